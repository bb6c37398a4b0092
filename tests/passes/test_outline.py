"""Outlining finds repeated blocks, never changes a result, and says why when it leaves a graph alone.

Every graph runs outlined and in one piece, through the checking compiler of `outlining.py`; Inductor itself is the subject
of `test_outline_inductor.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import fx

from qcompile.passes.late.outline import OutlineReport, outline
from qcompile.passes.late.outline_find import find
from qcompile.passes.late.outline_order import NotOutlined, execution_order, value
from tests.passes.outlining import Builder, Interpreting, aten, check, graphs, stack


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(graphs())
def test_outlining_never_changes_a_result(case: tuple[fx.GraphModule, list[torch.Tensor]]) -> None:
    check(*case)


@pytest.mark.parametrize(
    "block", [["linear", "relu"], ["cache", "residual"], ["halves", "linear"], ["linear", "constant"]]
)
def test_equal_blocks_share_one_body(block: list[str]) -> None:
    report, _ = check(*stack(*[block] * 5))
    assert report.outlined
    assert report.repeats == 5 or report.repeats == 4  # 4 where the cut that crosses fewest values lies inside


def test_a_period_of_several_layers_is_cut_into_its_layers() -> None:
    short, long = ["linear", "relu", "scale"], ["cache", "residual", "linear", "halves", "scale"]
    report, _ = check(*stack(*([short] * 4 + [long]) * 4), min_nodes=3)
    assert sorted(b.uses for b in report.bodies)[-2:] == [4, 16]


def test_what_only_one_layer_returns_is_an_output_of_the_shared_body() -> None:
    report, inner = check(*stack(*[["linear", "relu", "scale"]] * 6, returned=2))
    assert report.repeats == 6
    assert len(next(n for n in inner.graphs[0].graph.nodes if n.op == "output").args[0]) == 2


def test_different_constants_are_not_merged() -> None:
    b = Builder()
    x = b.input()
    for i in range(6):
        for _ in range(3):
            x = b.call(aten.clamp.default, b.call(aten.add.Tensor, x, float(i)), -50, 50)
    report, _ = check(b.module(x), b.inputs, min_nodes=6)
    assert not report.outlined
    assert "no block" in report.reason


def test_one_and_true_and_float_one_are_different_constants() -> None:
    b = Builder()
    x = b.input()
    for scalar in (1, 1.0, True, 1, 1.0, True):
        x = b.call(aten.relu.default, b.call(aten.mul.Tensor, x, scalar))
    assert len(set(tokens(b.module(x), aten.mul.Tensor))) == 3


def tokens(gm: fx.GraphModule, target: Any) -> list[int]:
    from qcompile.passes.late.outline_key import Constants, tokens

    return [t for n, t in tokens(gm.graph, Constants(gm)).items() if n.target is target]


def test_equal_looking_blocks_that_are_wired_differently_are_not_merged() -> None:
    b = Builder()
    x, fixed = b.input(), b.input()
    for i in range(6):
        y = b.call(aten.relu.default, x)
        z = b.call(aten.neg.default, y)
        x = b.call(aten.sub.Tensor, *((y, z), (z, y), (y, fixed))[i % 3])
    report, _ = check(b.module(x), b.inputs, min_nodes=3)
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
    report, _ = check(b.module(x), b.inputs)
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
    check(b.module(x), b.inputs)


@pytest.mark.parametrize(("values", "uses"), [([1.0] * 5, [5]), ([1.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 1.0], [3])])
def test_small_constants_are_compared_by_value(values: list[float], uses: list[int]) -> None:
    b = Builder()
    x = b.input()
    for number in values:
        x = b.call(aten.clamp.default, b.call(aten.sub.Tensor, x, b.constant(torch.tensor(number))), -9, 9)
    report, _ = check(b.module(x), b.inputs)
    assert [body.uses for body in report.bodies] == uses


def test_a_write_joins_the_layer_that_computes_its_value() -> None:
    gm, _ = stack(*[["cache", "linear"]] * 3)
    order, _ = execution_order(gm.graph)
    place = {node: i for i, node in enumerate(order)}
    writes = [node for node in order if node.target is aten.copy_.default]
    assert len(writes) == 3
    assert all(place[w] == place[w.args[1]] + 1 for w in writes)


def test_a_tuple_never_crosses_a_border() -> None:
    """The graph stops in the middle of a block, so the cheapest cut by count of tensors would split a tuple."""
    gm, inputs = stack(*[["halves", "linear", "relu"]] * 5, ["halves"])
    report, inner = check(gm, inputs)
    assert report.repeats == 5
    for module in inner.graphs:
        for node in module.graph.nodes:
            if node.op == "placeholder":
                assert isinstance(value(node), torch.Tensor)


# -------------------------------------------------------------------------------------------------- what inner is told
def test_options_reach_every_segment_and_static_inputs_are_renumbered() -> None:
    gm, inputs = stack(*[["linear", "relu"]] * 4)
    weights = list(range(1, len(inputs)))
    decompose = object()
    report, inner = check(gm, inputs, static_input_idxs=weights, get_decomp_fn=decompose, graph_id=3)
    assert report.repeats == 4
    for options in inner.options:
        assert options["get_decomp_fn"] is decompose
        assert (options["is_inference"], options["graph_id"]) == (True, 3)
        assert [i for i, t in enumerate(options["inputs"]) if i not in options["static_input_idxs"]] == [0]


def test_a_weight_that_moves_is_not_merged_with_weights_that_do_not() -> None:
    gm, inputs = stack(*[["linear", "relu"]] * 6)
    report, _ = check(gm, inputs, static_input_idxs=[1, 2, 4, 5, 6])
    assert sorted(b.uses for b in report.bodies) == [1, 5]


def test_all_outputs_of_a_segment_keep_their_strides() -> None:
    _, inner = check(*stack(*[["linear", "transpose"]] * 4))
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
    gm, _ = stack(*[["linear", "relu"]] * 4)
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
    report, _ = check(b.module(x), b.inputs)
    assert not report.outlined
    report, _ = check(*stack(["linear", "cache"], ["relu"], ["halves"]))
    assert not report.outlined


def test_outlining_is_deterministic_and_does_not_edit_the_graph() -> None:
    gm, inputs = stack(*[["cache", "linear", "halves", "residual"]] * 4)
    text = str(gm.graph)
    first, second = check(gm, inputs)[1], check(gm, inputs)[1]
    assert [m.code for m in first.graphs] == [m.code for m in second.graphs]
    assert str(gm.graph) == text


def test_a_dead_value_is_freed_before_the_next_segment_runs() -> None:
    """Each body gets its inputs as the only references that are left, so that it can free them."""
    gm, inputs = stack(*[["linear", "scale"]] * 4)
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
