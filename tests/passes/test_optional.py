"""Passes that a model runs just as well without: what happens when one of them fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from qcompile import Pass, PassContext, QCError, QCWarning
from qcompile.backend import DEFAULT_PASSES, watching
from qcompile.passes.base import Stage
from tests.passes.graphs import RECIPE, Functional, context, dynamo_graph, run


def call(edits: dict[str, Any], x: Tensor, model: nn.Module, kind: Any) -> tuple[Tensor, PassContext]:
    torch._dynamo.reset()
    with torch.no_grad(), watching(kind) as trace:
        y = torch.compile(model, backend="qcompile", options={"recipe": RECIPE, "passes": edits})(x)
    torch._dynamo.reset()
    return y, trace.contexts[0]


class Careless(Pass):
    """Fails in the middle: the graph is empty and the plan is written to."""

    name: ClassVar[str] = "careless"
    optional: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        for node in reversed(list(gm.graph.nodes)):
            if node.op != "placeholder":
                gm.graph.erase_node(node)
        ctx.plan.decisions.clear()
        ctx.plan.notes.append("half a note")
        raise IndexError("nothing left")


class CarelessLate(Careless):
    stage: ClassVar[Stage] = "post"


@pytest.mark.parametrize(
    ("item", "anchor"), [(Careless(), "detect"), (Careless(), "freeze"), (CarelessLate(), "epilogue")]
)
def test_an_optional_pass_that_fails_is_undone(item: Pass, anchor: str) -> None:
    model, x = Functional(lambda a, b: F.silu(a) * b, (16, 16), bias=True), torch.randn(3, 32)
    edits = {"insert": [("after", anchor, item)]}
    kind = "compiled" if item.stage == "post" else "reference"
    plain, before = call({}, x, model, kind)
    with pytest.warns(QCWarning, match="'careless' failed and was undone: IndexError: nothing left"):
        y, ctx = call(edits, x, model, kind)
    assert torch.equal(y, plain)
    assert [replace(d, entry=None) for d in ctx.plan] == [replace(d, entry=None) for d in before.plan]
    assert [note for note in ctx.plan.notes if "careless" in note or "half" in note] == [
        "pass 'careless' failed and was undone: IndexError: nothing left"
    ]


@pytest.mark.parametrize("option", ["strict", "verify"])
def test_an_optional_pass_that_fails_is_an_error_for_the_careful(option: str) -> None:
    gm, inputs = dynamo_graph(nn.Linear(8, 8), torch.randn(2, 8))
    with pytest.raises(QCError, match="careless") as caught:
        run([Careless()], gm, context(gm, inputs, **{option: True}))
    assert caught.value.code == "pass.failed"


def test_passes_that_may_fail() -> None:
    assert [item.name for item in DEFAULT_PASSES if item.optional] == [
        "group_queries",
        "canonicalize",
        "merge",
        "epilogue",
    ]
