"""Matmul problems whose result has no rounding, however long the sum is.

A bound on the error of a sum grows with its length, and at thousands of columns one wrong weight hides below it. Here all
scales are powers of two, activations are small integers, and their number is limited, so that every operand, product and
partial sum, in any order, is a multiple of one quantum that fits into the accumulator: a kernel that is right is right to
the last bit, and one tile that is read twice, or not at all, is seen at every K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.devices.triton_lines import Layout
from qcompile.codegen.devices.triton_numbers import byte_operand
from qcompile.codegen.spec import KernelSpec
from qcompile.errors import QCError
from qcompile.ir.granularity import Cell, Nested
from qcompile.ir.matmul import OUT_DTYPES, over_values, quantize_rows
from qcompile.ir.packing import ceil_div, pack_codes, pack_scales
from qcompile.ir.scales import load_scale, spread, store_scale
from qcompile.ir.scheme import Scheme

ACCUMULATOR = 22  # bits of a sum of fp32 (24), less the two that a tensor core may lose while it aligns its terms
OF_E4M3 = 12  # bits of a sum of e4m3 on sm_89 and sm_90, see `triton_bounds`; of 128 columns or a unit of the packing
LEVELS = 16.0  # of a float format's numbers those up to here are used, in steps of a half


@dataclass(frozen=True)
class ExactProduct:
    """`y[m, n] = x[m, k] @ weight[n, k].T`.

    Attributes:
        x: `[m, k]` in the type of the spec's x. parts: of the packed weight. want: the result in the type of the spec's y; of a
            format with a table its entries count as they are in 16 bits, in the type of x (fp16 where that is fp32).
    """

    x: Tensor
    parts: tuple[Tensor, ...]
    want: Tensor


def exact_product(spec: KernelSpec, m: int, n: int, k: int, seed: int = 0) -> ExactProduct:
    """Operands of a spec of one segment without epilogue, and the one right result.

    Weights have any of their codes (of a float format those of `LEVELS`); every row of x has as many other columns as the
    accumulator has room for.

    Raises:
        QCError: `testing.exact` where there is no such problem: for segments and epilogues, for sizes below 1
            and for sizes that are too large.
    """
    if any(type(size) is not int or size < 1 for size in (m, n, k)):
        raise QCError("testing.exact", f"a product of [{m}, {k}] and [{k}, {n}]", next="sizes are 1 or more")
    if spec.segments != 1 or spec.epilogue.replace("acc", "") or spec.extras:
        raise QCError("testing.exact", f"{spec} has segments, an epilogue or extras", next="give the plain product")
    generator = torch.Generator().manual_seed(seed)
    parts, number, weight = _weight(spec, n, k, generator)
    unit = torch.tensor([_quantum(row) for row in weight], dtype=torch.float64)
    x = _activation(spec, m, k, _digits(number), max(_digits(row) for row in weight), generator)
    sums = x.double().abs() @ weight.abs().T / unit
    if spec.act is None:
        same = True
    else:
        q, s = quantize_rows(x.float(), spec.act)
        same = torch.equal(q * over_values(s, spec.act, q.shape), x.float())
    if not same or float(sums.max()) >= 2.0**ACCUMULATOR:
        raise QCError(
            "testing.exact",
            f"No exact product of {spec} with {k} columns",
            why="sums have too many digits" if same else "activations have no scale of a power of two",
            next="choose another K",
        )
    return ExactProduct(x, parts, (x.double() @ weight.T).to(OUT_DTYPES[spec.y]))


def _weight(spec: KernelSpec, n: int, k: int, generator: torch.Generator) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
    """Packed parts; numbers before their scale, and the weight, as kernels multiply them, float64 `[n, k]`."""
    scheme = spec.weight
    levels = scheme.format.levels().double()[: len(scheme.format.table) or None]
    usable = levels.isfinite()
    if scheme.format.kind == "float":
        usable &= (levels.abs() <= LEVELS) & (levels * 2 == (levels * 2).round())
    if scheme.format.kind == "table":  # entries are rounded to the type of the operand
        levels = levels.to(OUT_DTYPES[spec.x if spec.x != "f32" else "f16"]).double()
    choices = usable.nonzero()[:, 0]
    codes = choices[torch.randint(len(choices), (n, k), generator=generator)].to(torch.uint8)

    def powers(cell: Cell, groups: int, low: int) -> Tensor:
        """Scales `[n, groups]`: each cell has one of four powers of two."""
        rows = n if cell[0] is None else cell[0]
        exponents = torch.randint(4, (ceil_div(n, rows), groups), generator=generator) + low
        return (2.0 ** exponents.float()).repeat_interleave(rows, 0)[:n]

    nested = scheme.granularity if isinstance(scheme.granularity, Nested) else None
    own = powers(scheme.granularity.cell(2), scheme.groups(k), 0 if nested else -4)
    stored, scale, number = [store_scale(own, scheme.scale.format)], own, levels[codes.long()]
    assert torch.equal(load_scale(stored[0], scheme.scale.format), own)

    def over(values: Tensor, group: int) -> Tensor:
        return spread(values, (1, group), (n, values.shape[1] * group)).double()[:, :k]

    group, minimum = scheme.group_size(k), torch.zeros(1, 1)
    middle = torch.randint(1 << scheme.format.bits, own.shape, generator=generator)
    if scheme.scale.zero == "z":
        stored.append(middle.to(torch.uint8))
        number = number - over(middle, group)
    elif scheme.scale.zero == "m":
        minimum = -own * middle
        stored.append(minimum.to(scheme.scale.format.dtype))
        minimum = over(minimum, group)
    if nested is not None and scheme.outer is not None:
        ratio = nested.outer_cell(2)[1] or scheme.groups(k)
        outer = powers(nested.outer.cell(2), scheme.outer_groups(k), -4)
        stored.append(store_scale(outer, scheme.outer.format))
        scale = own * spread(outer, (1, ratio), own.shape)
    packed = [pack_codes(codes, scheme.format.bits, scheme.packing)]
    packed += [pack_scales(part, scheme.packing) for part in stored]
    return tuple(packed), number, number * over(scale, group) + minimum


def _activation(spec: KernelSpec, m: int, k: int, number: float, weight: float, generator: torch.Generator) -> Tensor:
    """-1, 0 and 1, and what gives every scale of a row the value 1, or a power of two; for numbers and weights of up to so many
    quanta."""
    x, act = torch.zeros(m, k), spec.act
    ends, group = ([], k) if act is None else (_ends(act), act.group_size(k))
    coarse = act is not None and byte_operand(act) == "e4m3"
    window = max(128, Layout.of(spec.weight, act).unit) if coarse else k
    room = 0.9 * min(2.0**ACCUMULATOR / weight, 2.0**OF_E4M3 / number * ceil_div(k, window) if coarse else math.inf)
    for row in x:
        for begin in range(0, k, window):
            part = row[begin : begin + window]
            # One scale for all has its ends anywhere in the row: as if they were in this part.
            used = sum(map(abs, ends)) * ceil_div(len(part), group)
            filled = max(0, min(len(part), int(room * len(part) / k - used)))
            at = torch.randperm(len(part), generator=generator)[:filled]
            part[at] = 1.0 - 2.0 * torch.randint(2, (filled,), generator=generator).float()
        for begin in range(0, k if ends else 0, group):
            part = row[begin : begin + group]
            at = torch.randperm(len(part), generator=generator)[: len(ends)]
            part[at] = torch.tensor(ends[: len(at)])
    return x.to(OUT_DTYPES[spec.x])


def _ends(act: Scheme) -> list[float]:
    """The values whose distance, or size, is that of the codes."""
    top = float(act.format.max)
    if act.format.kind == "float":
        return [top / 32]  # 14 of e4m3: a few of the accumulator's digits
    return [top] if act.symmetric else [float(-(int(top) // 3)), top - int(top) // 3]


def _digits(values: Tensor) -> float:
    """The largest one in quanta."""
    return max(float(values.abs().max()), 1e-30) / _quantum(values)


def _quantum(values: Tensor) -> float:
    """The largest power of two that all values are multiples of."""
    unit = 2.0**8
    while not torch.equal(values / unit, (values / unit).round()):
        unit /= 2
    return unit


__all__ = ["ExactProduct", "exact_product"]
