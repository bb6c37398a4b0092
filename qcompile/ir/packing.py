"""Bit layouts: codes `[N, K]` of 1 to 8 bits to bytes and back.

A code of `bits` bits is cut into planes of power-of-two width (6 = 4 + 2), the first plane holding its low
bits, so that every plane fills bytes exactly and every width shares the same code. The layouts:

**tile16**, what the CPU kernels read and what is saved. Rows come in panels of 16, columns in blocks of 32;
codes beyond N and K are 0. Packed: uint8 `[P, KB, bits * 64]` with P = ceil(N/16), KB = ceil(K/32). Inside
one (panel, block) the planes follow each other; a plane of width w is w tiles of 64 bytes; byte `o*4 + j` of
tile t belongs to row o, and its bits `i*w .. i*w + w - 1` to column `t*4*(8/w) + 4*i + j`. One tile is one
512-bit register and one 32-bit lane of it one row: activations are broadcast four columns at a time and no
horizontal sum is needed.
Scales, zeros and minima: `[P, G, 16]` in their storage dtype.

**mma16**, what the Triton kernels read: the operand of a tensor core's 16 x 16 instruction, as its registers hold it.
Rows come in panels of 16, columns in units of 512/v, v being the width of the narrowest plane; codes beyond N and K are 0.
One unit is four words of 128/v columns, one word 8/v steps of 16 columns, one step one instruction. Of a unit, a plane of
width w has w/v tiles of 1 KB; inside a tile the bytes are `[half h][lane][word][b, i1]`: lane `4 g + t` of a warp owns the
16 bytes of row `8 h + g`, and bit field i of byte `i1 + 2 b` of a 32-bit word of tile j holds column
`16 (8/w j + i) + 8 i1 + 2 t + b` of the word. So one 16-byte load per lane brings whole operands, the fields of equal
(i, i1) of both half words are the two elements that one register of the instruction holds, and all planes of a code lie in
the same word of the same lane. Packed: uint8 `[P, bytes of a panel]`, plane after plane, unit after unit. Scales: as tile16.

**mma8** is the same for instructions on bytes: lane `4 g + t` owns columns `4 t ..` of each step, one in each byte of the
word, so bit field i of byte c of tile j holds column `16 (8/w j + i) + 4 t + c` of the word.

**rows**, device neutral: per row, the planes one after the other, each `ceil(K*w/8)` bytes, column `c` in the
bits `(c mod 8/w) * w ..` of byte `c div (8/w)`. Packed: uint8 `[N, sum ceil(K*w/8)]`; scales `[N, G]`.

All cut along N without touching a byte (in panels: at multiples of 16): packing commutes with sharding rows.

Sources: the operand layouts are those of `mma.m16n8k16`, `mma.m16n8k32` and `wgmma` in the PTX ISA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.errors import QCError
from qcompile.ir.formats import bit_planes

if TYPE_CHECKING:
    from qcompile.ir.scheme import Scheme

PANEL = 16
BLOCK = 32


def ceil_div(a: int, b: int) -> int:
    """ceil(a / b) for b > 0."""
    return -(-a // b)


def packed_shape(bits: int, n: int, k: int, packing: str = "tile16") -> tuple[int, ...]:
    """Shape of the packed uint8 codes of an `[n, k]` matrix."""
    planes = bit_planes(bits)
    if packing == "rows":
        return (n, sum(ceil_div(k * width, 8) for width in planes))
    if packing in _INNER:
        return (ceil_div(n, PANEL), padded_columns(bits, k) * bits * PANEL // 8)
    return (ceil_div(n, PANEL), ceil_div(k, BLOCK), bits * 64)


def unit_columns(bits: int) -> int:
    """Columns of one mma16 unit: what 16 bytes of the narrowest plane hold for one row and one lane in four."""
    return 512 // min(bit_planes(bits))


def padded_columns(bits: int, k: int) -> int:
    """Columns that mma16 stores for a matrix of `k`: whole units."""
    unit = unit_columns(bits)
    return ceil_div(k, unit) * unit


def scale_shape(groups: int, n: int, packing: str = "tile16") -> tuple[int, ...]:
    """Shape of the packed scales of `n` rows with `groups` scales each."""
    return (n, groups) if packing == "rows" else (ceil_div(n, PANEL), groups, PANEL)


class Part(NamedTuple):
    """What one tensor of a packed weight is: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def packed_parts(scheme: Scheme, n: int, k: int) -> tuple[Part, ...]:
    """The tensors of an `[n, k]` weight in `scheme`, in order: codes, scales, then zeros | mins, then outer scales."""
    scale, packing = scheme.scale.format.dtype, scheme.packing
    shape = scale_shape(scheme.groups(k), n, packing)
    parts = [
        Part("codes", packed_shape(scheme.format.bits, n, k, packing), torch.uint8),
        Part("scales", shape, scale),
    ]
    if scheme.scale.zero is not None:
        parts.append({"z": Part("zeros", shape, torch.uint8), "m": Part("mins", shape, scale)}[scheme.scale.zero])
    if scheme.outer is not None:
        parts.append(Part("outer", scale_shape(scheme.outer_groups(k), n, packing), scheme.outer.format.dtype))
    return tuple(parts)


