"""Whose operator a node calls, what it writes to, and what runs inside it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qcompile.passes.match import effects_before, op_name, recording, transformed, writes
from tests.passes.graphs import dynamo_graph


@pytest.fixture(scope="module", autouse=True)
def _operators() -> Iterator[None]:
    with torch.library._scoped_library("qcompiletest", "FRAGMENT") as lib:
        lib.define("linear(Tensor x, Tensor w) -> Tensor")
        lib.define("sub_into(Tensor g, Tensor(a!) p) -> ()")
        lib.define("log(Tensor x, *, Tensor(a!)? into=None) -> ()")
        yield


def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A call on placeholders, one for each string."""
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def node(value: Any) -> Any:
        if isinstance(value, list):
            return [node(item) for item in value]
        return nodes.setdefault(value, graph.placeholder(value)) if isinstance(value, str) else value

    return graph.call_function(target, tuple(map(node, args)), {name: node(value) for name, value in kwargs.items()})


def written(node: fx.Node) -> list[str]:
    return [operand.name for operand in writes(node)]


def matmul(x: Tensor, w: Tensor) -> Tensor:
    return (x @ w) * 7


def test_only_torchs_own_have_bare_names() -> None:
    wrapped = functools.wraps(torch.matmul)(lambda a, b: a @ b * 2)  # also its module says torch
    named = functools.wraps(F.embedding)(lambda ids, table: table[ids])
    for target, name in [
        (torch.matmul, "matmul"),
        (F.linear, "linear"),
        (torch.linalg.matmul, "matmul"),
        (torch.concat, "cat"),
        (F.scaled_dot_product_attention, "scaled_dot_product_attention"),
        (F.embedding, "embedding"),
        (torch.Tensor.add_, "add_"),
        (torch.ops.aten.linear, "linear"),
        (torch.ops.aten.add.Tensor, "add"),
        (torch.ops.qcompiletest.linear, "qcompiletest::linear"),
        (torch.ops.qcompiletest.linear.default, "qcompiletest::linear"),
        (torch.ops.higher_order.cond, "higher_order::cond"),
        (matmul, f"{__name__}.matmul"),
    ]:
        assert op_name(call(target, "a", "b")) == name
    for target in (wrapped, named):
        assert op_name(call(target, "a", "b")) not in ("matmul", "embedding")
        assert written(call(target, "a", "b")) == ["a", "b"]


def test_writes_of_schemas() -> None:
    op = torch.ops.qcompiletest
    for target in (op.sub_into, op.sub_into.default):
        assert written(call(target, "g", "p")) == ["p"]
        assert written(call(target, "g", p="p")) == ["p"]
    assert written(call(op.linear, "x", "w")) == []
    assert written(call(op.log, "x", into="y")) == ["y"]
    assert written(call(torch.ops.aten.add, "x", "y")) == []
    assert written(call(torch.ops.aten.add, "x", "y", out="z")) == ["z"]
    assert written(call(torch.ops.aten._foreach_add_.Scalar, ["x", "y"], 1)) == ["x", "y"]


def test_writes_that_no_name_tells() -> None:
    assert written(call(matmul, "x", ["w"])) == ["x", "w"], "nothing is known about it"
    assert written(call(F.embedding, "ids", "w", None, 1.0)) == ["w"]
    assert written(call(F.embedding_bag, "ids", "w", max_norm=1.0)) == ["w"]
    assert written(call(F.embedding, "ids", "w", None, None)) == []
    assert written(call(F.batch_norm, "x", "mean", "var", None, None, True)) == ["mean", "var"]
    assert written(call(F.batch_norm, "x", "mean", "var", None, None, False)) == []


def test_effects_without_operands() -> None:
    node = call(torch.ops.qcompiletest.log, "x")
    after = node.graph.call_function(torch.neg, (node.args[0],))
    assert effects_before(node.graph)[after] == 1


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(8))


class Branches(Holder):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.cond(x.sum() > 0, lambda x: self.l(x), lambda x: self.l(x) * 2, (x,))
        return result


class Writing(Holder):
    def forward(self, x: Tensor) -> Any:
        def inner(x: Tensor) -> Tensor:
            self.seen[2:].add_(1)
            return self.l(x)

        return checkpoint(inner, x, use_reentrant=False)


@pytest.mark.parametrize(("model", "names"), [(Branches, []), (Writing, ["seen"])])
def test_writes_inside_of_graphs(model: type[Holder], names: list[str]) -> None:
    gm, _ = dynamo_graph(model(), torch.randn(2, 8))
    (node,) = (n for n in gm.graph.nodes if isinstance(n.target, torch._ops.HigherOrderOperator))
    assert [next((name for name in ("seen", "weight", "bias") if name in w), w) for w in written(node)] == names


def test_regions() -> None:
    def f(x: Tensor) -> Tensor:
        a = x.sin()
        with torch.enable_grad():
            b = a.cos()
            with torch.inference_mode():
                c = x.tan()
        with torch.inference_mode(False):
            d = x.exp()
        return a + b.detach() + c + d.detach() + torch.vmap(torch.abs)(x)

    gm, _ = dynamo_graph(f, torch.randn(3, 3))
    inside = recording(gm.graph, outside=False)
    named = {op_name(node).rpartition(".")[2]: node for node in gm.graph.nodes}
    assert [name for name in ("sin", "cos", "tan", "exp", "abs") if named[name] in inside] == ["cos", "exp"]
    assert [name for name in ("sin", "exp", "abs") if named[name] in transformed(gm.graph)] == ["abs"]
