"""Everything in an update that would be in 16 bits is in float32, where the update does not say otherwise.

Dynamo's graph of an update has the types of the parameters: what is made of them follows when they become float32, but not what
names a type. A tensor that is made in 16 bits, as new state is, is made in float32 here. A cast to 16 bits is what somebody
asked for and stays; where its result meets float32, which most operations on lists and `lerp` do not take, it is widened again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.stochastic_cast import HALVES
from qcompile.passes.match import insert, memory_of, op_name, value_of

_LIKE = frozenset("zeros_like ones_like full_like empty_like rand_like randn_like".split())
_NEW = frozenset("new_zeros new_ones new_full new_empty new_tensor".split())
_CASTS = frozenset("half bfloat16".split())
_TAKES_ANY = frozenset("copy_ _foreach_copy_".split())  # of another type


def asks_for_half(node: fx.Node) -> bool:
    """Whether a node names a type of 16 bits."""
    named = [*node.args, *node.kwargs.values()]
    return op_name(node) in _CASTS or any(isinstance(x, torch.dtype) and x in HALVES for x in named)


def casts_of_nothing(graph: fx.Graph) -> list[fx.Node]:
    """Casts to 16 bits of what is in them: somebody who names a type and means the parameter's."""
    named = [node for node in graph.nodes if asks_for_half(node) and node.all_input_nodes]
    return [node for node in named if memory_of(node) in map(memory_of, node.all_input_nodes)]


def one_width(graph: fx.Graph, wide: Iterable[fx.Node]) -> None:
    """Carry on the types of `wide`, float32 copies of what comes into the graph in 16 bits.

    Example values of nodes stay those of Dynamo's graph: what leaves the graph has the types that it promised.
    """
    known = set(wide)
    while not _carried(graph, known):
        pass


def _carried(graph: fx.Graph, wide: set[fx.Node]) -> bool:
    """One walk along the graph, which adds to `wide`; False when something was widened on the way: what reads it is to be
    seen again."""
    sources: dict[int | None, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output" or node in wide:
            continue
        if asks_for_half(node) and _makes(node):
            node.args, node.kwargs = _float32(node.args), _float32(node.kwargs)
            wide.add(node)
        elif asks_for_half(node) or wide.isdisjoint(node.all_input_nodes):
            sources.setdefault(memory_of(node), node)
        else:
            for operand in node.all_input_nodes if op_name(node) not in _TAKES_ANY else ():
                if operand not in wide and getattr(value_of(operand), "dtype", None) in HALVES:
                    wide.add(_widened(graph, sources[memory_of(operand)]))  # the whole of what it may be a view of
                    return False
            if _in_half(value_of(node)):
                wide.add(node)
    return True


def _makes(node: fx.Node) -> bool:
    """Whether the node makes a tensor of nothing but its type, its shape and numbers."""
    name = op_name(node)
    return name in _LIKE or name in _NEW or not any(isinstance(value_of(n), Tensor) for n in node.all_input_nodes)


def _float32(arguments: Any) -> Any:
    kept = [torch.float32 if isinstance(x, torch.dtype) and x in HALVES else x for x in _values(arguments)]
    return dict(zip(arguments, kept, strict=True)) if isinstance(arguments, dict) else tuple(kept)


def _values(arguments: Any) -> Iterable[Any]:
    return arguments.values() if isinstance(arguments, dict) else arguments


def _in_half(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return any(isinstance(v, Tensor) and v.dtype in HALVES for v in values)


def _widened(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """A float32 copy of a node, which everything behind reads in its place."""
    users = list(node.users)
    with graph.inserting_after(node):
        wide = insert(graph, torch.Tensor.to, node, torch.float32, like=node)
    for user in users:
        user.replace_input_with(node, wide)
    return wide
