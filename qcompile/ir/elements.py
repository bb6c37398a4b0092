"""One element at a time: scaled float32 values to codes and back, for every kind of format.

This is where "nearest level" is defined, from the data in `Format` alone: integers by rounding, floats from
their exponent and mantissa widths, tables from thresholds derived from their levels. Values beyond the range
saturate.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from qcompile.ir.formats import Format
from qcompile.ir.rounding import round_to_integer


def encode_element(
    y: Tensor, fmt: Format, rounding: str, bits: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Codes (uint8) of scaled values.

    Nearest: the nearest level, ties to even (an even integer or mantissa; for tables the level of smaller
    magnitude, and between -1 and +1 of `binary` the positive one). Floor: the largest level below.
    Stochastic: one of the two neighbours, so that the expectation is the value. Outside [fmt.low, fmt.max]:
    the end of the range. Infinities saturate, except in formats that have an infinity (e5m2) or a NaN but no
    infinity (e4m3: NaN). NaN: the format's NaN, or the code of zero where it has none.

    Args:
        y: float32, any shape.
        bits: 16 random bits per element, for `stochastic`.
        shift: integer formats: a zero point added after rounding, before the range is applied.
    """
    return _ENCODERS[fmt.kind](y, fmt, rounding, bits, shift)


def decode_element(codes: Tensor, fmt: Format) -> Tensor:
    """Float32 levels of uint8 codes (NaN and infinity where the format has them)."""
    if fmt.kind == "int":
        return codes.to(torch.float32) - fmt.offset
    return fmt.levels(codes.device)[codes.to(torch.int32)]


def round_element(y: Tensor, fmt: Format, shift: Tensor | None = None) -> Tensor:
    """The nearest level (plus `shift`, see `encode_element`) of finite `y`, float32: encode and decode in one step."""
    if fmt.kind == "int":
        q = torch.round(y)
        return torch.clamp(q if shift is None else q + shift, fmt.low, fmt.max)
    if (native := _NATIVE.get(fmt.name)) is not None:  # one instruction on devices that have it
        return torch.clamp(y, fmt.low, fmt.max).to(native).to(torch.float32)
    return decode_element(encode_element(y, fmt, "nearest", None, shift), fmt)


_NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def _encode_int(y: Tensor, fmt: Format, rounding: str, bits: Tensor | None, shift: Tensor | None) -> Tensor:
    q = round_to_integer(torch.nan_to_num(y), rounding, bits)
    if shift is not None:
        q = q + shift
    return (torch.clamp(q, fmt.low, fmt.max) + fmt.offset).to(torch.uint8)


def _encode_float(y: Tensor, fmt: Format, rounding: str, bits: Tensor | None, shift: Tensor | None) -> Tensor:
    clamped = torch.clamp(torch.nan_to_num(y), fmt.low, fmt.max)
    exponent = torch.clamp(((clamped.view(torch.int32) >> 23) & 0xFF) - 127, min=fmt.emin)
    # in units of the spacing of its binade the mantissa is an integer; multiplying by a power of two is exact
    unit = ((fmt.mantissa + 127 - exponent) << 23).view(torch.float32)
    n = torch.abs(round_to_integer(clamped * unit, rounding, bits)).to(torch.int32)
    # a mantissa that rounds up to 2**(m+1) carries into the exponent field by this very sum
    magnitude = ((exponent - fmt.emin) << fmt.mantissa) + n
    if fmt.nonfinite != "none":
        top = (1 << (fmt.exponent + fmt.mantissa)) - 1
        infinity = top + 1 - (1 << fmt.mantissa) if fmt.nonfinite == "ieee" else top
        magnitude = torch.where(torch.isinf(y), infinity, magnitude)
        magnitude = torch.where(torch.isnan(y), top, magnitude)
    sign = torch.signbit(y).to(torch.int32) << (fmt.bits - 1)
    return (magnitude | sign).to(torch.uint8)


def _encode_table(y: Tensor, fmt: Format, rounding: str, bits: Tensor | None, shift: Tensor | None) -> Tensor:
    inside = torch.clamp(torch.nan_to_num(y), fmt.low, fmt.max).contiguous()
    if rounding == "nearest":
        upper, lower = (torch.tensor(t, dtype=torch.float32, device=y.device) for t in thresholds(fmt.table))
        # count the thresholds passed: those whose tie belongs above by >=, the others by >
        code = torch.bucketize(inside, upper, right=True) + torch.bucketize(inside, lower)
    else:
        levels = torch.tensor(fmt.table, dtype=torch.float32, device=y.device)
        below = torch.bucketize(inside, levels[1:-1].contiguous(), right=True)
        at, above = levels[below], levels[below + 1]
        code = below + round_to_integer((inside - at) / (above - at), rounding, bits).to(torch.int64)
    return torch.where(torch.isnan(y), fmt.zero_code, code).to(torch.uint8)


_ENCODERS = {"int": _encode_int, "float": _encode_float, "table": _encode_table}


@lru_cache(maxsize=64)
def thresholds(table: tuple[float, ...]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Midpoints between neighbouring levels, as (those whose tie goes up, those whose tie goes down).

    A midpoint need not be a float32 number; rounded *up* for the first kind and *down* for the second, a
    float32 comparison decides exactly as the real midpoint would.
    """
    up, down = [], []
    for low, high in pairwise(table):
        middle = (low + high) / 2
        if abs(high) <= abs(low):
            up.append(float32_towards(middle, math.inf))
        else:
            down.append(float32_towards(middle, -math.inf))
    return tuple(up), tuple(down)


def float32_towards(value: float, direction: float, strictly: bool = False) -> float:
    """The float32 number nearest to `value` on the side of `direction`: never `value` itself when `strictly`."""
    nearest: float = struct.unpack("f", struct.pack("f", value))[0]
    if (nearest == value and not strictly) or (nearest != value and (nearest > value) == (direction > 0)):
        return nearest
    if nearest == 0:
        return math.copysign(2.0**-149, direction)
    word: int = struct.unpack("i", struct.pack("f", nearest))[0]
    # for floats of one sign, the next float away from zero is the next bit pattern
    word += 1 if (nearest > 0) == (direction > 0) else -1
    result: float = struct.unpack("f", struct.pack("i", word))[0]
    return result
