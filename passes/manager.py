"""Run passes in order, with the user's edits to the list, and leave a trace of what each did.

The list of passes is data: names can be dropped, replaced, or followed by a user's own. After every pass the
graph is linted; with `dump` it is also written to a numbered file, with the plan under it: three of the passes write
nothing but the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import fx

from qcompile.errors import QCError
from qcompile.passes.base import Pass, PassContext
from qcompile.plan.plan import Plan


class PassManager:
    """An ordered list of passes of one stage.

    Args:
        passes: the default list.
    """

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = list(passes)

    def run(self, gm: fx.GraphModule, ctx: PassContext, dump: Path | None = None) -> fx.GraphModule:
        """Run every pass on `gm` in place.

        Raises:
            QCError: "pass.failed" naming the pass, with the original error as cause; a `QCError` of a pass is
                passed on as it is.
        """
        if dump is not None:
            write(dump, 0, "input", gm, ctx.plan)
        for number, item in enumerate(self.passes, 1):
            try:
                item.run(gm, ctx)
                gm.graph.lint()
            except QCError:
                raise
            except Exception as error:
                raise QCError(
                    "pass.failed",
                    f"pass {item.name!r} failed: {type(error).__name__}: {error}",
                    next=f'drop it with options={{"passes": {{"drop": ["{item.name}"]}}}}, or mend it',
                ) from error
            if dump is not None:
                write(dump, number, item.name, gm, ctx.plan)
        gm.recompile()
        return gm


def write(folder: Path, number: int, name: str, gm: fx.GraphModule, plan: Plan) -> None:
    """Write the graph and the plan as text to `folder/NN_name.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:02d}_{name}.txt").write_text(f"{gm.graph}\n{plan_text(plan)}", encoding="utf-8")


def plan_text(plan: Plan) -> str:
    """The plan as a block of comments, one line for each site and each note; "" while there is nothing in it."""
    rows = [
        (
            str(d.site.index),
            d.site.path or d.site.kind,
            f"{d.weight or 'float'}" + (f" x {d.act}" if d.act else ""),
            d.kernel or "-",
            "-" if d.group < 0 else str(d.group),
            d.reason,
        )
        for d in plan
    ]
    if rows:
        rows.insert(0, ("site", "path", "scheme", "kernel", "group", "reason"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines += [f"note: {note}" for note in plan.notes]
    return "".join(f"# {line.rstrip()}\n" for line in (["plan", *lines] if lines else []))
