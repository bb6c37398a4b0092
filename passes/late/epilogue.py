"""Grow each `qmm` by the pointwise work that follows it.

On the functional graph a linear's bias, activation, gate and residual are plain ATen pointwise nodes in
whatever form AOTAutograd decomposed them to (`silu` arrives as `x / (1 + exp(-x))`). Instead of listing
patterns this pass absorbs *any* pointwise region that hangs on one matmul and leaves it through one node, and
writes it down as the matmul's epilogue expression. Two segments that are only combined with each other
(`silu(gate) * up`) become a pair epilogue.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from qcompile.ir.matmul import DTYPE_NAMES, MatmulSpec
from qcompile.passes.base import Pass, PassContext, Stage, call_order
from qcompile.passes.match import op_name, same, value_of

MAX_REGION = 24
MAX_EXTRAS = 4
MAX_TEXT = 1000  # shared subexpressions are written out; beyond this a region is better left to Inductor
# ATen name -> template over operand expressions. Arithmetic is fp32 whatever the graph's dtypes, like
# Inductor's own.
_POINTWISE: Mapping[str, str] = {
    "add": "({0}+{1})",
    "sub": "({0}-{1})",
    "mul": "({0}*{1})",
    "div": "({0}/{1})",
    "true_divide": "({0}/{1})",
    "rsub": "({1}-{0})",
    "neg": "(-{0})",
    "reciprocal": "(1.0/{0})",
    "maximum": "maximum({0},{1})",
    "minimum": "minimum({0},{1})",
    **{n: f"{n}({{0}})" for n in "exp log tanh erf sigmoid relu silu abs sqrt rsqrt".split()},
    "convert_element_type": "{0}",
    "_to_copy": "{0}",
    "clone": "{0}",
    "alias": "{0}",
}
_POWERS: Mapping[float, str] = {
    2.0: "({0}*{0})",
    3.0: "({0}*{0}*{0})",
    0.5: "sqrt({0})",
    1.0: "{0}",
    -0.5: "rsqrt({0})",
}
_FLOATS = tuple(DTYPE_NAMES)
_EXTRA = re.compile(r"\be(\d+)\b")


class Epilogue(Pass):
    """Absorb single-exit pointwise regions into `qmm`."""

    name: ClassVar[str] = "epilogue"
    stage: ClassVar[Stage] = "post"
    optional: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        for node in [n for n in gm.graph.nodes if n.target is torch.ops.qcompile.qmm.default]:
            region = _grow_best(node, call_order(list(gm.graph.nodes)), ctx)
            if region is not None:
                _fuse(gm.graph, node, region)


@dataclass(frozen=True)
class _Region:
    """A pointwise region with one exit: what the exit computes and the outside tensors it reads."""

    exit: fx.Node
    expression: str
    extras: tuple[fx.Node, ...]
    kinds: tuple[str, ...]
    nodes: tuple[fx.Node, ...]


def _grow_best(qmm: fx.Node, order: Mapping[fx.Node, int], ctx: PassContext) -> _Region | None:
    """The largest region with a single exit, over the two ways to read a qmm: whole, or by its two
    segments."""
    spec = MatmulSpec.parse(str(qmm.args[3]))
    if spec.epilogue not in ("", "acc+e0") or (spec.epilogue and spec.extras != ("row",)):
        return None
    found = None
    halves = _segments(qmm) if len(spec.n) == 2 and spec.n[0] == spec.n[1] else None
    if halves is not None and _combines(qmm, spec, ctx):
        # A joined bias is cut in two views, one for each half.
        biases = _halves(qmm, spec.n[0]) if spec.epilogue else []
        texts = ("(a0+e0)", "(a1+e1)") if biases else ("a0", "a1")
        found = _grow(dict(zip(halves, texts, strict=True)), biases, ["row"] * len(biases), order)
        if found is None:
            for node in biases:
                qmm.graph.erase_node(node)
    whole = {qmm: f"({spec.epilogue or 'acc'})"}
    return found or _grow(whole, list(qmm.args[2]), list(spec.extras), order)  # type: ignore[arg-type]


def _combines(qmm: fx.Node, spec: MatmulSpec, ctx: PassContext) -> bool:
    """Whether a kernel combines two segments, if one multiplies them at all."""
    x = value_of(qmm.args[0])
    pair = replace(spec, epilogue="a0*a1", extras=())
    return ctx.kernel(pair, x.device, x.dtype, None).found or not ctx.kernel(spec, x.device, x.dtype, None).found


def _halves(qmm: fx.Node, n: int) -> list[fx.Node]:
    bias = qmm.args[2][0]  # type: ignore[index]
    views = []
    with qmm.graph.inserting_before(qmm):
        for start in (0, n):
            views.append(qmm.graph.call_function(torch.ops.aten.slice.Tensor, (bias, 0, start, start + n)))
            views[-1].meta["val"] = value_of(bias)[start : start + n]
    return views


def _segments(qmm: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two `getitem`s (or slices) that split a two-segment qmm, when nothing else reads it."""
    users = list(qmm.users)
    if len(users) == 1 and op_name(users[0]) in ("split_with_sizes", "split"):
        picks = {n.args[1]: n for n in users[0].users if n.target is operator.getitem}
        if set(picks) == {0, 1} and len(users[0].users) == 2:
            return picks[0], picks[1]
    return None


