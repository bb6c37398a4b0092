"""Put the bodies of plain calls into the graph that calls them.

`torch.utils.checkpoint` and `torch.compiler.nested_compile_region` wrap a piece of the model into a graph of its own.
Where nothing is recorded for a backward pass, both mean nothing but the call: their contents belong to the graph, with
the weights that come in as operands. (That repeated regions compile once is what `outline` is for.) Where something is, a
checkpoint's nodes are marked to be computed again in the backward pass, which is all that a checkpoint does.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator

import torch
from torch import fx

from qcompile import compat
from qcompile.passes.match import ORIGIN, bodies, op_name, recording, same_tensor, value_of, written_placeholders

_CALLS = frozenset("tag_activation_checkpoint invoke_subgraph wrap".split())
_REPEATED = frozenset({"observe_"})  # looks up, within a backward pass, what it did in the forward pass


def inline_calls(gm: fx.GraphModule, training: bool) -> None:
    """Inline calls, also those inside of what was inlined; while autograd records, those of plain checkpoints.

    Args:
        training: whether autograd records outside of the graph.
    """
    waiting, regions = True, itertools.count()
    while waiting:
        recorded = recording(gm.graph, training)
        calls = [node for node in gm.graph.nodes if _is_call(node) and (node not in recorded or _is_checkpoint(node))]
        waiting = sum(_inline(gm, node, regions if node in recorded else None) for node in calls) > 0


def _is_call(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.HigherOrderOperator) and node.target.__name__ in _CALLS


def _is_checkpoint(node: fx.Node) -> bool:
    """Whether a call is a checkpoint that keeps nothing, whose nodes can say so themselves."""
    return getattr(node.target, "__name__", "") == "tag_activation_checkpoint" and not any(
        compat.is_selective(body) for body, _ in bodies(node)
    )


def _inline(gm: fx.GraphModule, node: fx.Node, regions: Iterator[int] | None) -> bool:
    """Replace a call by its body, when its users pick the results one by one and nothing that comes in is written,
    but by operators that may run a second time.

    Args:
        regions: numbers for checkpoints whose nodes are to be marked, `None` where no backward pass follows.
    """
    inside = bodies(node)
    if len(inside) != 1 or any(user.target is not operator.getitem for user in node.users):
        return False
    ((body, operands),) = inside
    inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
    # A region that is called again has the example values of its first call: they must fit.
    fitting = all(p in operands and same_tensor(value_of(p), value_of(operands[p])) for p in inputs)
    results, made = body.graph.output_node().args[0], dict(operands)
    picked = isinstance(results, (tuple, list)) and all(isinstance(made.get(r, r), fx.Node) for r in results)  # type: ignore[arg-type]
    if not fitting or not picked or written_placeholders(body, _REPEATED):
        return False
    region = None if regions is None else next(regions)
    with gm.graph.inserting_before(node):
        for item in body.graph.nodes:
            if item.op == "get_attr":
                made[item] = gm.graph.get_attr(_adopt(gm, body, str(item.target)))
                made[item].meta = dict(item.meta)
            elif item.op not in ("placeholder", "output"):
                made[item] = gm.graph.node_copy(item, lambda n: made[n])
                made[item].meta[ORIGIN] = node.meta.get(ORIGIN)
                if region is not None:
                    # A range that is observed is kept: to look it up, the backward pass would have to keep the state as it is
                    # now, which the next call writes to.
                    mark = compat.mark_kept if op_name(item) in _REPEATED else compat.mark_checkpoint
                    mark(made[item], region)
    for user in list(node.users):
        result = results[user.args[1]]  # type: ignore[index]
        user.replace_all_uses_with(made[result])  # type: ignore[index]
        gm.graph.erase_node(user)
    attributes = [n for n in node.all_input_nodes if n.op == "get_attr"]
    gm.graph.erase_node(node)
    for attribute in attributes:
        if not attribute.users:
            gm.graph.erase_node(attribute)
    return True


def _adopt(gm: fx.GraphModule, body: fx.GraphModule, name: str) -> str:
    """Make an attribute of the body one of the graph around it; its name there."""
    value, number = operator.attrgetter(name)(body), 0
    while getattr(gm, f"inlined_{number}", value) is not value:
        number += 1
    setattr(gm, f"inlined_{number}", value)
    return f"inlined_{number}"
