"""List the sites of a canonical graph, each with what the ledger needs and a reason when nothing can be done.

A site is any contraction or lookup, also those that stay float: coverage is a share of all contraction FLOPs,
and a convolution that is skipped must be seen to be skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.passes.base import Pass, PassContext
from qcompile.passes.detect.canonicalize import canonicalize
from qcompile.passes.detect.describe import DESCRIBE, SITE, embedding, is_head, may_be_trained, multiplies, unhandled
from qcompile.passes.detect.scope import STAND_IN, Scope
from qcompile.passes.detect.tables import warn_packed_before
from qcompile.passes.detect.weights import constant_nodes, is_decode, weight_of
from qcompile.passes.match import ORIGIN, argument, bodies, op_name, recording, source_line
from qcompile.plan.plan import Decision

NO_CONTRACTION = "no contraction was found in this graph"
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
        _enter(Scope.of(gm.graph, ctx.inputs, recorded, ctx, tables))
        if all(decision.site.kind == "embedding" for decision in ctx.plan) and NO_CONTRACTION not in ctx.plan.notes:
            ctx.plan.notes.append(NO_CONTRACTION)


def _enter(scope: Scope) -> None:
    """Enter the sites of a graph into the plan, and those of the graphs inside it."""
    _note_tables(scope)
    plan = scope.ctx.plan
    for node in list(scope.graph.nodes):
        if node.op not in ("call_function", "call_method", "call_module"):
            continue
        inside = bodies(node) if isinstance(node.target, torch._ops.HigherOrderOperator) else []
        describe = DESCRIBE.get(op_name(node))
        if describe is None and not inside and multiplies(node, scope):
            describe = unhandled
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


def _note_tables(scope: Scope) -> None:
    """Note the tensors that embeddings read, so that a layer that reads them too is known to be the model's output."""
    for node in scope.graph.nodes:
        if op_name(node) == "embedding" and (table := weight_of(argument(node, 1, "weight"), scope.constants)):
            tensors = scope.tensors(table)
            if any(tensor not in scope.tables for tensor in tensors):
                scope.tables.update(dict.fromkeys(tensors))
                warn_packed_before(embedding(0, node, scope), tensors, scope.ctx)


def _inside(body: fx.GraphModule, operands: Mapping[fx.Node, Any], node: fx.Node, around: Scope) -> Scope:
    """The graph in a higher-order call, to be listed only: a copy, in canonical form, whose inputs know which
    parameters they are."""
    inner = fx.GraphModule(body, copy.deepcopy(body.graph))
    inputs: dict[str, Any] = {}
    for old, new in zip(body.graph.nodes, inner.graph.nodes, strict=True):
        root = around.roots.get(operands.get(old))  # type: ignore[arg-type]
        if root is not None and root.op != "get_attr":
            inputs[new.name] = around.inputs.get(root.name, STAND_IN)
            new._dynamo_source = getattr(root.all_input_nodes[0] if is_decode(root) else root, "_dynamo_source", None)
    canonicalize(inner.graph, constant_nodes(inner.graph, inputs))
    name = op_name(node).rpartition("::")[2]
    where = _SPELLED.get(name, f"torch.ops.higher_order.{name}")
    when = "while autograd records" if node in around.recorded else "yet"
    reason = around.refused or f"inside {where}: not handled {when}"
    origin = around.origin or node.meta.get(ORIGIN, "")
    return Scope.of(inner.graph, inputs, set(), around.ctx, around.tables, reason, origin)


__all__ = ["NO_CONTRACTION", "SITE", "Detect", "is_head", "may_be_trained"]
