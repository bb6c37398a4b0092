"""How reports are shown: as tables where rich prints them, as plain text everywhere else.

A report is read in a terminal, a notebook, a log and a file; none of them should get a dataclass of thousands of
characters, and a file should get no colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.console import Console, RenderableType


class Printed:
    """A report that has `__rich__`: `str()`, `print()` and an interactive session show what rich would print."""

    def __rich__(self) -> RenderableType:
        raise NotImplementedError

    def __str__(self) -> str:
        console = Console(width=200, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return capture.get()

    __repr__ = __str__


_UNITS = (("B", 1), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9))


def size_unit(sizes: Sequence[int]) -> tuple[str, Callable[[int], str]]:
    """The largest unit in which the largest size is one or more, and how to write sizes in it: three significant
    digits, or all digits before the point."""
    largest = max(sizes, default=0)
    unit, one = next(((name, one) for name, one in reversed(_UNITS) if largest >= one), _UNITS[0])

    def write(size: int) -> str:
        if size == 0 or one == 1:
            return str(size)
        return f"{size / one:.{max(0, 2 - math.floor(math.log10(size / one)))}f}"

    return unit, write
