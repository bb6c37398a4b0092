"""The list of passes as users edit it: inserted, dropped and replaced passes, wrong ones, and what they are told."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

from qcompile import Pass, PassContext, QCError
from qcompile.backend import DEFAULT_PASSES, watching
from qcompile.ir.scheme import Scheme
from qcompile.options import Options
from qcompile.passes.base import Stage
from qcompile.passes.freeze.freeze import Freeze
from qcompile.passes.match import op_name
from qcompile.passes.rewrite.merge import Merge
from qcompile.passes.rewrite.resolve import Resolve
from qcompile.plan.recipe import Recipe, Rule
from tests.passes.graphs import RECIPE, Functional, context, dynamo_graph, run

DYNAMO = [item for item in DEFAULT_PASSES if item.stage == "dynamo"]


class Halve(Pass):
    """The ten lines of the documentation: halve what every linear gives."""

    name: ClassVar[str] = "halve"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        for node in list(gm.graph.nodes):
            if op_name(node) == "linear":
                with gm.graph.inserting_after(node):
                    half = gm.graph.call_function(torch.mul, (node, 0.5))
                node.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)  # noqa: B023


class Nothing(Pass):
    name: ClassVar[str] = "merge"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        ctx.plan.notes.append("nothing was merged")


class Failing(Pass):
    name: ClassVar[str] = "failing"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        raise ZeroDivisionError("no reason")


class Dangling(Pass):
    """Leaves a graph that is none: a node used before it is made."""

    name: ClassVar[str] = "dangling"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        first = next(iter(gm.graph.nodes))
        last = next(node for node in reversed(gm.graph.nodes) if node.op == "call_function")
        with gm.graph.inserting_before(first):
            gm.graph.call_function(torch.neg, (last,))


class Late(Pass):
    """Counts the matmuls of the functional graph."""

    name: ClassVar[str] = "late"
    stage: ClassVar[Stage] = "post"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        ctx.plan.notes.append(f"{sum(node.target is torch.ops.qcompile.qmm.default for node in gm.graph.nodes)} qmm")


def call(edits: dict[str, Any], x: Tensor, model: nn.Module, kind: Any = "reference") -> tuple[Tensor, PassContext]:
    torch._dynamo.reset()
    with torch.no_grad(), watching(kind) as trace:
        y = torch.compile(model, backend="qcompile", options={"recipe": RECIPE, "passes": edits})(x)
    torch._dynamo.reset()
    return y, trace.contexts[0]


def test_insert() -> None:
    model, x = Functional(lambda y: y, (16,)), torch.randn(3, 32)
    plain, _ = call({}, x, model)
    for side, anchor in (("after", "detect"), ("before", "resolve"), ("after", "canonicalize")):
        half, _ = call({"insert": [(side, anchor, Halve())]}, x, model)
        assert torch.equal(half, plain * 0.5)


def test_drop_and_replace() -> None:
    model, x = Functional(lambda a, b: a + b, (16, 16)), torch.randn(3, 32)
    plain, ctx = call({}, x, model)
    assert [d.group for d in ctx.plan] == [0, 0]
    for edits in ({"drop": ["merge"]}, {"replace": {"merge": Nothing()}}):
        other, ctx = call(edits, x, model)
        assert torch.equal(other, plain)
        assert [d.group for d in ctx.plan] == [-1, -1]
        assert ctx.plan.notes == (["nothing was merged"] if "replace" in edits else [])


def test_late_pass_sees_the_functional_graph() -> None:
    model, x = Functional(lambda y: y, (16,)), torch.randn(3, 32)
    _, ctx = call({"insert": [("before", "epilogue", Late())]}, x, model, "compiled")
    assert "1 qmm" in ctx.plan.notes


def test_dropping_freeze_leaves_every_site_float() -> None:
    model, x = Functional(lambda y: y, (16,)), torch.randn(3, 32)
    y, ctx = call({"drop": ["freeze"]}, x, model)
    assert torch.equal(y, model(x))
    assert [d.reason for d in ctx.plan if not d.quantized] == [
        "no pass packed this weight (is `freeze` in the list of passes?)"
    ]


class Planner(Pass):
    """Stands in the place of `resolve`, under a name of its own."""

    name: ClassVar[str] = "planner"
    requires: ClassVar[tuple[str, ...]] = ("detect",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        Resolve().run(gm, ctx)


class Behind(Pass):
    """A late pass that builds on an early one: stages run one after the other, wherever it was inserted."""

    name: ClassVar[str] = "behind"
    stage: ClassVar[Stage] = "post"
    requires: ClassVar[tuple[str, ...]] = ("freeze",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        pass


@pytest.mark.parametrize(
    "edits",
    [
        {"replace": {"resolve": Planner()}},
        {"insert": [("before", "canonicalize", Behind())]},
        {"drop": ["resolve", "merge", "freeze", "fake_quant"]},
        {"drop": ["detect", "resolve", "merge", "freeze", "fake_quant"]},
        *({"drop": [item.name]} for item in DEFAULT_PASSES if item.name not in ("detect", "resolve")),
    ],
)
def test_lists_that_are_in_order(edits: dict[str, Any]) -> None:
    Options(passes=edits).passes.apply(DEFAULT_PASSES)


@pytest.mark.parametrize(
    ("edits", "words", "step"),
    [
        ({"drop": ["detect"]}, "pass 'resolve' requires 'detect', which is not in the list", "keep 'detect'"),
        ({"drop": ["resolve"]}, "pass 'merge' requires 'resolve', which is not in the list", "drop 'merge' too"),
        ({"drop": ["freeze"], "insert": [("after", "merge", Behind())]}, "'behind' requires 'freeze'", "keep 'freeze'"),
        (
            {"replace": {"resolve": Merge(), "merge": Resolve()}},
            "pass 'merge' requires 'resolve', which comes later",
            "move 'resolve' before it",
        ),
        (
            {"insert": [("before", "detect", Planner())]},
            "'planner' requires 'detect', which comes later",
            "move 'detect'",
        ),
    ],
)
def test_a_pass_without_what_it_requires_is_refused(edits: dict[str, Any], words: str, step: str) -> None:
    with pytest.raises(QCError, match=words) as caught:
        Options(passes=edits).passes.apply(DEFAULT_PASSES)
    assert caught.value.code == "passes.order"
    assert step in caught.value.next
    with pytest.raises(QCError, match=words):  # also from the backend, in the call that compiles
        call(edits, torch.randn(3, 32), Functional(lambda y: y, (16,)))


def test_a_matmul_takes_the_layout_of_its_own_activations() -> None:
    fused = nn.Parameter(torch.randn(96, 32))
    gm, inputs = dynamo_graph(
        lambda x: (nn.functional.linear(x, fused[:64]), nn.functional.linear(x, fused[64:])), torch.randn(4, 32)
    )
    weight, act = Scheme.parse("int8/axis0:fp32"), Scheme.parse("int8/token:fp32")
    ctx = context(gm, inputs, Recipe((Rule(weight, act, min_weights=2048), Rule(weight))), policy="memory")
    ctx.packing = lambda device, act: "mma8" if act else "mma16"
    run(DYNAMO[: [item.name for item in DYNAMO].index("resolve") + 1], gm, ctx)
    assert {decision.site.path for decision in ctx.plan} == {"fused"}
    assert [decision.weight.packing for decision in ctx.plan if decision.weight] == ["mma8", "mma16"]


@pytest.mark.parametrize("item", [Failing(), Dangling()], ids=lambda item: item.name)
def test_failing_pass(item: Pass) -> None:
    model, x = Functional(lambda y: y, (16,)), torch.randn(3, 32)
    with pytest.raises(QCError) as caught:
        call({"insert": [("after", "detect", item)]}, x, model)
    assert caught.value.code == "pass.failed"
    assert item.name in caught.value.what
    assert caught.value.next == "take it out of options['passes']['insert'], or mend it"


class Nameless(Pass):
    """Adds a node the way that plain FX does."""

    name = "nameless"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        node = next(node for node in gm.graph.nodes if node.op == "call_function")
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(torch.sigmoid, (node,))
        node.replace_all_uses_with(new)
        new.args = (node,)


def test_a_pass_whose_node_has_no_value_is_named() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 16))
    with pytest.raises(QCError, match="'nameless' added the node 'sigmoid'") as caught:
        call({"insert": [("before", "detect", Nameless())]}, torch.randn(3, 32), model)
    assert caught.value.code == "pass.value"
    assert "match.insert" in caught.value.next


def test_nobody_is_told_to_drop_what_others_require(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Resolve, "run", fail)
    with pytest.raises(QCError, match="'resolve' failed") as caught:
        call({}, torch.randn(3, 32), Functional(lambda y: y, (16,)))
    assert "drop" not in caught.value.next
    assert "report" in caught.value.next


@pytest.mark.parametrize("how", ["default", "replace"])
def test_the_way_around_a_failing_pass_is_one_that_works(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, failing = Functional(lambda y: y, (16,)), torch.randn(3, 32), Failing()
    if how == "default":
        monkeypatch.setattr(Freeze, "run", failing.run)
    with pytest.raises(QCError) as caught:
        call({} if how == "default" else {"replace": {"freeze": failing}}, x, model)
    assert caught.value.code == "pass.failed"
    want = {"default": "drop it with options={'passes': {'drop': ['freeze']}}", "replace": "take it out of"}[how]
    assert caught.value.next.startswith(want)
    if how == "default":
        torch._dynamo.reset()
        call({"drop": ["freeze"]}, x, model)


class Idle(Pass):
    name: ClassVar[str] = "idle"


@pytest.mark.parametrize(("stage", "method"), [("dynamo", "run"), ("post", "run"), ("compile", "wrap")])
def test_a_pass_that_does_nothing_is_refused(stage: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Idle, "stage", stage)
    with pytest.raises(QCError, match=f"stage '{stage}' calls {method}") as caught:
        Options.parse(passes={"insert": [("after", "detect", Idle())]})
    assert caught.value.next.startswith(f"define {method}(self, ")
