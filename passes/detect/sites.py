"""List the sites of a canonical graph, each with what the ledger needs and a reason when nothing can be done.

A site is any contraction or lookup, also those that stay float: coverage is a share of all contraction FLOPs,
and a convolution that is skipped must be seen to be skipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile.passes.base import Pass, PassContext
from qcompile.passes.detect.weights import Weight, constant_nodes, operand_shape, packed_rows, weight_of
from qcompile.passes.match import argument, hint, op_name, shape_of, source_line, value_of
from qcompile.plan.plan import Decision
from qcompile.plan.site import Site

SITE = "qcompile_site"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BOTH_ACTIVATIONS = "both operands are activations; only contractions with a weight are quantized"
_CONVOLUTION = "convolutions are not quantized yet"


class Detect(Pass):
    """Tag every contraction and lookup with a site index and enter it into the plan."""

    name: ClassVar[str] = "detect"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        constants = constant_nodes(gm.graph, ctx.inputs)
        lookups = {
            weight.roots
            for node in gm.graph.nodes
            if op_name(node) == "embedding" and (weight := weight_of(argument(node, 1, "weight"), constants))
        }
        for node in gm.graph.nodes:
            describe = _DESCRIBE.get(op_name(node))
            if describe is None or node.op not in ("call_function", "call_method"):
                continue
            index = len(ctx.plan.decisions)
            site = describe(index, node, constants, lookups, ctx)
            node.meta[SITE] = index
            ctx.plan.decisions[index] = Decision(site, reason=site.refused)


def is_head(n: int, k: int) -> bool:
    """Wide output layers (vocabulary, label sets): the last place where small errors are averaged out."""
    return n >= 16384 and n > 4 * k


def _rows(shape: tuple[Any, ...] | None) -> int | None:
    sizes = [hint(s) for s in (shape or ())[:-1]]
    return None if any(s is None for s in sizes) else math.prod(s for s in sizes if s is not None)


def _dtype(node: Any) -> str:
    value = value_of(node)
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""


def _linear(
    index: int, node: fx.Node, constants: set[fx.Node], lookups: set[tuple[fx.Node, ...]], ctx: PassContext
) -> Site:
    x, w = argument(node, 0, "input"), argument(node, 1, "weight")
    bias = argument(node, 2, "bias")
    shape, rows = shape_of(w) or (0, 0), _rows(shape_of(x))
    n, k = (hint(shape[0]) or 0, hint(shape[1]) or 0) if len(shape) == 2 else (1, hint(shape[-1]) or 0)
    weight = weight_of(w, constants)
    kind = node.meta.get("qcompile_kind") or "linear"
    if weight is not None and kind == "linear" and (is_head(n, k) or weight.roots in lookups):
        kind = "head"
    return Site(
        index,
        kind,
        weight.path if weight else "",
        source_line(node),
        n,
        k,
        rows,
        2 * n * k * (rows or 0),
        _dtype(x),
        _dtype(w),
        bias=bias is not None,
        refused=_refusal(weight, value_of(w), ctx),
    )


def _embedding(
    index: int, node: fx.Node, constants: set[fx.Node], lookups: set[tuple[fx.Node, ...]], ctx: PassContext
) -> Site:
    ids, w = argument(node, 0, "input"), argument(node, 1, "weight")
    weight = weight_of(w, constants)
    shape, rows = shape_of(w) or (0, 0), _rows((*(shape_of(ids) or ()), 1))
    refused = _refusal(weight, value_of(w), ctx)
    if argument(node, 3, "max_norm") is not None:
        refused = "max_norm renormalizes the table in place on every call"
    return Site(
        index,
        "embedding",
        weight.path if weight else "",
        source_line(node),
        hint(shape[0]) or 0,
        hint(shape[-1]) or 0,
        rows,
        0,
        _dtype(w),
        _dtype(w),
        refused=refused,
    )


def _refusal(weight: Weight | None, value: Any, ctx: PassContext) -> str:
    if weight is None:
        return "the weight operand is not a parameter: it depends on inputs, buffers or an in-place write"
    if value is None or value.dim() != 2 or 0 in value.shape:
        return f"the weight has shape {tuple(value.shape) if value is not None else '?'}, not a non-empty matrix"
    if value.dtype not in _FLOATS:
        return f"the weight has dtype {value.dtype}"
    if weight.packed is not None and packed_rows(weight) is None:
        return "a view of the packed weight that does not keep whole rows"
    if may_be_trained(weight, ctx):
        return "autograd is recording and this weight may be trained: use torch.no_grad() or inference_mode()"
    return ""


def may_be_trained(weight: Weight, ctx: PassContext) -> bool:
    """Whether a gradient may be asked for: a packed copy, which is a constant, would lose it."""
    return ctx.training and any(getattr(ctx.inputs.get(root.name), "requires_grad", False) for root in weight.roots)


def _attention(index: int, node: fx.Node, *_: Any) -> Site:
    q, k = shape_of(argument(node, 0, "query")) or (), shape_of(argument(node, 1, "key")) or ()
    sizes = [hint(s) or 0 for s in q]
    keys = hint(k[-2]) or 0 if len(k) >= 2 else 0
    flops = 4 * math.prod(sizes) * keys
    return _activation_site(index, "attention", node, flops, _BOTH_ACTIVATIONS)


def _batched(index: int, node: fx.Node, *_: Any) -> Site:
    if op_name(node) == "einsum":
        return _activation_site(index, "bmm", node, 0, _BOTH_ACTIVATIONS)
    left = shape_of(argument(node, 0, "input")) or ()
    out = shape_of(node) or ()
    flops = 2 * math.prod(hint(s) or 0 for s in out) * (hint(left[-1]) or 0 if left else 0)
    return _activation_site(index, "bmm", node, flops, _BOTH_ACTIVATIONS)


def _convolution(index: int, node: fx.Node, *_: Any) -> Site:
    weight = shape_of(argument(node, 1, "weight")) or ()
    out = shape_of(node) or ()
    flops = 2 * math.prod(hint(s) or 0 for s in out) * math.prod(hint(s) or 0 for s in weight[1:])
    return _activation_site(index, "conv", node, flops, _CONVOLUTION)


def _activation_site(index: int, kind: str, node: fx.Node, flops: int, refused: str) -> Site:
    return Site(index, kind, "", source_line(node), 0, 0, None, flops, _dtype(node), refused=refused)


__all__ = ["SITE", "Detect", "is_head", "may_be_trained", "operand_shape"]
_DESCRIBE: dict[str, Callable[..., Site]] = {
    "linear": _linear,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"), _batched),
    **dict.fromkeys((f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)), _convolution),
}
