"""Rewrite every spelling of "activation times weight" into `F.linear`.

`x @ w`, `x @ w.T`, `mm`, `addmm`, `bmm`, `baddbmm`, `einsum`, HF `Conv1D`, weight on the left: all become one
node kind with the weight as `[n, k]`, so that every later pass matches one thing. The reshapes and
transposes that this needs on the activation side are views; those on the weight side disappear into the
weight expression.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from qcompile.passes.base import Pass, PassContext
from qcompile.passes.detect.weights import constant_nodes
from qcompile.passes.match import argument, insert, op_name, shape_of, value_of

MAX_STACKED = 64
LINEAR = F.linear


class Canonicalize(Pass):
    """Contractions with a weight operand become `F.linear` with the weight as `[n, k]`."""

    name: ClassVar[str] = "canonicalize"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        constants = constant_nodes(gm.graph, ctx.inputs)
        for node in list(gm.graph.nodes):
            rewrite = _REWRITES.get(op_name(node))
            if rewrite is None or node.kwargs.get("out") is not None:
                continue
            with gm.graph.inserting_before(node):
                result = rewrite(_Builder(gm.graph, node, constants), node)
            if result is not None:
                result.meta.setdefault("example_value", value_of(node))
                node.replace_all_uses_with(result)
                gm.graph.erase_node(node)


class _Builder:
    """Adds nodes before one contraction; `weight(...)` results are constants like their operands."""

    def __init__(self, graph: fx.Graph, like: fx.Node, constants: set[fx.Node]) -> None:
        self.graph, self.like, self.constants = graph, like, constants

    def is_weight(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self.constants

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = insert(self.graph, target, *args, like=self.like, **kwargs)
        if node.all_input_nodes and all(n in self.constants for n in node.all_input_nodes):
            self.constants.add(node)
        return node

    def linear(self, x: fx.Node, weight: fx.Node, bias: Any = None, kind: str = "") -> fx.Node:
        node = self.call(LINEAR, x, weight, bias)
        if kind:
            node.meta["qcompile_kind"] = kind
        return node


def _matmul(build: _Builder, node: fx.Node) -> fx.Node | None:
    a, b = argument(node, 0, "input"), argument(node, 1, "other", argument(node, 1, "mat2"))
    left, right = shape_of(a), shape_of(b)
    if left is None or right is None or build.is_weight(a) == build.is_weight(b):
        return None
    if build.is_weight(b):
        if len(right) == 2:
            return build.linear(a, build.call(torch.t, b))
        return _bmm_nodes(build, a, b)
    if len(left) == 2 and len(right) >= 2:  # weight on the left: y = w x = (xᵀ wᵀ)ᵀ
        flipped = build.linear(build.call(torch.transpose, b, -1, -2), a)
        return build.call(torch.transpose, flipped, -1, -2)
    return None


def _bmm_nodes(build: _Builder, a: fx.Node, b: fx.Node) -> fx.Node | None:
    """`[B, M, K] @ [B, K, N]` with a stacked weight: one linear per member."""
    left, right, value = shape_of(a), shape_of(b), value_of(b)
    if left is None or right is None or len(right) != 3 or len(left) not in (2, 3):
        return None
    if value.stride(0) == 0 and len(left) == 3:  # one matrix expanded over the batch
        return build.linear(a, build.call(torch.t, build.call(torch.select, b, 0, 0)))
    if right[0] > MAX_STACKED or (len(left) == 3 and left[0] != right[0]):
        return None
    members = []
    for i in range(int(right[0])):
        x = build.call(torch.select, a, 0, i) if len(left) == 3 else a
        weight = build.call(torch.t, build.call(torch.select, b, 0, i))
        members.append(build.linear(x, weight, kind="bmm"))
    return build.call(torch.stack, members, 0)


def _addmm(build: _Builder, node: fx.Node) -> fx.Node | None:
    bias, a, b = argument(node, 0, "input"), argument(node, 1, "mat1"), argument(node, 2, "mat2")
    beta, alpha = argument(node, 3, "beta", 1), argument(node, 4, "alpha", 1)
    if build.is_weight(a) or not build.is_weight(b):
        return None
    weight = build.call(torch.t, b)
    shape, columns = shape_of(bias), shape_of(b)
    assert columns is not None
    if alpha == 1 and beta == 1 and shape == columns[1:]:
        return build.linear(a, weight, bias)
    return _scaled_sum(build, build.linear(a, weight), bias, alpha, beta)


def _baddbmm(build: _Builder, node: fx.Node) -> fx.Node | None:
    bias, a, b = argument(node, 0, "input"), argument(node, 1, "batch1"), argument(node, 2, "batch2")
    if build.is_weight(a) or not build.is_weight(b):
        return None
    product = _bmm_nodes(build, a, b)
    if product is None:
        return None
    return _scaled_sum(build, product, bias, argument(node, 4, "alpha", 1), argument(node, 3, "beta", 1))


def _scaled_sum(build: _Builder, y: fx.Node, bias: Any, alpha: Any, beta: Any) -> fx.Node:
    if alpha != 1:
        y = build.call(operator.mul, y, alpha)
    if beta == 0:  # torch ignores the bias then, even a NaN in it
        return y
    return build.call(operator.add, y, bias if beta == 1 else build.call(operator.mul, bias, beta))


def _einsum(build: _Builder, node: fx.Node) -> fx.Node | None:
    """Two operands, one of them a weight, no letter shared by both operands *and* the result."""
    equation, *operands = node.args
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or "." in equation or "->" not in equation:
        return None
    inputs, _, out = equation.replace(" ", "").partition("->")
    first, second = inputs.split(",")
    if build.is_weight(operands[0]) == build.is_weight(operands[1]):
        return None
    if build.is_weight(operands[0]):
        operands, (first, second) = operands[::-1], (second, first)
    x, w = operands
    contracted = [c for c in first if c in second and c not in out]
    rows = [c for c in first if c not in contracted]
    columns = [c for c in second if c not in contracted]
    repeated = len(set(first)) < len(first) or len(set(second)) < len(second)
    if repeated or not contracted or not columns or set(rows) & set(columns) or sorted(out) != sorted(rows + columns):
        return None
    size = {
        **dict(zip(first, shape_of(x) or (), strict=True)),
        **dict(zip(second, shape_of(w) or (), strict=True)),
    }
    x = build.call(torch.permute, x, [first.index(c) for c in rows + contracted])
    w = build.call(torch.permute, w, [second.index(c) for c in columns + contracted])
    if len(contracted) > 1:
        x = build.call(torch.flatten, x, len(rows), -1)
        w = build.call(torch.flatten, w, len(columns), -1)
    if len(columns) > 1:
        w = build.call(torch.flatten, w, 0, len(columns) - 1)
    y = build.linear(x, w)
    if len(columns) > 1:
        y = build.call(torch.unflatten, y, -1, [int(size[c]) for c in columns])
    order = [(rows + columns).index(c) for c in out]
    return y if order == sorted(order) else build.call(torch.permute, y, order)


_REWRITES: dict[str, Callable[[_Builder, fx.Node], fx.Node | None]] = {
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "addmm": _addmm,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
}