def packed_bytes(scheme: Scheme, n: int, k: int) -> int:
    """Bytes of all parts of an `[n, k]` weight in `scheme`, padding of the layout included."""
    return sum(torch.Size(part.shape).numel() * part.dtype.itemsize for part in packed_parts(scheme, n, k))


def pack_codes(codes: Tensor, bits: int, packing: str = "tile16") -> Tensor:
    """Pack codes.

    Args:
        codes: uint8 `[N, K]`, each below `2**bits` (higher bits are dropped); any strides.
        bits: 1 to 8.
        packing: `tile16`, `mma16`, `mma8` or `rows`.

    Returns:
        uint8 of `packed_shape(bits, N, K, packing)`, contiguous.

    Raises:
        QCError `packing.codes` unless `codes` is a uint8 matrix.
    """
    if codes.dtype != torch.uint8 or codes.dim() != 2:
        raise QCError("packing.codes", f"codes are {codes.dtype} {list(codes.shape)}", why="uint8 [N, K] is packed")
    n, k = codes.shape
    planes: list[Tensor] = []
    if packing == "rows":
        for shift, width, per in _plan(bits):
            size = ceil_div(k, per)
            planes.append(_join(_pad(codes, n, size * per).reshape(n, size, per, 1), shift, width).flatten(1))
        return torch.cat(planes, dim=1)
    panels = ceil_div(n, PANEL)
    if packing in _INNER:
        inner, order = _INNER[packing]
        units = ceil_div(k, unit_columns(bits))
        padded = _pad(codes, panels * PANEL, units * unit_columns(bits))
        for shift, width, per in _plan(bits):
            fields = padded.reshape(panels, 2, 8, units, 4, _tiles(bits, width), per, *inner).permute(order)
            planes.append(_join(fields.unsqueeze(-1), shift, width).flatten(1))
        return torch.cat(planes, dim=1)
    blocks = ceil_div(k, BLOCK)
    padded = _pad(codes, panels * PANEL, blocks * BLOCK)
    for shift, width, per in _plan(bits):
        lanes = _join(padded.reshape(panels, PANEL, blocks, width, per, 4), shift, width)
        planes.append(lanes.permute(0, 2, 3, 1, 4).reshape(panels, blocks, width * 64))
    return torch.cat(planes, dim=2)


def unpack_codes(packed: Tensor, bits: int, n: int, k: int, packing: str = "tile16") -> Tensor:
    """Invert `pack_codes`: uint8 `[n, k]`.

    Raises:
        QCError `packing.shape` when `packed` is not uint8 of `packed_shape(bits, n, k, packing)`.
    """
    shape = packed_shape(bits, n, k, packing)
    if packed.dtype != torch.uint8 or tuple(packed.shape) != shape:
        raise QCError(
            "packing.shape",
            f"packed codes are {packed.dtype} {list(packed.shape)}",
            where=f"{bits}-bit {packing} codes of [{n}, {k}]",
            why=f"those are torch.uint8 {list(shape)}",
            next="give n, k, bits and packing as they were packed, or pack the codes again",
        )
    start = 0
    codes: Tensor | None = None
    for shift, width, per in _plan(bits):
        if packing == "rows":
            size = ceil_div(k * width, 8)
            part = _split(packed[:, start : start + size].unsqueeze(-1), width, per).flatten(1)[:, :k]
        elif packing in _INNER:
            inner, order = _INNER[packing]
            size = padded_columns(bits, k) * width * PANEL // 8
            lanes = _mma_bytes(packed[:, start : start + size], _tiles(bits, width), inner)
            fields = _split(lanes.unsqueeze(-1), width, per).squeeze(-1)
            part = fields.permute(_inverse(order)).flatten(3).flatten(0, 2)[:n, :k]
        else:
            size = width * 64
            tiles = packed[:, :, start : start + size].reshape(shape[0], shape[1], width, PANEL, 4)
            part = _split(tiles.permute(0, 3, 1, 2, 4), width, per).reshape(shape[0] * PANEL, shape[1] * BLOCK)[:n, :k]
        codes = part if codes is None else codes | (part << shift)
        start += size
    assert codes is not None  # a width has at least one plane
    return codes.contiguous()


def repack_codes(packed: Tensor, bits: int, n: int, k: int, old: str, new: str) -> Tensor:
    """Packed codes in another layout; the same tensor where both are one."""
    return packed if old == new else pack_codes(unpack_codes(packed, bits, n, k, old), bits, new)


