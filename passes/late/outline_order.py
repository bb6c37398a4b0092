"""An execution order in which repeated blocks of a functional graph look alike.

AOTAutograd writes all input mutations at the end of the graph, and size arithmetic where it is first needed:
a layer that writes a cache, or the first of many layers, would look different from its copies. Three moves
repair that. Each is legal by itself, and what this module does not model it refuses.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx


class NotOutlined(Exception):
    """The graph is left as it is; the text says why. Internal: `outline` turns it into a report."""


def value(node: fx.Node) -> Any:
    """The example (fake) value of a node, None when it has none."""
    return node.meta.get("val")


def is_size(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymInt)


def written(node: fx.Node) -> fx.Node | None:
    """What the node writes to, if it is a functional graph's way to mutate: `copy_(input, value)`."""
    target = node.args[0] if node.target is torch.ops.aten.copy_.default else None
    return target if isinstance(target, fx.Node) else None


# Operators whose schema does not admit that they may return their argument, or that compilers replace by it.
_MAY_ALIAS = {"_unsafe_view", "reshape", "_reshape_alias", "contiguous", "to", "clone", "lift_fresh_copy"}


def _aliases(node: fx.Node) -> bool:
    """Whether a result of the node may share memory with an argument."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    return schema.name.split("::")[-1] in _MAY_ALIAS or any(r.alias_info is not None for r in schema.returns)


def alias_sets(roots: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Per root, the nodes whose value may be a view of it (itself included)."""
    result = {}
    for root in roots:
        seen, todo = {root}, [root]
        while todo:
            for user in todo.pop().users:
                if user not in seen and user.op == "call_function" and not written(user) and _aliases(user):
                    seen.add(user)
                    todo.append(user)
        result[root] = seen
    return result


def _check(graph: fx.Graph) -> None:
    """Refuse what is not modelled: writes to other things than inputs, sizes made from data, module calls."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_method"):
            raise NotOutlined(f"{node.name} is a {node.op}: not a functional graph")
        if node.op != "call_function":
            continue
        if node.meta.get("unbacked_bindings"):
            raise NotOutlined(f"{node.name} ({node.target}) makes a size that depends on data")
        schema = getattr(node.target, "_schema", None)
        if schema is None or not schema.is_mutable:
            continue
        target = written(node)
        if target is None or target.op != "placeholder" or any(user.op != "output" for user in node.users):
            raise NotOutlined(f"{node.name} ({node.target}) writes in place")


def execution_order(graph: fx.Graph) -> tuple[list[fx.Node], dict[fx.Node, set[fx.Node]]]:
    """The calls in an order in which repeated blocks look alike, and the alias sets of the written inputs.

    Three moves: size arithmetic on graph inputs leaves the order (each segment repeats it), an item of a
    tuple follows the tuple, a write to an input follows its value and the last reader of the old contents.

    Raises:
        NotOutlined: the graph writes to something else than an input, or makes sizes from data.
    """
    _check(graph)
    writes = {n: target for n in graph.nodes if n.op == "call_function" and (target := written(n))}
    aliases = alias_sets(writes.values())
    if len(aliases) < len(writes):
        raise NotOutlined("one input is written twice")
    # A write whose value is a view of another written input must keep its place among the writes.
    others = [(write, seen) for write, root in writes.items() for r, seen in aliases.items() if r is not root]
    sunk = {} if any(write.args[1] in seen for write, seen in others) else writes

    plain: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node not in sunk and node not in plain and not remade(node):
            plain[node] = None
            if not isinstance(value(node), torch.Tensor):
                plain.update((user, None) for user in node.users if user.target is operator.getitem)
    place = {node: i for i, node in enumerate(plain)}
    behind: dict[int, list[fx.Node]] = defaultdict(list)
    for write, root in sunk.items():
        readers = [user for alias in aliases[root] for user in alias.users if user not in sunk]
        behind[max(place.get(n, -1) for n in (*readers, *write.all_input_nodes))].append(write)
    order = behind[-1]
    for node, i in place.items():
        order += [node, *behind[i]]
    return order, aliases


_SIZE_OF = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default)


def remade(node: fx.Node) -> bool:
    """Whether the node is size arithmetic on graph inputs alone, so that every segment can redo it."""
    if node.op != "call_function" or not is_size(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target not in _SIZE_OF:
        return False
    if any(user.op == "output" for user in node.users):
        return False
    return all(n.op == "placeholder" or remade(n) for n in node.all_input_nodes)
