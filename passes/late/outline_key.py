"""When two nodes of a graph mean the same to a compiler.

Sharing compiled code between two blocks is right only if nothing the compiler may look at differs. `describe`
turns arguments, constants and example values into hashable keys with that property; `tokens` numbers the
nodes of a graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.passes.late.outline_order import value

SMALL = 64  # tensor constants up to this many elements are compared by value

Key = Hashable

_SCALARS = (bool, int, float, complex, str, bytes)
_ATOMS = (torch.dtype, torch.device, torch.layout, torch.memory_format, type(None), type(Ellipsis))
# Node metadata that changes what Inductor generates; the rest (stack traces, module paths) differs between
# equal layers.
_MEANING = (
    "eager_input_vals", "should_fallback", "quant_options", "inductor_realize_to_strides",
    "low_precision_pointwise_barrier", "only_clone_these_tensors",
)  # fmt: skip
_CUSTOM = ("stream", "fallback_to_eager")


def describe(value: Any, leaf: Callable[[fx.Node], Key] | None = None) -> Key:
    """A hashable value that is equal exactly when a compiler cannot tell two arguments apart.

    Types are part of it (1, 1.0 and True are equal to Python), tensors stand for their dtype, sizes, strides,
    device and alignment, sizes for their expression, and what is not known here for its identity.
    """
    if isinstance(value, fx.Node) and leaf is not None:
        return leaf(value)
    if isinstance(value, _SCALARS):
        return type(value).__name__, repr(value) if isinstance(value, float | complex) else value
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, tuple | list):
        return type(value).__name__, *(describe(v, leaf) for v in value)
    if isinstance(value, Mapping):
        return "dict", *sorted((str(k), describe(v, leaf)) for k, v in value.items())
    if isinstance(value, slice):
        return "slice", *(describe(v, leaf) for v in (value.start, value.stop, value.step))
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(value).__name__, str(compat.size_expression(value))
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    return "object", id(value)


def _describe_tensor(t: torch.Tensor) -> Key:
    if t.layout is not torch.strided:
        return "tensor", id(t)
    sizes = tuple(s if isinstance(s, int) else str(compat.size_expression(s)) for s in (*t.shape, *t.stride()))
    offset = t.storage_offset()  # only its alignment reaches generated code
    place = offset * t.itemsize % 64 == 0 if isinstance(offset, int) else str(compat.size_expression(offset))
    return "tensor", type(t).__name__, t.dtype, t.device, sizes, place, t.is_conj(), t.is_neg()


def _meaning(node: fx.Node) -> Key:
    meta, custom = node.meta, node.meta.get("custom") or {}
    found = [(k, describe(meta[k])) for k in _MEANING if k in meta]
    return (*found, *((k, describe(custom[k])) for k in _CUSTOM if k in custom))


class Constants:
    """Keys of what `get_attr` nodes name: small tensors by value, graphs by structure, others by identity."""

    def __init__(self, owner: fx.GraphModule) -> None:
        self._owner = owner
        self._keys: dict[str, Key] = {}

    def __call__(self, node: fx.Node) -> Key:
        name = str(node.target)
        if name not in self._keys:
            self._keys[name] = self._key(operator.attrgetter(name)(self._owner))
        return self._keys[name]

    @staticmethod
    def _key(thing: Any) -> Key:
        if isinstance(thing, fx.GraphModule):
            return "graph", graph_key(thing)
        if (
            isinstance(thing, torch.Tensor)
            and not compat.is_fake(thing)
            and thing.device.type == "cpu"
            and thing.numel() <= SMALL
        ):
            return "constant", describe(thing), compat.constant_bytes(thing)
        return "object", id(thing)


def graph_key(gm: fx.GraphModule) -> Key:
    """Equal for subgraphs (of higher-order operators) that compute the same function."""
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    constants = Constants(gm)

    def one(node: fx.Node) -> Key:
        if node.op == "get_attr":
            return "get_attr", constants(node)
        target = node.target if node.op == "call_function" else node.op
        return (
            target,
            describe((node.args, dict(node.kwargs)), number.__getitem__),
            describe(value(node)),
            _meaning(node),
        )

    return tuple(one(node) for node in gm.graph.nodes)


def tokens(graph: fx.Graph, constants: Constants) -> dict[fx.Node, int]:
    """Per call, a small integer: equal when target, constants, argument structure and result are equal."""

    def leaf(node: fx.Node) -> Key:
        return ("get_attr", constants(node)) if node.op == "get_attr" else "node"

    table: dict[Key, int] = {}
    found = {}
    for node in graph.nodes:
        if node.op == "call_function":
            arguments = describe((node.args, dict(node.kwargs)), leaf)
            key = (node.target, arguments, describe(value(node)), _meaning(node))
            found[node] = table.setdefault(key, len(table))
    return found