def gather_codes(packed: Tensor, bits: int, k: int, rows: Tensor, packing: str = "tile16") -> Tensor:
    """Codes of some rows, uint8 `[len(rows), k]`, without unpacking the others.

    Args:
        rows: int64 `[M]`, each a row of the packed matrix.
    """
    start = 0
    codes: Tensor | None = None
    for shift, width, per in _plan(bits):
        if packing == "rows":
            size = ceil_div(k * width, 8)
            fields = _split(packed[:, start : start + size][rows].unsqueeze(-1), width, per)
        elif packing in _INNER:
            inner, order = _INNER[packing]
            size = padded_columns(bits, k) * width * PANEL // 8
            lanes = _mma_bytes(packed[:, start : start + size], _tiles(bits, width), inner)
            lanes = lanes[rows // PANEL, :, :, rows % PANEL // 8, rows % 8]
            # Of the order only the columns are left: the dimensions from the fourth on, in their own order.
            left = [dim for dim in order if dim >= 3]
            columns = (1 + left.index(dim) for dim in sorted(left))
            fields = _split(lanes.unsqueeze(-1), width, per).squeeze(-1).permute(0, *columns)
        else:
            size = width * 64
            tiles = packed[:, :, start : start + size].reshape(packed.shape[0], packed.shape[1], width, PANEL, 4)
            fields = _split(tiles[rows // PANEL, :, :, rows % PANEL], width, per)
        part = fields.flatten(1)[:, :k]
        codes = part if codes is None else codes | (part << shift)
        start += size
    assert codes is not None  # a width has at least one plane
    return codes


def gather_scales(packed: Tensor, rows: Tensor, packing: str = "tile16") -> Tensor:
    """Scales of some rows, `[len(rows), G]`."""
    return packed[rows] if packing == "rows" else packed[rows // PANEL, :, rows % PANEL]


def pack_scales(scales: Tensor, packing: str = "tile16", pad: int = 0) -> Tensor:
    """`[N, G]` to `[P, G, 16]` (tile16, rows padded with `pad`) or `[N, G]` (rows); the dtype stays."""
    if packing == "rows":
        return scales.contiguous()
    n, groups = scales.shape
    panels = ceil_div(n, PANEL)
    padded = functional.pad(scales, (0, 0, 0, panels * PANEL - n), value=pad)
    return padded.reshape(panels, PANEL, groups).transpose(1, 2).contiguous()


def unpack_scales(packed: Tensor, n: int, packing: str = "tile16") -> Tensor:
    """Invert `pack_scales`: `[n, G]`."""
    if packing == "rows":
        return packed
    return packed.transpose(1, 2).reshape(packed.shape[0] * PANEL, packed.shape[1])[:n]


def _plan(bits: int) -> Sequence[tuple[int, int, int]]:
    """(shift of the plane in the code, width, codes per byte) of each plane."""
    plan, shift = [], 0
    for width in bit_planes(bits):
        plan.append((shift, width, 8 // width))
        shift += width
    return plan


# How the 16 columns of a step are told apart, and the dimensions (panel, half, g; unit, word, j, i, those of the step) in the
# order of the bytes, then i. mma16: the step is (i1, t, b); mma8: (t, c).
_INNER: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "mma16": ((2, 4, 2), (0, 3, 5, 1, 2, 8, 4, 9, 7, 6)),
    "mma8": ((4, 4), (0, 3, 5, 1, 2, 7, 4, 8, 6)),
}


def _inverse(order: Sequence[int]) -> tuple[int, ...]:
    return tuple(order.index(dim) for dim in range(len(order)))


def _tiles(bits: int, width: int) -> int:
    """mma16 tiles that a plane has in a unit."""
    return width // min(bit_planes(bits))


def _mma_bytes(plane: Tensor, tiles: int, inner: tuple[int, ...]) -> Tensor:
    """One plane of panels as `[P, unit, j, half, g, t, word, ...]`, the last dimensions being those of a word's bytes."""
    last = (2, 2) if len(inner) == 3 else (4,)
    return plane.reshape(plane.shape[0], plane.shape[1] // (tiles * 1024), tiles, 2, 8, 4, 4, *last)


def _pad(codes: Tensor, n: int, k: int) -> Tensor:
    if tuple(codes.shape) == (n, k):
        return codes
    return functional.pad(codes, (0, k - codes.shape[1], 0, n - codes.shape[0]))


def _join(codes: Tensor, shift: int, width: int) -> Tensor:
    """`[..., per, j]` codes to `[..., j]` bytes of one plane."""
    mask = (1 << width) - 1
    out = (codes[..., 0, :] >> shift) & mask
    for i in range(1, codes.shape[-2]):
        out |= ((codes[..., i, :] >> shift) & mask) << (i * width)
    return out


def _split(lanes: Tensor, width: int, per: int) -> Tensor:
    """`[..., j]` bytes of one plane to `[..., per, j]` fields."""
    mask = (1 << width) - 1
    return torch.stack([(lanes >> (i * width)) & mask for i in range(per)], dim=-2)
