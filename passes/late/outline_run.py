"""Compile the bodies of an outlined graph and run its segments.

Every body becomes a graph of its own and goes through the inner compile once. What runs afterwards is
straight-line Python, generated per graph: one local variable per value, one call per segment, a `del` where a
value is read for the last time. There is no loop, no table and no check left to pay for at run time, so a
segment costs about what the compiled function itself costs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import fx

from qcompile import compat
from qcompile.passes.late.outline_find import Segment
from qcompile.passes.late.outline_order import value, written

Compiled = Callable[[list[Any]], Sequence[Any]]
InnerCompile = Callable[..., Compiled]


def body_module(gm: fx.GraphModule, segment: Segment) -> fx.GraphModule:
    """The function a segment computes, as a functional graph that takes its inputs and returns its outputs.

    Writes to inputs go behind everything else (that is where compilers look for them), and every output keeps
    the strides the graph says it has: the next segment was compiled for them.
    """
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(segment.inputs):
        # Names enter Inductor's cache key. These keep a segment apart from a whole graph of the same text,
        # which may choose the strides of its outputs.
        new[node] = graph.placeholder(f"segment_input_{i}")
        new[node].meta = {**node.meta} if node.op == "placeholder" else {"val": value(node)}
    attributes: dict[str, Any] = {}
    for node in dict.fromkeys(a for n in segment.nodes for a in n.all_input_nodes if a.op == "get_attr"):
        name = f"segment_constant_{len(attributes)}"
        attributes[name] = operator.attrgetter(str(node.target))(gm)
        new[node] = graph.create_node("get_attr", name)
        new[node].meta = {**node.meta}

    writes = [n for n in segment.nodes if written(n)]
    for node in (*(n for n in segment.nodes if n not in set(writes)), *writes):
        new[node] = graph.node_copy(node, new.__getitem__)
    result = graph.output(tuple(new[node] for node in segment.outputs))
    result.meta["user_visible_output_idxs"] = list(range(len(segment.outputs)))
    module = fx.GraphModule(attributes, graph)
    module.meta = {**gm.meta}
    return module


def compile_bodies(
    gm: fx.GraphModule,
    examples: Mapping[fx.Node, Any],
    segments: Sequence[Segment],
    static: frozenset[fx.Node],
    inner: InnerCompile,
    options: Mapping[str, Any],
) -> tuple[list[Compiled], dict[fx.Node, tuple[int, ...] | None]]:
    """Compile each body once, in the order of first use.

    Args:
        gm: the whole graph.
        examples: what the inner compile was given for each placeholder of the whole graph.
        segments: the cut of `gm`.
        static: placeholders whose address never changes.
        inner: the inner compile.
        options: its keyword arguments for the whole graph.

    Returns:
        The compiled bodies, and the strides that were reported for the values the segments return.
    """
    compiled: list[Compiled] = []
    reported: list[list[tuple[int, ...] | None]] = []
    strides: dict[fx.Node, tuple[int, ...] | None] = {}
    for segment in segments:
        if segment.body == len(compiled):
            indices = [i for i, node in enumerate(segment.inputs) if node in static]
            inputs = [examples.get(node, value(node)) for node in segment.inputs]
            with compat.segment_strides() as found:
                module = body_module(gm, segment)
                compiled.append(inner(module, inputs, **{**options, "static_input_idxs": indices}))
            reported.append(list(found))
        if reported[segment.body]:
            strides.update(zip(segment.outputs, reported[segment.body], strict=True))
    return compiled, strides


def program(graph: fx.Graph, segments: Sequence[Segment]) -> str:
    """Source of `run(args)`, which empties `args`. It calls the bodies `f0`, `f1`, ... and may name
    `constants`."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    output = next(n for n in graph.nodes if n.op == "output")
    last: dict[fx.Node, int] = {}
    for i, segment in enumerate(segments):
        last.update((node, i) for node in segment.inputs)
    kept = set(output.all_input_nodes)
    last.update((node, len(segments)) for node in kept)
    name = {node: f"v{i}" for i, node in enumerate((*placeholders, *(n for s in segments for n in s.outputs)))}

    lines = ["def run(args):"]
    if placeholders:
        lines += [f"    {', '.join(name[n] for n in placeholders)}, = args", "    args.clear()"]
    unused = [n for n in placeholders if n not in last]
    lines += _delete(name[n] for n in unused)
    for i, segment in enumerate(segments):
        lines.append(f"    a = [{', '.join(name[n] for n in segment.inputs)}]")
        lines += _delete(name[n] for n in dict.fromkeys(segment.inputs) if last[n] == i)
        call = f"f{segment.body}(a)"
        lines.append(
            f"    {', '.join(name[n] for n in segment.outputs)}, = {call}" if segment.outputs else f"    {call}"
        )
        lines += _delete(name[n] for n in segment.outputs if n not in last)
    lines.append(f"    return ({''.join(_spell(v, name) + ', ' for v in output.args[0])})")
    return "\n".join(lines) + "\n"


def _delete(names: Iterable[str]) -> list[str]:
    found = ", ".join(names)
    return [f"    del {found}"] if found else []


def _spell(result: Any, name: Mapping[fx.Node, str]) -> str:
    if not isinstance(result, fx.Node):
        return repr(result)
    return name[result] if result.op != "get_attr" else f"constants[{str(result.target)!r}]"


class Runner:
    """Calls an outlined graph: boxed, as compiled graphs are (the list of arguments is emptied).

    Inductor's compiled graphs do some bookkeeping around a call, which matters for the first one (tuning
    results, metrics) and while the profiler records. All other calls go straight to the generated functions.
    """

    _boxed_call = True

    def __init__(self, source: str, bodies: Sequence[Compiled], constants: Mapping[str, Any]) -> None:
        self.source = source
        self._bodies = tuple(bodies)
        self._constants = dict(constants)
        self._full = self._link(self._bodies)
        self._direct: Compiled | None = None

    def _link(self, bodies: Sequence[Compiled]) -> Compiled:
        names: dict[str, Any] = {f"f{i}": body for i, body in enumerate(bodies)}
        names["constants"] = self._constants
        exec(compile(self.source, "<outlined graph>", "exec"), names)
        run: Compiled = names["run"]
        return run

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        direct = self._direct
        if direct is not None and not compat.profiling():
            return direct(args)
        results = self._full(args)
        if direct is None:
            self._direct = self._link([compat.direct_callable(body) for body in self._bodies])
        return results
