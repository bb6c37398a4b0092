"""Rewrite every spelling of "activation times weight" into `F.linear`.

`x @ w`, `x @ w.T`, `mm`, `mv`, `addmm`, `bmm`, `baddbmm`, `inner`, `tensordot`, `einsum`, HF `Conv1D`, weight on the
left: all become one node kind with the weight as `[n, k]`, so that every later pass matches one thing. The reshapes and
transposes that this needs on the activation side are views; those on the weight side disappear into the
weight expression.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from string import ascii_letters
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from qcompile.passes.base import Pass, PassContext
from qcompile.passes.detect.einsum import einsum_terms
from qcompile.passes.detect.inline import inline_calls
from qcompile.passes.detect.weights import constant_nodes
from qcompile.passes.match import argument, hint, insert, op_name, same, same_tensor, shape_of, transformed, value_of

MAX_STACKED = 64
LINEAR = F.linear


class Canonicalize(Pass):
    """Contractions with a weight operand become `F.linear` with the weight as `[n, k]`."""

    name: ClassVar[str] = "canonicalize"
    optional: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        inline_calls(gm, ctx.training)
        canonicalize(gm.graph, constant_nodes(gm.graph, ctx.inputs))


def canonicalize(graph: fx.Graph, constants: set[fx.Node]) -> None:
    """Rewrite a graph whose weights are `constants`, to which the new constants are added. A rewrite whose result is of
    another shape or dtype than the user's is dropped."""
    # The new nodes' example values are computed without the graph's autocast regions: only shapes tell there.
    autocast = any(op_name(node) == "_enter_autocast" for node in graph.nodes)
    # The example values inside of a transform are of its own kind, and end with it.
    inside = transformed(graph)
    for node in list(graph.nodes):
        rewrite = _REWRITES.get(op_name(node)) if node not in inside else None
        if rewrite is None or node.kwargs.get("out") is not None:
            continue
        build = _Builder(graph, node, constants)
        with graph.inserting_before(node):
            result = rewrite(build, node)
            alike = (
                same(shape_of(result), shape_of(node)) if autocast else same_tensor(value_of(result), value_of(node))
            )
            if result is not None and alike:
                node.replace_all_uses_with(build.laid_out(result, value_of(node)))
                graph.erase_node(node)
                continue
        build.undo()


