"""Generated functional graphs, and a compiler that checks what it is given, for the tests of outlining.

The compiler interprets its graph and checks at every call what a real one would have built upon: sizes, strides,
separate memory of written inputs. The values are small integers, so that results can be compared for equality.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import fx, nn

from qcompile.passes.late.outline import OutlineReport, outline
from qcompile.passes.late.outline_order import value

aten = torch.ops.aten


N = 4  # every matrix of the generated graphs is N x N


# ------------------------------------------------------------------------------------------------ a checking compiler
class Interpreting:
    """An inner compile that interprets, and checks at every call what a real compiler would have built upon."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        gm.graph.lint()
        self.graphs.append(gm)
        self.options.append({**options, "inputs": list(example_inputs)})
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        assert len(placeholders) == len(example_inputs)
        writes = [n.args[0] for n in gm.graph.nodes if n.target is aten.copy_.default]
        output = next(n for n in gm.graph.nodes if n.op == "output")

        def run(args: list[Any]) -> Any:
            for node, arg in zip(placeholders, args, strict=True):
                same_layout(value(node), arg)
            pointers = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            for node, arg in zip(placeholders, args, strict=True):
                if node in writes:
                    assert pointers.count(arg.untyped_storage().data_ptr()) == 1, "a written input has a view"
            given_, results = list(args), fx.Interpreter(gm).run(*args)
            args.clear()
            del given_
            for node, result in zip(output.args[0], results, strict=True):
                if isinstance(node, fx.Node):
                    same_layout(value(node), result)
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def same_layout(expected: Any, got: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride())


# --------------------------------------------------------------------------------------------------- generated graphs
class Builder:
    """Builds a functional graph and computes the value of every node on the way."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.inputs: list[torch.Tensor] = []
        self.writes: list[tuple[fx.Node, fx.Node]] = []
        self._generator = torch.Generator().manual_seed(0)
        self._first: fx.Node | None = None

    def input(self, *shape: int) -> fx.Node:
        tensor = torch.randint(-2, 3, shape or (N, N), generator=self._generator).float()
        before = self.graph.inserting_before(self._first) if self._first else self.graph.inserting_after()
        with before:
            node = self.graph.placeholder(f"arg{len(self.inputs)}_1")
        node.meta["val"] = tensor
        self.inputs.append(tensor.clone())
        return node

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        self._first = self._first or node
        plain_args, plain_kwargs = fx.node.map_arg((args, kwargs), value)
        node.meta["val"] = target(*plain_args, **plain_kwargs)
        return node

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        name = f"_tensor_constant{len(list(self.root.buffers()))}"
        self.root.register_buffer(name, tensor)
        node = self.graph.create_node("get_attr", name)
        node.meta["val"] = tensor
        return node

    def write(self, target: fx.Node, new: fx.Node) -> None:
        self.writes.append((target, new))

    def module(self, *results: Any) -> fx.GraphModule:
        for target, new in self.writes:
            node = self.graph.call_function(aten.copy_.default, (target, new))
            node.meta["val"] = value(target)
        self.graph.output(tuple(results))
        return fx.GraphModule(self.root, self.graph)


def _linear(b: Builder, pool: list[fx.Node]) -> fx.Node:
    return b.call(aten.clamp.default, b.call(aten.mm.default, pool[-1], b.input()), -3, 3)


def _cache(b: Builder, pool: list[fx.Node]) -> fx.Node:
    """A cache that is written, then read whole."""
    cache = b.input(2, N, N)
    new = b.call(aten.select_scatter.default, cache, pool[-1], 0, 1)
    b.write(cache, new)
    return b.call(aten.clamp.default, b.call(aten.sum.dim_IntList, new, [0]), -3, 3)


def _old_cache(b: Builder, pool: list[fx.Node]) -> fx.Node:
    """A cache whose old contents are read through a view, after the new ones are known."""
    cache = b.input()
    view = b.call(aten.permute.default, cache, [1, 0])
    new = b.call(aten.add.Tensor, cache, pool[-1])
    b.write(cache, new)
    return b.call(aten.clamp.default, b.call(aten.sub.Tensor, new, view), -3, 3)


def _halves(b: Builder, pool: list[fx.Node]) -> fx.Node:
    both = b.call(aten.split.Tensor, pool[-1], N // 2)
    first, second = b.call(operator.getitem, both, 0), b.call(operator.getitem, both, 1)
    return b.call(aten.cat.default, [second, first])


STEPS: dict[str, Callable[[Builder, list[fx.Node]], fx.Node]] = {
    "linear": _linear,
    "residual": lambda b, pool: b.call(aten.clamp.default, b.call(aten.add.Tensor, pool[-1], pool[0]), -3, 3),
    "skip": lambda b, pool: b.call(aten.sub.Tensor, pool[-1], pool[len(pool) // 2]),
    "relu": lambda b, pool: b.call(aten.relu.default, pool[-1]),
    "scale": lambda b, pool: b.call(aten.mul.Tensor, pool[-1], -1.0),
    "transpose": lambda b, pool: b.call(aten.permute.default, pool[-1], [1, 0]),
    "constant": lambda b, pool: b.call(aten.maximum.default, pool[-1], b.constant(torch.tensor(-1.0))),
    "cache": _cache,
    "old cache": _old_cache,
    "halves": _halves,
}


blocks = st.lists(st.sampled_from(sorted(STEPS)), min_size=1, max_size=6)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Prefix, a block several times, suffix; sometimes a second run of blocks, early results returned, an odd layer."""
    b = Builder()
    pool = [b.input()]
    kept = []
    for block, repeats in draw(st.lists(st.tuples(blocks, st.integers(1, 5)), min_size=1, max_size=4)):
        odd = draw(st.integers(0, 30))
        for layer in range(repeats):
            inside = [pool[-1]]
            for step in block if layer != odd else block[::-1]:
                inside.append(STEPS[step](b, inside))
            pool.append(inside[-1])
            if draw(st.integers(0, 9)) == 0:
                kept.append(draw(st.sampled_from(inside)))
    gm = b.module(pool[-1], *kept, None, pool[0], 7)
    return gm, b.inputs


