"""What comes into a graph, and which nodes are views of it: an update of a parameter may be written to any of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from qcompile.ir.stochastic_cast import HALVES
from qcompile.passes.base import PassContext
from qcompile.passes.match import memory_of, op_name, value_of, writes


class Leaves:
    """The tensors that come into a graph: which are in 16 bits, which are real, which are written.

    Attributes:
        real: parameters, buffers and example inputs, by node; one node for each tensor of the graph module.
        narrow: those of 16 bits, in order.
        home: for each node of the graph as it came, the leaf that it is a view of, or is; and for what stands for a leaf.
    """

    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        self.graph = gm.graph
        self.real: dict[fx.Node, Any] = {}
        known: dict[str, fx.Node] = {}
        for node in list(gm.graph.nodes):
            if node.op == "placeholder":
                self.real[node] = ctx.inputs.get(node.name)
            elif node.op == "get_attr":
                first = known.setdefault(str(node.target), node)
                if first is node:
                    self.real[node] = _attribute(gm, str(node.target))
                else:
                    node.replace_all_uses_with(first)
                    gm.graph.erase_node(node)
        self.narrow = [node for node in self.real if getattr(value_of(node), "dtype", None) in HALVES]
        self._whole = set(self.real)
        self.home: dict[fx.Node, fx.Node] = {}
        for node in gm.graph.nodes:
            memory = memory_of(node)
            leaf = None if memory is None else self._leaf(node, memory)
            if leaf is not None:
                self.home[node] = leaf

    def stand(self, wide: fx.Node, leaf: fx.Node) -> None:
        """From here on, views are of `wide` where they were of the leaf."""
        self.home[wide] = leaf
        self._whole.add(wide)

    def _leaf(self, node: fx.Node, memory: int) -> fx.Node | None:
        """The leaf in this memory that a node was made of. (Several may lie in one: slices of a flat buffer.)"""
        if node in self.home:
            return self.home[node] if memory_of(node) == memory else None
        if node in self.real:
            return node if memory_of(node) == memory else None
        for source in node.all_input_nodes:
            if memory_of(source) == memory or isinstance(value_of(source), list | tuple):
                found = self._leaf(source, memory)
                if found is not None:
                    return found
        return None

    def written(self) -> dict[fx.Node, fx.Node]:
        """The leaves that the graph writes to, also through views, with the last node that does."""
        return {
            self.home[operand]: node for node in self.graph.nodes for operand in _written(node) if operand in self.home
        }

    def again(self, node: fx.Node, base: fx.Node) -> fx.Node:
        """The view that `node` is of its leaf, of `base`: made at the graph's insert point."""
        leaf = self.home[node]
        if node in self._whole:
            return base
        written = [n for n in writes(node) if self.home.get(n) is leaf]
        if written:  # what writes in place returns what it wrote to
            return self.again(written[0], base)
        made = {n: self.again(n, base) for n in node.all_input_nodes if self.home.get(n) is leaf}
        lists = [n for n in node.all_input_nodes if isinstance(value_of(n), list | tuple)]
        if lists:  # one of the pieces of a tensor, or of the results of an operation on a list
            source = lists[0]
            if writes(source):
                return self.again(source.args[0][node.args[1]], base)  # type: ignore[index,arg-type]
            pieces = {n: self.again(n, base) for n in source.all_input_nodes if self.home.get(n) is leaf}
            made[source] = self.graph.node_copy(source, lambda n: pieces.get(n, n))
        return self.graph.node_copy(node, lambda n: made.get(n, n))


def _attribute(gm: fx.GraphModule, target: str) -> Any:
    value: Any = gm
    for name in target.split("."):
        value = getattr(value, name)
    return value


def _written(node: fx.Node) -> Sequence[fx.Node]:
    """What a node writes to; `torch._fused_adam_` and its like write to all lists but the gradients, their second."""
    if op_name(node).startswith("_fused_") and node.op == "call_function":
        return [n for i, group in enumerate(node.args) if isinstance(group, list | tuple) and i != 1 for n in group]
    return writes(node)
