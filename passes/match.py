"""Reading FX nodes by role instead of by spelling, and adding nodes that keep their shapes.

Dynamo writes `x.matmul(w)`, `torch.matmul(x, w)` and `x @ w` as three kinds of node. Passes ask for the
operation's name and get its operands, so that a new spelling is one table entry and not a new pattern.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
# torch and torch.nn.functional have them at different places among these four
_STATISTICS = ((1, "running_mean"), (2, "running_var"), (3, "running_mean"), (4, "running_var"))
# Functions that write to operands which their names do not tell: the argument that asks for it, and the operands.
_HIDDEN: Mapping[str, tuple[tuple[int, str], tuple[tuple[int, str], ...]]] = {
    "embedding": ((3, "max_norm"), ((1, "weight"),)),
    "embedding_bag": ((3, "max_norm"), ((1, "weight"),)),
    "batch_norm": ((5, "training"), _STATISTICS),
    "instance_norm": ((5, "use_input_stats"), _STATISTICS),
}
_REGIONS = frozenset(
    "_enter_autocast _exit_autocast _set_grad_enabled _enter_inference_mode _exit_inference_mode".split()
)
# Where a bare name means what torch means by it. The same name from elsewhere is somebody else's function.
_NAMESPACES = frozenset("aten prims qcompile".split())
_MODULES = frozenset(
    "torch torch._C torch._C._nn torch._C._linalg torch._C._special torch._C._fft torch.functional "
    "torch.nn.functional torch._tensor torch.amp.autocast_mode torch.autograd.grad_mode _operator builtins math".split()
)
_CANONICAL = {"concat": "cat", "concatenate": "cat", "linalg_matmul": "matmul", "imatmul": "matmul"}
# Higher-order operators whose bodies take the last operands of the call, in order.
_PLAIN_CALLS = frozenset("cond while_loop scan map_impl wrap invoke_subgraph tag_activation_checkpoint".split())
# Packages whose functions write only where their names or arguments tell. (einops puts its own into graphs.)
_WITHOUT_SURPRISES = frozenset("torch _operator builtins math einops".split())
_Op = torch._ops.OpOverload | torch._ops.OpOverloadPacket


# Key of a node's meta: the node of Dynamo's graph in whose place it stands, where somebody wants to know.
ORIGIN = "qcompile_origin"


def op_name(node: fx.Node) -> str:
    """Bare name of what a node computes ("matmul", "linear", "getitem"), "" for placeholders and outputs. What is not
    torch's own (or this package's) has a qualified name: "mylib::linear", "my.module.linear"."""
    target = node.target
    if node.op == "call_method":
        name = str(target)
        return name.strip("_") if name.strip("_") in _DUNDER and name.startswith("__") else name
    if node.op != "call_function":
        return ""
    if target is getattr:
        return str(node.args[1])
    if isinstance(target, _Op):
        whole = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        space, _, name = str(whole).partition("::")
        return name if space in _NAMESPACES else f"{space}::{name}"
    name, home = getattr(target, "__name__", type(target).__name__), _home(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{name}"
    # By identity: a wrapper may carry the name and the module of what it wraps.
    method = hasattr(target, "__objclass__")
    if home not in _MODULES or not (method or getattr(sys.modules.get(home), name, None) is target):
        return f"{home}.{name}"
    return _CANONICAL.get(name, name)


def _home(target: Any) -> str:
    """Module of a callable; of the class that it is a method of."""
    return str(getattr(target, "__module__", None) or getattr(getattr(target, "__objclass__", None), "__module__", ""))


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
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack", "custom", ORIGIN, *compat.RECOMPUTE_MARKS):
        if key in like.meta:
            node.meta[key] = like.meta[key]
    values = fx.map_arg((args, kwargs), lambda n: value_of(n))
    # Nothing is recorded: what the user hangs on saved tensors is not for these.
    with compat.fake_mode(graph), torch.no_grad():
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


def same_tensor(a: Any, b: Any) -> bool:
    """Whether two example values surely describe the same kind of value: shape and dtype of tensors, the expression of
    sizes."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return same(a.shape, b.shape) and a.dtype == b.dtype
    return type(a) is type(b) and not isinstance(a, torch.Tensor) and same((a,), (b,))


def writes(node: fx.Node) -> tuple[fx.Node, ...]:
    """The operands that a node writes to in place; all of them where that cannot be known."""
    if node.op not in ("call_function", "call_method", "call_module"):
        return ()
    target = node.target
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _written_inside(node)
    if isinstance(target, _Op):
        return tuple(dict.fromkeys(_written_by_schema(node)))
    if _foreign(node):
        return tuple(node.all_input_nodes)
    name, found = op_name(node), list(_tensors(node.kwargs.get("out")))
    in_place = name.endswith("_") and not name.endswith("__") and name not in _NOT_IN_PLACE
    if in_place or name in _AUGMENTED or _asks_in_place(node):
        found += _tensors(node.args[0] if node.args else list(node.kwargs.values()))
    if name in _HIDDEN:
        asked, operands = _HIDDEN[name]
        found += [n for item in operands for n in _tensors(argument(node, *item)) if argument(node, *asked)]
    return tuple(dict.fromkeys(found))


