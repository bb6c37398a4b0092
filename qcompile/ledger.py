"""The ledger: what happens to every contraction of a model, and why.

`explain` traces a model exactly as the backend would, graph breaks included, without generating code, and
collects each graph's plan. Bytes are what the packed-weight store really holds; nothing is estimated that
can be counted.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from qcompile import compat
from qcompile.backend import qcompile, watching
from qcompile.errors import QCError
from qcompile.options import Options
from qcompile.passes.base import PassContext
from qcompile.passes.rewrite.resolve import training_notes
from qcompile.plan.plan import Decision
from qcompile.plan.recipe import PRESETS, Recipe, Rule
from qcompile.plan.table import Printed, size_unit
from qcompile.runtime.store import STORE, Entry


@dataclass(frozen=True)
class Row:
    """One site of the ledger.

    Attributes:
        graph: number of the graph (0 unless the model has graph breaks; -1 for what runs outside of all graphs).
        kind: linear, head, embedding, bmm, conv, attention or "other" (an operator that reads a weight and is not
            handled); "bias" for the joined biases of a merged matmul, "eager" for all contractions outside of every
            graph.
        path: module path of the weight.
        source: the user's "file.py:line".
        shape: `(m, n, k)` of the contraction; `m` is `None` when symbolic, n and k are 0 without a weight.
        scheme: "weight scheme" or "weight scheme x activation scheme", "float" when not quantized.
        kernel: the lowering.
        flops: of the example input.
        bytes_before: float bytes of the weight; 0 on rows that share another row's weight.
        bytes_after: bytes the store holds for it; 0 likewise.
        sqnr: weight signal-to-noise ratio in dB; `None` for float sites.
        reason: why it stays float, or a remark.
    """

    graph: int
    kind: str
    path: str
    source: str
    shape: tuple[int | None, int, int]
    scheme: str
    kernel: str
    flops: int
    bytes_before: int
    bytes_after: int
    sqnr: float | None
    reason: str

    @property
    def quantized(self) -> bool:
        return self.scheme != "float"


@dataclass(frozen=True, repr=False)
class Explanation(Printed):
    """What `explain` returns; `print()` it, or read `.rows`.

    Attributes:
        rows: every site of every graph.
        coverage: share of contraction FLOPs that run quantized, over all graphs (1.0 without contractions).
        graphs: number of graphs (more than one means graph breaks).
        unused_rules: rules of the recipe that matched no site of any graph.
        notes: what concerns no single site, in words: remarks of passes, unused rules (with the nearest name), converted
            weights that the recipe does not reach, a model that was in training mode.
    """

    rows: tuple[Row, ...]
    coverage: float
    graphs: int
    recipe: str
    unused_rules: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values under the names of the attributes; an infinite `sqnr` is the text "inf"."""
        values = asdict(self) | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        rows = values.pop("rows")
        return values | {"rows": [row | {"sqnr": "inf"} if row["sqnr"] == math.inf else row for row in rows]}

    def __rich__(self) -> RenderableType:
        return _Sheet(self)

    def title(self) -> str:
        """The first line of the printed ledger."""
        graphs = f"{self.graphs} graph(s)" if self.graphs else "no graph was compiled"
        if not self.rows:
            return f"recipe {self.recipe}: nothing to quantize, {graphs}"
        unit, size_of = size_unit([size for row in self.rows for size in (row.bytes_before, row.bytes_after)])
        return (
            f"recipe {self.recipe}: {self.coverage:.1%} of contraction FLOPs quantized, "
            f"{size_of(self.bytes_before)} {unit} -> {size_of(self.bytes_after)} {unit}, {graphs}"
        )

    def table(self, narrow: bool = False) -> Table:
        """The sites; `narrow`: only the columns that say what happens to each, and why."""
        unit, size_of = size_unit([size for row in self.rows for size in (row.bytes_before, row.bytes_after)])
        table = Table(title=self.title(), title_justify="left")
        names = ("site", "m x n x k", "scheme", "kernel", unit, "SQNR dB", "source", "reason")
        shown = [name for name in names if not narrow or name in _NARROW]
        for name in shown:
            table.add_column(name, overflow="fold", justify="right" if name in (unit, "SQNR dB") else "left")
        for row in self.rows:
            m, n, k = row.shape
            size = f"{'?' if m is None else m} x {n} x {k}" if n else ""
            sqnr = "" if row.sqnr is None else "exact" if math.isinf(row.sqnr) else f"{row.sqnr:.1f}"
            weight = f"{size_of(row.bytes_before)} -> {size_of(row.bytes_after)}" if row.bytes_after else ""
            cells = (row.path or row.kind, size, row.scheme, row.kernel, weight, sqnr, row.source, row.reason)
            values = dict(zip(names, cells, strict=True))
            # Names of modules are no markup.
            table.add_row(*(Text(values[name]) for name in shown), style="" if row.quantized else "yellow")
        return table


# All columns of the ledger are legible from this width on; fewer are shown on a narrower terminal.
_WIDE = 120
_NARROW = ("site", "scheme", "kernel", "reason")


