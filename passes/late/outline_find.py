"""Where a functional graph repeats itself: the part of outlining that knows graphs and no compiler.

A transformer's graph is one layer written n times, and a compiler that does not know it compiles n layers.
This module finds the copies. It looks for the period of the token sequence, cuts where the fewest values are
alive, and proves for every pair of segments it calls equal that they compute the same function of their
inputs. What is equal gets one *body*; the segments keep their own inputs.

Segments are slices of one legal execution order, so running them one after the other is always right; only
"these two segments may share a body" needs a proof: equality of a key that holds everything a compiler may
look at.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.passes.late.outline_key import Constants, Key, describe, tokens
from qcompile.passes.late.outline_order import NotOutlined, execution_order, is_size, remade, value, written

MIN_NODES = 16  # a smaller body saves less compile time than the call and the lost fusion cost
MIN_GAIN = 0.25  # repeats must save this fraction of the nodes looked at
MAX_PERIODS = 16  # how many candidate periods are tried, most frequent first


@dataclass(frozen=True)
class Segment:
    """A slice of the execution order.

    Attributes:
        nodes: what it computes, in order. Several segments may redo the same size arithmetic.
        inputs: nodes of other segments and graph inputs; sizes first, then in order of first use.
        outputs: the values that some segment with the same body gives to the rest of the graph.
        body: number of the function it computes; equal for equal functions.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    body: int


# ------------------------------------------------------------------------------------------------------- cuts
class Liveness:
    """How many values cross each position of the order, and where a cut is impossible.

    Position c lies before node c. A tuple or a symbolic boolean cannot be passed between segments, so no cut
    may separate its producer from a reader.
    """

    def __init__(self, order: Sequence[fx.Node]) -> None:
        place = {node: i for i, node in enumerate(order)}
        values, blocked = [0] * (len(order) + 2), [0] * (len(order) + 2)
        for i, node in enumerate(order):
            last = max((place.get(user, i) for user in node.users), default=i)
            count = values if isinstance(value(node), torch.Tensor | torch.SymInt) else blocked
            count[i + 1] += 1
            count[last + 1] -= 1
        self._values, self._blocked = _running_sum(values), _running_sum(blocked)

    def cost(self, cuts: Iterable[int]) -> int | None:
        """Values across all cuts, or None when one of them is impossible."""
        total = 0
        for cut in cuts:
            if self._blocked[cut]:
                return None
            total += self._values[cut]
        return total


def _running_sum(steps: Sequence[int]) -> list[int]:
    total, result = 0, []
    for step in steps:
        total += step
        result.append(total)
    return result


def split(
    token: Sequence[int], live: Liveness, start: int, stop: int, repeats: int, *, min_nodes: int = MIN_NODES
) -> list[tuple[int, int]]:
    """Cut [start, stop) into slices such that repeated blocks are slices of their own.

    Works on what is left before and behind the longest repetition again, and inside its period too: a stack
    of five layers of one kind and one of another has a period of six layers.
    """
    best = _longest_run(token[start:stop], repeats, min_nodes)
    if best is None:
        return [(start, stop)]
    first, period, length = best
    count = length // period
    options = []
    for shift in range(length - count * period + 1):
        cuts = [start + first + shift + k * period for k in range(count + 1)]
        cost = live.cost(c for c in cuts if start < c < stop)
        if cost is not None:
            options.append((cost, shift, cuts))
    if not options:
        return [(start, stop)]
    cuts = min(options)[2]
    inner = split(token, live, cuts[0], cuts[1], repeats, min_nodes=min_nodes)
    pieces = split(token, live, start, cuts[0], repeats, min_nodes=min_nodes) if start < cuts[0] else []
    for cut in cuts[:-1]:
        moved = [(a - cuts[0] + cut, b - cuts[0] + cut) for a, b in inner]
        legal = live.cost(a for a, _ in moved) is not None
        pieces += moved if legal else [(moved[0][0], moved[-1][1])]
    if cuts[-1] < stop:
        pieces += split(token, live, cuts[-1], stop, repeats, min_nodes=min_nodes)
    return pieces


