"""Run passes in order, with the user's edits to the list, and leave a trace of what each did.

The list of passes is data: names can be dropped, replaced, or followed by a user's own. After every pass the
graph is linted; with `dump` it is also written to a numbered file, with the plan under it: three of the passes write
nothing but the plan.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import fx

from qcompile.errors import QCError, warn
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
            QCError: "pass.failed" naming the pass, with the original error as cause ("pass.value" naming an earlier one that
                left nodes without example values); a `QCError` of a pass is
                passed on as it is. An optional pass that fails is undone instead, with a note and a `QCWarning`,
                unless the options say `strict` or `verify`.
        """
        careful = ctx.options.strict or ctx.options.verify
        if dump is not None:
            write(dump, 0, "input", gm, ctx.plan)
        valueless: dict[fx.Node, str] = {}
        for number, item in enumerate(self.passes, 1):
            undo = _snapshot(gm, ctx) if item.optional and not careful else None
            try:
                before = set(gm.graph.nodes)
                item.run(gm, ctx)
                gm.graph.lint()
                valueless |= _valueless(item, gm.graph, before)
            except QCError:
                raise
            except Exception as error:
                if undo is not None:
                    undo()
                    note = f"pass {item.name!r} failed and was undone: {type(error).__name__}: {error}"
                    ctx.plan.notes.append(note)
                    warn(f"{note}. The result is right, and maybe slower.")
                    continue
                raise _blame(gm.graph, valueless) or QCError(
                    "pass.failed",
                    f"pass {item.name!r} failed: {type(error).__name__}: {error}",
                    next=_way_out(item, ctx, self.passes),
                ) from error
            if dump is not None:
                write(dump, number, item.name, gm, ctx.plan)
        gm.recompile()
        return gm


def _valueless(item: Pass, graph: fx.Graph, before: set[fx.Node]) -> dict[fx.Node, str]:
    """The nodes that a pass added and that do not say what they give, with its name."""
    keys = {"example_value", "val"}
    return {
        node: item.name
        for node in graph.nodes
        if node.op.startswith("call_") and node not in before and not keys & node.meta.keys()
    }


def _blame(graph: fx.Graph, valueless: dict[fx.Node, str]) -> QCError | None:
    """What made a pass fail, where it is an earlier one."""
    found = [node for node in graph.nodes if node in valueless]
    if not found:
        return None
    return QCError(
        "pass.value",
        f"pass {valueless[found[0]]!r} added the node {found[0].name!r} without an example value",
        why="passes after it read shapes and dtypes from node.meta",
        next="add nodes with qcompile.passes.match.insert(graph, function, *args, like=node), which computes it",
    )


def _way_out(item: Pass, ctx: PassContext, passes: Sequence[Pass]) -> str:
    """How to compile without a pass. Only those of the default list that no other pass requires can be dropped by name."""
    edits = ctx.options.passes
    if any(edit.new is item for edit in edits.insert):
        return "take it out of options['passes']['insert'], or mend it"
    if any(new is item for _, new in edits.replace):
        return "take it out of options['passes']['replace'], or mend it"
    if any(item.name in other.requires for other in passes):
        own = "see whether it works without the passes of your own; " if edits.insert or edits.replace else ""
        return f"{own}please report it"
    return f"drop it with options={{'passes': {{'drop': ['{item.name}']}}}}, or mend it"


def _snapshot(gm: fx.GraphModule, ctx: PassContext) -> Callable[[], None]:
    """Remember graph and plan; the function that brings them back."""
    graph, plan = copy.deepcopy(gm.graph), ctx.plan  # nodes and their metadata are copied, not the values in them
    for old, new in zip(gm.graph.nodes, graph.nodes, strict=True):
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    decisions, rules = dict(plan.decisions), list(plan.unused_rules)
    notes, packed = list(plan.notes), list(ctx.packed)

    def undo() -> None:
        gm.graph = graph
        plan.decisions, plan.unused_rules, plan.notes, ctx.packed = decisions, rules, notes, packed

    return undo


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
