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

Below the normal numbers, eta = 2^-126, these relative errors do not hold: a result is off by up to 2^-150, or, where the
processor flushes subnormal numbers to zero (`torch.set_flush_denormal`), as they are read and as they are written, by up
to eta. Each such error counts with all that it is multiplied by:

* what stands for x (x itself, a scale of the activation, sums of it): with the weights, and a scale per row also with
  the largest digit Q. Twice: the value and a digit that a flushed x changes.
* a scale or minimum, and zero point times scale: with |x| and the largest level L.
* scale times step, inside a block: with the count, at most L Q per k.
* sums: one error per rounding, with the weight's scale where that waits for the end, and with the row's.

Their sum is doubled, which is far more than gamma of it. At ordinary sizes it is not seen: 2^-90 for 4096 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcompile.codegen.devices.cpu_text import LONG_GROUP, WeightCode, arithmetic, step_blocks
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.matmul import over_values, quantize_rows
from qcompile.ir.packing import BLOCK, unpack_codes, unpack_scales
from qcompile.ir.scales import load_scale

UNIT = 2.0**-24
ETA = 2.0**-126  # the smallest normal number
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


def _underflow(spec: KernelSpec, digit: float, x: torch.Tensor, weight: torch.Tensor, k: int) -> torch.Tensor:
    """What flushed factors cost `[m, n]`, in units of eta, for sums of sizes `x[m, 1]` and `weight[n]`."""
    level = max(abs(v) for v in spec.weight.format.values if math.isfinite(v))
    if spec.weight.scale.zero == "z":
        level += spec.weight.format.max
    per_row = spec.act is not None and not step_blocks(spec)
    of_x = 4 + (2 * digit / WeightCode.of(spec.weight.format).factor if per_row else 0)
    return of_x * weight + (level + 2) * x + level * digit * k


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
        used = codes.double() * over_values(scale, spec.act, codes.shape).double()
        digit = spec.act.format.max
        roundings = 2 * groups + 6 + (4 * -(-blocks // steps) + 2 if steps else 0)
    else:
        used, digit, roundings = wide.double(), 32639.0 if how == "digits2" else 1.0, 0
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
    # What each row and each output is multiplied by at the end, after its sums.
    last = scale.double() if spec.act is not None and not step_blocks(spec) else torch.zeros(1, 1)
    waiting = unpack_scales(load_scale(parts[1], spec.weight.scale.format), n).double().amax(1)
    sums = (roundings + k) * (1 + waiting) * (1 + last)
    tiny = 2 * ETA * (sums + _underflow(spec, digit, bounded.sum(1, keepdim=True), size.sum(1), k))
    return Expected(used @ weight.T, error + gamma(roundings) * (bounded @ size.T) + tiny)
