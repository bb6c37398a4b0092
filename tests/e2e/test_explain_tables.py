"""A tied head that is met before the lookup: `explain` leaves nothing behind, the backend says it, a reset mends it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile import QCWarning, Recipe, Rule, explain
from qcompile.backend import watching
from qcompile.runtime.store import STORE
from tests.e2e.support import compiled

INT4, INT8 = "uint4/g32:fp16+m", "int8/g64:fp16"


class HeadFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 64)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, self.embed.weight)
        torch._dynamo.graph_break()
        return y, self.embed(ids)


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 64), torch.randint(0, 96, (2, 5))


def schemes(found: Any) -> list[tuple[str, str]]:
    return [(row.kind, row.scheme) for row in found]


def test_explain_says_the_same_twice_and_changes_no_compile() -> None:
    model, args = HeadFirst().eval(), inputs()
    known = list(STORE.tables)
    with pytest.warns(QCWarning, match="looked up as an embedding"):
        first = explain(model, *args, recipe="int4")
    assert schemes(first) == [("linear", INT4), ("embedding", INT8)]
    assert any("looked up as an embedding" in note for note in first.notes)
    with pytest.warns(QCWarning):
        assert explain(model, *args, recipe="int4").rows == first.rows
    assert len(list(STORE.tables)) == len(known)
    assert id(model.embed.weight) not in STORE._roots
    # Somebody looks rows of a plain weight up, in a function that is only explained.
    layer = nn.Linear(64, 96, bias=False).eval()
    with watching("reference") as trace:
        explain(lambda ids: F.embedding(ids, layer.weight), args[1], recipe="int4")
    with torch.no_grad(), watching("reference") as trace:
        compiled(layer, "int4")(args[0])
    assert [d.site.kind for d in trace.contexts[0].plan] == ["linear"]


def test_a_lookup_after_the_linear_is_announced_and_a_reset_mends_it() -> None:
    model, args, known = HeadFirst().eval(), inputs(), {id(entry) for entry in STORE}

    def run() -> tuple[list[str], list[str]]:
        with warnings.catch_warnings(record=True) as seen, torch.no_grad(), watching("reference") as trace:
            warnings.simplefilter("always")
            got = compiled(model, "int4")(*args)
            kinds = [d.site.kind for ctx in trace.contexts for d in ctx.plan]
        want = {str(e.scheme): e.decoded() for e in STORE if id(e) not in known}
        for kind, value in zip(kinds, got, strict=True):
            packed = want[INT4 if kind == "linear" else INT8]
            expected = F.embedding(args[1], packed) if kind == "embedding" else F.linear(args[0], packed)
            # fp32 sums of 64 products in another order.
            assert (value - expected).abs().max() <= 64 * 2.0**-24 * (args[0].abs() @ packed.abs().t()).max()
        return sorted(want), [str(w.message) for w in seen if issubclass(w.category, QCWarning)]

    held, said = run()
    assert held == [INT8, INT4]
    (message,) = said
    assert all(word in message for word in ("embed.weight", INT4, INT8, "torch.compiler.reset()"))
    torch.compiler.reset()
    held, said = run()
    assert (held, said) == ([INT8], [])  # one packed copy, for both


def test_explaining_takes_nothing_from_compiled_code() -> None:
    """The outdated copy belongs to a graph that may still be called."""
    model, args = HeadFirst().eval(), inputs()
    with torch.no_grad(), watching("reference"):
        run = compiled(model, "int4")
        with pytest.warns(QCWarning, match="looked up as an embedding"):
            want = run(*args)
    held = [id(entry) for entry in STORE]
    assert schemes(explain(model, *args, recipe="int4"))[0] == ("head", INT8)  # what a reset would give
    assert [id(entry) for entry in STORE] == held
    with torch.no_grad():
        assert torch.equal(run(*args)[0], want[0])


def test_a_recipe_that_treats_both_alike_says_nothing() -> None:
    model, args = HeadFirst().eval(), inputs()
    for recipe in (INT8, Recipe((Rule(INT4), Rule(INT8, kind="head")))):
        with warnings.catch_warnings():
            warnings.simplefilter("error", QCWarning)
            assert len(explain(model, *args, recipe=recipe).rows) == 2


def test_a_recipe_that_packs_nothing_leaves_no_trace() -> None:
    model, args = HeadFirst().eval(), inputs()
    with torch.no_grad(), watching("reference"):
        compiled(model, "none")(*args)
    assert model.embed.weight not in STORE.tables

    def tied(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return model.embed(ids), F.linear(x, model.embed.weight)

    assert [row.kind for row in explain(tied, *args, recipe="none")] == ["embedding", "head"]  # in one graph it is seen