class _Builder:
    """Adds nodes before one contraction; `weight(...)` results are constants like their operands."""

    def __init__(self, graph: fx.Graph, like: fx.Node, constants: set[fx.Node]) -> None:
        self.graph, self.like, self.constants = graph, like, constants
        self.made: list[fx.Node] = []

    def is_weight(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and node in self.constants

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = insert(self.graph, target, *args, like=self.like, **kwargs)
        self.made.append(node)
        if node.all_input_nodes and all(n in self.constants for n in node.all_input_nodes):
            self.constants.add(node)
        return node

    def linear(self, x: fx.Node, weight: fx.Node, bias: Any = None, kind: str = "") -> fx.Node:
        node = self.call(LINEAR, x, weight, bias)
        if kind:
            node.meta["qcompile_kind"] = kind
        return node

    def laid_out(self, result: fx.Node, value: torch.Tensor) -> fx.Node:
        """The result, contiguous where the user's was: a `view` of it may follow."""
        if _is_contiguous(value) and not _is_contiguous(value_of(result)):
            return self.call(torch.Tensor.contiguous, result)
        return result

    def undo(self) -> None:
        for node in reversed(self.made):
            self.constants.discard(node)
            self.graph.erase_node(node)


def _is_contiguous(value: torch.Tensor) -> bool:
    """Whether the strides are surely those of a contiguous tensor (asking a symbolic tensor would add guards)."""
    sizes = list(value.shape)
    return same(value.stride(), [math.prod(sizes[i + 1 :]) for i in range(len(sizes))])


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
    if len(left) == 2 and len(right) == 1:
        return build.linear(b, a)
    return None


def _bmm_nodes(build: _Builder, a: fx.Node, b: fx.Node) -> fx.Node | None:
    """`[B, M, K] @ [B, K, N]` with a stacked weight: one linear per member."""
    left, right, value = shape_of(a), shape_of(b), value_of(b)
    if left is None or right is None or len(right) != 3 or len(left) not in (2, 3):
        return None
    if len(left) == 3 and not same(left[:1], right[:1]):
        return None
    if hint(right[0]) == 0:  # no member to take a weight from
        return None
    if value.stride(0) == 0 and len(left) == 3:  # one matrix expanded over the batch
        return build.linear(a, build.call(torch.t, build.call(torch.select, b, 0, 0)))
    if right[0] > MAX_STACKED:
        return None
    members = []
    for i in range(int(right[0])):
        x = build.call(torch.select, a, 0, i) if len(left) == 3 else a
        weight = build.call(torch.t, build.call(torch.select, b, 0, i))
        members.append(build.linear(x, weight, kind="bmm"))
    return build.call(torch.stack, members, 0)


def _mv(build: _Builder, node: fx.Node) -> fx.Node | None:
    w, x = argument(node, 0, "input"), argument(node, 1, "vec")
    return build.linear(x, w) if build.is_weight(w) and not build.is_weight(x) else None


def _addmv(build: _Builder, node: fx.Node) -> fx.Node | None:
    bias, w, x = argument(node, 0, "input"), argument(node, 1, "mat"), argument(node, 2, "vec")
    if not build.is_weight(w) or build.is_weight(x):
        return None
    return _scaled_sum(build, build.linear(x, w), bias, _factor(node, "alpha"), _factor(node, "beta"))


def _addmm(build: _Builder, node: fx.Node) -> fx.Node | None:
    bias, a, b = argument(node, 0, "input"), argument(node, 1, "mat1"), argument(node, 2, "mat2")
    if build.is_weight(a) or not build.is_weight(b):
        return None
    alpha, beta = _factor(node, "alpha"), _factor(node, "beta")
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
    return _scaled_sum(build, product, bias, _factor(node, "alpha"), _factor(node, "beta"))


def _factor(node: fx.Node, name: str) -> Any:
    return argument(node, {"beta": 3, "alpha": 4}[name], name, 1)


def _scaled_sum(build: _Builder, y: fx.Node, bias: Any, alpha: Any, beta: Any) -> fx.Node:
    if alpha != 1:
        y = build.call(operator.mul, y, alpha)
    if beta == 0:  # torch ignores the bias then, even a NaN in it
        return y
    return build.call(operator.add, y, bias if beta == 1 else build.call(operator.mul, bias, beta))


def _einsum(build: _Builder, node: fx.Node) -> fx.Node | None:
    found = einsum_terms(node)
    return None if found is None or len(found[0]) != 2 else _contract(build, *found[0], *found[1])


def _inner(build: _Builder, node: fx.Node) -> fx.Node | None:
    a, b = argument(node, 0, "input"), argument(node, 1, "other")
    return _tensordot_of(build, a, b, [-1], [-1])


def _tensordot(build: _Builder, node: fx.Node) -> fx.Node | None:
    a, b, dims = argument(node, 0, "a"), argument(node, 1, "b"), argument(node, 2, "dims", 2)
    if isinstance(dims, int):
        return _tensordot_of(build, a, b, list(range(-dims, 0)), list(range(dims)))
    if isinstance(dims, (list, tuple)) and len(dims) == 2 and all(isinstance(d, (list, tuple)) for d in dims):
        return _tensordot_of(build, a, b, list(dims[0]), list(dims[1]))
    return None


def _tensordot_of(build: _Builder, a: Any, b: Any, over_a: list[int], over_b: list[int]) -> fx.Node | None:
    """The sum over pairs of dimensions, as an equation; the result has the rest of `a`, then the rest of `b`."""
    left, right = shape_of(a), shape_of(b)
    if left is None or right is None or not left or not right or len(over_a) != len(over_b):
        return None
    first, rest = list(ascii_letters[: len(left)]), ascii_letters[len(left) :]
    second = list(rest[: len(right)])
    pairs = {i % len(left): j % len(right) for i, j in zip(over_a, over_b, strict=True)}
    for i, j in pairs.items():
        second[j] = first[i]
    out = [c for c in first if c not in second] + [c for c in second if c not in first]
    return _contract(build, a, b, "".join(first), "".join(second), "".join(out))


def _contract(build: _Builder, a: Any, b: Any, first: str, second: str, out: str) -> fx.Node | None:
    """`einsum(first,second->out)` of two operands, one of them a weight, no letter shared by both operands *and* the
    result."""
    if shape_of(a) is None or shape_of(b) is None or build.is_weight(a) == build.is_weight(b):
        return None
    if build.is_weight(a):
        a, b, first, second = b, a, second, first
    x, w, rows_of, columns_of = a, b, shape_of(a) or (), shape_of(b) or ()
    if "." in first + second + out or (len(first), len(second)) != (len(rows_of), len(columns_of)):
        return None
    contracted = [c for c in first if c in second and c not in out]
    rows = [c for c in first if c not in contracted]
    columns = [c for c in second if c not in contracted]
    repeated = len(set(first)) < len(first) or len(set(second)) < len(second)
    if repeated or not contracted or not columns or set(rows) & set(columns) or sorted(out) != sorted(rows + columns):
        return None
    # A size of one would be broadcast against the other.
    if not all(same([rows_of[first.index(c)]], [columns_of[second.index(c)]]) for c in contracted):
        return None
    x = build.call(torch.permute, x, [first.index(c) for c in rows + contracted])
    w = build.call(torch.permute, w, [second.index(c) for c in columns + contracted])
    if len(contracted) > 1:
        x = build.call(torch.flatten, x, len(rows), -1)
        w = build.call(torch.flatten, w, len(columns), -1)
    if len(columns) > 1:
        w = build.call(torch.flatten, w, 0, len(columns) - 1)
    y = build.linear(x, w)
    if len(columns) > 1:
        y = build.call(torch.unflatten, y, -1, [int(columns_of[second.index(c)]) for c in columns])
    order = [(rows + columns).index(c) for c in out]
    return y if order == sorted(order) else build.call(torch.permute, y, order)


_REWRITES: dict[str, Callable[[_Builder, fx.Node], fx.Node | None]] = {
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "mv": _mv,
    "addmm": _addmm,
    "addmv": _addmv,
    "baddbmm": _baddbmm,
    "inner": _inner,
    "tensordot": _tensordot,
    "einsum": _einsum,
}