@dataclass(frozen=True)
class _Sheet:
    """An explanation, printed as wide as the console allows."""

    found: Explanation

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.found
        yield found.table(narrow=options.max_width < _WIDE) if found.rows else Text(found.title())
        yield Group(*(Text(f"note: {note}") for note in found.notes))


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

    Weights are encoded to be measured; packed weights that no compiled graph uses are given back before it returns.

    Raises:
        QCError: what the backend would raise for these inputs; with `strict` also "explain.eager" when contractions ran
            in eager mode, outside of every graph, which no backend sees; "explain.option" for an option given as a
            keyword that the model does not take.
    """
    settings = Options.parse(options) if recipe is None else Options.parse(options, recipe=recipe)
    name = Recipe.of(settings.recipe).name
    _check_keywords(compat.uncompiled(model), kwargs)
    eager = compat.EagerFlops()
    with watching("float") as trace:

        def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            with eager.paused():
                made = qcompile(gm, inputs, options=settings)

            def run(*values: Any) -> Any:
                with eager.paused():
                    return made(*values)

            return run

        held = list(STORE)  # so that no id is used twice
        known = set(map(id, held))
        try:
            original = compat.uncompiled(model)
            with _evaluating(original) as notes, torch.no_grad():
                with compat.unlimited_recompiles(), compat.eager_parts() as breaks, eager:
                    run: Callable[..., Any] = torch.compile(_fresh(original), backend=backend)
                    run(*args, **kwargs)
                found = _with_eager_parts(summarize(trace.contexts), breaks, eager.total, settings.strict)
                return replace(found, recipe=name, notes=(*found.notes, *notes))
        finally:
            STORE.drop_unused([entry for entry in STORE if id(entry) not in known])


@contextmanager
def _evaluating(target: Any) -> Iterator[tuple[str, ...]]:
    """Every module of a module (or of the one whose method is given) in evaluation mode, without calling `train`, which
    some override to rewrite weights. Yields a note when one was not."""
    owner = target if isinstance(target, nn.Module) else getattr(target, "__self__", None)
    training = [module for module in owner.modules() if module.training] if isinstance(owner, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield ("the model is in training mode: explained as in eval()",) if training else ()
    finally:
        for module in training:
            module.training = True


def _with_eager_parts(found: Explanation, breaks: list[str], flops: int, strict: bool) -> Explanation:
    """Add what ran outside of every graph, which `strict` refuses."""
    why = "; ".join(breaks) or "Dynamo made no graph of it"
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
    notes = (*found.notes, *(f"graph break: {each}" for each in breaks))
    return replace(found, rows=rows, coverage=_coverage(rows), notes=notes)


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


def _coverage(rows: Sequence[Row]) -> float:
    flops = sum(row.flops for row in rows)
    return sum(row.flops for row in rows if row.quantized) / flops if flops else 1.0


def _fresh(target: Callable[..., Any]) -> Callable[..., Any]:
    """`target` behind a code object of its own: Dynamo keeps compiled graphs, and counts them against its limit, by
    code object, and explaining a model must not use up what its user has."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    call.__code__ = call.__code__.replace()
    return call


def summarize(contexts: list[PassContext]) -> Explanation:
    """The explanation of a list of compiled graphs."""
    rows: list[Row] = []
    counted: set[object] = set()
    for number, ctx in enumerate(contexts):
        for decision in ctx.plan:
            # A weight that was given up (`convert`) has no entry: its module path names it in every graph.
            key = id(decision.entry) if decision.entry is not None else (decision.site.path, decision.bytes_after)
            rows.append(_row(number, decision, key not in counted))
            if decision.bytes_after:
                counted.add(key)
        for item in ctx.packed:
            if item.entry.scheme is None and id(item.entry) not in counted:
                counted.add(id(item.entry))
                rows.append(_constant(number, item.entry))
    unused = _unused(contexts)
    name = contexts[0].recipe.name if contexts else ""
    return Explanation(tuple(rows), _coverage(rows), len(contexts), name, tuple(unused), _notes(contexts, unused))


def _notes(contexts: list[PassContext], unused: dict[str, Rule]) -> tuple[str, ...]:
    """Remarks of all graphs, each once; weights that stay float for one common reason are counted."""
    notes: dict[str, None] = {}
    for number, ctx in enumerate(contexts):
        training = training_notes(ctx.plan)
        where = f"graph {number}: " if len(contexts) > 1 else ""
        notes |= dict.fromkeys(where + note for note in ctx.plan.notes if note not in training)
        if training:
            notes[f"{where}{len(training)} weights stay float: autograd is recording, so they may be trained"] = None
        if overruled := ctx.plan.overruled(ctx.recipe):
            notes[where + overruled] = None
    paths = {decision.site.path: None for ctx in contexts for decision in ctx.plan}
    for text, rule in unused.items():
        notes[f"this rule of the recipe matched no site: {text}{rule.hint(paths)}"] = None
    return tuple(notes)


def _constant(graph: int, entry: Entry) -> Row:
    """Joined biases of a merged matmul: the store holds a second copy of them."""
    reason = "joined biases of a merged matmul, kept as they are"
    where, size = entry.expression.where, entry.nbytes
    return Row(graph, "bias", where, "", (None, 0, 0), "float", "", 0, 0, size, None, reason)


def _row(graph: int, decision: Decision, fresh: bool) -> Row:
    site = decision.site
    scheme = "float"
    if decision.weight is not None:
        scheme = str(decision.weight) + (f" x {decision.act}" if decision.act else "")
    return Row(
        graph,
        site.kind,
        site.path,
        site.source,
        (site.m, site.n, site.k),
        scheme,
        decision.kernel,
        site.flops,
        decision.bytes_before if fresh else 0,
        decision.bytes_after if fresh else 0,
        decision.entry.sqnr_db() if decision.entry is not None else None,
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
