"""Laws of every pass, what a dump shows of them, and how they read graphs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

from qcompile import Pass, default_passes
from qcompile.backend import DEFAULT_PASSES, watching
from qcompile.passes.late.outline_pass import Outline
from qcompile.passes.match import drop_dead, effects_before, op_name, writes
from tests.e2e.models import TinyLM
from tests.passes.graphs import RECIPE, Functional, context, dynamo_graph, post_graph, run

DYNAMO = [item for item in DEFAULT_PASSES if item.stage == "dynamo"]
POST = [item for item in DEFAULT_PASSES if item.stage == "post"]
NAMES = [item.name for item in DEFAULT_PASSES]


def test_the_lists_are_complete() -> None:
    assert len(DYNAMO) + len(POST) + 1 == len(DEFAULT_PASSES)
    assert isinstance(DEFAULT_PASSES[-1], Outline)
    assert len(set(NAMES)) == len(NAMES)


def test_the_public_list_says_what_each_pass_is() -> None:
    listed = default_passes()
    assert [item.name for item in listed] == NAMES
    for index, (one, item) in enumerate(zip(listed, DEFAULT_PASSES, strict=True)):
        assert (one.stage, one.requires) == (item.stage, item.requires)
        assert one.description.endswith("."), "the first line of the docstring is shown alone"
        assert set(one.requires) <= set(NAMES[:index])


def empty() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output(())
    return fx.GraphModule(nn.Module(), graph)


@pytest.mark.parametrize("item", DYNAMO + POST, ids=lambda item: item.name)
def test_empty_graph(item: Pass) -> None:
    gm = empty()
    before = str(gm.graph)
    assert run([item], gm, context(gm, [])) == before
    assert gm() == ()


class NoSites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).relu().sum(-1)


@pytest.mark.parametrize("item", DYNAMO, ids=lambda item: item.name)
def test_graph_without_sites(item: Pass) -> None:
    gm, inputs = dynamo_graph(NoSites(), torch.randn(3, 8))
    before, ctx = str(gm.graph), context(gm, inputs)
    assert run([item], gm, ctx) == before
    assert not ctx.plan.decisions
    assert not ctx.packed


@pytest.mark.parametrize("last", range(1, len(DYNAMO) + 1), ids=lambda i: DYNAMO[i - 1].name)
def test_twice_is_once(last: int) -> None:
    """Each pass on the graph that it gets in practice: a second run finds nothing to do."""
    model = TinyLM(layers=1, bias=True).eval()
    gm, inputs = dynamo_graph(model, torch.randint(0, 128, (2, 5)))
    ctx = context(gm, inputs)
    once = run(DYNAMO[:last], gm, ctx)
    plan, packed = dict(ctx.plan.decisions), list(ctx.packed)
    if DYNAMO[last - 1].name == "detect":
        ctx.plan.decisions.clear()  # it numbers the sites it finds
    assert run([DYNAMO[last - 1]], gm, ctx) == once
    assert ctx.plan.decisions == plan
    assert ctx.packed == packed


def test_the_rewritten_graph_computes_the_same() -> None:
    """Every prefix of the list is a graph that runs."""
    model, ids = TinyLM(layers=1, bias=True).eval(), torch.randint(0, 128, (2, 5))
    gm, inputs = dynamo_graph(model, ids)
    ctx = context(gm, inputs, recipe="none")
    with torch.no_grad():
        want = gm(*inputs)[0]
        for item in DYNAMO:
            run([item], gm, ctx)
            # recipe "none": only spellings change, so every bit stays
            assert torch.equal(gm(*inputs)[0], want), item.name


# --------------------------------------------------------------------------------------------------------------- dump
def test_dump_writes_every_pass_of_every_graph(tmp_path: Path) -> None:
    """Also the second time, when the disk caches hold the result."""
    model, x = Functional(lambda y: y.relu(), (16,)), torch.randn(3, 32)
    for number in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model, backend="qcompile", options={"recipe": RECIPE, "dump": tmp_path})(x)
        for stage, passes in (("dynamo", DYNAMO), ("post", POST)):
            folder = tmp_path / f"{number:02d}_{stage}"
            want = ["00_input.txt", *(f"{i:02d}_{item.name}.txt" for i, item in enumerate(passes, 1))]
            assert sorted(path.name for path in folder.iterdir()) == want
    assert "qmm" in next((tmp_path / "01_dynamo").glob("*_freeze.txt")).read_text()


def test_dump_shows_what_each_pass_planned(tmp_path: Path) -> None:
    """The passes that leave the graph as it is are told apart by the plan under it."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) @ self.b(x).t()).relu()

    with torch.no_grad(), watching("reference"):
        torch.compile(Twice(), backend="qcompile", options={"recipe": RECIPE, "dump": tmp_path})(torch.randn(3, 32))
    texts = {path.stem.partition("_")[2]: path.read_text() for path in (tmp_path / "00_dynamo").iterdir()}
    graph, _, _ = texts["detect"].partition("# plan")
    assert texts["canonicalize"] == graph  # no plan yet: no block
    for name in ("resolve", "merge"):
        assert texts[name].startswith(graph + "# plan\n")
    found = {name: [re.split(r"  +", line) for line in text.splitlines() if line.startswith("# ")][1:]
             for name, text in texts.items()}  # fmt: skip
    names, first, _, product = found["detect"]
    assert names == ["# site", "path", "scheme", "kernel", "group", "reason"]
    assert first == ["# 0", "a.weight", "float", "-", "-"]
    assert product[:3] == ["# 2", "bmm", "float"]
    assert "both operands are activations" in product[5]
    kernel = found["resolve"][1][3]
    assert kernel.startswith("cpu-")
    assert found["resolve"][1] == ["# 0", "a.weight", RECIPE, kernel, "-"]
    assert found["merge"][1:3] == [["# 0", "a.weight", RECIPE, kernel, "0"], ["# 1", "b.weight", RECIPE, kernel, "0"]]


# -------------------------------------------------------------------------------------------------- reading of graphs
def test_writes_and_effects() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        a = x + y
        a.add_(1)
        b = torch.relu(a)
        torch.mul(a, 2, out=b)
        b[0] = 1
        nn.functional.relu(a, inplace=True)
        c = (a > 0) & (b > 0)
        a += 1
        return a.__and__(c) if a.dtype == torch.bool else a + b + c

    gm, _ = dynamo_graph(f, torch.randn(3), torch.randn(3))
    found = [(op_name(node), [w.name for w in writes(node)]) for node in gm.graph.nodes if writes(node)]
    assert [name for name, _ in found] == ["add_", "mul", "setitem", "relu", "iadd"]
    first, last = (list(effects_before(gm.graph).values())[i] for i in (0, -1))
    assert (first, last) == (0, 5)
    before = str(gm.graph)
    drop_dead(gm.graph)
    assert str(gm.graph) == before


def test_post_graph_is_what_late_passes_get() -> None:
    gm, inputs, _ = post_graph(Functional(torch.relu, (16,)), torch.randn(3, 32))
    assert sum(node.target is torch.ops.qcompile.qmm.default for node in gm.graph.nodes) == 1
    assert gm(*inputs)[0].shape == (3, 16)
