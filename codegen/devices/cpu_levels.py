"""How a CPU kernel finds the nearest level of a table: numbers that C++ needs, and the proof that they are right.

`ir.state.boundaries` defines the code of y: how many boundaries it has reached. Looked for among 255 that costs more than the
rest of an optimizer's step, so kernels use what is known of the maps: from y's sign and size |y|, by

* buckets: floats whose upper bits agree. One bucket has one boundary at most, so that a table of buckets and one addition give
  the code. Any instruction set that can gather.
* lines: runs of boundaries at equal distances are the whole numbers of `slope * |y| + shift`. What comes out within `near`
  above a whole number is looked up in buckets, one element in some ten thousand; all other results are proven here. 32 octaves
  and 16 lines are registers of AVX-512, not memory.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from qcompile.errors import QCError
from qcompile.ir.elements import float32_towards
from qcompile.ir.formats import Format
from qcompile.ir.state import boundaries

OCTAVES, LINES = 32, 16
LOWEST = 127 - (OCTAVES - 1)  # the exponent field of the first octave; the last one begins at 1
WIDEST = Fraction(1, 1 << 11)  # the most that `near` may be


def pattern(value: float) -> int:
    """The bits of a float32 number."""
    return int(struct.unpack("I", struct.pack("f", value))[0])


@dataclass(frozen=True)
class Lines:
    """The code of a size s, from its octave: what its pattern shows beyond the lower 23 bits, modulo 32.

    The pattern plus `begin[octave]` shows in the same place, modulo 16, the number of a line: of the one that the octave begins
    with, or, where a line starts in the octave and s has reached it, of that one. The code is the whole part of
    min(slope * s + shift, most), unless the fraction is below `near`.
    """

    begin: tuple[int, ...]
    slope: tuple[float, ...]
    shift: tuple[float, ...]
    most: tuple[float, ...]
    near: float


@dataclass(frozen=True)
class Levels:
    """A table for C++.

    Attributes:
        levels: by code. zero: the code of the level that sizes count from: below it, codes of negative numbers.
        reached: sizes that are boundaries, ascending: the code of y >= 0 is `zero` and how many of them it has reached, that
            of y < 0 is as far below, at least 0.
        shift: upper bits of a float from here on are a bucket.
        lines: None where there are too many.
    """

    levels: tuple[float, ...]
    zero: int
    reached: tuple[float, ...]
    shift: int
    lines: Lines | None

    @property
    def lowest_bucket(self) -> int:
        """A bucket that begins below all boundaries."""
        return (pattern(self.reached[0]) - 1) >> self.shift

    @property
    def buckets(self) -> int:
        """Buckets up to the one of 1."""
        return (pattern(1.0) >> self.shift) - self.lowest_bucket + 1


@lru_cache(maxsize=64)
def levels_of(fmt: Format) -> Levels:
    """The table of a format. Raises `QCError` ("kernel.unsupported") for one without the symmetry that kernels use."""
    every = boundaries(fmt)
    zero = sum(b <= 0 for b in every) if fmt.signed else 0
    reached = every[zero:]
    # -s is at code zero - k or below exactly where s is at zero + k or above: both sides have the same boundaries.
    mirrored = [float32_towards(-b, math.inf, strictly=True) for b in reversed(every[:zero])]
    largest = max(abs(level) for level in fmt.table)
    fits = reached and reached[0] >= 2.0 ** (LOWEST - 127) and largest == 1 and len(every) + 1 == len(fmt.table)
    if not fits or mirrored != list(reached[:zero]) or (fmt.signed and fmt.table[zero] != 0):
        raise QCError(
            "kernel.unsupported", f"no CPU kernel for state in {fmt.name}", why="its levels are not symmetric"
        )
    patterns = [pattern(b) for b in reached]
    shift = next(s for s in range(23, -1, -1) if len({p >> s for p in patterns}) == len(patterns))
    return Levels(fmt.table, zero, reached, shift, _lines(reached))


def _fitted(reached: tuple[float, ...], begin: int, end: int) -> tuple[float, float, Fraction] | None:
    """Slope and shift of a line from boundary `begin` up to boundary `end`, and its `near`; None when none fits.

    The line must have reached the whole number of each boundary there, and be less than `near` above it just below. Just below
    the first one it is not asked.
    """
    if end - begin == 1:
        return 0.0, begin + 1.5, Fraction(0)
    runs = [Fraction(b) for b in reached[begin:end]]
    slope = float((len(runs) - 2) / (runs[-1] - runs[1]) if len(runs) > 2 else 1 / (runs[1] - runs[0]))
    slope = float32_towards(slope, math.inf)
    # Whole numbers are floats, so what is not below one is not rounded below it.
    needed = max(begin + 1 + i - Fraction(slope) * b for i, b in enumerate(runs))
    shift = float32_towards(float(needed), math.inf)
    while Fraction(shift) < needed:
        shift = float32_towards(shift, math.inf, strictly=True)
    over = Fraction(0)
    for i, b in enumerate(reached[begin + 1 : end], 1):
        below = Fraction(float32_towards(b, -math.inf, strictly=True))
        over = max(over, Fraction(slope) * below + Fraction(shift) - (begin + 1 + i))
    return (slope, shift, 2 * over) if 2 * over <= WIDEST else None


def _lines(reached: tuple[float, ...]) -> Lines | None:
    """The fewest lines, each as long as it can be."""
    starts, slopes, shifts, most, near = [0.0], [0.0], [0.5], [0.5], Fraction(1, 1 << 15)
    begin = 0
    while begin < len(reached):
        end, fitted = begin + 1, _fitted(reached, begin, begin + 1)
        while end < len(reached) and (longer := _fitted(reached, begin, end + 1)) is not None:
            end, fitted = end + 1, longer
        assert fitted is not None  # a single boundary always fits
        starts.append(reached[begin])
        slopes.append(fitted[0])
        shifts.append(fitted[1])
        most.append(end + 0.5)
        near = max(near, fitted[2])
        begin = end
    octaves = [min(max((pattern(s) >> 23) - LOWEST, 0), OCTAVES - 1) for s in starts[1:]]
    if len(starts) > LINES or len(set(octaves)) < len(octaves):
        return None
    beginning = []
    for octave in range(OCTAVES):
        line, exponent = sum(o < octave for o in octaves), (LOWEST + octave) << 23
        start = pattern(starts[1:][octaves.index(octave)]) if octave in octaves else exponent + (1 << 23)
        beginning.append((line << 23) + (1 << 23) - max(start, exponent))
    rest = [0.0] * (LINES - len(starts))
    power = 2.0 ** math.ceil(math.log2(near))
    return Lines(tuple(beginning), (*slopes, *rest), (*shifts, *rest), (*most, *rest), power)