def expected(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    args = [t.clone() for t in inputs]
    return [copy(r) for r in fx.Interpreter(gm).run(*args)], args


def copy(result: Any) -> Any:
    return result.clone() if isinstance(result, torch.Tensor) else result


def check(
    gm: fx.GraphModule, inputs: list[torch.Tensor], *, min_nodes: int = 2, **options: Any
) -> tuple[OutlineReport, Interpreting]:
    """Run outlined and in one piece, twice: equal results, equal contents of every input."""
    results, after = expected(gm, inputs)
    reports: list[OutlineReport] = []
    inner = Interpreting()
    build = outline(inner, min_nodes=min_nodes, report=reports.append)
    run = build(gm, [value(n) for n in gm.graph.nodes if n.op == "placeholder"], is_inference=True, **options)
    for _ in range(2):
        kept = [t.clone() for t in inputs]
        args: list[Any] = list(kept)
        got = run(args)
        assert args == [], "the list of arguments was not emptied"
        assert len(got) == len(results)
        for a, e in zip(got, results, strict=True):
            assert torch.equal(a, e) if isinstance(e, torch.Tensor) else a == e
        for a, e in zip(kept, after, strict=True):
            assert torch.equal(a, e)
    (report,) = reports
    assert len(inner.graphs) == (len(report.bodies) if report.outlined else 1)
    return report, inner


def stack(*blocks_: Sequence[str], returned: int | None = None) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    b = Builder()
    x = b.input()
    early = []
    for i, block in enumerate(blocks_):
        inside = [x]
        for step in block:
            inside.append(STEPS[step](b, inside))
        x = inside[-1]
        if i == returned:
            early.append(inside[1])
    return b.module(x, *early), b.inputs