def effects_before(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node, how many nodes before it write in place or change a mode (autocast, grad). Two nodes that read
    the same operand compute from the same contents, in the same mode, when their numbers are equal."""
    count, found = 0, {}
    for node in graph.nodes:
        found[node] = count
        count += bool(writes(node)) or op_name(node) in _REGIONS or _foreign(node) or any(_written_arguments(node))
    return found


def recording(graph: fx.Graph, outside: bool) -> set[fx.Node]:
    """The nodes that run while autograd records, when it does (or not) `outside` of the graph."""
    now, found, before = outside, set(), []
    for node in graph.nodes:
        if now:
            found.add(node)
        name = op_name(node)
        if name == "_set_grad_enabled":
            now = bool(node.args[0])
        elif name == "_enter_inference_mode":
            before.append(now)
            now = not node.args[0]
        elif name == "_exit_inference_mode" and before:
            now = before.pop()
    return found


def transformed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes inside `torch.func` transforms (vmap, grad, jvp, ...): their tensors have a level around them."""
    depth, found = 0, set()
    for node in graph.nodes:
        name = op_name(node)
        depth += name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")
        if depth > 0:
            found.add(node)
    return found


def memory_of(node: fx.Node) -> int | None:
    """Which storage a node's example value lives in; views share one."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    return int(compat.without_levels(value).untyped_storage()._cdata)


def bodies(node: fx.Node) -> list[tuple[fx.GraphModule, dict[fx.Node, Any]]]:
    """The graphs inside a higher-order call, each with what its placeholders stand for (nothing, where the operator's
    calling convention is not known)."""
    owner = node.graph.owning_module
    leaves = list(_leaves((node.args, node.kwargs)))
    inner = {leaf: getattr(owner, str(leaf.target), None) for leaf in leaves if _is_attribute(leaf)}
    operands = [x for x in _leaves(node.args) if not (_is_attribute(x) and isinstance(inner[x], fx.GraphModule))]
    plain, found = getattr(node.target, "__name__", "") in _PLAIN_CALLS, []
    for body in dict.fromkeys(module for module in inner.values() if isinstance(module, fx.GraphModule)):
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        known = plain and len(inputs) <= len(operands)
        found.append((body, dict(zip(inputs, operands[len(operands) - len(inputs) :], strict=True)) if known else {}))
    return found


def written_placeholders(body: fx.GraphModule, but: Collection[str] = ()) -> list[fx.Node]:
    """The inputs that a graph writes to, also through views; what operators of the names `but` write is left out."""
    operands = {operand for node in body.graph.nodes if op_name(node) not in but for operand in writes(node)}
    memory = {memory_of(operand) for operand in operands}
    inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
    return [node for node in inputs if node in operands or memory_of(node) in memory or None in memory]


def drop_dead(graph: fx.Graph) -> None:
    """Erase unread views, casts and decodes. (`Graph.eliminate_dead_code` would also erase `cache.index_copy_(...)`:
    it does not know which methods write.)"""
    for node in reversed(graph.nodes):
        if not node.users and op_name(node) in _DROPPABLE and not writes(node):
            graph.erase_node(node)


_DUNDER = _AUGMENTED | {"matmul"}


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _tensors(value: Any) -> Iterator[fx.Node]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, fx.Node))


def _is_attribute(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _foreign(node: fx.Node) -> bool:
    """Whether nothing is known about what a node calls: a module, or a function of somebody else."""
    if node.op == "call_module":
        return True
    if node.op != "call_function" or isinstance(node.target, _Op | torch._ops.HigherOrderOperator):
        return False
    # Where a function was written, whatever it says of itself.
    written = node.target.__globals__["__name__"] if isinstance(node.target, FunctionType) else _home(node.target)
    return str(written).partition(".")[0] not in _WITHOUT_SURPRISES


def _written_arguments(node: fx.Node) -> Iterator[tuple[int, Any]]:
    """The arguments of an operator's schema that it writes to, with their positions. Of a packet, those of any overload
    (but for `out=`, which is there only when it is given)."""
    target = node.target
    if not isinstance(target, _Op):
        return
    overloads = (
        [target] if isinstance(target, torch._ops.OpOverload) else [getattr(target, o) for o in target.overloads()]
    )
    for overload in overloads:
        for position, item in enumerate(overload._schema.arguments):
            written = item.alias_info is not None and item.alias_info.is_write
            if written and (len(overloads) == 1 or not item.kwarg_only or item.name in node.kwargs):
                yield position, item


def _written_by_schema(node: fx.Node) -> Iterator[fx.Node]:
    for position, item in _written_arguments(node):
        yield from _tensors(node.kwargs.get(item.name) if item.kwarg_only else argument(node, position, item.name))


def _written_inside(node: fx.Node) -> tuple[fx.Node, ...]:
    found: dict[fx.Node, None] = {}
    inside = bodies(node)
    for body, operands in inside:
        inputs = written_placeholders(body)
        if any(p not in operands for p in inputs):
            return tuple(node.all_input_nodes)
        found |= dict.fromkeys(n for p in inputs for n in _tensors(operands[p]))
    return tuple(found) if inside else tuple(node.all_input_nodes)


def _asks_in_place(node: fx.Node) -> bool:
    """`F.relu(x, inplace=True)` and its like, also by position."""
    if "inplace" in node.kwargs:
        return bool(node.kwargs["inplace"])
    if isinstance(node.target, FunctionType):
        code = node.target.__code__
        names = code.co_varnames[: code.co_argcount]
        return "inplace" in names and bool(argument(node, names.index("inplace"), "inplace", False))
    return False
