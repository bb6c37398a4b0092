"""The ledger: what happens to every contraction of a model, and why.

`explain` traces a model exactly as the backend would, graph breaks included, without generating code, and
collects each graph's plan. Bytes are what the packed-weight store really holds; nothing is estimated that
can be counted. One graph may run for many layers and for many sizes: so its calls are counted, whose weights each of
them brought, and the FLOPs of what ran, operator by operator.
"""

from __future__ import annotations

import fnmatch
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import nn

from qcompile import compat
from qcompile.backend import qcompile, watching
from qcompile.calls import Calls, Graph
from qcompile.errors import QCError
from qcompile.options import Options
from qcompile.passes.base import PassContext
from qcompile.plan.explanation import Explanation, Row, coverage
from qcompile.plan.names import names_of, owner_of
from qcompile.plan.plan import Decision
from qcompile.plan.recipe import PRESETS, Recipe, Rule
from qcompile.runtime.store import SHARED, STORE, Entry

__all__ = ["Explanation", "Row", "explain", "summarize"]


def explain(
    model: Callable[..., Any], *args: Any, recipe: Any = None, options: Any = None, **kwargs: Any
) -> Explanation:
    """Plan a model on example inputs and report every site.

    Args:
        model: a module or function; called once under `torch.no_grad()`.
        args: its positional inputs.
        recipe: preset, scheme, `Recipe` or JSON file; `None`: that of the options, else "auto".
        options: further backend options.
        kwargs: its keyword inputs.

    A module in training mode (or one whose method is given) is explained as in `eval()`, with a note: that is the graph
    that runs low-bit, and running the other one would move the statistics of its norms. Every module has its own mode
    again afterwards. The modules that a function calls keep theirs.

    Weights are encoded to be measured; nothing of what only `explain` made stays behind.

    Raises:
        QCError: what the backend would raise for these inputs; with `strict` also "explain.eager" when contractions ran
            in eager mode, outside of every graph, which no backend sees, and "explain.updates" when the recipe rounds updates
            stochastically and no graph has any; "explain.option" for an option given as a
            keyword that the model does not take.
    """
    settings = Options.parse(options) if recipe is None else Options.parse(options, recipe=recipe)
    name = Recipe.of(settings.recipe).name
    _check_keywords(compat.uncompiled(model), kwargs)
    eager = compat.EagerFlops()
    graphs: list[Graph] = []
    with STORE.unchanged(), watching("float") as trace:

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            with eager.paused():
                made = qcompile(gm, inputs, options=settings)
            graph = None
            if len(trace.contexts) > len(graphs):  # else it was refused, and raises when it is called
                graphs.append(graph := Graph.of(trace.contexts[-1], gm))

            def run(*values: Any) -> Any:
                if graph is None:
                    return made(*values)
                result, flops = eager.run(gm, values)
                graph.count(values, flops)
                return result

            return run

        original = compat.uncompiled(model)
        try:
            with _evaluating(original) as notes, torch.no_grad():
                with compat.unlimited_recompiles(), compat.eager_parts() as breaks, eager:
                    run: Callable[..., Any] = torch.compile(_fresh(original), backend=backend)
                    run(*args, **kwargs)
                found = _summary(graphs, names_of(original, (*args, *kwargs.values())))
        finally:
            for graph in graphs:
                graph.forget()
            for ctx in trace.contexts:
                if ctx.counter is not None:
                    ctx.counter.withdraw()
        found = _with_eager_parts(found, breaks, eager, settings.strict)
        if Recipe.of(settings.recipe).updates == "stochastic" and all(ctx.counter is None for ctx in trace.contexts):
            found = _with_no_updates(found, settings.strict)
        return replace(found, recipe=name, notes=(*found.notes, *notes))


