"""The other ways to a product on a GPU: decode the weight once, then multiply what has nothing to decode.

A fused kernel decodes a weight for every tile of rows. With many rows a product whose operands both come from memory is
faster than any kernel that decodes beside its products, by more than it costs to write the weight once, in the type that
is multiplied, and to read it again. The decoded weight lives as long as one call.

Activations of 16 bits leave the product to the vendor's library. Those with a scheme meet bytes: in a kernel of ours, which
ends as the fused one does, or in the library, whose sums a second kernel finishes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qcompile import compat
from qcompile.codegen.devices.triton_bytes import Stored
from qcompile.codegen.devices.triton_lines import Layout
from qcompile.codegen.devices.triton_overlap import begin
from qcompile.codegen.devices.triton_text import bytes_text, decode_text, finish_text
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.triton import Shape, Tile, Way, tiles_across
from qcompile.ir.packing import ceil_div, unpack_scales

Tensors = Sequence[torch.Tensor]

ROWS, COLUMNS = 32, 64  # of a block that decodes (COLUMNS outputs), or finishes (ROWS x COLUMNS results)
WARPS = 4
FULL = 8  # warps whose registers are those of a multiprocessor
LIBRARY = 16  # the libraries' products of bytes want a multiple of so many rows of the weight


def ways(spec: KernelSpec) -> tuple[Way, ...]:
    """How a spec's product may be made: the libraries know no scales inside a sum, and no 32-bit activations here. What finds
    the sums of a weight's bytes, for zero points of activations, is the fused kernel."""
    if spec.act is None:
        return ("fused", "vendor") if spec.x in ("f16", "bf16") else ("fused",)
    layout = Layout.of(spec.weight, spec.act)
    if layout.shifted:
        return ("fused",)
    return ("fused", "own") if layout.cell else ("fused", "own", "vendor")


@dataclass(frozen=True)
class Call:
    """What a product is called with.

    Attributes:
        inputs: x, `[M, k]`; with an activation scheme codes of x, `[M, K padded to the unit]`, scales, and sums of codes where
            the fused kernel reads them.
        parts: packed parts of each segment, codes as int32.
        extras: "row" `[columns]`, "mat" `[M, columns]`.
        y: `[M, columns]`, which is written.
        n: rows of each segment.
        strides: row strides of "mat" extras and of y.
        tile: with a way that the spec has.
    """

    inputs: Tensors
    parts: Tensors
    extras: Tensors
    y: torch.Tensor
    n: Sequence[int]
    k: int
    strides: Sequence[int]
    tile: Tile


def _decode(
    kernel: Any, weight: torch.Tensor, parts: Tensors, n: Sequence[int], k: int, units: int, together: int = 1
) -> None:
    """Write the rows of all segments, one after the other; a block decodes so many units of the packing `together`."""
    each = len(parts) // len(n)
    for i, rows in enumerate(weight[: sum(n)].split(list(n))):
        kernel[ceil_div(n[i], COLUMNS), units // together](
            rows, *parts[i * each : (i + 1) * each], n[i], k, weight.stride(0),
            BN=COLUMNS, KC=together, num_warps=WARPS, **begin(weight.device),
        )  # fmt: skip


