"""Parameters in 16 bits that a graph updates are updated in float32 and written back by stochastic rounding.

It knows no optimizer. Every 16-bit tensor that comes into the graph is widened where it is first read, so that the whole update
is float32, in whatever operations it is written; what the graph writes in place goes back once, after the last write:
parameters rounded stochastically (`qcompile::rounded`), everything else as torch rounds. `steps` makes single operators of the
updates later.

A graph that writes no 16-bit parameter is left as it is: a model's forward, or an update in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.errors import QCError
from qcompile.ir.stochastic_cast import HALVES
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.match import insert, memory_of, op_name, value_of, writes
from qcompile.runtime.updates import Counter

LEARNING_RATE = "lr"  # what torch's schedules change in a group


def learning_rates_as_inputs(gm: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Where `gm` is the step of an optimizer with 16-bit parameters: have Dynamo trace it with learning rates as inputs.

    At first it takes them for constants. It is asked once, before anything is compiled, and then comes again.
    """
    values = [*gm.parameters(), *inputs]
    narrow = [p for p in values if isinstance(p, Tensor) and p.dtype in HALVES]
    if narrow and compat.traced_optimizer(narrow) is not None:
        compat.trace_again_with_numbers(LEARNING_RATE)


class Updates(Pass):
    """16-bit parameters are updated in float32 and written by stochastic rounding."""

    name: ClassVar[str] = "updates"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        leaves = _Leaves(gm, ctx)
        written = leaves.written()
        parameters = _parameters([leaves.real[node] for node in written])
        targets = [node for node in leaves.narrow if node in written and id(leaves.real[node]) in parameters]
        if not targets:
            if parameters:
                ctx.plan.notes.append(f"{self.name}: no parameter of 16 bits is updated here, nothing is rounded")
            return
        values = [leaves.real[node] for node in targets]
        rows = _supply(gm.graph, ctx, targets, values, Counter(compat.traced_optimizer(values)))
        wide = {node: _widened(gm.graph, node) for node in leaves.narrow if any(u.op != "output" for u in node.users)}
        _narrow_outputs(gm.graph)
        for node in leaves.narrow:
            if node in written and node in wide:
                _write_back(gm.graph, node, wide[node], written[node], rows.get(node))


def _parameters(written: Sequence[Any]) -> set[int]:
    """Ids of the tensors that are parameters, by their type or because an optimizer holds them."""
    tensors = [value for value in written if isinstance(value, Tensor)]
    optimizer = compat.traced_optimizer(tensors)
    held = {id(p) for group in (optimizer.param_groups if optimizer else ()) for p in group["params"]}
    return {id(t) for t in tensors if isinstance(t, torch.nn.Parameter) or id(t) in held}


class _Leaves:
    """The tensors that come into a graph: which are in 16 bits, which are real, which are written.

    Attributes:
        real: parameters, buffers and example inputs, by node; one node for each tensor of the graph module.
        narrow: those of 16 bits, in order.
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

    def written(self) -> dict[fx.Node, fx.Node]:
        """The leaves that the graph writes to, also through views, with the last node that does."""
        memory = {memory_of(node): node for node in self.real if isinstance(value_of(node), Tensor)}
        found: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            for operand in _written(node):
                leaf = operand if operand in self.real else memory.get(memory_of(operand))
                if leaf is not None:
                    found[leaf] = node
        return found


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


def _supply(
    graph: fx.Graph, ctx: PassContext, targets: Sequence[fx.Node], values: Sequence[Tensor], counter: Counter
) -> dict[fx.Node, tuple[fx.Node, int]]:
    """A graph input for each device with the random words of its parameters; for each parameter the input and its row."""
    rows: dict[fx.Node, tuple[fx.Node, int]] = {}
    first = next(iter(graph.nodes))
    numbers = dict(zip(targets, counter.numbers(values), strict=True))
    seed = ctx.options.seed - (1 << 64) * (ctx.options.seed >> 63)  # the same 64 bits, as int64 holds them
    devices: dict[torch.device, list[fx.Node]] = {}
    kinds: dict[torch.dtype, list[int]] = {}
    for node, value in zip(targets, values, strict=True):
        if type(value) not in (Tensor, torch.nn.Parameter):
            raise QCError(
                "updates.kind",
                f"parameter {numbers[node]} is a {type(value).__name__}: nothing is known of where its elements lie",
                why="random bits depend on an element's place in the whole parameter",
                next="use an optimizer of qcompile.optim, which knows shards, or the recipe 'none'",
            )
        devices.setdefault(value.device, []).append(node)
        kinds.setdefault(value.dtype, []).append(numbers[node])
    for device, nodes in devices.items():
        words = torch.tensor([[seed, 0, numbers[node], 0] for node in nodes], dtype=torch.int64, device=device)
        with graph.inserting_before(first):
            random = compat.add_placeholder(graph, f"random_{len(ctx.random)}", words)
        ctx.random[random.name], ctx.updated[device] = words, [numbers[node] for node in nodes]
        rows |= {node: (random, row) for row, node in enumerate(nodes)}
    ctx.counter = counter
    for dtype, found in kinds.items():
        half = str(dtype).removeprefix("torch.")
        ctx.plan.notes.append(
            f"{Updates.name}: parameters {listed(found)}: {half}, updated in float32, rounded stochastically"
        )
    return rows


def listed(numbers: Iterable[int]) -> str:
    """Whole numbers in a few words: 0-2, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)


def _widened(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """The float32 copy of a leaf, in its place for everything but the results of the graph."""
    users = [user for user in node.users if user.op != "output"]
    first = min(users)
    with graph.inserting_before(first):
        loose = insert(graph, torch.Tensor.detach, node, like=first)
        wide = insert(graph, torch.Tensor.to, loose, torch.float32, like=first)
    for user in users:
        user.replace_input_with(node, wide)
    return wide


def _narrow_outputs(graph: fx.Graph) -> None:
    """Results keep the types that Dynamo promised: state that a first step makes is as wide as the parameter."""
    output = next(node for node in graph.nodes if node.op == "output")

    def narrow(node: fx.Node) -> fx.Node:
        value = value_of(node)
        if node.op in ("placeholder", "get_attr") or getattr(value, "dtype", None) not in HALVES:
            return node
        with graph.inserting_before(output):
            return insert(graph, torch.Tensor.to, node, value.dtype, like=node)

    output.args = fx.map_arg(output.args, narrow)


def _write_back(
    graph: fx.Graph, node: fx.Node, wide: fx.Node, last: fx.Node, random: tuple[fx.Node, int] | None
) -> None:
    """`node.copy_(wide)` after the last write: there autograd is off if it has to be."""
    value = wide
    with graph.inserting_after(last):
        copy = graph.call_method("copy_", (node, value))
    copy.meta = {**last.meta, "example_value": value_of(node)}
    if random is not None:
        with graph.inserting_before(copy):
            made = insert(
                graph, torch.ops.qcompile.rounded.default, wide, random[0], random[1], value_of(node).dtype, like=last
            )
        copy.args = (node, made)


__all__ = ["Updates", "learning_rates_as_inputs", "listed"]
