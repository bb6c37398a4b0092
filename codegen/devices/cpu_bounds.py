"""How far a CPU kernel may be from the exact product: bounds derived from its arithmetic, as code.

Tests and benchmarks compare kernels with a float64 evaluation of the same codes, scales and activations. What
they may differ by is not a chosen tolerance: it is computed here, element by element, from the operations the
kernels perform.

Notation: u = 2^-24 is the unit roundoff of fp32, gamma(n) = n u / (1 - n u) bounds the relative error of n
roundings (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1), A = sum over k of (size of
the weight's terms) * |x|.

* digits1 (int8 activation): sums of products are exact integers. Roundings: integer to float, zero point, then one
  multiply-add with the scale (and one with the minimum) per group, the row's scale, its product with the sum. Where the
  activation has a scale for each some 32 k: scale times step and one multiply-add for each of those, and the same again
  for the sum of step times digits that zero points and minimums meet.
* digits2 (16-bit image of x, a scale for each 32 k): |x - step q| <= step (1/2 + 32639 * 3 u) <= 0.51 step with
  step = absmax / 32639, for the factor 32639 / absmax, its product with x, and step itself are rounded once
  each. That error meets |w|. Roundings: integer to float, scale times step, and one multiply-add for each 32
  k; zero points and minimums add the sum of step times digits (one rounding for each 32 k) and one
  multiply-add per group.
* float: the rounded activation, one multiply-add per k, one per group, the row's scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcompile.codegen.devices.cpu_text import LONG_GROUP, arithmetic, step_blocks
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.matmul import quantize_rows
from qcompile.ir.packing import BLOCK, unpack_codes, unpack_scales
from qcompile.ir.scales import load_scale

UNIT = 2.0**-24
TINY_BLOCK = 1e-33  # a block of 32 k with smaller values counts as zero (digits2)


def gamma(n: float) -> float:
    """Relative error of `n` roundings to fp32."""
    return n * UNIT / (1 - n * UNIT)


@dataclass(frozen=True)
class Expected:
    """Exact sums before the epilogue, float64 `[m, n]`, and how far a kernel may be from them,
    elementwise."""

    value: torch.Tensor
    bound: torch.Tensor


def weight_terms(spec: KernelSpec, parts: Sequence[torch.Tensor], n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact float64 `[n, k]`: the decoded weight, and the sum of the sizes of the terms it is made of."""
    scheme = spec.weight
    codes = unpack_codes(parts[0], scheme.format.bits, n, k)
    group = scheme.group_size(k)

    def spread(t: torch.Tensor) -> torch.Tensor:
        return unpack_scales(t, n).double().repeat_interleave(group, 1)[:, :k]

    s = spread(load_scale(parts[1], scheme.scale.format))
    level = scheme.format.levels().double()[codes.long()]
    if scheme.scale.zero == "z":
        z = spread(parts[2])
        return s * (level - z), s * (level + z)
    if scheme.scale.zero == "m":
        m = spread(load_scale(parts[2], scheme.scale.format))
        return s * level + m, s * level + m.abs()
    return s * level, (s * level).abs()


def expected(spec: KernelSpec, x: torch.Tensor, parts: Sequence[torch.Tensor], n: int, k: int) -> Expected:
    """One segment's sums for finite `x[m, k]`.

    Args:
        parts: packed parts of the segment.
    """
    weight, size = weight_terms(spec, parts, n, k)
    blocks, groups = -(-k // BLOCK), -(-k // spec.weight.group_size(k))
    groups += blocks // LONG_GROUP  # the pieces of a long K
    wide, how = x.float(), arithmetic(spec)
    if spec.act is not None:
        codes, scale = quantize_rows(wide, spec.act)
        steps = step_blocks(spec)
        used = codes.double() * scale.double()
        roundings = 2 * groups + 6 + (4 * -(-blocks // steps) + 2 if steps else 0)
    else:
        used, roundings = wide.double(), 0
    error = torch.zeros(x.shape[0], n, dtype=torch.float64)
    if how == "digits2":
        padded = torch.nn.functional.pad(used.abs(), (0, blocks * BLOCK - k)).reshape(x.shape[0], blocks, BLOCK)
        absmax = padded.amax(-1, keepdim=True)
        step = torch.where(absmax > TINY_BLOCK, 0.51 * absmax / 32639, absmax).expand_as(padded)
        step = step.reshape(x.shape[0], blocks * BLOCK)[:, :k]
        error = step @ weight.abs().T
        roundings, bounded = 2 * blocks + 2 * groups + 8, used.abs() + step
    else:
        bounded = used.abs()
        if how == "float":
            roundings = spec.weight.group_size(k) + groups + 9
    # The last term is for results below the normal range, where a rounding costs up to 2^-150 whatever its
    # size.
    bound = error + gamma(roundings) * (bounded @ size.T) + (roundings + k) * 2.0**-149
    return Expected(used @ weight.T, bound)
