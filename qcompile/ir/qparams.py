"""Choosing scales: the part of a scheme that depends on data.

Per cell of the granularity, with Q the format's largest level and everything in float32:

    absmax formats         s = absmax / Q
    with an e8m0 scale     s = 2**(floor(log2 absmax) - floor(log2 Q)), the OCP MX rule: beyond Q * s it
    saturates
    ternary, binary        s = mean |x|, summed in float64
    uintN without zero     s = max(x, 0) / Q; negative values saturate at 0
    +z                     s = (max(x, 0) - min(x, 0)) / Q, z = clamp(round(-min(x, 0) / s), 0, Q)
    +m                     s = (max x - min x) / Q, m = min x
    nested                 s as above; outer = (largest s inside it) / (largest inner scale); inner = s /
    outer

Scales are then rounded to the form they are stored in, before anything is encoded: `float` and `element`
formats to nearest, powers of two up, so that nothing saturates (only the MX rule rounds down), clamped to the
range of the format. A cell of zeros (for +m: of equal values) has s = 1; a format without a zero (binary) has
s = 0 there, or the smallest power of two. A cell that holds a NaN or an infinity has s = NaN, so that all of
it decodes to NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.formats import TINY
from qcompile.ir.granularity import Nested, PerToken
from qcompile.ir.scales import amax, amin, cell_counts, load_scale, reduce_cells, spread, store_scale, total
from qcompile.ir.scheme import Scheme

# An inner scale never falls below 2**-24 nor an outer one below 2**-102: the product is a normal float32.
INNER_LOW = 2.0**-24
OUTER_LOW = 2.0**-102


class QParams(NamedTuple):
    """Scales of one tensor in stored form (see `ScaleFormat.dtype`), one per cell of the granularity.

    Attributes:
        scale: `[cells...]`; of a nested scheme the inner scale.
        zero: `+z`: uint8 zero points; `+m`: minima in the scale's dtype; else None.
        outer: outer scales of a nested scheme, else None.
        inverse: float32 Q / absmax. Only `choose_qparams` of a `token` scheme with an fp32 scale and no zero
            sets it. Where it is present values are multiplied by it, as a kernel that quantizes on the fly
            does; otherwise they are divided by the scale.
    """

    scale: Tensor
    zero: Tensor | None = None
    outer: Tensor | None = None
    inverse: Tensor | None = None


def pack_qparams(qparams: QParams) -> list[Tensor]:
    """The tensors of scales, without those that are not there."""
    return [t for t in qparams if t is not None]


def unpack_qparams(tensors: Sequence[Tensor], scheme: Scheme, ndim: int) -> QParams:
    """Invert `pack_qparams` for a tensor of `ndim` dimensions."""
    rest = list(tensors)
    scale = rest.pop(0)
    zero = rest.pop(0) if scheme.scale.zero is not None else None
    outer = rest.pop(0) if scheme.outer is not None else None
    return QParams(scale, zero, outer, rest.pop(0) if rest else None)


def choose_qparams(x: Tensor, scheme: Scheme | str) -> QParams:
    """Choose scales for `x`: any float dtype, shape and strides.

    Raises:
        QCError `scheme.rank` when the granularity needs a dimension that `x` lacks.
    """
    scheme = Scheme.of(scheme)
    fmt, scale, cell = scheme.format, scheme.scale, scheme.granularity.cell(x.dim())
    low, high = (reduce_cells(x, cell, r).to(torch.float32) for r in (amin, amax))
    finite = torch.isfinite(low) & torch.isfinite(high)
    if scale.zero == "z":
        low, high = torch.clamp(low, max=0.0), torch.clamp(high, min=0.0)
    peak = torch.maximum(high, -low) if fmt.signed else torch.clamp(high, min=0.0)
    mx = scale.format.name == "e8m0" and scale.zero is None and fmt.kind != "table"
    if scale.zero is not None:
        # halves, as the difference of two large numbers would overflow; otherwise the bits are the same
        wanted = (high * 0.5 - low * 0.5) / (fmt.max * 0.5)
    elif fmt.statistic == "mean":
        sums = reduce_cells(torch.abs(x), cell, total)
        wanted = (sums / cell_counts(x.shape, cell, x.device)).to(torch.float32)
    else:
        wanted = peak * 2.0**-fmt.emax if mx else peak / fmt.max
    empty = low == high if scale.zero is not None else peak == 0
    wanted = torch.where(finite, _live(wanted, empty), math.nan)
    fill = 0.0 if fmt.values[fmt.zero_code] else 1.0

    outer = zero = inverse = None
    if isinstance(scheme.granularity, Nested) and scheme.outer is not None:
        top = 1.0 if scale.format.kind == "exponent" else scale.format.high
        outer_cell = scheme.granularity.outer_cell(x.dim())
        most = reduce_cells(wanted, outer_cell, amax)
        outer = store_scale(most / top, scheme.outer.format, low=OUTER_LOW)
        loaded = spread(load_scale(outer, scheme.outer.format), outer_cell, wanted.shape)
        stored = store_scale(_live(wanted / loaded, empty), scale.format, fill, low=INNER_LOW, high=top)
    else:
        stored = store_scale(wanted, scale.format, fill, down=mx)

    if scale.zero == "z":
        s = effective_scale(QParams(stored, outer=outer), scheme, x.dim())
        zero = torch.clamp(torch.round(torch.nan_to_num(-low / s)), 0.0, fmt.max).to(torch.uint8)
    elif scale.zero == "m":
        limit = scale.format.high
        # which of 0.0 and -0.0 is the smaller depends on the order of the reduction: store 0.0
        zero = torch.where(low == 0, 0.0, torch.where(finite, low, math.nan))
        zero = torch.clamp(zero, -limit, limit).to(scale.format.dtype)
    elif isinstance(scheme.granularity, PerToken) and fmt.statistic == "absmax" and scale.format.name == "fp32":
        least = fmt.max * scale.format.low  # the peak whose scale is the smallest one
        divisor = torch.where(finite, torch.clamp(peak, min=least), math.nan)
        # A Python number divided by a tensor is its reciprocal times the number: two roundings where kernels have one.
        inverse = torch.where(empty, 1.0, torch.full_like(divisor, fmt.max) / divisor)
    return QParams(stored, zero, outer, inverse)


def _live(wanted: Tensor, empty: Tensor) -> Tensor:
    """0 for empty cells, and for them alone: a quotient of tiny numbers that underflowed becomes positive."""
    return torch.where(empty, 0.0, torch.clamp(wanted, min=TINY))


def effective_scale(qparams: QParams, scheme: Scheme, ndim: int) -> Tensor:
    """Float32 scale per (inner) cell: the stored scale, times the outer one when nested.

    Raises:
        QCError `codec.outer-missing` when a nested scheme gets no outer scale.
    """
    s = load_scale(qparams.scale, scheme.scale.format)
    if scheme.outer is None or not isinstance(scheme.granularity, Nested):
        return s
    if qparams.outer is None:
        raise QCError("codec.outer-missing", f"no outer scale for {scheme}", next="pass QParams(outer=...)")
    outer = load_scale(qparams.outer, scheme.outer.format)
    return s * spread(outer, scheme.granularity.outer_cell(ndim), s.shape)
