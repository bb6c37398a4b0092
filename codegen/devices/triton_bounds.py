"""How far a Triton kernel may be from the exact product: bounds derived from its arithmetic, as code.

Notation as in `cpu_bounds`: gamma(n) bounds the relative error of n roundings, A = sum over k of |operand| |x|. The unit
of a rounding here is 2^-23: tensor cores add with fp32 accumulators and may cut instead of rounding (Fasi, Higham, Mikaitis
and Pranesh, Numerical behavior of NVIDIA tensor cores, 2021, section 4); the interpreter, which rounds, is inside that.

* Operands. Integer codes less a zero point, and the levels of a float format, are exact in 16 bits (at most 8 significant
  ones), also between the multiplication and the subtraction. Entries of a table are rounded once. In mode "operand" the
  scale is rounded, then its product with the number, then (with a minimum, itself rounded) the sum; for activations of fp32
  all that is rounded to fp32. Where sums are folded (see `triton_floats.fold`) product and sum are one rounding, and what is
  added in place of an offset is exact, so these bounds hold as well; numbers are as much nearer to the subnormal ones.
* Products of two 16-bit floats are exact in fp32 (at most 22 bits), those of fp32 are rounded.
* Bytes: sums of integers are exact. Four roundings per cell (to a float, times two scales, into the sum) and those at the
  end: the scales of rows, splits. Sums of e4m3 are sums of floats: products are exact, one rounding per k, and as many of
  the sum of x, which integer codes less an offset or a zero point need; what is cut off is relative to codes and zeros
  before they are subtracted. The instructions of sm_90 add e4m3 with 13 bits after the leading one of the largest term,
  not 23 (DeepSeek-V3 Technical Report, 2024, section 3.3.2), so 33 cuts for each of them; every iteration, of 128 columns or
  a unit, brings its sums to fp32.
* Sums of floats: one rounding per k, one per step and unit, one with each group's scale, split and the row's scale. So do
  libraries, in any order, inside of `compat.float32_sums`.

Below the normal numbers a rounded operand is off by up to half the smallest subnormal number of its type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcompile.codegen.devices.triton_floats import fold
from qcompile.codegen.devices.triton_lines import Layout
from qcompile.codegen.devices.triton_numbers import Numbers, byte_operand
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import part_names
from qcompile.ir.granularity import Nested, PerGroup
from qcompile.ir.matmul import over_values, quantize_rows
from qcompile.ir.packing import unpack_codes, unpack_scales
from qcompile.ir.scales import load_scale

UNIT = 2.0**-23
ROUNDOFF = {"f16": 2.0**-11, "bf16": 2.0**-8, "f32": 2.0**-24}
SMALLEST = {"f16": 2.0**-24, "bf16": 2.0**-133, "f32": 2.0**-149}


def gamma(n: float, unit: float = UNIT) -> float:
    """Relative error of `n` roundings of tensor cores. Raises ValueError for so many that nothing is known of the result."""
    if n * unit >= 0.5:
        raise ValueError(f"{n} roundings by {unit}: no digit is left")
    return n * unit / (1 - n * unit)


def unit_of(architecture: str) -> float:
    """The unit of a rounding in the accumulator of an instruction on e4m3."""
    return 2.0**-13 if architecture in ("sm_89", "sm_90") else UNIT


@dataclass(frozen=True)
class Expected:
    """Exact sums before the epilogue, float64 `[m, n]`, and how far a kernel may be from them, elementwise."""

    value: torch.Tensor
    bound: torch.Tensor


@dataclass(frozen=True)
class Terms:
    """A decoded weight `[n, k]` in float64: its value, the size of the numbers it is made of, and how far the operand of
    the kernel may be from it."""

    value: torch.Tensor
    size: torch.Tensor
    error: torch.Tensor


def terms(spec: KernelSpec, parts: Sequence[torch.Tensor], n: int, k: int, rounded: bool | None = None) -> Terms:
    """What one segment's packed parts stand for, and what the kernel makes of them.

    Args:
        rounded: whether every weight is rounded to the type of x, scaled, before it is multiplied; `None`: as the
            kernels here do it.
    """
    weight, operand = spec.weight, spec.x if spec.x != "f32" else "f16"
    rounded = Layout.of(weight).mode == "operand" if rounded is None else rounded
    numbers = Numbers.of(weight.format, operand, exact=rounded)
    named = dict(zip(part_names(weight), parts, strict=True))
    level = weight.format.levels().double()[unpack_codes(parts[0], weight.format.bits, n, k, weight.packing).long()]

    def spread(t: torch.Tensor, group: int) -> torch.Tensor:
        return unpack_scales(t, n, weight.packing).repeat_interleave(group, 1)[:, :k]

    s = spread(load_scale(named["scales"], weight.scale.format), weight.group_size(k))
    if weight.outer is not None and isinstance(weight.granularity, Nested):
        outer = weight.granularity.outer
        s = s * spread(
            load_scale(named["outer"], weight.outer.format), outer.size if isinstance(outer, PerGroup) else k
        )
    s = s.double()
    # The type that scales of operands are rounded to, and that entries of a table are.
    unit = ROUNDOFF[spec.x]
    tiny = SMALLEST[spec.x] / 2
    number = level - spread(named["zeros"], weight.group_size(k)).double() if "zeros" in named else level
    of_table = ROUNDOFF[spec.x] * number.abs() + tiny if numbers.kind == "table" else torch.zeros_like(number)
    value, size = number * s, (number.abs() + of_table) * s
    if spec.act is not None and byte_operand(spec.act) == "e4m3" and numbers.kind == "int":
        size = ((level - numbers.offset).abs() + (number - level + numbers.offset).abs()) * s
    error = of_table * s
    if rounded:
        error = error + (number.abs() + of_table) * (s * unit + tiny * 2.0**-numbers.unit)
        tiny *= 2.0 ** (fold(weight, Layout.of(weight), numbers) or 0)
        error = error + (size + error) * unit + tiny
        size = size + error
        if "mins" in named:
            minimum = spread(load_scale(named["mins"], weight.scale.format), weight.group_size(k)).double()
            error = error + minimum.abs() * unit + tiny
            value = value + minimum
            error = error + (value.abs() + error) * unit + tiny
            size = value.abs() + error
    return Terms(value, size, error)


def expected(
    spec: KernelSpec,
    x: torch.Tensor,
    parts: Sequence[torch.Tensor],
    n: int,
    k: int,
    rounded: bool | None = None,
    byte_unit: float = UNIT,
    static: Sequence[torch.Tensor] = (),
) -> Expected:
    """One segment's sums for finite `x[m, k]`; `rounded` as in `terms`, `byte_unit` of a rounding of a sum of e4m3, `static` as
    in `quantize_values`."""
    weight = terms(spec, parts, n, k, rounded)
    wide = x.double()
    layout = Layout.of(spec.weight, spec.act)
    steps = -(-k // layout.unit) * 8 // min(spec.weight.format.planes)
    groups = -(-k // layout.group) if layout.group else 1
    roundings = k + steps + groups + 8 + (k if spec.x == "f32" else 0)
    coarse = 0.0
    if spec.act is not None:
        codes, scale = quantize_rows(x.float(), spec.act, static)
        sums = 0 if byte_operand(spec.act) == "i8" else k + (layout.cell or k)
        wide = codes.double() * over_values(scale, spec.act, codes.shape).double()
        roundings = sums + 4 * (k // (layout.cell or k) + 1) + 8
        if sums and byte_unit > UNIT:
            # Each of 32 products and the sum before them is cut; the sum leaves the accumulator after one iteration at most.
            coarse = gamma(33 * max(128, layout.unit) // 32, byte_unit)
    # Sums below the normal numbers: one error of the smallest number for each rounding, with the row's scale where it waits.
    waiting = weight.size.amax(1) / weight.value.abs().clamp_min(2.0**-149).amax(1).clamp_min(1) + 1
    numbers = Numbers.of(spec.weight.format, spec.x if spec.x != "f32" else "f16", exact=layout.mode == "operand")
    tiny = 2.0 ** (-126 + (fold(spec.weight, layout, numbers) or 0)) * roundings * (1 + waiting)
    return Expected(
        wide @ weight.value.T,
        wide.abs() @ weight.error.T + (gamma(roundings) + coarse) * (wide.abs() @ weight.size.T) + tiny,
    )
