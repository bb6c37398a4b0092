"""Parameters in 16 bits that a graph updates are updated in float32 and written back by stochastic rounding.

It knows no optimizer. Every 16-bit tensor that comes into the graph is widened where it is first read, so that the whole update
is float32, in whatever operations it is written; what the graph writes in place goes back once, after the last write:
parameters rounded stochastically (`qcompile::rounded`), everything else as torch rounds. Behind its last write a parameter
is what is stored: whatever reads it there reads the rounded values. `steps` makes single operators of the updates later.

A graph that writes no 16-bit parameter is left as it is: a model's forward, or an update in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.errors import QCError
from qcompile.ir.stochastic_cast import HALVES
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.match import insert, op_name, shape_of, value_of, writes
from qcompile.passes.rewrite.leaves import Leaves
from qcompile.passes.rewrite.width import asks_for_half, casts_of_nothing, one_width
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
        leaves = Leaves(gm, ctx)
        written = leaves.written()
        parameters = _parameters([leaves.real[node] for node in written])
        targets = [node for node in leaves.narrow if node in written and id(leaves.real[node]) in parameters]
        if not targets:
            if parameters:
                ctx.plan.notes.append(f"{self.name}: no parameter of 16 bits is updated here, nothing is rounded")
            return
        for node in casts_of_nothing(gm.graph):
            node.replace_all_uses_with(node.all_input_nodes[0])
            gm.graph.erase_node(node)
            leaves.home.pop(node, None)
        values = [leaves.real[node] for node in targets]
        rows = _supply(gm.graph, ctx, targets, values, Counter(compat.traced_optimizer(values)))
        _stores(gm.graph, {node for node in leaves.home if leaves.home[node] in rows}, leaves)
        wide = {node: _widened(gm.graph, node) for node in leaves.narrow if any(u.op != "output" for u in node.users)}
        for node, stands in wide.items():
            leaves.stand(stands, node)
        one_width(gm.graph, wide.values())
        for node in leaves.narrow:
            if node in written and node in wide:
                last = _write_back(gm.graph, node, wide[node], written[node], rows.get(node))
                if node in rows:
                    _read_back(gm.graph, node, last, leaves)
        _narrow_outputs(gm.graph, leaves)


def _parameters(written: Sequence[Any]) -> set[int]:
    """Ids of the tensors that are parameters, by their type or because an optimizer holds them."""
    tensors = [value for value in written if isinstance(value, Tensor)]
    optimizer = compat.traced_optimizer(tensors)
    held = {id(p) for group in (optimizer.param_groups if optimizer else ()) for p in group["params"]}
    return {id(t) for t in tensors if isinstance(t, torch.nn.Parameter) or id(t) in held}


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


def _stores(graph: fx.Graph, targets: Set[fx.Node], leaves: Leaves) -> None:
    """What is stored in a parameter is not rounded before, and is stored in place: `p.copy_(new.to(p.dtype))` and
    `p.data = new` leave nothing to be rounded here.

    Raises:
        QCError: "updates.data" for new data that is another tensor's, or of another shape.
    """
    for node in list(graph.nodes):
        name = op_name(node)
        if name == "set_" and node.args[0] in targets:
            _refuse_foreign_data(node, leaves)
            node.op, node.target, name = "call_function", torch.Tensor.copy_, "copy_"
        if name in ("copy_", "_foreach_copy_") and not targets.isdisjoint(writes(node)):
            node.args = (node.args[0], fx.map_arg(node.args[1], _uncast), *node.args[2:])


def _refuse_foreign_data(node: fx.Node, leaves: Leaves) -> None:
    """`p.data = new` is a copy where p keeps its shape and `new` is nobody else's. (The example of p has the new one.)"""
    leaf, new = leaves.home[node.args[0]], node.args[1:]  # type: ignore[index]
    before = leaves.real[leaf]
    if len(new) != 1 or leaves.home.get(new[0], leaf) is not leaf or shape_of(new[0]) != tuple(before.shape):  # type: ignore[arg-type]
        raise QCError(
            "updates.data",
            f"a parameter {list(before.shape)} is given the data of another tensor, or of another shape",
            why="what is rounded is written into the parameter, which would not become that tensor",
            next="do this outside of the compiled step, or write into the parameter by p.copy_(new)",
        )


def _uncast(node: fx.Node) -> fx.Node:
    while op_name(node) in ("to", "type", "half", "bfloat16") and asks_for_half(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _read_back(graph: fx.Graph, node: fx.Node, copy: fx.Node, leaves: Leaves) -> None:
    """Behind `copy` the parameter and its views are read as they are stored."""
    views = [view for view, leaf in leaves.home.items() if leaf is node and view is not node and view < copy]
    later = {view: [user for user in view.users if user > copy and user.op != "output"] for view in views}
    if not any(later.values()):
        return
    with graph.inserting_before(copy.next):
        stored = insert(
            graph, torch.Tensor.to, insert(graph, torch.Tensor.detach, node, like=copy), torch.float32, like=copy
        )
        leaves.stand(stored, node)
        for view, users in later.items():
            again = leaves.again(view, stored) if users else stored
            for user in users:
                user.replace_input_with(view, again)


def _narrow_outputs(graph: fx.Graph, leaves: Leaves) -> None:
    """Results keep the types that Dynamo promised: state that a first step makes is as wide as the parameter, and a view of
    what came in is one."""
    output = next(node for node in graph.nodes if node.op == "output")

    def narrow(node: fx.Node) -> fx.Node:
        value = value_of(node)
        if node.op in ("placeholder", "get_attr") or getattr(value, "dtype", None) not in HALVES:
            return node
        with graph.inserting_before(output):
            if node in leaves.home:
                return leaves.again(node, leaves.home[node])
            return insert(graph, torch.Tensor.to, node, value.dtype, like=node)

    output.args = fx.map_arg(output.args, narrow)


def _write_back(
    graph: fx.Graph, node: fx.Node, wide: fx.Node, last: fx.Node, random: tuple[fx.Node, int] | None
) -> fx.Node:
    """`node.copy_(wide)` after the last write: there autograd is off if it has to be."""
    with graph.inserting_after(last):
        copy = graph.call_method("copy_", (node, wide))
    copy.meta = {**last.meta, "example_value": value_of(node)}
    if random is not None:
        with graph.inserting_before(copy):
            made = insert(
                graph, torch.ops.qcompile.rounded.default, wide, random[0], random[1], value_of(node).dtype, like=last
            )
        copy.args = (node, made)
    return copy


__all__ = ["Updates", "learning_rates_as_inputs", "listed"]
