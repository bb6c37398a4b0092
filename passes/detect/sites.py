"""List the sites of a canonical graph, each with what the ledger needs and a reason when nothing can be done.

A site is any contraction or lookup, also those that stay float: coverage is a share of all contraction FLOPs,
and a convolution that is skipped must be seen to be skipped.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from qcompile import compat
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.detect.canonicalize import canonicalize
from qcompile.passes.detect.einsum import einsum_flops
from qcompile.passes.detect.tables import drop_packed_before, warn_packed_before
from qcompile.passes.detect.unhandled import elements, keeps_apart, matrices_read, rows_read
from qcompile.passes.detect.weights import (
    Weight,
    ancestors,
    buffers_behind,
    constant_nodes,
    is_decode,
    operand_shape,
    packed_rows,
    parameter_path,
    parameter_roots,
    root_path,
    weight_of,
    why_not_constant,
)
from qcompile.passes.match import (
    ORIGIN,
    argument,
    bodies,
    hint,
    op_name,
    recording,
    shape_of,
    source_line,
    transformed,
    value_of,
)
from qcompile.plan.plan import Decision
from qcompile.plan.site import Site

SITE = "qcompile_site"
NO_CONTRACTION = "no contraction was found in this graph"
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BOTH_ACTIVATIONS = "both operands are activations; only contractions with a weight are quantized"
_CONVOLUTION = "convolutions are not quantized yet"
_TRANSFORMED = "inside a transform of torch.func (vmap, grad, jvp, ...): not handled yet"
# What users call the operators that hold a graph.
_SPELLED = {
    "tag_activation_checkpoint": "torch.utils.checkpoint",
    "invoke_subgraph": "torch.compiler.nested_compile_region",
    "autograd_function_apply": "torch.autograd.Function",
    **{name: f"torch.{name}" for name in ("cond", "while_loop", "scan", "associative_scan")},
}


class Detect(Pass):
    """Tag every contraction and lookup with a site index and enter it into the plan."""

    name: ClassVar[str] = "detect"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        recorded = recording(gm.graph, ctx.training)
        ctx.training = ctx.training or bool(recorded)
        # A recipe that packs nothing leaves no trace on the parameters, not even a weak reference.
        packs = any(rule.weight is not None for rule in ctx.recipe.rules)
        tables = ctx.store.tables if packs else WeakIdKeyDictionary()
        _enter(_Scope.of(gm.graph, ctx.inputs, recorded, ctx, tables))
        if all(decision.site.kind == "embedding" for decision in ctx.plan) and NO_CONTRACTION not in ctx.plan.notes:
            ctx.plan.notes.append(NO_CONTRACTION)


@dataclass(frozen=True)
class _Scope:
    """A graph, and what describing its nodes needs to know about it.

    Attributes:
        constants: nodes that can be weights.
        roots: functions of parameters, each with one of these.
        recorded: nodes that run while autograd records.
        transformed: nodes inside a transform of `torch.func`.
        inputs: real parameters by the names of their placeholders.
        tables: tensors that embeddings read, see `Store.tables`.
        refused: why nothing in this graph can be quantized, "" when something can.
        origin: of the call that holds this graph, "" for Dynamo's own (see `PassContext.origins`).
    """

    graph: fx.Graph
    constants: set[fx.Node]
    roots: dict[fx.Node, fx.Node]
    recorded: set[fx.Node]
    transformed: set[fx.Node]
    inputs: Mapping[str, Any]
    ctx: PassContext
    tables: WeakIdKeyDictionary
    refused: str = ""
    origin: str = ""

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        inputs: Mapping[str, Any],
        recorded: set[fx.Node],
        ctx: PassContext,
        tables: WeakIdKeyDictionary,
        refused: str = "",
        origin: str = "",
    ) -> _Scope:
        constants = constant_nodes(graph, inputs)
        roots = parameter_roots(graph, inputs)
        scope = cls(graph, constants, roots, recorded, transformed(graph), inputs, ctx, tables, refused, origin)
        for node in graph.nodes:
            if op_name(node) == "embedding" and (table := weight_of(argument(node, 1, "weight"), constants)):
                tensors = scope.tensors(table)
                if any(tensor not in tables for tensor in tensors):
                    tables.update(dict.fromkeys(tensors))
                    warn_packed_before(_embedding(0, node, scope), tensors, ctx)
        return scope

    def tensors(self, weight: Weight) -> list[torch.Tensor]:
        """What a weight is made of: its parameters, or the packed tensors that stand for them."""
        nodes = [n for root in weight.roots for n in (root.all_input_nodes if is_decode(root) else [root])]
        return [
            tensor for node in nodes if (tensor := self.inputs.get(node.name)) is not _STAND_IN and tensor is not None
        ]

    def looked_up(self, weight: Weight) -> bool:
        """Whether an embedding reads the same tensors: here, or in a graph that was compiled before."""
        tensors = self.tensors(weight)
        return bool(tensors) and all(tensor in self.tables for tensor in tensors)


def _enter(scope: _Scope) -> None:
    """Enter the sites of a graph into the plan, and those of the graphs inside it."""
    plan = scope.ctx.plan
    for node in list(scope.graph.nodes):
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        inside = bodies(node) if isinstance(node.target, torch._ops.HigherOrderOperator) else []
        describe = _DESCRIBE.get(op_name(node))
        if describe is None and not inside and _multiplies(node, scope):
            describe = _unhandled
        origin = scope.origin or node.meta.get(ORIGIN)
        if describe is not None:
            index = len(plan.decisions)
            site = describe(index, node, scope)
            plan.decisions[index] = Decision(site, reason=site.refused)
            node.meta[SITE] = index
            scope.ctx.origins |= {index: origin} if origin else {}
        elif origin and not inside:
            scope.ctx.others.setdefault(origin, (op_name(node) or str(node.target), source_line(node)))
        # The second graph of an autograd.Function is its backward.
        for body, operands in inside[:1] if op_name(node).endswith("autograd_function_apply") else inside:
            _enter(_inside(body, operands, node, scope))


def _inside(body: fx.GraphModule, operands: Mapping[fx.Node, Any], node: fx.Node, around: _Scope) -> _Scope:
    """The graph in a higher-order call, to be listed only: a copy, in canonical form, whose inputs know which
    parameters they are."""
    inner = fx.GraphModule(body, copy.deepcopy(body.graph))
    inputs: dict[str, Any] = {}
    for old, new in zip(body.graph.nodes, inner.graph.nodes, strict=True):
        root = around.roots.get(operands.get(old))  # type: ignore[arg-type]
        if root is not None and root.op != "get_attr":
            inputs[new.name] = around.inputs.get(root.name, _STAND_IN)
            new._dynamo_source = getattr(root.all_input_nodes[0] if is_decode(root) else root, "_dynamo_source", None)
    canonicalize(inner.graph, constant_nodes(inner.graph, inputs))
    name = op_name(node).rpartition("::")[2]
    where = _SPELLED.get(name, f"torch.ops.higher_order.{name}")
    when = "while autograd records" if node in around.recorded else "yet"
    reason = around.refused or f"inside {where}: not handled {when}"
    origin = around.origin or node.meta.get(ORIGIN, "")
    return _Scope.of(inner.graph, inputs, set(), around.ctx, around.tables, reason, origin)


_STAND_IN = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # for packed weights, which are no parameters


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


def _linear(index: int, node: fx.Node, scope: _Scope) -> Site:
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
    )
    if kind == "head" and weight is not None:
        drop_packed_before(site, scope.tensors(weight), scope.ctx)
    return site


def _path(operand: Any, scope: _Scope) -> str:
    """Path of a parameter behind an operand that is no weight, "" when there is none."""
    root = scope.roots.get(operand)
    if root is not None:
        return root_path(root)
    behind = buffers_behind(operand, scope.roots) if isinstance(operand, fx.Node) else []
    return parameter_path(behind[0]) if behind else ""


def _mixed(x: Any, w: Any, scope: _Scope) -> str:
    """Why torch itself would refuse to multiply, "" when it would not: autocast makes dtypes equal, nothing else does."""
    value = value_of(x)
    if value is None or _dtype(x) == _dtype(w) or torch.is_autocast_enabled(value.device.type):
        return ""
    if any(op_name(node) == "_enter_autocast" for node in scope.graph.nodes):
        return ""
    return f"the input has dtype {_dtype(x)}, the weight {_dtype(w)}: torch does not multiply them outside of autocast"


def _embedding(index: int, node: fx.Node, scope: _Scope) -> Site:
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
    )


def _refusal(weight: Weight | None, operand: Any, node: fx.Node, scope: _Scope) -> str:
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
    if node in scope.transformed:
        return _TRANSFORMED
    if node in scope.recorded and may_be_trained(weight, scope.ctx):
        return "autograd is recording and this weight may be trained: use torch.no_grad() or inference_mode()"
    return ""


def may_be_trained(weight: Weight, ctx: PassContext) -> bool:
    """Whether a gradient may be asked for: a packed copy, which is a constant, would lose it."""
    return ctx.training and any(getattr(ctx.inputs.get(root.name), "requires_grad", False) for root in weight.roots)


def _attention(index: int, node: fx.Node, scope: _Scope) -> Site:
    q, k = shape_of(argument(node, 0, "query")) or (), shape_of(argument(node, 1, "key")) or ()
    keys = hint(k[-2]) or 0 if len(k) >= 2 else 0
    return _float_site(index, "attention", node, 4 * _size(q) * keys, scope.refused or _BOTH_ACTIVATIONS)


def _product(index: int, node: fx.Node, scope: _Scope) -> Site:
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


def _convolution(index: int, node: fx.Node, scope: _Scope) -> Site:
    weight = shape_of(argument(node, 1, "weight")) or ()
    # A transposed one spreads every value of its input.
    positions = argument(node, 0, "input") if "transpose" in op_name(node) else node
    flops = 2 * _size(shape_of(positions) or ()) * _size(weight[1:])
    return _float_site(index, "conv", node, flops, scope.refused or _CONVOLUTION)


def _multiplies(node: fx.Node, scope: _Scope) -> bool:
    """Whether a node reads a weight in a way that nothing here knows."""
    if node.op == "call_module":
        owner = scope.graph.owning_module
        module = owner.get_submodule(str(node.target)) if owner is not None else None
        return module is None or any(p.dim() > 1 for p in module.parameters())
    return not keeps_apart(op_name(node)) and bool(matrices_read(node, scope.roots))


def _unhandled(index: int, node: fx.Node, scope: _Scope) -> Site:
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


__all__ = ["SITE", "Detect", "is_head", "may_be_trained", "operand_shape"]
_DESCRIBE: dict[str, Callable[[int, fx.Node, _Scope], Site]] = {
    "linear": _linear,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys("matmul mm bmm mv addmm addmv baddbmm inner tensordot einsum".split(), _product),
    **dict.fromkeys((f"conv{t}{d}d" for t in ("", "_transpose") for d in (1, 2, 3)), _convolution),
}