def _longest_run(token: Sequence[int], repeats: int, min_nodes: int) -> tuple[int, int, int] | None:
    """(first, period, length) of the repetition that saves most nodes, or None."""
    size = len(token)
    seen: dict[int, int] = {}
    distances: Counter[int] = Counter()
    for i, t in enumerate(token):
        if t in seen:
            distances[i - seen[t]] += 1
        seen[t] = i
    periods = sorted((p for p in distances if min_nodes <= p <= size // repeats), key=lambda p: (-distances[p], p))
    best: tuple[int, int, int] | None = None
    saved = MIN_GAIN * size
    for period in sorted(periods[:MAX_PERIODS]):
        first = 0
        for i in range(size - period + 1):
            if i + period < size and token[i] == token[i + period]:
                continue
            length = i - first + period
            if i > first and length // period >= repeats and (length // period - 1) * period > saved:
                saved, best = (length // period - 1) * period, (first, period, length)
            first = i + 1
    return best


# --------------------------------------------------------------------------------------------------- segments
def find(
    gm: fx.GraphModule,
    static: frozenset[fx.Node] = frozenset(),
    *,
    min_repeats: int = 3,
    min_nodes: int = MIN_NODES,
) -> tuple[Segment, ...]:
    """Cut a functional graph into segments; repeated blocks share a body.

    Args:
        gm: forward graph of an inference compile: `val` on every node, mutations as `copy_` to a placeholder.
        static: placeholders whose address never changes; equal segments agree on them.
        min_repeats: how often a block must occur.
        min_nodes: how many nodes a block must have.

    Raises:
        NotOutlined: nothing repeats often enough, or the graph has something this module does not model.
    """
    order, aliases = execution_order(gm.graph)
    token = tokens(gm.graph, Constants(gm))
    slices = split([token[n] for n in order], Liveness(order), 0, len(order), min_repeats, min_nodes=min_nodes)
    if len(slices) == 1:
        raise NotOutlined(f"no block of {min_nodes} or more nodes occurs {min_repeats} times in {len(order)} nodes")
    symbols = _symbol_inputs(gm.graph)
    drafts = _join_single([_Draft.of(order[a:b], symbols, token, static) for a, b in slices])
    if max(Counter(d.key for d in drafts).values()) < min_repeats:
        raise NotOutlined("the repeated blocks are wired or typed differently")
    for draft in drafts:
        draft.check_views(aliases)
    return _with_outputs(drafts)


def _symbol_inputs(graph: fx.Graph) -> dict[Any, fx.Node]:
    """Size symbol -> the graph input that is this symbol, in the order of the inputs."""
    found: dict[Any, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "placeholder" and is_size(node):
            expression = compat.size_expression(value(node))
            if expression in compat.size_symbols(value(node)):
                found.setdefault(expression, node)
    return found


@dataclass(frozen=True)
class _Draft:
    """A segment before its outputs are known."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    key: Key
    again: Callable[[Sequence[fx.Node]], _Draft]

    @classmethod
    def of(
        cls,
        slice_: Sequence[fx.Node],
        symbols: Mapping[Any, fx.Node],
        token: Mapping[fx.Node, int],
        static: frozenset[fx.Node],
    ) -> _Draft:
        redo: dict[fx.Node, None] = {}

        def visit(node: fx.Node) -> None:
            if remade(node) and node not in redo:
                for argument in node.all_input_nodes:
                    visit(argument)
                redo[node] = None

        for node in slice_:
            for argument in node.all_input_nodes:
                visit(argument)
        nodes = (*redo, *slice_)
        inside = set(nodes)
        used = {a: None for n in nodes for a in n.all_input_nodes if a not in inside and a.op != "get_attr"}
        # Generated code takes a symbol from an input: give it every symbol that its values mention.
        free = set().union(*(compat.size_symbols(value(n)) for n in (*nodes, *used))) if symbols else set()
        sizes = [node for symbol, node in symbols.items() if symbol in free]
        inputs = (*sizes, *(n for n in used if n not in sizes))

        number = {n: i for i, n in enumerate((*inputs, *nodes))}
        body = tuple((token[n], tuple(number[a] for a in arguments(n) if a.op != "get_attr")) for n in nodes)
        key = (body, tuple((describe(value(n)), n in static) for n in inputs))
        return cls(nodes, inputs, key, lambda joined: cls.of(joined, symbols, token, static))

    def check_views(self, aliases: Mapping[fx.Node, set[fx.Node]]) -> None:
        """Compilers take a segment's inputs for separate memory: a written input comes without its views."""
        for node in self.nodes:
            root = written(node)
            views = [n for n in self.inputs if root is not None and n is not root and n in aliases[root]]
            if views:
                raise NotOutlined(f"{views[0].name}, a view of the written input {root}, crosses a segment border")


def arguments(node: fx.Node) -> list[fx.Node]:
    """Nodes among the arguments, in order, with repetitions."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _join_single(drafts: Sequence[_Draft]) -> list[_Draft]:
    """Join neighbours that share their body with nobody: a cut between them only costs fusion."""
    count = Counter(d.key for d in drafts)
    joined: list[_Draft] = []
    single = False
    for draft in drafts:
        if single and count[draft.key] == 1:
            both = [n for d in (joined[-1], draft) for n in d.nodes if not remade(n)]
            joined[-1] = draft.again(both)
        else:
            joined.append(draft)
        single = count[draft.key] == 1
    return joined


def _with_outputs(drafts: Sequence[_Draft]) -> tuple[Segment, ...]:
    """Number the bodies; a body returns the union of what its segments are asked for."""
    home = {node: i for i, draft in enumerate(drafts) for node in draft.nodes if not remade(node)}
    wanted: dict[Key, set[int]] = defaultdict(set)
    for i, draft in enumerate(drafts):
        for position, node in enumerate(draft.nodes):
            if not remade(node) and any(home.get(user) != i for user in node.users):
                wanted[draft.key].add(position)
    body: dict[Key, int] = {}
    return tuple(
        Segment(
            nodes=draft.nodes,
            inputs=draft.inputs,
            outputs=tuple(draft.nodes[position] for position in sorted(wanted[draft.key])),
            body=body.setdefault(draft.key, len(body)),
        )
        for draft in drafts
    )
