"""Reading FX nodes by role instead of by spelling, and adding nodes that keep their shapes.

Dynamo writes `x.matmul(w)`, `torch.matmul(x, w)` and `x @ w` as three kinds of node. Passes ask for the
operation's name and get its operands, so that a new spelling is one table entry and not a new pattern.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile import compat


def op_name(node: fx.Node) -> str:
    """Bare name of what a node computes ("matmul", "linear", "getitem"), "" for placeholders and outputs."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    if node.target is getattr:
        return str(node.args[1])
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    name = getattr(node.target, "__name__", "")
    return {"concat": "cat", "concatenate": "cat"}.get(name, name)


def value_of(node: Any) -> Any:
    """Example (fake) value of a node, or the constant itself."""
    if isinstance(node, fx.Node):
        return node.meta.get("example_value", node.meta.get("val"))
    return node


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Shape of a tensor node (sizes may be symbolic), `None` when it is no tensor."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def hint(size: Any) -> int | None:
    """A size as an integer: itself, or the example value behind a symbol, or `None` when there is none."""
    return compat.size_hint(size)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def insert(graph: fx.Graph, target: Callable[..., Any], *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Add a call at the graph's insert point; source location from `like`, example value computed on
    fakes."""
    node = graph.call_function(target, args, kwargs)
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom"):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    values = fx.map_arg((args, kwargs), lambda n: value_of(n))
    with compat.fake_mode(graph):
        node.meta["example_value"] = target(*values[0], **values[1])
    return node


def pick(graph: fx.Graph, value: fx.Node, index: int, like: fx.Node) -> fx.Node:
    """`value[index]` of a tuple."""
    return insert(graph, operator.getitem, value, index, like=like)


def source_line(node: fx.Node) -> str:
    """User's "file.py:12" for a node: the innermost frame outside torch, "" when unknown."""
    found = ""
    for line in str(node.meta.get("stack_trace", "")).splitlines():
        line = line.strip()
        if line.startswith('File "') and "/torch/" not in line:
            path, _, rest = line[6:].partition('", line ')
            found = f"{path.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return found
