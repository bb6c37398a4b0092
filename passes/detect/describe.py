"""One node of a canonical graph as a site: kind, sizes, FLOPs, and a reason where nothing can be done about it.

`DESCRIBE` has a function for every operator that contracts or looks up; `unhandled` describes those that nobody knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.passes.base import PassContext
from qcompile.passes.detect.einsum import einsum_flops
from qcompile.passes.detect.scope import Scope
from qcompile.passes.detect.tables import drop_packed_before
from qcompile.passes.detect.unhandled import elements, keeps_apart, matrices_read, rows_read
from qcompile.passes.detect.weights import (
    Weight,
    ancestors,
    buffers_behind,
    packed_rows,
    parameter_path,
    root_path,
    weight_of,
    why_not_constant,
)
from qcompile.passes.match import argument, hint, op_name, shape_of, source_line, value_of
from qcompile.plan.site import Site

SITE = "qcompile_site"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BOTH_ACTIVATIONS = "both operands are activations; only contractions with a weight are quantized"
_CONVOLUTION = "convolutions are not quantized yet"
_TRANSFORMED = "inside a transform of torch.func (vmap, grad, jvp, ...): not handled yet"


def is_head(n: int, k: int) -> bool:
    """Wide output layers (vocabulary, label sets): the last place where small errors are averaged out."""
    return n >= 16384 and n > 4 * k


def _rows(shape: tuple[Any, ...] | None) -> int | None:
    sizes = [hint(s) for s in (shape or ())[:-1]]
    return None if any(s is None for s in sizes) else math.prod(s for s in sizes if s is not None)


def _dtype(node: Any) -> str:
    value = value_of(node)
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""


def _device(node: Any) -> str:
    value = value_of(node)
    return "gpu" if isinstance(value, torch.Tensor) and compat.writes_triton(value.device) else "cpu"


def _linear(index: int, node: fx.Node, scope: Scope) -> Site:
    x, w = argument(node, 0, "input"), argument(node, 1, "weight")
    bias = argument(node, 2, "bias")
    shape, rows = shape_of(w) or (0, 0), _rows(shape_of(x))
    n, k = (hint(shape[0]) or 0, hint(shape[1]) or 0) if len(shape) == 2 else (1, hint(shape[-1]) or 0)
    weight = weight_of(w, scope.constants)
    kind = node.meta.get("qcompile_kind") or "linear"
    if weight is not None and kind == "linear" and (is_head(n, k) or scope.looked_up(weight)):
        kind = "head"
    site = Site(
        index,
        kind,
        weight.path if weight else _path(w, scope),
        source_line(node),
        n,
        k,
        rows,
        2 * n * k * (rows or 0),
        _dtype(x),
        _dtype(w),
        bias=bias is not None,
        refused=_refusal(weight, w, node, scope) or _mixed(x, w, scope),
        device=_device(w),
        trained=_trained(weight, node, scope),
    )
    if kind == "head" and weight is not None:
        drop_packed_before(site, scope.tensors(weight), scope.ctx)
    return site


def _path(operand: Any, scope: Scope) -> str:
    """Path of a parameter behind an operand that is no weight, "" when there is none."""
    root = scope.roots.get(operand)
    if root is not None:
        return root_path(root)
    behind = buffers_behind(operand, scope.roots) if isinstance(operand, fx.Node) else []
    return parameter_path(behind[0]) if behind else ""


def _mixed(x: Any, w: Any, scope: Scope) -> str:
    """Why torch itself would refuse to multiply, "" when it would not: autocast makes dtypes equal, nothing else does."""
    value = value_of(x)
    if value is None or _dtype(x) == _dtype(w) or torch.is_autocast_enabled(value.device.type):
        return ""
    if any(op_name(node) == "_enter_autocast" for node in scope.graph.nodes):
        return ""
    return f"the input has dtype {_dtype(x)}, the weight {_dtype(w)}: torch does not multiply them outside of autocast"


def embedding(index: int, node: fx.Node, scope: Scope) -> Site:
    ids, w = argument(node, 0, "input"), argument(node, 1, "weight")
    weight = weight_of(w, scope.constants)
    shape, rows = shape_of(w) or (0, 0), _rows((*(shape_of(ids) or ()), 1))
    refused = _refusal(weight, w, node, scope)
    if argument(node, 3, "max_norm") is not None:
        refused = "max_norm renormalizes the table in place on every call"
    return Site(
        index,
        "embedding",
        weight.path if weight else _path(w, scope),
        source_line(node),
        hint(shape[0]) or 0,
        hint(shape[-1]) or 0,
        rows,
        0,
        _dtype(w),
        _dtype(w),
        refused=refused,
        device=_device(w),
        trained=_trained(weight, node, scope),
    )


def _refusal(weight: Weight | None, operand: Any, node: fx.Node, scope: Scope) -> str:
    value = value_of(operand)
    if scope.refused:
        return scope.refused
    if weight is None:
        return why_not_constant(operand, scope.roots)
    if value is None or value.dim() != 2 or 0 in value.shape:
        return f"the weight has shape {tuple(value.shape) if value is not None else '?'}, not a non-empty matrix"
    if value.dtype not in _FLOATS:
        return f"the weight has dtype {value.dtype}"
    if weight.packed is not None and packed_rows(weight) is None:
        return "a view of the packed weight that does not keep whole rows"
    if weight.rounded is not None and packed_rows(weight) != (0, shape_of(weight.rounded)[0]):  # type: ignore[index]
        return "a view of the rounded weight that does not keep all of its rows"
    if node in scope.transformed:
        return _TRANSFORMED
    return ""


def _trained(weight: Weight | None, node: fx.Node, scope: Scope) -> bool:
    return weight is not None and node in scope.recorded and may_be_trained(weight, scope.ctx)


def may_be_trained(weight: Weight, ctx: PassContext) -> bool:
    """Whether a gradient may be asked for: a packed copy, which is a constant, would lose it."""
    return ctx.training and any(getattr(ctx.inputs.get(root.name), "requires_grad", False) for root in weight.roots)


def _attention(index: int, node: fx.Node, scope: Scope) -> Site:
    q, k = shape_of(argument(node, 0, "query")) or (), shape_of(argument(node, 1, "key")) or ()
    keys = hint(k[-2]) or 0 if len(k) >= 2 else 0
    return _float_site(index, "attention", node, 4 * _size(q) * keys, scope.refused or _BOTH_ACTIVATIONS)


def _product(index: int, node: fx.Node, scope: Scope) -> Site:
    """A contraction that did not become a linear."""
    flops, out = 0, _size(shape_of(node) or ())
    sizes = [_size(shape_of(n) or ()) for n in node.all_input_nodes]
    if op_name(node) == "einsum":
        flops = einsum_flops(node)
    elif op_name(node) == "tensordot" and out:
        flops = 2 * out * math.isqrt(math.prod(sizes) // out)  # every contracted size is in both operands
    else:
        left = shape_of(
            argument(node, 1 if "add" in op_name(node) else 0, "mat1" if "add" in op_name(node) else "input")
        )
        flops = 2 * out * (hint(left[-1]) or 0 if left else 0)
    # What is only added is no factor: `addmm(bias, q, k)` multiplies two activations.
    added = argument(node, 0, "input") if "add" in op_name(node) else None
    both = (
        argument(node, 1, "mat1"),
        argument(node, 2, "mat2"),
        argument(node, 1, "batch1"),
        argument(node, 2, "batch2"),
    )
    factors = [n for n in node.all_input_nodes if n is not added or n in both]
    weights = [n for n in factors if n in scope.roots]
    if scope.refused:
        return _float_site(index, "bmm", node, flops, scope.refused)
    if weights and node in scope.transformed:
        return _float_site(index, "other", node, flops, _TRANSFORMED, root_path(scope.roots[weights[0]]))
    if not weights:
        kept = [behind[0] for n in factors if (behind := buffers_behind(n, scope.roots))]
        reason = "the weight operand is a buffer; only parameters are quantized" if kept else _BOTH_ACTIVATIONS
        return _float_site(index, "bmm", node, flops, reason, parameter_path(kept[0]) if kept else "")
    made = [n for n in weights if n not in scope.constants]
    kind, reason = "other", f"this form of {op_name(node)} with a weight is not handled"
    if made:
        reason = why_not_constant(made[0], scope.roots)
        # What another contraction gave is an activation, even where it starts from parameters alone.
        kind = "bmm" if any(SITE in behind.meta for behind in ancestors(made[0])) else kind
    elif node in scope.roots:
        reason = "both operands are weights"
    return _float_site(index, kind, node, flops, reason, root_path(scope.roots[weights[0]]))


def _convolution(index: int, node: fx.Node, scope: Scope) -> Site:
    weight = shape_of(argument(node, 1, "weight")) or ()
    # A transposed one spreads every value of its input.
    positions = argument(node, 0, "input") if "transpose" in op_name(node) else node
    flops = 2 * _size(shape_of(positions) or ()) * _size(weight[1:])
    return _float_site(index, "conv", node, flops, scope.refused or _CONVOLUTION)


def multiplies(node: fx.Node, scope: Scope) -> bool:
    """Whether a node reads a weight in a way that nothing here knows."""
    if node.op == "call_module":
        owner = scope.graph.owning_module
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        return module is None or any(p.dim() > 1 for p in module.parameters())
    return not keeps_apart(op_name(node)) and bool(matrices_read(node, scope.roots))


def unhandled(index: int, node: fx.Node, scope: Scope) -> Site:
    """Any other operator that reads a weight: a multiply-add for each of its elements and each row."""
    name, weights, rows = (
        op_name(node) or str(node.target),
        matrices_read(node, scope.roots),
        rows_read(node, scope.roots),
    )
    lookup = name == "embedding_bag"
    path = root_path(scope.roots[weights[0]]) if weights else str(node.target)
    shape = shape_of(weights[0]) or () if len(weights) == 1 else ()
    n, k = (int(shape[0]), int(shape[1])) if len(shape) == 2 else (0, 0)
    return Site(
        index,
        "embedding" if lookup else "other",
        path,
        source_line(node),
        n,
        k,
        rows,
        0 if lookup else 2 * sum(map(elements, weights)) * (rows or 0),
        _dtype(next((x for x in node.all_input_nodes if x not in scope.roots), node)),
        _dtype(weights[0]) if weights else "float32",
        refused=scope.refused or f"operator {name} is not handled",
    )


def _size(shape: tuple[Any, ...]) -> int:
    return math.prod(hint(size) or 0 for size in shape)


def _float_site(index: int, kind: str, node: fx.Node, flops: int, refused: str, path: str = "") -> Site:
    return Site(index, kind, path, source_line(node), 0, 0, None, flops, _dtype(node), refused=refused)


DESCRIBE: dict[str, Callable[[int, fx.Node, Scope], Site]] = {
    "linear": _linear,
    "embedding": embedding,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys("matmul mm bmm mv addmm addmv baddbmm inner tensordot einsum".split(), _product),
    **dict.fromkeys((f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)), _convolution),
}
