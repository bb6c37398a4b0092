"""Reading FX nodes by role instead of by spelling, and adding nodes that keep their shapes.

Dynamo writes `x.matmul(w)`, `torch.matmul(x, w)` and `x @ w` as three kinds of node. Passes ask for the
operation's name and get its operands, so that a new spelling is one table entry and not a new pattern.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx

from qcompile import compat

# Views, casts and joins: cheap, pure, and they keep values (so that a scheme's scale still means something).
PURE = frozenset(
    "T mT t transpose permute view reshape flatten unflatten chunk split unbind getitem narrow select slice "
    "unsqueeze squeeze expand expand_as contiguous clone to type float half bfloat16 double detach data "
    "cat stack swapaxes swapdims movedim view_as alias _get_data_attr".split()
)
_DROPPABLE = PURE | {"decode", "repeat", "repeat_interleave"}
# What Python's `x += y` and `x[i] = y` become. `and_` and its like only look like in-place operators.
_AUGMENTED = frozenset("iadd isub imul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift setitem".split())
_NOT_IN_PLACE = frozenset("and_ or_ not_ is_".split())
_REGIONS = frozenset("_enter_autocast _exit_autocast _set_grad_enabled".split())


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


_NOT_THE_USERS = ("/torch/", "/qcompile/ledger.py")  # `explain` calls the model from a function of its own


def source_line(node: fx.Node) -> str:
    """User's "file.py:12" for a node: the innermost frame outside torch, "" when unknown."""
    found = ""
    for line in str(node.meta.get("stack_trace", "")).splitlines():
        line = line.strip()
        if line.startswith('File "') and not any(part in line for part in _NOT_THE_USERS):
            path, _, rest = line[6:].partition('", line ')
            found = f"{path.rsplit('/', 1)[-1]}:{rest.split(',')[0]}"
    return found


def same(a: Sequence[Any] | None, b: Sequence[Any] | None) -> bool:
    """Whether two shapes are surely equal. Symbolic sizes are compared as expressions: asking whether they are equal
    would add a guard to the user's graph."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(compat.size_expression(x) == compat.size_expression(y) for x, y in zip(a, b, strict=True))


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands that a node writes to in place; all of them where that cannot be known."""
    if node.op == "call_module" or isinstance(node.target, torch._ops.HigherOrderOperator):
        return tuple(node.all_input_nodes)
    if node.op not in ("call_function", "call_method"):
        return ()
    name, found = op_name(node), list(_tensors(node.kwargs.get("out")))
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
    if isinstance(node.target, torch._ops.OpOverload):
        in_place = node.target._schema.is_mutable
    if in_place or name in _AUGMENTED or _asks_in_place(node):
        found += _tensors(node.args[0] if node.args else list(node.kwargs.values()))
    return tuple(found)


def effects_before(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node, how many nodes before it write in place or change a mode (autocast, grad). Two nodes that read
    the same operand compute from the same contents, in the same mode, when their numbers are equal."""
    count, found = 0, {}
    for node in graph.nodes:
        found[node] = count
        count += bool(writes(node)) or op_name(node) in _REGIONS
    return found


def drop_dead(graph: fx.Graph) -> None:
    """Erase unread views, casts and decodes. (`Graph.eliminate_dead_code` would also erase `cache.index_copy_(...)`:
    it does not know which methods write.)"""
    for node in reversed(graph.nodes):
        if not node.users and op_name(node) in _DROPPABLE and not writes(node):
            graph.erase_node(node)


def _tensors(value: Any) -> Iterator[fx.Node]:
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _asks_in_place(node: fx.Node) -> bool:
    """`F.relu(x, inplace=True)` and its like, also by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if isinstance(node.target, FunctionType):
        code = node.target.__code__
        names = code.co_varnames[: code.co_argcount]
        return "inplace" in names and bool(argument(node, names.index("inplace"), "inplace", False))
    return False