@contextmanager
def _evaluating(target: Any) -> Iterator[tuple[str, ...]]:
    """Every module of a module (or of the one whose method is given) in evaluation mode, without calling `train`, which
    some override to rewrite weights. Yields a note when one was not."""
    owner = owner_of(target)
    training = [module for module in owner.modules() if module.training] if isinstance(owner, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield ("the model is in training mode: explained as in eval()",) if training else ()
    finally:
        for module in training:
            module.training = True


def _with_eager_parts(found: Explanation, breaks: list[str], eager: compat.EagerFlops, strict: bool) -> Explanation:
    """Add what ran outside of every graph, which `strict` refuses."""
    flops, why = eager.total, "; ".join(breaks) or "Dynamo made no graph of it"
    if flops and strict:
        raise QCError(
            "explain.eager",
            f"contractions of {flops:,} FLOPs ran in eager mode, outside of every graph: they cannot be quantized",
            where=f"{found.graphs} graph(s)" if found.graphs else "no graph was compiled",
            why=why,
            next="remove the graph break, or drop strict: `explain` then shows what is quantized around it",
        )
    rows = found.rows
    if flops:
        reason = f"ran in eager mode, outside every graph: {why}"
        rows += (Row(-1, "eager", "(eager)", "", (None, 0, 0), "float", "", flops, 0, 0, None, reason),)
    notes = [*found.notes, *(f"graph break: {each}" for each in breaks)]
    if eager.uncounted:
        which = ", ".join(eager.uncounted)
        notes.append(f"not counted: {which} ran outside of every graph; if it contracts anything, coverage is less")
    return replace(found, rows=rows, coverage=coverage(rows), notes=tuple(notes))


def _with_no_updates(found: Explanation, strict: bool) -> Explanation:
    """Add that nothing is rounded stochastically though the recipe asks for it, which `strict` refuses."""
    what = "no graph updates a parameter of 16 bits: nothing is rounded stochastically"
    if strict:
        raise QCError(
            "explain.updates",
            what,
            where=f"{found.graphs} graph(s)" if found.graphs else "no graph was compiled",
            why="; ".join(found.notes) or "the parameters are float32",
            next="make the optimizer without fused=True; where Dynamo has no graph of a step (LBFGS, Adafactor), take an "
            "optimizer of qcompile.optim; where it stopped compiling a step that another backend compiled too often, call "
            "torch._dynamo.reset() and raise torch._dynamo.config.recompile_limit before the first step",
        )
    return replace(found, notes=(*found.notes, what))


def _check_keywords(target: Any, given: Mapping[str, Any]) -> None:
    """An option among the keywords, which belong to the model: a slip that the model's own error would not explain."""
    options = [name for name in given if name in _OPTIONS]
    if not options:
        return
    try:
        takes = inspect.signature(target.forward if isinstance(target, nn.Module) else target).parameters
    except (TypeError, ValueError):  # some built-in functions do not tell
        return
    if any(one.kind is inspect.Parameter.VAR_KEYWORD for one in takes.values()):
        return
    for name in options:
        if name not in takes:
            raise QCError(
                "explain.option",
                f"the model takes no argument {name!r}",
                where="explain",
                why="keywords are the model's inputs; options of the backend are given apart",
                next=f"pass options={{{name!r}: {given[name]!r}}}",
            )


_OPTIONS = {item.name for item in fields(Options)} | {"mode"}


def _fresh(target: Callable[..., Any]) -> Callable[..., Any]:
    """`target` behind a code object of its own: Dynamo keeps compiled graphs, and counts them against its limit, by
    code object, and explaining a model must not use up what its user has."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def summarize(contexts: list[PassContext]) -> Explanation:
    """The explanation of a list of compiled graphs, each called once."""
    return _summary([Graph.of(ctx) for ctx in contexts], {})


@dataclass(frozen=True)
class _Line:
    """A row, and the decision it shows."""

    row: Row
    decision: Decision | None = None


def _summary(graphs: list[Graph], names: Mapping[int, Sequence[str]]) -> Explanation:
    contexts = [graph.ctx for graph in graphs]
    counted: set[object] = set()
    lines = [line for number, graph in enumerate(graphs) for line in _lines(number, graph, names, counted)]
    unused = _unused(contexts)
    name = contexts[0].recipe.name if contexts else ""
    rows = tuple(line.row for line in lines)
    notes = _notes(contexts, unused, lines)
    return Explanation(rows, coverage(rows), len(contexts), name, tuple(unused), notes)


def _lines(number: int, graph: Graph, names: Mapping[int, Sequence[str]], counted: set[object]) -> Iterator[_Line]:
    """The sites of a graph: for every weight that it was called with, in order of first calls."""
    found: dict[tuple[int, ...], tuple[Decision, list[torch.Tensor], int, int]] = {}
    joined: dict[tuple[int, ...], Entry] = {}
    others: dict[tuple[str, str], tuple[int, int]] = {}
    for calls in graph.calls.values() or (Calls(),):
        for index, ((decision, positions), flops) in enumerate(zip(graph.sites, graph.flops(calls), strict=True)):
            values = [calls.values[i] for i in positions if calls.values]
            key = (index, *map(id, values))
            *_, count, before = found.get(key, (0, 0))
            found[key] = (decision, values, count + calls.count, before + flops)
        for name, line, flops in graph.others(calls):
            count, before = others.get((name, line), (0, 0))
            others[name, line] = (count + calls.count, before + flops)
        for index, (constant, positions) in enumerate(graph.constants):
            values = [calls.values[i] for i in positions if calls.values]
            joined[(index, *map(id, values))] = _entry(constant, values)
    for decision, values, count, flops in found.values():
        entry = None if decision.entry is None else _entry(decision.entry, values)
        # A weight that was given up (`convert`) has no entry: its packed tensors name it, or its module path.
        given = (id(values[0]) if values else decision.site.path, decision.bytes_after)
        holder: object = given if entry is None else id(entry)
        path, fresh = _path(decision, values, names), holder not in counted
        yield _Line(replace(_row(number, decision, entry, fresh, path), flops=flops, calls=count), decision)
        if decision.bytes_after:
            counted.add(holder)
    for (name, line), (count, flops) in others.items():
        reason = f"operator {name} is not handled"
        yield _Line(Row(number, "other", "", line, (None, 0, 0), "float", "", flops, 0, 0, None, reason, count))
    for one in joined.values():
        if id(one) not in counted:
            counted.add(id(one))
            yield _Line(_constant(number, one))


def _entry(entry: Entry, values: Sequence[torch.Tensor]) -> Entry:
    """What the graph that was compiled for `entry` reads when it is called with these parameters. What they lose is told in
    a note, not in a warning about compiled code."""
    return STORE.entry(values, replace(entry.encoding, min_sqnr=-math.inf)) if values else entry


def _path(decision: Decision, values: Sequence[torch.Tensor], names: Mapping[int, Sequence[str]]) -> str:
    """The path of a weight in the model that was explained; Dynamo knows it from the frame that a graph begins in."""
    path = decision.site.path
    known = names.get(id(values[0]), ()) if values else ()
    if not known or path in known:
        return path
    return next((name for name in known if name.endswith(f".{path}")), known[0])


def _notes(contexts: list[PassContext], unused: dict[str, Rule], lines: Sequence[_Line]) -> tuple[str, ...]:
    """Remarks of all graphs, each once; weights that stay float for one common reason are counted."""
    notes: dict[str, None] = {}
    for number, ctx in enumerate(contexts):
        trained = sum(decision.trained for decision in ctx.plan)
        where = f"graph {number}: " if len(contexts) > 1 else ""
        notes |= dict.fromkeys(where + note for note in ctx.plan.notes)
        if trained:
            notes[
                f"{where}autograd is recording: {trained} weights stay float parameters and are rounded in every call"
            ] = None
        if overruled := ctx.plan.overruled(ctx.recipe):
            notes[where + overruled] = None
    paths = {decision.site.path: None for ctx in contexts for decision in ctx.plan}
    for text, rule in unused.items():
        hint = _in_its_frame(rule, lines) or rule.hint(paths)
        notes[f"this rule of the recipe matched no site: {text}{hint}"] = None
    if missed := _missed(lines):
        notes[missed] = None
    return tuple(notes)


def _in_its_frame(rule: Rule, lines: Sequence[_Line]) -> str:
    """Why a rule with a path of the model matched nothing behind a graph break, or ""."""
    for line in lines:
        seen = line.decision.site.path if line.decision is not None else line.row.path
        if seen != line.row.path and fnmatch.fnmatchcase(line.row.path, rule.path):
            return (
                f"; behind a graph break rules match the path inside the frame, and {line.row.path!r} is {seen!r} there"
            )
    return ""


def _missed(lines: Sequence[_Line]) -> str:
    """One sentence about weights that keep less than the `min_sqnr` for whose sake their scheme was chosen, or ""."""
    found = [
        (line.row, line.decision.min_sqnr)
        for line in lines
        if line.decision is not None and line.row.sqnr is not None and line.row.sqnr < line.decision.min_sqnr
    ]
    if not found:
        return ""
    row, wanted = found[0]
    return (
        f"{len(found)} weights keep less than the recipe asks for ({row.path}: {row.scheme} keeps {row.sqnr:.1f} dB, not "
        f"{wanted:g}). The scheme was chosen for other values: {SHARED}"
    )


def _constant(graph: int, entry: Entry) -> Row:
    """Joined biases of a merged matmul: the store holds a second copy of them."""
    reason = "joined biases of a merged matmul, kept as they are"
    where, size = entry.expression.where, entry.nbytes
    return Row(graph, "bias", where, "", (None, 0, 0), "float", "", 0, 0, size, None, reason)


def _row(graph: int, decision: Decision, entry: Entry | None, fresh: bool, path: str) -> Row:
    site = decision.site
    scheme = "float"
    if decision.weight is not None:
        scheme = str(decision.weight) + (f" x {decision.act}" if decision.act else "")
    return Row(
        graph,
        site.kind,
        path,
        site.source,
        (site.m, site.n, site.k),
        scheme,
        decision.kernel,
        site.flops,
        decision.bytes_before if fresh else 0,
        decision.bytes_after if fresh else 0,
        entry.sqnr_db() if entry is not None else None,
        decision.reason,
    )


def _unused(contexts: list[PassContext]) -> dict[str, Rule]:
    """Rules that matched in no graph. Presets are made for any model: nothing is wrong with theirs."""
    everywhere: dict[str, Rule] | None = None
    for ctx in contexts:
        if ctx.recipe is PRESETS.get(ctx.recipe.name):
            continue
        here = {str(rule.to_json()): rule for rule in ctx.plan.unused_rules}
        everywhere = {text: here[text] for text in sorted(here) if everywhere is None or text in everywhere}
    return everywhere or {}
