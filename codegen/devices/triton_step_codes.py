"""How a kernel finds the nearest level of a table: a guess by arithmetic, and one comparison that makes it exact.

The code of y is the number of boundaries that y has reached (`ir/state.py`). Counting them one by one takes an instruction or
two for each of 255, a search by halves eight loads that wait for each other. But levels of state lie so that the number of
boundaries up to y is nearly a function of few pieces, straight and each flatter than the one before: the minimum of a few
straight lines. Of a line a kernel needs one multiply-add. It is the right number or the one below, and y against the next
boundary tells which: one load from a table of a kilobyte that stays in the first cache. How the guess rounds does not matter,
there is room for it, so a multiply-add may be one rounding or two.

Maps that are the same on both sides of 0 are looked up by |y|.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from qcompile.ir.elements import float32_towards
from qcompile.ir.formats import Format
from qcompile.ir.state import boundaries

ROOM = 2.0**-9  # between guesses and where they would be wrong: a float32 of at most 256 is off by less than 2**-14
BEYOND = 1.001  # y is at most 1, and a few roundings more


@dataclass(frozen=True)
class Search:
    """Code of y: `zero + k` above 0 and `max(zero - k, 0)` below, k the number of `bounds` that |y| has reached.

    Attributes:
        zero: code of 0. signed: whether numbers below 0 have levels; where not, they have the first one.
        bounds: ascending. lines: (slope, offset): the floor of the least `slope * |y| + offset` is k or k - 1.
        lifted: whether it may be below 0, which then stands for 0.
    """

    zero: int
    signed: bool
    bounds: tuple[float, ...]
    lines: tuple[tuple[float, float], ...]

    @property
    def lifted(self) -> bool:
        """See the class; what is rounded, half less, is above 0 where not."""
        return min(offset for _, offset in self.lines) < 0.5 + ROOM


@functools.cache
def search(fmt: Format) -> Search | None:
    """How to find codes of a table whose largest level is 1; None where few lines do not tell."""
    if fmt.kind != "table" or fmt.max != 1:
        return None
    every = boundaries(fmt)
    signed = fmt.low < 0
    zero = sum(b <= 0 for b in every) if signed else 0
    bounds = every[zero:]
    if signed:
        # Below 0 a tie goes to the other side: what is reached there by |y| is passed here.
        mirrored = tuple(float32_towards(-b, math.inf, strictly=True) for b in reversed(every[:zero]))
        if fmt.table[zero] != 0 or mirrored != bounds[: len(mirrored)]:
            return None
    lines = _lines(bounds)
    if not bounds or bounds[0] <= 0 or len(lines) > 12 or not _right(bounds, lines):
        return None
    return Search(zero, signed, bounds, lines)


def _lines(bounds: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Lines whose minimum at boundary k, counted from 1, is between k - 1 and k, from the left to the right.

    Each begins at k where the ones before are too high, and is as flat as can be without being too low later.
    """
    found: list[tuple[float, float]] = []
    for i, b in enumerate(bounds):
        top = i + 1 - ROOM
        if any(slope * b + offset <= top for slope, offset in found):
            continue
        later = [(j + ROOM - top) / (bounds[j] - b) for j in range(i + 1, len(bounds))]
        slope = max([0.0, *later])
        found.append((slope, top - slope * b))
    return tuple(found)


def _right(bounds: Sequence[float], lines: Sequence[tuple[float, float]]) -> bool:
    """Whether guesses are what `Search` says, by half of `ROOM`."""

    def guess(a: float) -> float:
        return min(slope * a + offset for slope, offset in lines)

    inside = all(i + ROOM / 2 <= guess(b) <= i + 1 - ROOM / 2 for i, b in enumerate(bounds))
    return inside and guess(BEYOND) <= len(bounds) + 1 - ROOM / 2


__all__ = ["Search", "search"]
