"""Grouped queries read keys and values where they lie, when these are still what was repeated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qcompile.passes.rewrite.attention import GroupQueries
from tests.passes.graphs import context, dynamo_graph, run

Repeat = Callable[[Tensor], Tensor]


def expanded(k: Tensor) -> Tensor:
    b, h, s, d = k.shape
    return k[:, :, None].expand(b, h, 2, s, d).reshape(b, h * 2, s, d)


REPEATS: dict[str, Repeat] = {
    "method": lambda k: k.repeat_interleave(2, 1),
    "keywords": lambda k: torch.repeat_interleave(input=k, repeats=2, dim=1),
    "expand": expanded,
}
_COUNTS = torch.tensor([1, 3])


def attend(repeat: Repeat, write: Callable[[Tensor, Tensor], Any] | None = None) -> Callable[..., Tensor]:
    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = repeat(k), repeat(v)
        if write is not None:
            write(k, v)
        return F.scaled_dot_product_attention(q, keys, values)

    return f


def both(f: Callable[..., Tensor], batch: int = 1) -> tuple[Tensor, Tensor, bool]:
    """The result before and after the pass, and whether the pass did anything."""
    made = [torch.randn(b, h, s, 16) for b, h, s in ((1, 4, 1), (batch, 2, 7), (batch, 2, 7))]
    gm, inputs = dynamo_graph(f, *(t.clone() for t in made))

    def result() -> Tensor:
        gm.recompile()
        names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        fresh = {"q": made[0], "k": made[1], "v": made[2]}
        values = [
            fresh[n[2]].clone() if n[2] in fresh and n[3] == "_" else x for n, x in zip(names, inputs, strict=True)
        ]
        found: Tensor = gm(*values)[0]
        return found

    want, before = result(), str(gm.graph)
    changed = run([GroupQueries()], gm, context(gm, inputs)) != before
    return want, result(), changed


@pytest.mark.parametrize("name", REPEATS)
def test_shared_heads_are_rows(name: str) -> None:
    want, got, changed = both(attend(REPEATS[name]))
    assert changed
    assert got.shape == want.shape
    # weights that sum to one, of seven values below 5, over scores that sum 16 products: the same sums, another order
    assert (got - want).abs().max() <= 2 * (16 + 7) * 2.0**-24 * 5 * 16


@pytest.mark.parametrize("name", REPEATS)
def test_a_write_after_the_repeat_is_not_seen(name: str) -> None:
    want, got, changed = both(attend(REPEATS[name], lambda k, v: (k.zero_(), v.zero_())))
    assert not changed
    assert torch.equal(got, want)
    assert want.abs().max() > 0


def test_what_is_no_equal_repeat_stays() -> None:
    uneven = attend(lambda k: torch.repeat_interleave(k, _COUNTS, 1, output_size=4))
    for f, batch in ((uneven, 1), (attend(REPEATS["method"]), 3)):
        want, got, changed = both(f, batch)
        assert not changed
        assert torch.equal(got, want)
