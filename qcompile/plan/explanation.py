"""What `explain` found, and how it is shown.

The rows are plain data: they outlive the graphs and the packed weights that they were read from, and go to JSON and
into a table alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from qcompile.plan.table import Printed, size_unit


@dataclass(frozen=True)
class Row:
    """One site of the ledger, for one set of weights: a graph that runs for several layers has a row for each.

    Attributes:
        graph: number of the graph (0 unless the model has graph breaks; -1 for what runs outside of all graphs).
        kind: linear, head, embedding, bmm, conv, attention or "other" (an operator that reads a weight and is not
            handled); "bias" for the joined biases of a merged matmul, "eager" for all contractions outside of every
            graph.
        path: module path of the weight in the model; behind a graph break Dynamo, and the rules of a recipe, may know it by
            the end of that path.
        source: the user's "file.py:line".
        shape: `(m, n, k)` of the contraction; `m` is `None` when symbolic, n and k are 0 without a weight.
        scheme: "weight scheme" or "weight scheme x activation scheme", "float" when not quantized.
        kernel: the lowering.
        flops: of the example input, all calls of the graph together.
        bytes_before: float bytes of the weight; 0 on rows that share another row's weight.
        bytes_after: bytes the store holds for it; 0 likewise.
        sqnr: weight signal-to-noise ratio in dB; `None` for float sites.
        reason: why it stays float, or a remark.
        calls: how often the graph ran with this weight.
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
    calls: int = 1

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
        """Plain JSON values under the names of the attributes; an infinite `sqnr` is the text "inf" or "-inf"."""
        values = asdict(self) | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}
        rows = values.pop("rows")
        infinite = (math.inf, -math.inf)
        return values | {"rows": [row | {"sqnr": str(row["sqnr"])} if row["sqnr"] in infinite else row for row in rows]}

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
            sqnr = "" if row.sqnr is None else "exact" if row.sqnr == math.inf else f"{row.sqnr:.1f}"
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


def coverage(rows: Sequence[Row]) -> float:
    """Share of the FLOPs of these rows that run quantized; 1.0 without any."""
    flops = sum(row.flops for row in rows)
    return sum(row.flops for row in rows if row.quantized) / flops if flops else 1.0
