"""Outlining finds repeated blocks, never changes a result, and says why when it leaves a graph alone.

Most tests use a compiler that interprets the graph it is given and checks what a compiler relies on (sizes, strides,
separate memory of written inputs). The few that call Inductor compare exactly: either the values are small integers, so
that floating point is exact, or the generated code is scalar, so that there is one order of summation.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import fx, nn

from qcompile.passes.late.outline import OutlineReport, outline
from qcompile.passes.late.outline_find import find
from qcompile.passes.late.outline_order import NotOutlined, execution_order, value

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
                _same_layout(value(node), arg)
            pointers = [a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)]
            for node, arg in zip(placeholders, args, strict=True):
                if node in writes:
                    assert pointers.count(arg.untyped_storage().data_ptr()) == 1, "a written input has a view"
            given_, results = list(args), fx.Interpreter(gm).run(*args)
            args.clear()
            del given_
            for node, result in zip(output.args[0], results, strict=True):
                if isinstance(node, fx.Node):
                    _same_layout(value(node), result)
            return results

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _same_layout(expected: Any, got: Any) -> None:
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


def _expected(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> tuple[Any, list[torch.Tensor]]:
    args = [t.clone() for t in inputs]
    return [_copy(r) for r in fx.Interpreter(gm).run(*args)], args


def _copy(result: Any) -> Any:
    return result.clone() if isinstance(result, torch.Tensor) else result


def _check(
    gm: fx.GraphModule, inputs: list[torch.Tensor], *, min_nodes: int = 2, **options: Any
) -> tuple[OutlineReport, Interpreting]:
    """Run outlined and in one piece, twice: equal results, equal contents of every input."""
    results, after = _expected(gm, inputs)
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


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(graphs())
def test_outlining_never_changes_a_result(case: tuple[fx.GraphModule, list[torch.Tensor]]) -> None:
    _check(*case)


def _stack(*blocks_: Sequence[str], returned: int | None = None) -> tuple[fx.GraphModule, list[torch.Tensor]]:
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


@pytest.mark.parametrize(
    "block", [["linear", "relu"], ["cache", "residual"], ["halves", "linear"], ["linear", "constant"]]
)
def test_equal_blocks_share_one_body(block: list[str]) -> None:
    report, _ = _check(*_stack(*[block] * 5))
    assert report.outlined
    assert report.repeats == 5 or report.repeats == 4  # 4 where the cut that crosses fewest values lies inside


def test_a_period_of_several_layers_is_cut_into_its_layers() -> None:
    short, long = ["linear", "relu", "scale"], ["cache", "residual", "linear", "halves", "scale"]
    report, _ = _check(*_stack(*([short] * 4 + [long]) * 4), min_nodes=3)
    assert sorted(b.uses for b in report.bodies)[-2:] == [4, 16]


def test_what_only_one_layer_returns_is_an_output_of_the_shared_body() -> None:
    report, inner = _check(*_stack(*[["linear", "relu", "scale"]] * 6, returned=2))
    assert report.repeats == 6
    assert len(next(n for n in inner.graphs[0].graph.nodes if n.op == "output").args[0]) == 2


def test_different_constants_are_not_merged() -> None:
    b = Builder()
    x = b.input()
    for i in range(6):
        for _ in range(3):
            x = b.call(aten.clamp.default, b.call(aten.add.Tensor, x, float(i)), -50, 50)
    report, _ = _check(b.module(x), b.inputs, min_nodes=6)
    assert not report.outlined
    assert "no block" in report.reason


def test_one_and_true_and_float_one_are_different_constants() -> None:
    b = Builder()
    x = b.input()
    for scalar in (1, 1.0, True, 1, 1.0, True):
        x = b.call(aten.relu.default, b.call(aten.mul.Tensor, x, scalar))
    assert len(set(_tokens(b.module(x), aten.mul.Tensor))) == 3


def _tokens(gm: fx.GraphModule, target: Any) -> list[int]:
    from qcompile.passes.late.outline_key import Constants, tokens

    return [t for n, t in tokens(gm.graph, Constants(gm)).items() if n.target is target]


def test_equal_looking_blocks_that_are_wired_differently_are_not_merged() -> None:
    b = Builder()
    x, fixed = b.input(), b.input()
    for i in range(6):
        y = b.call(aten.relu.default, x)
        z = b.call(aten.neg.default, y)
        x = b.call(aten.sub.Tensor, *((y, z), (z, y), (y, fixed))[i % 3])
    report, _ = _check(b.module(x), b.inputs, min_nodes=3)
    assert report.repeats < 6


@pytest.mark.parametrize("known", ["first", "last"])
def test_old_contents_are_read_before_a_write(known: str) -> None:
    """Every layer reads the old contents through a view made early; the new contents are known first, or last."""
    b = Builder()
    x, cache = b.input(), b.input()
    view = b.call(aten.permute.default, cache, [1, 0])
    first = b.call(aten.add.Tensor, cache, 1.0)
    for _ in range(5):
        x = b.call(aten.clamp.default, b.call(aten.add.Tensor, b.call(aten.relu.default, x), view), -9, 9)
    b.write(cache, first if known == "first" else x)
    report, _ = _check(b.module(x), b.inputs)
    assert report.outlined == (known == "last")  # known first, the write would meet the view in the last layer


@pytest.mark.parametrize("known", ["first", "last"])
def test_swapped_inputs_keep_the_order_of_their_writes(known: str) -> None:
    b = Builder()
    x, left, right = b.input(), b.input(), b.input()
    seen = b.call(aten.permute.default, right, [1, 0])
    first = b.call(aten.add.Tensor, x, 1.0)
    for _ in range(4):
        x = b.call(aten.clamp.default, b.call(aten.add.Tensor, b.call(aten.relu.default, x), left), -9, 9)
    b.write(left, seen)
    b.write(right, first if known == "first" else x)
    _check(b.module(x), b.inputs)


@pytest.mark.parametrize(("values", "uses"), [([1.0] * 5, [5]), ([1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0], [3])])
def test_small_constants_are_compared_by_value(values: list[float], uses: list[int]) -> None:
    b = Builder()
    x = b.input()
    for number in values:
        x = b.call(aten.clamp.default, b.call(aten.sub.Tensor, x, b.constant(torch.tensor(number))), -9, 9)
    report, _ = _check(b.module(x), b.inputs)
    assert [body.uses for body in report.bodies] == uses


def test_a_write_joins_the_layer_that_computes_its_value() -> None:
    gm, _ = _stack(*[["cache", "linear"]] * 3)
    order, _ = execution_order(gm.graph)
    place = {node: i for i, node in enumerate(order)}
    writes = [node for node in order if node.target is aten.copy_.default]
    assert len(writes) == 3
    assert all(place[w] == place[w.args[1]] + 1 for w in writes)


def test_a_tuple_never_crosses_a_border() -> None:
    """The graph stops in the middle of a block, so the cheapest cut by count of tensors would split a tuple."""
    gm, inputs = _stack(*[["halves", "linear", "relu"]] * 5, ["halves"])
    report, inner = _check(gm, inputs)
    assert report.repeats == 5
    for module in inner.graphs:
        for node in module.graph.nodes:
            if node.op == "placeholder":
                assert isinstance(value(node), torch.Tensor)


# -------------------------------------------------------------------------------------------------- what inner is told
def test_options_reach_every_segment_and_static_inputs_are_renumbered() -> None:
    gm, inputs = _stack(*[["linear", "relu"]] * 4)
    weights = list(range(1, len(inputs)))
    decompose = object()
    report, inner = _check(gm, inputs, static_input_idxs=weights, get_decomp_fn=decompose, graph_id=3)
    assert report.repeats == 4
    for options in inner.options:
        assert options["get_decomp_fn"] is decompose
        assert (options["is_inference"], options["graph_id"]) == (True, 3)
        assert [i for i, t in enumerate(options["inputs"]) if i not in options["static_input_idxs"]] == [0]


def test_a_weight_that_moves_is_not_merged_with_weights_that_do_not() -> None:
    gm, inputs = _stack(*[["linear", "relu"]] * 6)
    report, _ = _check(gm, inputs, static_input_idxs=[1, 2, 4, 5, 6])
    assert sorted(b.uses for b in report.bodies) == [1, 5]


def test_all_outputs_of_a_segment_keep_their_strides() -> None:
    _, inner = _check(*_stack(*[["linear", "transpose"]] * 4))
    for module in inner.graphs:
        output = next(n for n in module.graph.nodes if n.op == "output")
        assert output.meta["user_visible_output_idxs"] == list(range(len(output.args[0])))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"is_inference": False}, "a training graph"),
        ({"is_backward": True}, "a training graph"),
        ({"cudagraphs": True}, "CUDA graphs"),
    ],
)
def test_graphs_that_must_stay_whole_say_why(options: dict[str, Any], reason: str) -> None:
    gm, _ = _stack(*[["linear", "relu"]] * 4)
    reports: list[OutlineReport] = []
    inner = Interpreting()
    examples = [value(n) for n in gm.graph.nodes if n.op == "placeholder"]
    outline(inner, min_nodes=2, report=reports.append)(gm, examples, **{"is_inference": True, **options})
    assert inner.graphs == [gm]
    assert reason in reports[0].reason
    assert reports[0].compiled_nodes == reports[0].nodes


def test_a_write_to_something_else_than_an_input_is_refused() -> None:
    b = Builder()
    x = b.call(aten.relu.default, b.input())
    b.call(aten.add_.Tensor, x, 1.0)
    with pytest.raises(NotOutlined, match="writes in place"):
        find(b.module(x))


def test_an_empty_graph_and_a_graph_without_blocks_are_left_alone() -> None:
    b = Builder()
    x = b.input()
    report, _ = _check(b.module(x), b.inputs)
    assert not report.outlined
    report, _ = _check(*_stack(["linear", "cache"], ["relu"], ["halves"]))
    assert not report.outlined


def test_outlining_is_deterministic_and_does_not_edit_the_graph() -> None:
    gm, inputs = _stack(*[["cache", "linear", "halves", "residual"]] * 4)
    text = str(gm.graph)
    first, second = _check(gm, inputs)[1], _check(gm, inputs)[1]
    assert [m.code for m in first.graphs] == [m.code for m in second.graphs]
    assert str(gm.graph) == text


def test_a_dead_value_is_freed_before_the_next_segment_runs() -> None:
    """Each body gets its inputs as the only references that are left, so that it can free them."""
    gm, inputs = _stack(*[["linear", "scale"]] * 4)
    alive: list[int] = []

    class Counting(Interpreting):
        def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
            run = super().__call__(module, example_inputs, **options)

            def counted(args: list[Any]) -> Any:
                alive.append(sys.getrefcount(args[0]))  # the list, the call's argument, and who else?
                return run(args)

            return counted

    build = outline(Counting(), min_nodes=2)
    run = build(gm, [value(n) for n in gm.graph.nodes if n.op == "placeholder"], is_inference=True)
    del gm
    run([t.clone() for t in inputs])
    assert set(alive) == {2}
