"""Contractions in a graph within the graph (branches, loops, checkpoints) are listed, or become part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qcompile import QCError, compat
from qcompile.passes.detect.canonicalize import Canonicalize
from qcompile.passes.detect.sites import Detect
from qcompile.passes.match import op_name
from tests.passes.graphs import context, dynamo_graph, run, sites

B, K = 4, 16


class Held(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(K, K), nn.Linear(K, K)


class Branches(Held):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        result: Tensor = torch.cond(x.sum() > 0, lambda x: x @ self.a.weight, lambda x: self.b(x), (x,))
        return result


class Loop(Held):
    def forward(self, x: Tensor) -> Any:
        from torch._higher_order_ops.while_loop import while_loop

        return while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, self.b(x)), (torch.tensor(0), x))


@pytest.mark.parametrize(("model", "where", "free"), [(Branches, "torch.cond", 1), (Loop, "torch.while_loop", 0)])
def test_contractions_inside_are_listed(model: type[Held], where: str, free: int) -> None:
    """With path, shape and FLOPs; the same weight outside is no worse for it."""
    found = sites(model(), torch.randn(B, K))
    outside, inside = found[:free], found[free:]
    assert [(site.path, site.refused) for site in outside] == [("a.weight", "")] * free
    assert [site.path for site in inside] == ["a.weight", "b.weight"][1 - free :]
    for site in inside:
        assert (site.kind, site.m, site.n, site.k, site.flops) == ("linear", B, K, K, 2 * B * K * K)
        assert site.refused == f"inside {where}: not handled yet"
    with pytest.raises(QCError, match="cannot be quantized"):
        sites(model(), torch.randn(B, K), strict=True)


class Checkpointed(Held):
    def forward(self, x: Tensor) -> Any:
        def outer(x: Tensor) -> Any:
            return checkpoint(lambda x: F.relu(self.a(x), inplace=True), x, use_reentrant=False) + self.b(x)

        return checkpoint(outer, x, use_reentrant=False)


class Region(Held):
    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)).relu()


@pytest.mark.parametrize(
    "make", [Checkpointed, lambda: nn.Sequential(Region(), Region())], ids=["checkpoint", "region"]
)
def test_plain_calls_become_part_of_the_graph(make: Callable[[], nn.Module]) -> None:
    model, x = make(), torch.randn(B, K)
    gm, inputs = dynamo_graph(model, x)
    ctx = context(gm, inputs)
    text = run([Canonicalize(), Detect()], gm, ctx)
    assert "higher_order" not in text
    weights = [name for name, p in model.named_parameters() if p.dim() == 2]
    assert sorted(d.site.path for d in ctx.plan) == sorted(weights)
    assert not any(d.site.refused for d in ctx.plan)
    with torch.no_grad():
        assert torch.equal(gm(*inputs)[0], model(x))


@pytest.mark.parametrize("selective", [False, True])
def test_a_recorded_checkpoint(selective: bool) -> None:
    """Its nodes are marked to be computed again, unless it decides that node by node: then it stays as it is."""
    gm, inputs = dynamo_graph(Checkpointed(), torch.randn(B, K))
    (node,) = (n for n in gm.graph.nodes if "tag_activation_checkpoint" in str(n.target))
    if selective:
        getattr(gm, node.args[0].target).meta["_checkpoint_context_fn"] = lambda: None
    ctx = context(gm, inputs)
    ctx.training = True
    text = run([Canonicalize(), Detect()], gm, ctx)
    assert len(ctx.plan.decisions) == 2
    refused = "inside torch.utils.checkpoint: not handled while autograd records" if selective else ""
    assert {d.site.refused for d in ctx.plan} == {refused}
    assert ("tag_activation_checkpoint" in text) == selective
    marked = {compat.checkpoint_of(n) for n in gm.graph.nodes if op_name(n) == "linear"}
    assert marked == (set() if selective else {0, 1})  # one inside the other
