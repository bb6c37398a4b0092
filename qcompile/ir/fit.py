"""Fitting scales to a weight: what a closed form over the range leaves on the table.

`minmax` spans the whole range, so one large value makes the steps of its group wide. `mse` tries a few other
step sizes, refits scale and minimum by least squares to the codes each of them gives, and keeps per group
what has the smallest squared error once everything is rounded to its stored form. It is never worse than
`minmax`, and a weight that lies on a grid of the scheme already is left alone. On Gaussian rows with
`uint4/g32:fp16+m` the squared error falls by a sixth.

The idea is common: clipping by grid search (Banner et al. 2019, "Post training 4-bit quantization", section
4) alternated with least squares for fixed codes (Stock et al. 2020, "And the bit goes down").

What is kept depends on comparisons of sums, so their order is part of the definition: `by_halves`, on every device and in
every kernel. Trial codes are rounded from x times the reciprocal of the step, which is cheaper than a quotient; the two differ
where x lies between two levels, and there both are as good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qcompile.ir.elements import round_element
from qcompile.ir.granularity import PerAxis, PerGroup
from qcompile.ir.qparams import QParams, choose_qparams, unpack_qparams
from qcompile.ir.scales import load_scale, store_scale
from qcompile.ir.scheme import Scheme

# Trial steps span the range of a group with so many levels more (clipping) or fewer (a coarser grid) than there are.
MORE_LEVELS = (-1.5, -0.75, 0.0, 0.75, 1.5)
LANES = 16  # of the vectors that sums are defined for
# Noise this far below the signal (50 dB) is what rounding the scales themselves leaves: the weight is on the grid.
ON_GRID = 1e-5
_CHUNK = 1 << 18  # elements at a time, so that temporaries stay in the cache


def fit_mse(w: Tensor, scheme: Scheme) -> QParams:
    """Scales of small squared error for a weight.

    Args:
        w: finite `[N, K]`, any float dtype.
        scheme: scales per row (`axis0`) or per group; `fits` says which.

    Returns:
        As `choose_qparams`, whose squared error per group it never exceeds.
    """
    start = choose_qparams(w, scheme)
    scale, zero = start.scale.clone(), None if start.zero is None else start.zero.clone()
    n, k = w.shape
    size = scheme.group_size(k)
    whole = k // size * size
    rows = max(1, _CHUNK // max(k, 1))
    for top in range(0, n, rows):
        for left, right in ((0, whole), (whole, k)):  # a ragged last group is a group of its own size
            if left == right:
                continue
            x = w[top : top + rows, left:right].to(torch.float32)
            x = x.unflatten(1, (-1, min(size, right - left)))
            at = slice(top, top + rows), slice(left // size, -(-right // size))
            fitted = _fit(x, scale[at], None if zero is None else zero[at], scheme)
            scale[at] = fitted[0]
            if zero is not None and fitted[1] is not None:
                zero[at] = fitted[1]
    return QParams(scale, zero)


def _fit(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> tuple[Tensor, Tensor | None]:
    """Stored scales and zeros `[r, G]` of groups `x[r, G, size]`, never worse than the given ones."""
    best = _error(x, scale, zero, scheme)
    on_grid = best <= by_halves(x.square()) * ON_GRID
    if bool(on_grid.all()):
        return scale, zero
    best = torch.where(on_grid, 0.0, best)  # nothing is better than that
    first, minimum = load_scale(scale, scheme.scale.format)[..., None], scheme.scale.zero == "m"
    shift = None if zero is None else zero[..., None].to(torch.float32)
    levels = 2**scheme.format.bits - 1
    for more in MORE_LEVELS:
        trial = first * (levels / (levels + more))
        q = _codes(x, trial, shift, scheme)
        # Least squares for these codes: x = s q + m, or x = s q.
        qq, qx = by_halves(q.square()), by_halves(q * x)
        offset: Tensor | None = zero
        if minimum:
            count, sq, sx = x.shape[-1], by_halves(q), by_halves(x)
            spread = count * qq - sq.square()
            s = (count * qx - sq * sx) / spread
            s = torch.where((spread > 0) & (s > 0), s, trial[..., 0])
            limit = scheme.scale.format.high
            offset = torch.clamp((sx - s * sq) / count, -limit, limit).to(scheme.scale.format.dtype)
        else:
            s = torch.where((qq > 0) & (qx > 0), qx / qq, trial[..., 0])
        stored = store_scale(s, scheme.scale.format)
        error = _error(x, stored, offset, scheme)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, stored, scale)
        if minimum and zero is not None and offset is not None:
            zero = torch.where(better, offset, zero)
    return scale, zero


def _codes(x: Tensor, s: Tensor, shift: Tensor | None, scheme: Scheme) -> Tensor:
    """Levels (minus the zero point) that `encode` would choose, as float32, but for quotients between two of them."""
    inverse = torch.reciprocal(s)
    if scheme.scale.zero == "m" and shift is not None:
        return round_element((x - shift) * inverse, scheme.format)
    if scheme.scale.zero == "z" and shift is not None:
        return round_element(x * inverse, scheme.format, shift) - shift
    return round_element(x * inverse, scheme.format)


def _error(x: Tensor, scale: Tensor, zero: Tensor | None, scheme: Scheme) -> Tensor:
    """Squared error per group of the weight that stored scales and zeros decode to."""
    s = load_scale(scale, scheme.scale.format)[..., None]
    shift = None if zero is None else zero[..., None].to(torch.float32)
    value = _codes(x, s, shift, scheme) * s
    if scheme.scale.zero == "m" and shift is not None:
        value = value + shift
    return by_halves((value - x).square_())


def by_halves(x: Tensor) -> Tensor:
    """Sum over the last dimension: zeros up to a power of two of vectors of `LANES`, then the second half is added to the
    first until one number is left."""
    size = LANES
    while size < x.shape[-1]:
        size *= 2
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1])) if size > x.shape[-1] else x
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


FITS: Mapping[str, Callable[[Tensor, Scheme], QParams]] = {"minmax": choose_qparams, "mse": fit_mse}


def fitted_qparams(w: Tensor, scheme: Scheme, fit: str) -> QParams:
    """`FITS[fit](w, scheme)` by the operator: a kernel where the device of `w` has one."""
    return unpack_qparams(torch.ops.qcompile.fit_qparams(w.detach(), str(scheme), fit), scheme, w.dim())


def why_unfit(fit: str, scheme: Scheme) -> str:
    """Why a known fit does not work for a scheme, "" when it does."""
    if fit == "minmax" or scheme.granularity == PerAxis(0) or isinstance(scheme.granularity, PerGroup):
        return ""
    return f"{fit} fits one scale per row or per group, and {scheme} has {scheme.granularity}"


__all__ = ["FITS", "LANES", "MORE_LEVELS", "ON_GRID", "by_halves", "fit_mse", "fitted_qparams", "why_unfit"]
