"""Take a model's graph out of a compile, at a pass's place in the list of passes.

The model is compiled by the backend itself, up to that place and no further: a test sees what the pass will see.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.errors import QCError, QCWarning
from qcompile.ir.ops import reference_only
from qcompile.passes.base import Pass, PassContext, Stage
from qcompile.passes.manager import PassManager, plan_text
from qcompile.plan.plan import Plan
from qcompile.testing.exact import Outcome, copies, run
from qcompile.testing.graphs import Model

Place = tuple[Literal["before", "after"], str]
FIRST: Mapping[Stage, Place] = {"dynamo": ("before", "group_queries"), "post": ("before", "pieces")}


@dataclass(frozen=True)
class State:
    """A graph at some place in the list of passes.

    Attributes:
        gm: the graph. ctx: what passes share, the plan in it.
        values: what the placeholders stand for, by name.
        others: the same for inputs of other sizes; empty where the graph does not take them.
    """

    gm: fx.GraphModule
    ctx: PassContext
    values: Mapping[str, Any]
    others: Mapping[str, Any] = field(default_factory=dict)
    runs: dict[Any, Outcome] = field(default_factory=dict, repr=False)

    def copy(self) -> State:
        """A copy that a pass may edit; tensors are the same."""
        plan, ctx = self.ctx.plan, self.ctx
        new = Plan(dict(plan.decisions), list(plan.unused_rules), list(plan.notes))
        context = replace(ctx, plan=new, packed=list(ctx.packed), origins=dict(ctx.origins), others=dict(ctx.others))
        return replace(self, gm=compat.clone_graph(self.gm), ctx=context, runs={})

    def after(self, item: Pass) -> State:
        """The same after a pass, which runs on a copy."""
        new = self.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QCWarning)
            PassManager([item]).run(new.gm, new.ctx)
        given = {made.name: made.entry.parts[made.part] for made in new.ctx.packed}
        names = {node.name for node in new.gm.graph.nodes if node.op == "placeholder"}
        added = {name: value for name, value in given.items() if name in names - self.values.keys()}
        others = {**self.others, **added} if self.others else {}
        return replace(new, values={**self.values, **added}, others=others, runs={})

    @property
    def text(self) -> str:
        """Graph and plan as text."""
        return f"{self.gm.graph}\n{plan_text(self.ctx.plan)}"

    @property
    def packed(self) -> frozenset[str]:
        """Names of the inputs that hold packed weights; in the "post" stage inputs come in the order of the stage before."""
        parts = {id(made.entry.parts[made.part]) for made in self.ctx.packed}
        return frozenset(name for name, value in self.values.items() if id(value) in parts)

    def arguments(self) -> list[Any]:
        """Copies of the inputs, in the order of the graph's."""
        inputs = copies(self.values, None)
        return [inputs[node.name] for node in self.gm.graph.nodes if node.op == "placeholder"]

    def outcome(
        self, dtype: torch.dtype | None = None, weights: Mapping[fx.Node, Tensor] | None = None, other: bool = False
    ) -> Outcome:
        """What a run of the graph leaves, with inputs of other sizes if asked; see `exact.run`."""
        key = (dtype, other)
        if weights or key not in self.runs:
            with reference_only():
                made = run(self.gm, self.others if other else self.values, dtype, self.packed, weights)
            if weights:
                return made
            self.runs[key] = made
        return self.runs[key]


# --------------------------------------------------------------------------------------------------------- capture
_CAPTURED = "testing.captured"  # ends a compile that has gone far enough


class _Spy(Pass):
    """Takes a copy of what it finds, and ends the compile."""

    name: ClassVar[str] = "spy"

    def __init__(self) -> None:
        self.found: list[tuple[fx.GraphModule, PassContext]] = []

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.found.append((compat.clone_graph(gm), ctx))
        raise QCError(_CAPTURED, "the graph was captured")

    def fingerprint(self) -> str:
        return self.name


class _LateSpy(_Spy):
    stage: ClassVar[Stage] = "post"


class _Note(Pass):
    """Notes the names of the inputs of the graph that becomes the functional one."""

    name: ClassVar[str] = "note"

    def __init__(self) -> None:
        self.names: list[str] = []

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]

    def fingerprint(self) -> str:
        return self.name


def capture(model: Model, stage: Stage, place: Place, options: Mapping[str, Any]) -> State:
    """The graph of a model as a pass at a place gets it.

    Raises:
        QCError: "testing.not-reached" when nothing is compiled there.
    """
    state = _capture(model, stage, place, options)
    if model.dynamic:
        other = _capture(model.resized(), stage, place, options)
        if str(other.gm.graph) == str(state.gm.graph):  # else a size was 0 or 1, or is fixed for another reason
            return replace(state, others=other.values)
    return state


def _capture(model: Model, stage: Stage, place: Place, options: Mapping[str, Any]) -> State:
    module, args = model.build()
    spy, note = (_LateSpy() if stage == "post" else _Spy()), _Note()
    insert = [(*place, spy), *([("after", "freeze", note)] if stage == "post" else [])]
    # A pass that fails shall fail, also an optional one: `verify` says that somebody is looking.
    settings = {"recipe": "none", **options, "verify": True, "passes": {"insert": insert}}
    torch.compiler.reset()
    compiled = torch.compile(module, backend="qcompile", options=settings, dynamic=model.dynamic, fullgraph=True)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", QCWarning)
            compiled(*args)
    except QCError as error:
        if error.code != _CAPTURED:
            raise
    finally:
        torch.compiler.reset()
    if not spy.found:
        raise QCError(
            "testing.not-reached",
            f"no graph came to the stage {stage!r}",
            why="there is no C++ compiler, or the model has no graph",
            next="see `qcompile doctor`, and give the model something to compute",
        )
    ((gm, ctx),) = spy.found
    given = {made.name: made.entry.parts[made.part] for made in ctx.packed} | ctx.inputs
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    # Functional graphs have names of their own, in the order of the graph that they were made of.
    return State(gm, ctx, {name: given[old] for name, old in zip(names, note.names or names, strict=True)})
