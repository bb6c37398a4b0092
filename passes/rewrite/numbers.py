"""Python floats of an update become tensors, so that a schedule compiles nothing.

Dynamo hands a float that may change to a graph as a float64 tensor, takes its number with `item()` and goes on with that: what
AOTAutograd cannot turn back into tensors (`alpha=`, `value=`, the weight of a `lerp`, most of what works on lists) it makes a
constant, and every value of a learning rate would be a graph of its own. Here nothing is left for it: arithmetic of numbers is
arithmetic of float64 tensors without dimensions, which has the same roundings; where a number meets a tensor it is rounded to
float32, as torch rounds it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import fx

from qcompile.passes.base import Pass, PassContext
from qcompile.passes.match import insert, op_name, value_of

_ARITHMETIC: Mapping[Any, Callable[..., Any]] = {
    **{f: f for f in (operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg)},
    math.sqrt: torch.sqrt,
    torch.sym_sqrt: torch.sqrt,
    torch.sym_max: torch.maximum,
    torch.sym_min: torch.minimum,
}
_ALPHA = frozenset("add add_ sub sub_ _foreach_add _foreach_add_ _foreach_sub _foreach_sub_".split())
_VALUE = frozenset(
    "addcmul addcmul_ addcdiv addcdiv_ _foreach_addcmul _foreach_addcmul_ _foreach_addcdiv _foreach_addcdiv_".split()
)


class Numbers(Pass):
    """Floats that change between updates are computed with as tensors."""

    name: ClassVar[str] = "numbers"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        wide: dict[fx.Node, fx.Node] = {}
        for node in list(gm.graph.nodes):
            if not any(n in wide for n in node.all_input_nodes) and op_name(node) != "item":
                continue
            with gm.graph.inserting_before(node):
                if op_name(node) == "item" and isinstance(value_of(node), torch.SymFloat):
                    wide[node] = insert(gm.graph, torch.Tensor.to, node.args[0], torch.float64, like=node)
                elif node.target in _ARITHMETIC and isinstance(value_of(node), torch.SymFloat):
                    args = [_float64(gm.graph, wide.get(a, a), node) for a in node.args]
                    wide[node] = insert(gm.graph, _ARITHMETIC[node.target], *args, like=node)
                elif node.op in ("call_function", "call_method") and not isinstance(value_of(node), _PYTHON):
                    _meet(gm.graph, node, wide)
        for node in reversed(gm.graph.nodes):
            if node in wide and not node.users:
                gm.graph.erase_node(node)


_PYTHON = (torch.SymFloat, torch.SymInt, torch.SymBool, bool, int, float)


def _float64(graph: fx.Graph, value: Any, like: fx.Node) -> Any:
    """An operand of arithmetic: functions that take tensors alone get no Python numbers."""
    if isinstance(value, fx.Node) or like.target not in (torch.sym_max, torch.sym_min):
        return value
    return insert(graph, torch.scalar_tensor, value, dtype=torch.float64, like=like)


def _meet(graph: fx.Graph, node: fx.Node, wide: Mapping[fx.Node, fx.Node]) -> None:
    """Give an operation on tensors its numbers as tensors."""
    name, kwargs = op_name(node), dict(node.kwargs)
    near = next((v for n in node.all_input_nodes if isinstance(v := value_of(n), torch.Tensor) and v.dim()), None)
    device = None if near is None else near.device

    def number(n: fx.Node) -> fx.Node:
        if n not in wide:
            return n
        tensor = insert(graph, torch.Tensor.to, wide[n], torch.float32, like=node)
        return (
            tensor
            if device is None or device.type == "cpu"
            else insert(graph, torch.Tensor.to, tensor, device, like=node)
        )

    args = list(fx.map_arg(node.args, number))
    if name in _ALPHA and kwargs.get("alpha") in wide:
        args[1] = _scaled(graph, args[1], number(cast("fx.Node", kwargs.pop("alpha"))), node)
    if name in _VALUE and kwargs.get("value") in wide:
        # value * (a op b), of which the first product or quotient is the operation's own in torch, too
        factor, lists = number(cast("fx.Node", kwargs.pop("value"))), name.startswith("_foreach")
        quotient = "addcdiv" in name
        function = (
            (torch._foreach_div if quotient else torch._foreach_mul)
            if lists
            else (torch.div if quotient else torch.mul)
        )
        term = graph.call_function(function, (args[1], args[2]))
        term.meta = _meta(args[1], node)
        replacement = ("_foreach_add" if lists else "add") + "_" * name.endswith("_")
        new = graph.call_function(_FUNCTIONS[replacement], (args[0], _scaled(graph, term, factor, node)))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        return
    node.args, node.kwargs = tuple(args), fx.map_arg(kwargs, number)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "add": torch.add,
    "add_": torch.Tensor.add_,
    "_foreach_add": torch._foreach_add,
    "_foreach_add_": torch._foreach_add_,
}


def _scaled(graph: fx.Graph, value: Any, factor: fx.Node, like: fx.Node) -> fx.Node:
    """`value * factor`, of a tensor or of each tensor in a list."""
    lists = isinstance(value, list | tuple) or isinstance(value_of(value), list | tuple)
    node = graph.call_function(torch._foreach_mul if lists else torch.mul, (value, factor))
    node.meta = _meta(value, like)
    return node


def _meta(value: Any, like: fx.Node) -> dict[str, Any]:
    """What is known of a result that has the shapes of `value`."""
    example = [value_of(v) for v in value] if isinstance(value, list | tuple) else value_of(value)
    return {**{k: v for k, v in like.meta.items() if k == "stack_trace"}, "example_value": example}