class Floats:
    """The product of a spec without activation scheme."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec, self.layout = spec, Layout.of(spec.weight)
        self.decode = compat.triton_kernel(decode_text(spec))
        # Sums that need nothing but a cast are left to the product itself.
        self.plain = not spec.epilogue.replace("acc", "") and not spec.extras and spec.x == spec.y
        self.finish = None if self.plain else compat.triton_kernel(finish_text(spec))

    def __call__(self, call: Call) -> None:
        """Write y."""
        (x,), y, n, k = call.inputs, call.y, call.n, call.k
        weight = torch.empty(sum(n), k, dtype=x.dtype, device=x.device)
        _decode(self.decode, weight, call.parts, n, k, ceil_div(k, self.layout.unit))
        m = x.shape[0]
        if self.finish is None:
            compat.mm_float32(x, weight.t(), out=y.view(m, -1))
            return
        sums = compat.mm_float32(x, weight.t())
        columns = n[0] if self.spec.paired else sum(n)
        grid = (ceil_div(m, ROWS), ceil_div(columns, COLUMNS))
        self.finish[grid](
            sums, *call.extras, y, m, columns, sums.stride(0), *call.strides,
            BM=ROWS, BN=COLUMNS, num_warps=WARPS, **begin(x.device),
        )  # fmt: skip


class Octets:
    """The product of a spec with an activation scheme."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec, self.lines = spec, Stored.of(spec)
        self.layout = self.lines.layout
        self.decode = compat.triton_kernel(decode_text(spec))
        weight = spec.weight
        # A library that scales rows and columns itself, and rounds to bf16, leaves nothing to do.
        self.scaled = (
            not self.lines.whole
            and not self.lines.corrected
            and self.lines.numbers.factor == 1
            and weight.outer is None
            and weight.scale.format.dtype == torch.float32
            and not spec.epilogue.replace("acc", "")
            and not spec.extras
            and spec.y == "bf16"
        )

    @functools.cached_property
    def product(self) -> Any:
        """The kernel of way "own"."""
        return compat.triton_kernel(bytes_text(self.spec).source)

    @functools.cached_property
    def finish(self) -> Any:
        """The kernel from a library's sums to the result."""
        return compat.triton_kernel(bytes_text(self.spec, given=True).source)

    def weight(self, parts: Tensors, n: Sequence[int], k: int, dtype: torch.dtype) -> torch.Tensor:
        """The bytes of all segments, `[rows, K padded to the unit]`: their rows one after the other, then some that hold
        anything, up to a multiple of `LIBRARY`."""
        units = ceil_div(k, self.layout.unit)
        rows = ceil_div(sum(n), LIBRARY) * LIBRARY
        found = torch.empty(rows, units * self.layout.unit, dtype=dtype, device=parts[0].device)
        together = math.gcd(units, max(1, 128 // self.layout.unit))  # 128 columns of a row, a line of the cache
        _decode(self.decode, found.view(torch.int32), parts, n, k, units, together)
        return found

    def __call__(self, call: Call) -> None:
        """Write y."""
        (x, *more), parts, n, tile = call.inputs, call.parts, call.n, call.tile
        weight, each = self.weight(parts, n, call.k, x.dtype), len(parts) // len(n)
        scales = [part for i in range(len(n)) for part in parts[i * each + 1 : (i + 1) * each]]
        rest = [*more, *scales, *call.extras, call.y, x.shape[0], call.k]
        if tile.way == "own":
            self._own(x, weight, rest, [*n, *call.strides], tile)
        elif self.scaled and sum(n) == weight.shape[0] and library_scales(compat.gpu(x.device).architecture):
            columns = torch.cat([unpack_scales(s, size).reshape(-1) for s, size in zip(scales, n, strict=True)])
            compat.mm_e4m3(x, weight.t(), more[0].reshape(-1, 1), columns.reshape(1, -1), out=call.y)
        else:
            sums = compat.mm_int8(x, weight.t()) if self.lines.whole else compat.mm_e4m3(x, weight.t())
            grid = (ceil_div(x.shape[0], ROWS) * self._tiles(n, COLUMNS),)
            sizes = [sums.stride(0), *n, *call.strides]
            self.finish[grid](sums, *rest, *sizes, BM=ROWS, BN=COLUMNS, num_warps=WARPS)

    def _own(
        self, x: torch.Tensor, weight: torch.Tensor, rest: Sequence[Any], sizes: Sequence[int], tile: Tile
    ) -> None:
        depth = math.gcd(tile.depth, weight.shape[1], self.layout.cell)
        tiles = ceil_div(x.shape[0], tile.rows) * self._tiles(sizes[: self.spec.segments], tile.columns)
        tma = tile.tma and x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0
        operands: Sequence[Any] = (x, weight)
        if tma:
            operands = [compat.descriptor(x, (tile.rows, depth)), compat.descriptor(weight, (tile.columns, depth))]
        blocks = compat.gpu(x.device).processors * max(1, FULL // tile.warps)
        self.product[min(tiles, blocks),](
            *operands, *rest, x.stride(0), *sizes,
            BM=tile.rows, BN=tile.columns, BK=depth, STAGES=tile.stages, TMA=tma, FLAT=tile.flat, **tile.options,
        )  # fmt: skip

    def _tiles(self, n: Sequence[int], columns: int) -> int:
        return tiles_across(n, columns, self.spec.paired)


@functools.lru_cache(maxsize=512)
def other_way(spec: KernelSpec) -> Floats | Octets:
    """The one of a spec that has more `ways` than "fused"."""
    return Floats(spec) if spec.act is None else Octets(spec)


def library_scales(architecture: str) -> bool:
    """Whether the library of a GPU scales rows and columns of a product of e4m3; what stands for it on a CPU does."""
    return architecture == "" or (architecture.startswith("sm_") and int(architecture[3:]) >= 90)


def cut_own(spec: KernelSpec, shape: Shape, shared: int, architecture: str) -> Tile:
    """The tile of a line of the table for way "own".

    The numbers that a thread holds for each element of the tile are the sums, with those of a cell or a step beside where
    sums do not stay in one accumulator, and "mat" extras. 128 of a thread's 255 registers are for them on sm_90, whose
    instructions read memory, and 64 elsewhere, where they read registers, or sums come from a memory of their own.
    """
    lines, most, sums = Stored.of(spec), 128 if architecture == "sm_90" else 64, spec.sums
    held = sums + bool(lines.layout.cell or not lines.whole) + [kind for kind, _ in spec.extras].count("mat")
    rows, depth = shape.rows, shape.depth
    threads = shape.warps * (64 if architecture.startswith("gfx") else 32)
    while rows > ROWS and held * rows * shape.columns > most * threads:
        rows //= 2
    shared -= 16384  # scales of rows, and what threads pass on to each other

    def stage() -> int:
        return depth * (rows + shape.columns * sums)

    while depth > COLUMNS and 2 * stage() > shared:
        depth //= 2
    stages = max(1, min(shape.stages, shared // stage()))
    tma = architecture in ("", "sm_90")
    return Tile(rows, shape.columns, 1, 1, stages, shape.warps, "own", depth, tma, shape.flat)


__all__ = ["Call", "Floats", "Octets", "cut_own", "library_scales", "other_way", "ways"]
