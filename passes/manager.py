"""Run passes in order, with the user's edits to the list, and leave a trace of what each did.

The list of passes is data: names can be dropped, replaced, or followed by a user's own. After every pass the
graph is linted; with `dump` it is also written to a numbered file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import fx

from qcompile.errors import QCError
from qcompile.passes.base import Pass, PassContext


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
            write(dump, 0, "input", gm)
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
                write(dump, number, item.name, gm)
        gm.recompile()
        return gm


def write(folder: Path, number: int, name: str, gm: fx.GraphModule) -> None:
    """Write the graph as text to `folder/NN_name.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{number:02d}_{name}.txt").write_text(f"{gm.graph}\n")
