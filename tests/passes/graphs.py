"""Graphs for pass tests: as Dynamo hands them to a backend, and as AOTAutograd hands them to Inductor."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qcompile import compat
from qcompile.codegen import inductor
from qcompile.options import Options
from qcompile.passes.base import Kernel, Pass, PassContext
from qcompile.passes.detect.canonicalize import Canonicalize
from qcompile.passes.detect.sites import Detect
from qcompile.passes.manager import PassManager
from qcompile.passes.rewrite.resolve import Resolve
from qcompile.plan.plan import Plan
from qcompile.plan.recipe import Recipe
from qcompile.plan.site import Site
from qcompile.runtime.store import STORE

RECIPE = "int8/axis0:fp32"


def dynamo_graph(model: Any, *args: Any, dynamic: bool | None = None) -> tuple[fx.GraphModule, list[Any]]:
    """The graph and example inputs that a backend gets (under `torch.no_grad()`)."""
    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append((compat.clone_graph(gm), list(inputs)))
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    torch._dynamo.reset()
    (result,) = found
    return result


def context(gm: fx.GraphModule, inputs: Sequence[Any], recipe: Any = RECIPE, **options: Any) -> PassContext:
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]

    def kernel(spec: Any, device: torch.device, dtype: torch.dtype, rows: int | None) -> Kernel:
        return Kernel("some-kernel" if inductor.verdict(spec, device, dtype).ok else "", "none")

    given = dict(zip(names, inputs, strict=True))
    return PassContext(Options(**options), Recipe.of(recipe), Plan(), STORE, given, kernel, inductor.packing)


def run(passes: Sequence[Pass], gm: fx.GraphModule, ctx: PassContext) -> str:
    """Run passes in place; the graph's text afterwards."""
    PassManager(passes).run(gm, ctx)
    return str(gm.graph)


def sites(model: Any, *args: Any, **options: Any) -> list[Site]:
    """The sites of a model's graph, with what a recipe makes of them."""
    gm, inputs = dynamo_graph(model, *args)
    ctx = context(gm, inputs, **options)
    run([Canonicalize(), Detect(), Resolve()], gm, ctx)
    return [decision.site for decision in ctx.plan]


class Functional(nn.Module):
    """A pointwise function behind one or more packed matmuls, for `post_graph`."""

    def __init__(self, function: Callable[..., Tensor], n: Sequence[int], k: int = 32, bias: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(k, size, bias=bias) for size in n)
        self.function = function

    def forward(self, x: Tensor, *extras: Tensor) -> Any:
        return self.function(*(layer(x) for layer in self.layers), *extras)


def post_graph(model: nn.Module, *args: Tensor, recipe: Any = RECIPE) -> tuple[fx.GraphModule, list[Any], PassContext]:
    """The functional graph with `qmm` in it that "post" passes get; its inputs; the context."""
    from torch._dynamo.backends.common import aot_autograd

    from qcompile.backend import DEFAULT_PASSES

    found: list[tuple[fx.GraphModule, list[Any], PassContext]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        work = compat.clone_graph(gm)
        ctx = context(work, inputs, recipe)
        PassManager([p for p in DEFAULT_PASSES if p.stage == "dynamo"]).run(work, ctx)
        parts = {item.name: item.entry.parts[item.part] for item in ctx.packed}
        names = [n.name for n in work.graph.nodes if n.op == "placeholder"]
        values = [parts[name] if name in parts else ctx.inputs[name] for name in names]

        def compiler(functional: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            found.append((copy.deepcopy(functional), values, ctx))
            return functional.forward

        fakes = [
            compat.compile_example(value) if name in parts else value for name, value in zip(names, values, strict=True)
        ]
        from torch._inductor.decomposition import select_decomp_table

        aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=select_decomp_table())(
            work, fakes
        )
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(*args)
    torch._dynamo.reset()
    (result,) = found
    return result
