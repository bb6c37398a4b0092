"""What two graphs of one function may differ by: rounding as it is, and no mistake, however small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qcompile.testing.exact import Outcome, copies, furthest, run


def both(function: Callable[..., Any], *args: Tensor) -> tuple[Outcome, Outcome]:
    gm = fx.symbolic_trace(function)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    values = dict(zip(names, args, strict=True))
    return run(gm, values, torch.float32), run(gm, values, torch.float64)


def values(*sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(0))


# Pairs of one function, some of which cancel almost everything.
SAME: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "another order": (lambda x, w: (x @ w.t()).sum(-1), lambda x, w: x @ w.t().sum(-1)),
    "a large detour": (lambda x, w: F.linear(x, w), lambda x, w: F.linear(x, w + 1000) - 1000 * x.sum(-1, True)),
    "a norm": (lambda x, w: F.layer_norm(x, (16,)) @ w.t(), lambda x, w: F.layer_norm(x - 100, (16,)) @ w.t()),
    "softmax": (lambda x, w: (x @ w.t()).softmax(-1), lambda x, w: (x @ w.t() + 50).softmax(-1)),
    "nothing": (lambda x, w: x, lambda x, w: x),
    "casts": (lambda x, w: F.linear(x.half(), w.half()).float(), lambda x, w: F.linear(x, w)),
    "nan": (lambda x, w: (x - 9).log() @ w.t(), lambda x, w: (x - 9).log() @ w.t()),
}


@pytest.mark.parametrize("name", SAME)
def test_rounding_is_no_mistake(name: str) -> None:
    x, w = values(5, 16), values(8, 16)
    a, b = (both(function, x, w) for function in SAME[name])
    assert furthest(a, b) == ""


OTHER: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "a small factor": (lambda x, w: F.linear(x, w), lambda x, w: F.linear(x, w) * (1 + 1e-9)),
    "a nan": (lambda x, w: x, lambda x, w: x / (x != x[0, 0])),
    "a shape": (lambda x, w: x, lambda x, w: x[None]),
    "an integer": (lambda x, w: x.argmax(-1), lambda x, w: x.argmin(-1)),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_mistake_is_none_of_rounding(name: str) -> None:
    x, w = values(5, 16), values(8, 16)
    a, b = (both(function, x, w) for function in OTHER[name])
    assert furthest(a, b).startswith("result 0")


def test_one_wrong_element_is_named() -> None:
    def wrong(x: Tensor) -> Tensor:
        y = x * 1
        y[2, 3].add_(1e-9)
        return y

    words = furthest(both(lambda x: x * 1, values(5, 16)), both(wrong, values(5, 16)))
    assert words.startswith("result 0 differs at (2, 3)")
    assert words.endswith("1 of 80 elements are off")


def test_writes_to_inputs_count() -> None:
    words = furthest(both(lambda x: x.add_(1), values(3)), both(lambda x: x + 1, values(3)))
    assert words.startswith("input 'x' after the call differs")


def test_copies_keep_strides_and_what_shares_memory() -> None:
    whole = values(4, 6)
    made = copies({"a": whole, "b": whole[1:, ::2], "c": whole[:1].expand(3, -1), "n": 3}, torch.float64)
    assert made["n"] == 3
    for name, old in {"a": whole, "b": whole[1:, ::2], "c": whole[:1].expand(3, -1)}.items():
        assert (made[name].stride(), made[name].dtype) == (old.stride(), torch.float64)
        assert torch.equal(made[name], old.double())
    made["a"].zero_()
    assert not made["b"].any()
    assert whole.all()
