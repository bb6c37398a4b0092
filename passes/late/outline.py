"""Outlining: repeated blocks of an inference graph are compiled once.

Compile time is Python over identical layers. `outline` stands between AOTAutograd and Inductor: it cuts the
functional graph into segments (`outline_find`), hands Inductor one graph per distinct segment, and returns a
function that runs the segments in order (`outline_run`). The graph that is not understood, or in which
nothing repeats, goes to Inductor as it is; either way a report says what was done and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from qcompile import compat
from qcompile.passes.late.outline_find import MIN_NODES, Segment, find
from qcompile.passes.late.outline_order import NotOutlined, value
from qcompile.passes.late.outline_run import Compiled, InnerCompile, Runner, compile_bodies, program


@dataclass(frozen=True)
class Body:
    """One compiled function: how many segments share it, and how many graph nodes it has."""

    uses: int
    nodes: int


@dataclass(frozen=True)
class OutlineReport:
    """What happened to one graph.

    Attributes:
        reason: why the graph was compiled in one piece, or "" when it was outlined.
        nodes: calls in the graph.
        bodies: the compiled functions in order of first use; empty when not outlined.
        source: the generated program that runs the segments; "" when not outlined.
    """

    reason: str
    nodes: int
    bodies: tuple[Body, ...] = ()
    source: str = ""

    @property
    def outlined(self) -> bool:
        return not self.reason

    @property
    def repeats(self) -> int:
        """How often the most repeated body occurs."""
        return max((b.uses for b in self.bodies), default=0)

    @property
    def nodes_per_layer(self) -> int:
        """Nodes of the body that saves most."""
        return max(self.bodies, key=lambda b: (b.uses - 1) * b.nodes).nodes if self.bodies else 0

    @property
    def compiled_nodes(self) -> int:
        """Nodes that the compiler saw."""
        return sum(b.nodes for b in self.bodies) if self.bodies else self.nodes

    def __str__(self) -> str:
        if self.reason:
            return f"compiled in one piece ({self.nodes} nodes): {self.reason}"
        parts = ", ".join(f"{b.uses} x {b.nodes}" for b in self.bodies)
        return f"compiled {self.compiled_nodes} of {self.nodes} nodes: {parts}"


def outline(
    inner: InnerCompile | None = None,
    *,
    min_repeats: int = 3,
    min_nodes: int = MIN_NODES,
    report: Callable[[OutlineReport], None] | None = None,
) -> InnerCompile:
    """An `inner_compile` for Inductor that compiles repeated blocks once.

    Args:
        inner: compiles one functional graph, with the signature of Inductor's inner compile (the default).
        min_repeats: how often a block must occur.
        min_nodes: how many nodes a block must have.
        report: is called once per graph with what was done.

    Returns:
        A function `(gm, example_inputs, **options)`. It calls `inner` once for the graph or once per distinct
        segment, with the same options but for `static_input_idxs`, which it renumbers. `gm` itself is not
        edited in the second case.

    Raises:
        Nothing of its own: whatever `inner` raises for a segment leaves as it is.
    """
    compile_one: InnerCompile = inner or compat.inner_compile()
    tell = report or (lambda _: None)

    def inner_compile(gm: fx.GraphModule, example_inputs: Sequence[Any], **options: Any) -> Compiled:
        nodes = sum(node.op == "call_function" for node in gm.graph.nodes)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        static = frozenset(placeholders[i] for i in options.get("static_input_idxs", ()))
        try:
            if why := compat.why_whole(options):
                raise NotOutlined(why)
            segments = find(gm, static, min_repeats=min_repeats, min_nodes=min_nodes)
        except NotOutlined as refusal:
            tell(OutlineReport(str(refusal), nodes))
            return compile_one(gm, example_inputs, **options)

        examples = dict(zip(placeholders, example_inputs, strict=True))
        bodies, strides = compile_bodies(gm, examples, segments, static, compile_one, options)
        source = program(gm.graph, segments)
        tell(OutlineReport("", nodes, _bodies(segments), source))
        results = next(node for node in gm.graph.nodes if node.op == "output")
        if strides:
            compat.report_strides([_strides(result, strides) for result in results.args[0]])
        constants = {str(n.target): getattr(gm, str(n.target)) for n in results.all_input_nodes if n.op == "get_attr"}
        return Runner(source, bodies, constants)

    return inner_compile


def _bodies(segments: Sequence[Segment]) -> tuple[Body, ...]:
    uses = Counter(segment.body for segment in segments)
    first = {segment.body: segment for segment in reversed(segments)}
    return tuple(Body(uses[body], len(first[body].nodes)) for body in sorted(first))


def _strides(result: Any, reported: dict[fx.Node, tuple[int, ...] | None]) -> tuple[int, ...] | None:
    """Strides of one graph output: what its segment reported, or what a returned graph input has."""
    if not isinstance(result, fx.Node):
        return None
    if result in reported:
        return reported[result]
    return compat.stride_hints(value(result))
