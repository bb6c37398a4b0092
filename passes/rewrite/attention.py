"""Decode attention without repeated keys and values.

Grouped-query models repeat each key/value head for the query heads that share it, which for one new token
means copying the whole cache on every step. With a single query position the shared heads can be *rows* of
one query instead: `[b, heads, 1, d]` becomes `[b, kv heads, group, d]`, and keys and values are read where
they lie. Every row computes the same sums as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import fx
from torch.nn import functional as F

from qcompile.passes.base import Pass, PassContext
from qcompile.passes.match import argument, drop_dead, effects_before, hint, insert, op_name, same, shape_of, value_of

_MERGES = ("reshape", "view", "flatten", "contiguous", "_unsafe_view")


class GroupQueries(Pass):
    """Rewrite single-position grouped-query attention; everything else is left alone."""

    name: ClassVar[str] = "group_queries"
    optional: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        effects = effects_before(gm.graph)
        for node in list(gm.graph.nodes):
            if op_name(node) == "scaled_dot_product_attention":
                _rewrite(gm.graph, node, effects)
        drop_dead(gm.graph)


def _rewrite(graph: fx.Graph, node: fx.Node, effects: Mapping[fx.Node, int]) -> None:
    q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    mask, dropout = argument(node, 3, "attn_mask"), argument(node, 4, "dropout_p", 0.0)
    causal, scale = argument(node, 5, "is_causal", False), argument(node, 6, "scale")
    shape, bias = shape_of(q), shape_of(mask) or ()
    if shape is None or len(shape) != 4 or hint(shape[2]) != 1 or not isinstance(shape[2], int):
        return
    # With is_causal the only query row would see the first key alone; a mask per head cannot be shared by
    # rows.
    if causal or dropout or (len(bias) >= 3 and bias[-3] != 1) or (len(bias) >= 2 and bias[-2] != 1):
        return
    grouped = argument(node, 7, "enable_gqa", False)
    with graph.inserting_before(node):
        keys = k if grouped else _before_repeat(graph, k, node, effects)
        values = v if grouped else _before_repeat(graph, v, node, effects)
        kv = shape_of(keys) if keys is not None else None
        if keys is None or values is None or kv is None or shape_of(values) is None:
            return
        if not same(shape[:1], kv[:1]):  # broadcasting over the batch would change the result's shape
            return
        heads, shared = hint(shape[1]), hint(kv[1])
        if not heads or not shared or heads == shared or heads % shared or shape_of(values)[1] != kv[1]:  # type: ignore[index]
            return
        # By views that name no size but heads: others may be symbols, which are no constants of a graph.
        rows = insert(graph, torch.squeeze, q, 2, like=node)
        rows = insert(graph, torch.unflatten, rows, 1, (shared, heads // shared), like=node)
        new = insert(graph, F.scaled_dot_product_attention, rows, keys, values, attn_mask=mask, scale=scale, like=node)
        back = insert(graph, torch.unsqueeze, insert(graph, torch.flatten, new, 1, 2, like=node), 2, like=node)
    node.replace_all_uses_with(back)
    graph.erase_node(node)


def _before_repeat(graph: fx.Graph, node: Any, like: fx.Node, effects: Mapping[fx.Node, int]) -> fx.Node | None:
    """Keys or values `[b, kv heads, s, d]` before their heads were repeated; `None` when they were not, or when
    anything is written between the repeat and `like`: the repeat is a copy, which does not see that."""
    shape = shape_of(node)
    if shape is None or not isinstance(node, fx.Node) or effects[node] != effects[like]:
        return None
    if op_name(node) == "repeat_interleave":
        base, repeats = argument(node, 0, "input"), argument(node, 1, "repeats")
        one = isinstance(repeats, int) and argument(node, 2, "dim") in (1, -3)
        return base if one and isinstance(base, fx.Node) else None
    while op_name(node) in _MERGES and isinstance(argument(node, 0, "input"), fx.Node):
        node = argument(node, 0, "input")
        if effects.get(node) != effects[like]:
            return None
        value = value_of(node)
        # The repeat is a dimension of stride zero between heads and positions, whatever spelled it.
        if isinstance(value, torch.Tensor) and value.dim() == 5 and value.stride(2) == 0:
            b, heads, group, s, d = value.shape
            if same((b, heads * group, s, d), shape):
                return insert(graph, torch.select, node, 2, 0, like=like)
    return None
