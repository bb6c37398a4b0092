"""Tiles of the Triton kernels, per architecture: shipped, so that a first call searches for nothing.

`triton.json` holds a few lines for each family of kernels. "default" serves every architecture without its own. None of
them was timed on a GPU yet: they follow from the arithmetic of registers, shared memory and bytes in flight, and from
what the compiled kernels show (no spills, 16-byte loads, tensor-core instructions).
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Shape:
    """A line of the table.

    Attributes:
        rows_up_to: the largest number of rows of x it is for, `None` for any. rows, columns: of a tile. depth: columns
            of the weight in one iteration, at least a unit of the packing. stages: of the software pipeline. warps: of
            a block. waves: blocks per multiprocessor that K is split for. decoded: that the weight is decoded first.
            registers: see `Tile`; only NVIDIA's devices know such a limit.
    """

    rows_up_to: int | None
    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    waves: int
    decoded: bool = False
    registers: int = 0


@functools.cache
def shapes(architecture: str, family: str) -> tuple[Shape, ...]:
    """Lines of a family of kernels, the fewest rows first.

    Args:
        architecture: "sm_90", "gfx942", ...; one without lines of its own gets the default ones.
    """
    table = json.loads(resources.files("qcompile.codegen").joinpath("tuning", "triton.json").read_text())
    lines = table.get(architecture, {}).get(family) or table["default"][family]
    return tuple(Shape(**line) for line in lines)


def shape_for(architecture: str, family: str, rows: int) -> Shape:
    """The line for so many rows of x."""
    found = shapes(architecture, family)
    return next(shape for shape in found if shape.rows_up_to is None or rows <= shape.rows_up_to)
