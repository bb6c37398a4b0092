"""Outlining as a pass: a name that users can drop, and a place in the ledger for what was done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from qcompile.passes.base import Pass, PassContext, Stage
from qcompile.passes.late.outline import OutlineReport, outline


class Outline(Pass):
    """Compile repeated blocks once; the report goes into the plan's notes."""

    name: ClassVar[str] = "outline"
    stage: ClassVar[Stage] = "compile"

    def wrap(self, inner: Callable[..., Any], ctx: PassContext) -> Callable[..., Any]:
        def note(report: OutlineReport) -> None:
            ctx.plan.notes.append(f"outline: {report}")

        return outline(inner, report=note)
