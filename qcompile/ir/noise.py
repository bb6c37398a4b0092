"""How much a code of a tensor loses, as one number for every size that float32 can hold.

A recipe chooses schemes by this number and the ledger prints it, so both must read it off in the same way. Squares of
float32 values leave the range of float32 from about 1e19 up and below about 1e-23 (a weight of 1e22 would have the
ratio NaN, one of 1e-24 would seem exact), so the sums are float64: it holds the square of every float32 value.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements widened at a time: a float64 copy of a vocabulary's table would be twice the table


def ratio_db(got: Tensor, want: Tensor) -> float:
    """Signal-to-noise ratio of `got` against `want`, in dB: never NaN.

    Args:
        got: what is left of it, floating point, shape of `want`.
        want: `[n, k]`, floating point.

    Returns:
        `inf` where they are equal; `-inf` where either holds NaN or infinity, or where there is noise and no signal.
    """
    rows = max(1, _CHUNK // max(1, want.shape[-1]))
    noise = signal = 0.0
    for one, two in zip(got.detach().split(rows), want.detach().split(rows), strict=True):
        wide = two.to(torch.float64)
        noise += float((one.to(torch.float64) - wide).square().sum())
        signal += float(wide.square().sum())
    if not (math.isfinite(noise) and math.isfinite(signal)):
        return -math.inf
    if not noise:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf
