"""Oracles: the vocabulary once more, slowly and exactly.

Nothing here shares code with `qcompile.ir` beyond the data in `Format`: layouts are written as the loops that
define them, levels as fractions, random numbers on Python integers. Errors are bounded by derivation, see
`error_bound`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import product

import torch
from torch import Tensor

from qcompile.ir.formats import Format
from qcompile.ir.granularity import Cell
from qcompile.ir.qparams import QParams, effective_scale
from qcompile.ir.scales import spread
from qcompile.ir.scheme import Scheme

UNIT = 2.0**-24  # relative error of one float32 operation
TINY = 2.0**-149  # absolute error of one float32 operation that underflows


def float_level(fmt: Format, code: int) -> Fraction | None:
    """Value of a code of a `float` format by the definition of its fields; None for NaN and infinity."""
    bits = f"{code:0{1 + fmt.exponent + fmt.mantissa}b}"
    sign, field, fraction = bits[0], bits[1 : 1 + fmt.exponent], bits[1 + fmt.exponent :]
    ones = "1" * fmt.exponent
    if fmt.nonfinite == "ieee" and field == ones:
        return None
    if fmt.nonfinite == "nan" and field == ones and fraction == "1" * fmt.mantissa:
        return None
    bias = 2 ** (fmt.exponent - 1) - 1
    significand = Fraction(int(fraction, 2), 2**fmt.mantissa)
    exponent = int(field, 2)
    value: Fraction = (significand if exponent == 0 else 1 + significand) * Fraction(2) ** (max(exponent, 1) - bias)
    return -value if sign == "1" else value


def nearest_codes(y: float, fmt: Format) -> set[int]:
    """Codes that `encode` may produce for the scaled value `y`: nearest level, with every tie, after
    saturation.
    """
    target = min(max(Fraction(y), Fraction(fmt.low)), Fraction(fmt.max))
    count = len(fmt.table) or 1 << fmt.bits
    used = sorted((v, c) for c, v in enumerate(fmt.values[:count]) if fmt.low <= v <= fmt.max)
    at = bisect_left(used, (float(target), -1))
    near = used[max(at - 2, 0) : at + 2]  # zero appears twice in a float format
    distance = {code: abs(Fraction(value) - target) for value, code in near}
    return {code for code in distance if distance[code] == min(distance.values())}


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, ...]:
    """Philox4x32-10 on Python integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b % 2**32, (a >> 32) ^ c[3] ^ k[1], a % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def random_bits(index: int, seed: int, stream: tuple[int, int] = (0, 0)) -> int:
    """The 16 random bits of the element with this global index."""
    block, lane = divmod(index, 8)
    words = philox4x32((block % 2**32, block >> 32, *stream), (seed % 2**32, seed >> 32))
    return words[lane // 2] >> 16 * (lane % 2) & 0xFFFF


def planes(bits: int) -> list[tuple[int, int]]:
    """(lowest bit in the code, width) of each plane."""
    out, low = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            out.append((low, width))
            low += width
    return out


def pack_tile16(codes: Tensor, bits: int) -> Tensor:
    """The tile16 layout, one field at a time."""
    n, k = codes.shape
    panels, blocks = (n + 15) // 16, (k + 31) // 32
    packed = torch.zeros(panels, blocks, bits * 64, dtype=torch.int64)
    for row, column in product(range(n), range(k)):
        code, start = int(codes[row, column]), 0
        for low, width in planes(bits):
            tile, rest = divmod(column % 32, 4 * (8 // width))
            i, j = divmod(rest, 4)
            byte = start + tile * 64 + (row % 16) * 4 + j
            packed[row // 16, column // 32, byte] |= (code >> low) % 2**width << i * width
            start += width * 64
    return packed.to(torch.uint8)


def pack_mma16(codes: Tensor, bits: int, octets: bool = False) -> Tensor:
    """The mma16 layout, one field at a time: where the PTX ISA says that element (row, column) of the 16 x 16 operand A
    lies (thread `4 * (row mod 8) + column mod 8 div 2`, register `2 * (column div 8) + row div 8`), and what `packing`
    adds to that (whose word, which bits). `octets`: mma8, for operands of bytes, where thread `4 * (row mod 8) + column mod
    16 div 4` holds column mod 4."""
    n, k = codes.shape
    narrow = min(width for _, width in planes(bits))
    panels, units = (n + 15) // 16, (k + 512 // narrow - 1) // (512 // narrow)
    packed = torch.zeros(panels, units * bits * 1024 // narrow, dtype=torch.int64)
    for row, column in product(range(n), range(k)):
        code, start = int(codes[row, column]), 0
        unit, rest = divmod(column, 512 // narrow)
        word, rest = divmod(rest, 128 // narrow)
        step, inner = divmod(rest, 16)  # which instruction of the word, and where in it
        thread, register, half = 4 * (row % 8) + inner % 8 // 2, 2 * (inner // 8) + row % 16 // 8, inner % 2
        if octets:
            thread, register, half = 4 * (row % 8) + inner // 4, row % 16 // 8 + 2 * (inner % 2), inner % 4 // 2
        for low, width in planes(bits):
            tile, field = divmod(step, 8 // width)
            byte = (unit * (width // narrow) + tile) * 1024 + register % 2 * 512 + thread * 16 + word * 4
            byte += register // 2 + half * 2
            packed[row // 16, start + byte] |= (code >> low) % 2**width << field * width
            start += units * (width // narrow) * 1024
    return packed.to(torch.uint8)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """The rows layout, one field at a time."""
    n, k = codes.shape
    packed = torch.zeros(n, sum((k * width + 7) // 8 for _, width in planes(bits)), dtype=torch.int64)
    for row, column in product(range(n), range(k)):
        start = 0
        for low, width in planes(bits):
            byte, i = divmod(column, 8 // width)
            packed[row, start + byte] |= (int(codes[row, column]) >> low) % 2**width << i * width
            start += (k * width + 7) // 8
    return packed.to(torch.uint8)


def cells(shape: Sequence[int], cell: Cell) -> Iterator[tuple[tuple[int, ...], tuple[slice, ...]]]:
    """(index of the scale, slices of its elements) for every cell of a tensor."""
    along = [size if length is None else length for size, length in zip(shape, cell, strict=True)]
    for index in product(*(range(-(-size // step)) for size, step in zip(shape, along, strict=True))):
        yield index, tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, along, strict=True))


def level_distance(y: Tensor, fmt: Format, zero: Tensor | None = None) -> Tensor:
    """Distance (float64) of each y from the nearest level; a zero point moves the levels to -z .. max - z."""
    if zero is not None:
        return (y - torch.minimum(torch.maximum(torch.round(y), -zero), fmt.max - zero)).abs()
    levels = torch.tensor(
        sorted({v for v in fmt.values if fmt.low <= v <= fmt.max}), dtype=torch.float64, device=y.device
    )
    above = torch.searchsorted(levels, y.contiguous()).clamp(1, len(levels) - 1)
    return torch.minimum((y - levels[above - 1]).abs(), (levels[above] - y).abs())


def error_bound(x: Tensor, scheme: Scheme, qparams: QParams) -> Tensor:
    """Largest |decode(encode(x)) - x| allowed under `nearest`, per element, float64.

    With u = 2**-24, real scale s, minimum m and y = (x - m) / s: the computed quotient is off by e <= 3u|y|
    (three roundings on the `token` path, two otherwise; the minimum's subtraction included), so the level l
    chosen, nearest to the computed quotient, is within dist(y) + 2e of y, dist being the distance to the
    nearest level: at most half a step inside the range. Decoding rounds l*s once and, with a minimum, the sum
    once more: u|l*s| + u|value|, where |l*s| <= |x - m| + s*(dist + 2e). Doubling u covers the terms of
    second order, underflow adds 2**-149 per operation. Valid for |x| <= 2**126, where nothing overflows.
    """
    cell = scheme.granularity.cell(x.dim())
    s = spread(effective_scale(qparams, scheme, x.dim()), cell, x.shape).double()
    zero = None if qparams.zero is None else spread(qparams.zero.double(), cell, x.shape)
    minimum = zero if scheme.scale.zero == "m" and zero is not None else torch.zeros((), dtype=torch.float64)
    centred, u = x.double() - minimum, 2 * UNIT
    y = torch.where(s > 0, centred / s, 0.0)  # a group of zeros may have s = 0: everything decodes to 0
    quotient = 3 * u * y.abs() + TINY
    level = level_distance(y, scheme.format, zero if scheme.scale.zero == "z" else None) + 2 * quotient
    product_error = u * (centred.abs() + s * level) + TINY
    sum_error = u * (x.double().abs() + s * level + product_error)
    return s * level + product_error + (sum_error if scheme.scale.zero == "m" else 0.0)
