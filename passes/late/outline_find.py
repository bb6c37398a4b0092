"""Where a functional graph repeats itself: the part of outlining that knows graphs and no compiler.

A transformer's graph is one layer written n times, and a compiler that does not know it compiles n layers. This module
finds the copies. It puts the nodes into an order in which the copies look alike, gives every node a token, looks for the
period of the token sequence, cuts where the fewest values are alive, and proves for every pair of segments it calls equal
that they compute the same function of their inputs. What is equal gets one *body*; the segments keep their own inputs.

Segments are slices of one legal execution order, so running them one after the other is always right; only "these two
segments may share a body" needs a proof, and the proof is equality of a key that holds everything a compiler may look at.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile import compat

MIN_NODES = 16  # a smaller body saves less compile time than the call and the lost fusion cost
MIN_GAIN = 0.25  # repeats must save this fraction of the nodes looked at
MAX_PERIODS = 16  # how many candidate periods are tried, most frequent first
SMALL = 64  # tensor constants up to this many elements are compared by value

Key = Hashable


class NotOutlined(Exception):
    """The graph is left as it is; the text says why. Internal: `outline` turns it into a report."""


@dataclass(frozen=True)
class Segment:
    """A slice of the execution order.

    Attributes:
        nodes: what it computes, in order. Size arithmetic on graph inputs may be repeated in several segments.
        inputs: nodes of other segments and graph inputs; sizes first, then in order of first use.
        outputs: the values that some segment with the same body gives to the rest of the graph.
        body: number of the function it computes; equal for equal functions.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    body: int


# ------------------------------------------------------------------------------------------------------------- the order
def value(node: fx.Node) -> Any:
    return node.meta.get("val")


def is_size(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymInt)


def _is_write(node: fx.Node) -> bool:
    """Whether the node is the functional graph's spelling of an input mutation: `copy_(placeholder, value)`."""
    return node.target is torch.ops.aten.copy_.default and isinstance(node.args[0], fx.Node)


# Operators whose schema does not admit that they may return their argument, or that compilers replace by it.
_MAY_ALIAS = {"_unsafe_view", "reshape", "_reshape_alias", "contiguous", "to", "clone", "lift_fresh_copy"}


def _aliases(node: fx.Node) -> bool:
    """Whether a result of the node may share memory with its first argument."""
    if node.target is operator.getitem:
        return True
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return False
    return schema.name.split("::")[-1] in _MAY_ALIAS or any(r.alias_info is not None for r in schema.returns)


