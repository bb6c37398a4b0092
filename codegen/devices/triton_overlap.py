"""Kernels that begin before the one before them has ended: NVIDIA's programmatic dependent launch, from sm_90 on.

Between two kernels of a stream a device is idle for a microsecond or more: the last blocks of one end, the first of the
next begin, compute addresses and wait for memory. A launch with the attribute lets blocks begin as soon as all of the
kernel before have said that they may (`gdc_launch_dependents`); what such a block does before `gdc_wait` is hidden. So a
matmul asks there for the weights of its first iterations, which no kernel before it makes, and reads x afterwards.

What every kernel with the attribute keeps to (`templates/triton/overlap.jinja`):

* It waits before it loads anything. Weights too: a graph may have written them a kernel ago, and a prefetch into L2 is the
  only access that does not mind, as L2 is where such writes arrive.
* It waits before it writes: the allocator may have given it memory that an earlier kernel still reads.
* Every block waits before it returns. A kernel that waits for this one takes all earlier ones for completed as well, and so
  does one without the attribute, which begins when this one has ended.
* It lets the next one begin after its own wait, so that there are two kernels at most under way. By the time that all its
  blocks have said so they have begun, and the next one's take only room that none of them needs. A matmul of few weights says
  so before its work; one of many after it, as what the next one has asked for would be gone from L2 when it is needed.

Sources: PTX ISA, "griddepcontrol"; CUDA driver API, `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`. Graphs have
edges of that kind between kernels (`CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC`).
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from qcompile import compat
from qcompile.codegen.devices.triton_lines import Layout, Lines
from qcompile.codegen.tuning.triton import Tile
from qcompile.errors import QCError
from qcompile.ir.packing import ceil_div

LINE = 128  # bytes that one prefetch brings
FEW = 1 << 24  # bytes of weights, a third of the L2 of an H200, and less of that of later devices
SMALL = 64 * 64  # sums of a tile: of more, products take the time, not memory
SIZES = {"i32": 4, "fp32": 4, "fp16": 2, "bf16": 2, "i8": 1, "u8": 1}  # bytes of an element of a part
CHOICES = {"": True, "1": True, "0": False}

# A device function, for the texts that call it.
HELPERS = {
    "prefetched": '''@triton.jit
def prefetched(part, panel, last, size, begin, LINE: tl.constexpr, LINES: tl.constexpr, PANELS: tl.constexpr):
    """Asks L2 for so many lines of each panel, from element `begin` of its `size` on. No value comes back."""
    i = tl.arange(0, PANELS * LINES)
    at = tl.minimum(panel + i // LINES, last) * size + tl.minimum(begin + i % LINES * LINE, size - 1)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [part + at], tl.int32, False, 1)'''
}


@dataclass(frozen=True)
class Overlap:
    """How kernels begin.

    Attributes:
        early: before the one before has ended, where the device can. ahead: for how much of the pipeline they then ask L2:
            1 for what it holds, 2 for twice that, 0 for nothing.
    """

    early: bool = True
    ahead: int = 1


_chosen: Overlap | None = None


@contextmanager
def overlapping(overlap: Overlap) -> Iterator[None]:
    """Inside, every launch of this process begins so, whatever `QCOMPILE_PDL` says."""
    global _chosen
    before, _chosen = _chosen, overlap
    try:
        yield
    finally:
        _chosen = before


def can_overlap(architecture: str) -> bool:
    """Whether kernels of "sm_90", "gfx942", ... have the instructions."""
    return architecture.startswith("sm_") and int(architecture[3:]) >= 90


@functools.cache
def _usual() -> Overlap:
    said = os.environ.get("QCOMPILE_PDL", "")
    if said not in CHOICES:
        raise QCError("kernel.pdl", f"QCOMPILE_PDL={said!r}", next="use 0, so that no kernel begins early, or 1")
    return Overlap(CHOICES[said])


def begin(device: torch.device) -> dict[str, Any]:
    """What a launch on a device says: the kernel's constant PDL, and the option that has to go with it."""
    early, architecture = (_chosen or _usual()).early, compat.architecture(device)
    if not architecture:  # interpreted: only where it was asked for
        return {"PDL": early and _chosen is not None}
    return {"PDL": True, "launch_pdl": True} if early and can_overlap(architecture) else {"PDL": False}


def begin_with_weights(device: torch.device, tile: Tile) -> dict[str, Any]:
    """The same of a matmul: also its constant AHEAD.

    Only a matmul asks for something before it waits. Which weights or pages kernels of experts and of attention read, OFFS and
    the table say, which a kernel before may write; and a rotation reads one matrix of 32 KB at most, the same in all blocks.
    """
    return begin(device) | {"AHEAD": ahead(tile, (_chosen or _usual()).ahead)}


def ahead(tile: Tile, times: int = 1) -> int:
    """How many units of the packing a block asks L2 for: those in so many pipelines, as the next power of two. Tiles of more
    than SMALL sums ask for nothing, as registers are scarce there."""
    wanted = tile.units * tile.stages * times if tile.rows * tile.columns <= SMALL else 0
    return 1 << (wanted - 1).bit_length() if wanted else 0


def ahead_lines(lines: Lines, parts: list[tuple[str, str]]) -> list[str]:
    """Lines that ask L2 for what the first AHEAD units of a block need: of each part ("W", "S", ..., with the type of its
    elements) a panel of 16 rows lies in one piece, the units one after the other."""
    layout, found = lines.layout, []
    for i in lines.names:
        for name, kind in parts:
            if name == "W":
                whole = sum(plane["tiles"] * 256 for plane in lines.planes())
                for plane in lines.planes():
                    words = plane["tiles"] * 256
                    before = f"units * {plane['before']} + " if plane["before"] else ""
                    found.append(_ask(f"W{i}", f"units * {whole}", f"{before}ahead * {words}", words * 4, 4))
            else:
                found.append(_scales(f"{name}{i}", layout, SIZES[kind], outer=name == "O"))
    return found


def _scales(name: str, layout: Layout, size: int, outer: bool) -> str:
    """Of scales, 16 for each group of columns, or 16 for all."""
    group = layout.group * layout.ratio if outer else layout.group
    if not group:
        return _ask(name, "16", "0", 0, size)
    return _ask(
        name,
        f"tl.cdiv(K, {group}) * 16",
        f"ahead * {layout.unit} // {group} * 16",
        16 * size * layout.unit / group,
        size,
    )


def _ask(name: str, pitch: str, begin: str, each: float, size: int) -> str:
    """For lines of a part whose units have `each` bytes in a panel, as a power of two."""
    if each >= LINE:
        lines = f"AHEAD * {1 << (ceil_div(int(each), LINE) - 1).bit_length()}"
    elif each:
        share = 1 << (int(LINE / each).bit_length() - 1)  # units that a line has
        lines = f"(AHEAD + {share - 1}) // {share}" if share > 1 else "AHEAD"
    else:
        lines = "1"
    return f"prefetched({name}, tile_n * PANELS, last_panel, {pitch}, {begin}, {LINE // size}, {lines}, PANELS)"


__all__ = [
    "HELPERS",
    "Overlap",
    "ahead",
    "ahead_lines",
    "begin",
    "begin_with_weights",
    "can_overlap",
    "overlapping",
]
