"""Tiles of the Triton kernels, per architecture: shipped, so that a first call searches for nothing.

`triton.json` holds a few lines for each family of kernels. "default" serves every architecture without its own. None of
them was timed on a GPU yet: they follow from the arithmetic of registers, shared memory and bytes in flight, and from
what the compiled kernels show (no spills, 16-byte loads, tensor-core instructions). Kernels of pairs take smaller tiles, see
`devices.triton.cut`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

from qcompile.ir.packing import ceil_div

# Who multiplies: one kernel that decodes beside its products; or, after a decode of the whole weight, a kernel of ours over
# bytes, or the vendor's library.
Way = Literal["fused", "own", "vendor"]


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        rows: of x in a tile (at least 16, a power of two). columns: of y, a multiple of 16 and a power of two.
        units: of the packing in one iteration; fewer where they do not divide K's. splits: blocks that share the sum over
            K. stages: of the software pipeline. warps: of a block. way: who multiplies, where that is possible.
        depth: columns of K in one iteration of way "own", a power of two; fewer where they do not divide K or a cell.
        tma: that way "own" loads by descriptors, where operands are aligned. flat: that its loop over tiles and the one over K
            are one, so that loads of a tile begin before the one before ends.
        natural: the order in which instructions take columns, see `triton_order`; only speed depends on it.
        registers: that a thread may have; 0: what NVIDIA's assembler takes for best, which may be a few too little, spilled
            for the sake of one more block.
    """

    rows: int = 16
    columns: int = 64
    units: int = 1
    splits: int = 1
    stages: int = 3
    warps: int = 4
    way: Way = "fused"
    depth: int = 128
    tma: bool = False
    flat: bool = False
    natural: bool = True
    registers: int = 0

    @property
    def constants(self) -> dict[str, int]:
        """Of a fused kernel, what the tile decides."""
        return {
            "BM": self.rows,
            "BN": self.columns,
            "KC": self.units,
            "SPLIT": self.splits,
            "STAGES": self.stages,
            "NATURAL": self.natural,
        }

    @property
    def options(self) -> dict[str, int]:
        """Of a launch, what the tile decides."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


def tiles_across(n: Sequence[int], columns: int, paired: bool) -> int:
    """Tiles of so many columns over segments of `n` rows of weight: none has columns of two, and a pair has those of one."""
    return sum(ceil_div(size, columns) for size in (n[:1] if paired else n))


@dataclass(frozen=True)
class Shape:
    """A line of the table.

    Attributes:
        rows_up_to: the largest number of rows of x it is for, `None` for any. rows, columns: of a tile. depth: columns
            of the weight in one iteration, at least a unit of the packing. stages: of the software pipeline. warps: of
            a block. waves: blocks per multiprocessor that K is split for. way, flat, registers: see `Tile`.
    """

    rows_up_to: int | None
    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    waves: int
    way: Way = "fused"
    flat: bool = False
    registers: int = 0


@functools.cache
def shapes(architecture: str, family: str) -> tuple[Shape, ...]:
    """Lines of a family of kernels, the fewest rows first.

    Args:
        architecture: "sm_90", "gfx942", ...; one without lines of its own gets the default ones.
        family: "weight-only", "bytes", or "integers": bytes whose sums stay int32 to the end, "bytes" where it has no lines.
    """
    table = json.loads(resources.files("qcompile.codegen").joinpath("tuning", "triton.json").read_text())
    own, default = table.get(architecture, {}), table["default"]
    wider = "bytes" if family == "integers" else family
    lines = own.get(family) or own.get(wider) or default.get(family) or default[wider]
    return tuple(Shape(**line) for line in lines)


FUSED: tuple[Way, ...] = ("fused",)


def shape_for(architecture: str, family: str, rows: int, ways: Collection[Way] = FUSED) -> Shape:
    """The line for so many rows of x, of those whose way is possible; the last of these where none is for so many."""
    found = [shape for shape in shapes(architecture, family) if shape.way in ways]
    return next((shape for shape in found if shape.rows_up_to is None or rows <= shape.rows_up_to), found[-1])