def alias_sets(graph: fx.Graph, roots: Iterable[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """Per root, the nodes whose value may be a view of it (itself included)."""
    result = {}
    for root in roots:
        seen, todo = {root}, [root]
        while todo:
            node = todo.pop()
            for user in node.users:
                if user not in seen and user.op == "call_function" and not _is_write(user) and _aliases(user):
                    seen.add(user)
                    todo.append(user)
        result[root] = seen
    return result


def _check(graph: fx.Graph) -> None:
    """Refuse what the rest of this module does not model."""
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
        if not (
            _is_write(node) and node.args[0].op == "placeholder" and all(u.op == "output" for u in node.users)
        ):
            raise NotOutlined(f"{node.name} ({node.target}) writes in place")


def execution_order(graph: fx.Graph) -> tuple[list[fx.Node], dict[fx.Node, set[fx.Node]]]:
    """The graph's calls in an order in which repeated blocks look alike, and the alias sets of the written inputs.

    Three moves, each of them legal on its own: size arithmetic on graph inputs leaves the order (segments repeat it), an
    item of a tuple follows the tuple, a write to an input follows its value and the last reader of the old contents.
    """
    _check(graph)
    writes = [n for n in graph.nodes if n.op == "call_function" and _is_write(n)]
    aliases = alias_sets(graph, [w.args[0] for w in writes])
    if len(aliases) < len(writes):
        raise NotOutlined("one input is written twice")
    # A write whose value is a view of another written input must keep its place among the writes.
    entangled = any(
        w.args[1] in seen for w in writes for root, seen in aliases.items() if root is not w.args[0]
    )
    sunk = set() if entangled else set(writes)

    plain: list[fx.Node] = []
    placed: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function" or node in sunk or node in placed or remade(node):
            continue
        plain.append(node)
        placed.add(node)
        if isinstance(value(node), (tuple, list)) or value(node) is None:
            items = [u for u in node.users if u.target is operator.getitem]
            plain += items
            placed.update(items)
    place = {node: i for i, node in enumerate(plain)}
    behind: dict[int, list[fx.Node]] = defaultdict(list)
    for write in writes:
        if write in sunk:
            readers = [u for alias in aliases[write.args[0]] for u in alias.users if u not in sunk]
            behind[max([place.get(n, -1) for n in (*readers, write.args[1])], default=-1)].append(write)
    order = behind[-1]
    for i, node in enumerate(plain):
        order.append(node)
        order += behind[i]
    return order, aliases


_SIZE_OF = (torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default)


def remade(node: fx.Node) -> bool:
    """Whether the node is size arithmetic that depends on graph inputs alone, so that every segment can redo it."""
    if node.op != "call_function" or not is_size(node):
        return False
    if isinstance(node.target, torch._ops.OpOverload) and node.target not in _SIZE_OF:
        return False
    if any(user.op == "output" for user in node.users):
        return False
    return all(n.op == "placeholder" or remade(n) for n in node.all_input_nodes)


# --------------------------------------------------------------------------------------------------------------- tokens
_SCALARS = (bool, int, float, complex, str, bytes)
_ATOMS = (torch.dtype, torch.device, torch.layout, torch.memory_format, type(None), type(Ellipsis))
# Node metadata that changes what Inductor generates; the rest (stack traces, module paths) differs between equal layers.
_MEANING = (
    "eager_input_vals", "should_fallback", "quant_options", "inductor_realize_to_strides",
    "low_precision_pointwise_barrier", "only_clone_these_tensors",
)  # fmt: skip
_CUSTOM = ("stream", "fallback_to_eager")


def describe(value: Any, leaf: Callable[[fx.Node], Key] | None = None) -> Key:
    """A hashable value that is equal exactly when a compiler cannot tell two arguments apart.

    Types are part of it (1, 1.0 and True are equal to Python), tensors stand for their dtype, sizes, strides, device and
    alignment, sizes for their expression, and what is not known here for its identity.
    """
    if isinstance(value, fx.Node) and leaf is not None:
        return leaf(value)
    if isinstance(value, _SCALARS):
        return type(value).__name__, repr(value) if isinstance(value, float | complex) else value
    if isinstance(value, _ATOMS):
        return value
    if isinstance(value, tuple | list):
        return type(value).__name__, *(describe(v, leaf) for v in value)
    if isinstance(value, Mapping):
        return "dict", *sorted((str(k), describe(v, leaf)) for k, v in value.items())
    if isinstance(value, slice):
        return "slice", *(describe(v, leaf) for v in (value.start, value.stop, value.step))
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return type(value).__name__, str(compat.size_expression(value))
    if isinstance(value, torch.Tensor):
        return _describe_tensor(value)
    return "object", id(value)


def _describe_tensor(t: torch.Tensor) -> Key:
    if t.layout is not torch.strided:
        return "tensor", id(t)
    sizes = tuple(
        s if isinstance(s, int) else str(compat.size_expression(s)) for s in (*t.shape, *t.stride())
    )
    offset = t.storage_offset()  # only its alignment reaches generated code
    place = offset * t.itemsize % 64 == 0 if isinstance(offset, int) else str(compat.size_expression(offset))
    return "tensor", type(t).__name__, t.dtype, t.device, sizes, place, t.is_conj(), t.is_neg()


def _meaning(node: fx.Node) -> Key:
    meta, custom = node.meta, node.meta.get("custom") or {}
    found = [(k, describe(meta[k])) for k in _MEANING if k in meta]
    return (*found, *((k, describe(custom[k])) for k in _CUSTOM if k in custom))


class Constants:
    """Keys of what `get_attr` nodes name: small tensors by value, graphs by structure, everything else by identity."""

    def __init__(self, owner: fx.GraphModule) -> None:
        self._owner = owner
        self._keys: dict[str, Key] = {}

    def __call__(self, node: fx.Node) -> Key:
        name = str(node.target)
        if name not in self._keys:
            self._keys[name] = self._key(operator.attrgetter(name)(self._owner))
        return self._keys[name]

    @staticmethod
    def _key(thing: Any) -> Key:
        if isinstance(thing, fx.GraphModule):
            return "graph", graph_key(thing)
        if (
            isinstance(thing, torch.Tensor)
            and not compat.is_fake(thing)
            and thing.device.type == "cpu"
            and thing.numel() <= SMALL
        ):
            return "constant", describe(thing), compat.constant_bytes(thing)
        return "object", id(thing)


def graph_key(gm: fx.GraphModule) -> Key:
    """Equal for subgraphs (of higher-order operators) that compute the same function."""
    number = {node: i for i, node in enumerate(gm.graph.nodes)}
    constants = Constants(gm)

    def one(node: fx.Node) -> Key:
        if node.op == "get_attr":
            return "get_attr", constants(node)
        target = node.target if node.op == "call_function" else node.op
        return (
            target,
            describe((node.args, dict(node.kwargs)), number.__getitem__),
            describe(value(node)),
            _meaning(node),
        )

    return tuple(one(node) for node in gm.graph.nodes)


def tokens(graph: fx.Graph, constants: Constants) -> dict[fx.Node, int]:
    """Per call, a small integer: equal when target, constants, argument structure and result are equal."""

    def leaf(node: fx.Node) -> Key:
        return ("get_attr", constants(node)) if node.op == "get_attr" else "node"

    table: dict[Key, int] = {}
    found = {}
    for node in graph.nodes:
        if node.op == "call_function":
            arguments = describe((node.args, dict(node.kwargs)), leaf)
            key = (node.target, arguments, describe(value(node)), _meaning(node))
            found[node] = table.setdefault(key, len(table))
    return found


# ----------------------------------------------------------------------------------------------------------------- cuts
class Liveness:
    """How many values cross each position of the order, and where a cut is impossible.

    Position c lies before node c. A tuple or a symbolic boolean cannot be passed between segments, so no cut may
    separate its producer from a reader.
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

    Works on what is left before and behind the longest repetition again, and inside its period too: a stack of five
    layers of one kind and one of another has a period of six layers.
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
    periods = sorted(
        (p for p in distances if min_nodes <= p <= size // repeats), key=lambda p: (-distances[p], p)
    )
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


# ------------------------------------------------------------------------------------------------------------- segments
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
    slices = split(
        [token[n] for n in order], Liveness(order), 0, len(order), min_repeats, min_nodes=min_nodes
    )
    if len(slices) == 1:
        raise NotOutlined(
            f"no block of {min_nodes} or more nodes occurs {min_repeats} times in {len(order)} nodes"
        )
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
        # Generated code reads a symbol from an input of its own: give it every symbol that its values mention.
        free = set().union(*(compat.size_symbols(value(n)) for n in (*nodes, *used))) if symbols else set()
        sizes = [node for symbol, node in symbols.items() if symbol in free]
        inputs = (*sizes, *(n for n in used if n not in sizes))

        number = {n: i for i, n in enumerate((*inputs, *nodes))}
        body = tuple((token[n], tuple(number[a] for a in arguments(n) if a.op != "get_attr")) for n in nodes)
        key = (body, tuple((describe(value(n)), n in static) for n in inputs))
        return cls(nodes, inputs, key, lambda joined: cls.of(joined, symbols, token, static))

    def check_views(self, aliases: Mapping[fx.Node, set[fx.Node]]) -> None:
        """A compiler sees a segment's inputs as separate memory: a written input must come without its views."""
        for node in self.nodes:
            if not _is_write(node):
                continue
            root = node.args[0]
            view = next((n for n in self.inputs if n is not root and n in aliases[root]), None)
            if view is not None:
                raise NotOutlined(
                    f"{view.name}, a view of the written input {root.name}, crosses a segment border"
                )


def arguments(node: fx.Node) -> list[fx.Node]:
    """Nodes among the arguments, in order, with repetitions."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def _join_single(drafts: Sequence[_Draft]) -> list[_Draft]:
    """Join neighbours that share their body with nobody: a cut between them saves nothing and costs fusion."""
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