def _grow(
    leaves: Mapping[fx.Node, str], extras: Sequence[fx.Node], kinds: Sequence[str], order: Mapping[fx.Node, int]
) -> _Region | None:
    """Absorb users of `leaves` in graph order; `extras` and `kinds` are what the leaves read already."""
    extras, kinds = list(extras), list(kinds)
    shape = value_of(next(iter(leaves))).shape
    text: dict[fx.Node, str] = dict(leaves)
    best: _Region | None = None
    frontier = sorted({u for leaf in leaves for u in leaf.users}, key=order.__getitem__)
    while frontier and len(text) < MAX_REGION:
        node = frontier.pop(0)
        if node in text:
            continue
        expression = _absorb(node, text, extras, kinds, shape)
        if expression is None or len(expression) > MAX_TEXT:
            continue
        text[node] = expression
        frontier = sorted({*frontier, *node.users}, key=order.__getitem__)
        exits = [n for n in text if any(u not in text for u in n.users)]
        paired = len(leaves) == 1 or all(name in expression for name in leaves.values())
        if exits == [node] and paired and value_of(node).dtype in _FLOATS:
            best = _Region(node, expression, tuple(extras), tuple(kinds), tuple(n for n in text if n not in leaves))
    if best is None or best.exit in leaves:
        return None
    return _prune(best)


def _prune(region: _Region) -> _Region:
    """Drop extras that only later, rejected growth asked for, and renumber the rest."""
    keep = sorted({int(i) for i in _EXTRA.findall(region.expression)})
    return replace(
        region,
        expression=_EXTRA.sub(lambda match: f"e{keep.index(int(match[1]))}", region.expression),
        extras=tuple(region.extras[i] for i in keep),
        kinds=tuple(region.kinds[i] for i in keep),
    )


def _absorb(
    node: fx.Node,
    text: Mapping[fx.Node, str],
    extras: list[fx.Node],
    kinds: list[str],
    shape: Sequence[object],
) -> str | None:
    """Expression of one node, or `None` when it cannot be part of an epilogue. May add an extra operand."""
    value = value_of(node)
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or not same(value.shape, shape):
        return None
    if value.dtype not in _FLOATS:
        return None
    name = op_name(node)
    operands = list(node.args)
    if name == "pow" and len(operands) == 2 and isinstance(operands[1], (int, float)):
        template, operands = _POWERS.get(float(operands[1])), operands[:1]
    else:
        template = _POINTWISE.get(name)
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("rounding_mode") is not None:
            return None
        if name in ("convert_element_type", "_to_copy", "clone", "alias"):
            operands = operands[:1]
    if template is None or len(operands) != (2 if "{1}" in template else 1):
        return None
    added, pieces = len(extras), []
    for operand in operands:
        piece = _operand(operand, text, extras, kinds, shape)
        if piece is None:
            del extras[added:], kinds[added:]
            return None
        pieces.append(piece)
    return template.format(*pieces)


def _operand(
    operand: object,
    text: Mapping[fx.Node, str],
    extras: list[fx.Node],
    kinds: list[str],
    shape: Sequence[object],
) -> str | None:
    if isinstance(operand, bool) or not isinstance(operand, (int, float, fx.Node)):
        return None
    if isinstance(operand, (int, float)):
        return repr(float(operand)) if math.isfinite(operand) else None
    if operand in text:
        return text[operand]
    value = value_of(operand)
    if not isinstance(value, torch.Tensor) or value.dtype not in _FLOATS or operand.op == "get_attr":
        return None
    if same(value.shape, shape):
        kind = "mat"
    elif same(value.shape, shape[-1:]):
        kind = "row"
    else:
        return None
    if operand not in extras:
        if len(extras) == MAX_EXTRAS:
            return None
        extras.append(operand)
        kinds.append(kind)
    return f"e{extras.index(operand)}"


def _fuse(graph: fx.Graph, qmm: fx.Node, region: _Region) -> None:
    spec = MatmulSpec.parse(str(qmm.args[3]))
    value = value_of(region.exit)
    x = value_of(qmm.args[0])
    out = "" if value.dtype == x.dtype else DTYPE_NAMES[value.dtype]
    fused = replace(spec, epilogue=region.expression, extras=region.kinds, out=out)
    with graph.inserting_before(region.exit):
        new = graph.call_function(
            torch.ops.qcompile.qmm.default, (qmm.args[0], qmm.args[1], list(region.extras), str(fused))
        )
    new.meta = {**region.exit.meta, **{k: v for k, v in qmm.meta.items() if k not in ("val", "tensor_meta")}}
    region.exit.replace_all_uses_with(new)
    for node in reversed(region.nodes):
        graph.erase_node(node)
    for node in [*(pick for user in qmm.users for pick in user.users), *qmm.users, qmm]:
        graph.erase_node(node)  # the split of a pair, then the matmul itself
