"""Which operators read a weight without multiplying by it, so that every other one can be named.

A weight that no rewrite reaches must not look like no weight at all: recurrent layers, fused encoder layers, custom
operators, a spelling that nobody thought of. So the question is asked the other way round: an operator that reads a
matrix of parameters beside something else is listed, unless it is known to keep values apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache

import torch
from torch import fx

from qcompile.passes.match import PURE, hint, shape_of, value_of

# Elementwise under names that ATen does not know, or does not mark as pointwise.
_ELEMENTWISE = frozenset(
    "truediv floordiv floor_divide mod and_ or_ xor lshift rshift invert pos is_ is_not multiply subtract divide rsub "
    "greater less greater_equal less_equal not_equal complex polar type_as prelu dropout arctan2 "
    "iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift radd rmul rtruediv rpow".split()
)
# Normalisations, losses, lookups by index, writes by index, comparisons of whole tensors.
_APART = frozenset(
    "layer_norm group_norm rms_norm batch_norm instance_norm native_layer_norm normalize mse_loss l1_loss "
    "smooth_l1_loss huber_loss kl_div cross_entropy nll_loss binary_cross_entropy binary_cross_entropy_with_logits "
    "gather take take_along_dim put bucketize searchsorted isin grid_sample interpolate pad setitem copy fill "
    "select_scatter slice_scatter diagonal_scatter equal allclose isclose broadcast_tensors meshgrid broadcast_to "
    "new_zeros new_ones new_empty new_full size dim numel stride view_as_complex view_as_real set".split()
)
_PREFIXES = ("index", "scatter", "masked_", "_foreach_", "_fused_")


@cache
def keeps_apart(name: str) -> bool:
    """Whether an operator (by `match.op_name`) reads tensors without contracting them with each other."""
    if ":" in name or "." in name:  # somebody else's, but for the levels that torch.func puts around tensors
        return name.startswith(("torch._functorch.", "torch._C._functorch."))
    plain = name.strip("_")
    if name in PURE or plain in _ELEMENTWISE or plain in _APART or name.startswith(_PREFIXES):
        return True
    packet = getattr(torch.ops.aten, plain, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def matrices_read(node: fx.Node, roots: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The float matrices made of parameters that an operator reads beside something else.

    Args:
        roots: `weights.parameter_roots` of the graph.
    """
    return [n for n in node.all_input_nodes if n in roots and _is_matrix(n)] if node not in roots else []


def _is_matrix(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.dim() >= 2 and value.is_floating_point()


def rows_read(node: fx.Node, roots: Mapping[fx.Node, fx.Node]) -> int | None:
    """Rows of the first activation: all its dimensions but the last; `None` where a size has no example."""
    for operand in node.all_input_nodes:
        value = value_of(operand)
        if operand not in roots and isinstance(value, torch.Tensor) and value.is_floating_point():
            sizes = [hint(size) for size in value.shape[:-1]]
            return None if None in sizes else math.prod(size for size in sizes if size is not None)
    return 1


def elements(node: fx.Node) -> int:
    """Number of elements of a tensor; parameters have static sizes."""
    return math.prod(hint(size) or 0 for size in shape_of(node) or ())
