"""Observed ranges: the average, and what a recomputation within a backward pass is told."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qcompile.ir.ops  # noqa: F401  (registers the operators)
from qcompile.ir.observed import LINES, no_lines

OBSERVE = torch.ops.qcompile.observe_
MOMENTUM = 0.25


def state() -> tuple[Tensor, Tensor, Tensor]:
    return torch.full((2,), torch.nan), torch.zeros((), dtype=torch.int64), no_lines()


def within_backward(call: Callable[[], Tensor]) -> Tensor:
    """What a call returns that runs in a backward pass."""
    found: list[Tensor] = []
    leaf = torch.ones((), requires_grad=True)
    leaf.register_hook(lambda _: found.append(call()))
    leaf.backward()
    return found[0]


def span(high: float) -> Tensor:
    return torch.tensor([-1.0, high])


def test_the_average_moves_in_forward_passes_only() -> None:
    held = state()
    assert torch.equal(OBSERVE(span(2), *held, MOMENTUM), span(2))  # the first call sets it
    assert torch.equal(OBSERVE(span(4), *held, MOMENTUM), span(2.5))  # 2 + (4 - 2) / 4
    before = [t.clone() for t in held]
    for high, want in ((4.0, 2.5), (2.0, 2.0), (2.0 - 2**-20, 2.0)):  # the nearest line: the last bits may differ
        assert torch.equal(within_backward(lambda h=high: OBSERVE(span(h), *held, MOMENTUM)), span(want))  # type: ignore[misc]
    assert all(torch.equal(t.nan_to_num(0), b.nan_to_num(0)) for t, b in zip(held, before, strict=True))
    assert int(held[1]) == 2


def test_the_latest_of_equal_calls_and_the_oldest_that_is_remembered() -> None:
    held = state()
    used = [OBSERVE(span(high), *held, MOMENTUM) for high in (1.0, 9.0, 1.0)]
    assert not torch.equal(used[0], used[2])
    assert torch.equal(within_backward(lambda: OBSERVE(span(1), *held, MOMENTUM)), used[2])
    used = [OBSERVE(span(100.0 + i), *held, MOMENTUM) for i in range(LINES)]
    assert torch.equal(within_backward(lambda: OBSERVE(span(100), *held, MOMENTUM)), used[0])
    OBSERVE(span(999), *held, MOMENTUM)  # the table is full: the oldest line is lost
    assert torch.equal(within_backward(lambda: OBSERVE(span(100), *held, MOMENTUM)), used[1])


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_what_is_not_finite_moves_nothing(value: float) -> None:
    held = state()
    OBSERVE(span(2), *held, MOMENTUM)
    for call in (lambda: OBSERVE(span(value), *held, MOMENTUM),) * 2:
        assert torch.equal(call(), span(2))
        assert torch.equal(within_backward(call), span(2))
    assert int(held[1]) == 1


def test_nothing_was_seen() -> None:
    assert within_backward(lambda: OBSERVE(span(2), *state(), MOMENTUM)).isnan().all()


def test_the_operator_is_what_its_schema_says() -> None:
    torch.library.opcheck(OBSERVE.default, (span(2), *state(), MOMENTUM), test_utils=("test_schema", "test_faketensor"))
