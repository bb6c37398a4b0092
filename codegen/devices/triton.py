"""Matmul kernels for GPUs, generated as Triton text.

One text serves every matrix of a scheme; `Tile` says how it is cut for one call. Kernels need no GPU to be proven:
`qcompile.testing.interpret` runs them over CPU tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qcompile import compat
from qcompile.codegen.devices.triton_decoded import Call, cut_own, other_way, ways
from qcompile.codegen.devices.triton_launch import SplitMemory, dense_rows
from qcompile.codegen.devices.triton_lines import Layout, integer_sums
from qcompile.codegen.devices.triton_numbers import Bytes, byte_operand, why_no_bytes, why_no_operand
from qcompile.codegen.devices.triton_order import natural
from qcompile.codegen.devices.triton_overlap import begin_with_weights
from qcompile.codegen.devices.triton_text import Text, kernel_text
from qcompile.codegen.registry import Verdict
from qcompile.codegen.spec import LONG_K, KernelSpec
from qcompile.codegen.tuning.triton import Shape, Tile, Way, shape_for, tiles_across
from qcompile.ir.granularity import Nested, PerAxis, PerBlock, PerGroup, PerTensor, PerToken
from qcompile.ir.matmul import OUT_DTYPES, MatmulSpec, quantize_values
from qcompile.ir.packing import ceil_div
from qcompile.ir.scheme import Packing, Scheme

MMA = 16  # columns of one tensor-core instruction: groups are whole instructions


def packing(act: Scheme | None) -> Packing:
    """The layout that kernels read: operands of instructions on 16-bit floats, or on bytes."""
    return "mma16" if act is None else "mma8"


def _weight_reason(weight: Scheme, act: Scheme | None, x: str) -> str:
    """Why a weight scheme is not supported, "" when it is."""
    granularity = weight.granularity.inner if isinstance(weight.granularity, Nested) else weight.granularity
    outer = weight.granularity.outer if isinstance(weight.granularity, Nested) else PerTensor()
    match granularity:
        case PerTensor() | PerAxis(0):
            pass
        case PerGroup(size) | PerBlock(_, size) if size % MMA == 0:
            pass
        case PerGroup(size) | PerBlock(_, size):
            return f"groups of {size} weights: the group must be a multiple of {MMA}"
        case other:
            return f"granularity {other} of the weight; tensor, axis0, groups and blocks of {MMA}, {2 * MMA}, ... columns work"
    if not isinstance(outer, PerTensor | PerGroup) and outer != PerAxis(0):
        return f"outer granularity {outer} of the weight; tensor, axis0 and groups work"
    if weight.packing != packing(act):
        return f"packing {weight.packing}: Triton kernels read {packing(act)} here"
    return "" if act is not None else why_no_operand(weight.format, "bf16" if x == "bf16" else "f16")


def _act_reason(spec: KernelSpec) -> str:
    """Why an activation scheme is not supported, "" when it is, or there is none."""
    act, layout = spec.act, Layout.of(spec.weight, spec.act)
    if act is None:
        return ""
    number = act.format.name == "e4m3" or (act.format.kind == "int" and (act.symmetric == act.format.signed))
    if not number or not isinstance(act.granularity, PerToken | PerGroup | PerTensor):
        return f"activation {act}: signed integers, unsigned ones with a zero point, or e4m3 work, or none"
    if why := why_no_bytes(spec.weight.format, byte_operand(act)):
        return f"activation {act}: {why}"
    if layout.mode == "operand" or layout.act_group % layout.unit:
        return (
            f"activation {act}: a sum of bytes has one scale for {layout.unit} columns or a multiple of that, and no minimum; "
            f"the weight is {spec.weight}"
        )
    if layout.shifted and layout.act_group:
        return f"activation {act}: a zero point for each group of a row"
    if layout.shifted and not layout.cell and spec.weight.scale.zero is not None and spec.weight.format.bits > 7:
        return f"activation {act}: sums of 9 bits times 9 overflow; the weight, {spec.weight}, has a zero point as well"
    if not layout.cell and spec.long_k and byte_operand(act) == "i8":
        return f"activation {act}: more than {LONG_K} inputs overflow a sum of bytes; give the weight groups"
    return ""


def _before_ampere(architecture: str) -> bool:
    return architecture.startswith("sm_") and int(architecture[3:]) < 80


@dataclass(frozen=True)
class TritonLowering:
    """Lowering of `qmm` to Triton for an architecture, "" where kernels are interpreted."""

    architecture: str = ""

    def supports(self, spec: KernelSpec) -> Verdict:
        """See `Lowering`. Reads no sizes, so a yes holds for every N and K."""
        reason = _weight_reason(spec.weight, spec.act, spec.x) or _act_reason(spec)
        if (
            not reason
            and spec.act is not None
            and byte_operand(spec.act) == "e4m3"
            and not compat.multiplies_e4m3(self.architecture)
        ):
            reason = f"activation {spec.act}: {self.architecture} has no instruction that multiplies e4m3"
        if not reason and spec.x == "f32" and spec.act is None and spec.paired:
            reason = "two sums of activations in fp32: a thread has too few registers for them"
        if not reason and spec.x == "bf16" and _before_ampere(self.architecture):
            reason = f"activations in bf16: {self.architecture} has no arithmetic on them"
        if not reason and not compat.triton_version():
            reason = "Triton is not installed"
        return Verdict(not reason, reason)


_BYTE_DTYPES = {"i8": torch.int8, "e4m3": torch.float8_e4m3fn}


@functools.lru_cache(maxsize=512)
def text_of(spec: KernelSpec) -> Text:
    """The text of a spec's kernel."""
    return kernel_text(spec)


def fit(tile: Tile, layout: Layout, k: int) -> Tile:
    """A tile whose units divide those of K, and of a group."""
    units = math.gcd(tile.units, ceil_div(k, layout.unit))
    units = math.gcd(units, layout.units)
    splits = min(tile.splits, ceil_div(k, layout.unit * units))
    return replace(tile, units=units, splits=splits)


class Matmul:
    """The kernel of a spec as a callable over raw operands, for generated code.

    One object serves every number of rows; what depends on them is decided at each call, on the host.
    """

    def __init__(self, spec: KernelSpec, text: Text | None = None) -> None:
        self.spec, self.text = spec, text or text_of(spec)
        self.kernel = compat.triton_kernel(self.text.source)
        self.parts = 2 + (spec.weight.scale.zero is not None) + (spec.weight.outer is not None)

    def __call__(self, x: torch.Tensor, *rest: Any, tile: Tile | None = None) -> None:
        """Write y.

        Args:
            x: rows of k values; with an activation scheme their codes, see `quantize`.
            rest: scales and sums of x, if it has a scheme; packed parts of each segment, extras, y; then the integers M, K,
                the row stride of x, the rows of each segment, the row stride of each "mat" extra, and that of y.
            tile: how to cut the work, in place of the tuned choice.
        """
        spec, segments = self.spec, self.spec.segments
        first = self.text.inputs - 1
        count = first + segments * self.parts + len(spec.extras) + 1
        operands, (m, k, ldx, *sizes) = list(rest[:count]), rest[count:]
        if m == 0:
            return
        n = sizes[:segments]
        tile = tile or choose_tile(spec, tuple(n), k, m, x.device)
        for index in range(first, first + segments * self.parts, self.parts):
            operands[index] = operands[index].view(torch.int32)
        if tile.way != "fused" and tile.way in ways(spec):
            last = first + segments * self.parts
            columns = k if spec.act is None else ceil_div(k, self.text.layout.unit) * self.text.layout.unit
            inputs = [x.as_strided((m, columns), (ldx, 1)), *operands[:first]]
            extras, y = operands[last:-1], operands[-1]
            other_way(spec)(Call(inputs, operands[first:last], extras, y, n, k, sizes[segments:], tile))
            return
        tile = fit(tile, self.text.layout, k)
        tiles = tiles_across(n, tile.columns, spec.paired) * ceil_div(m, tile.rows)
        with SplitMemory(tiles, tile.splits, spec.sums * tile.rows * tile.columns, operands[-1]) as work:
            self.kernel[tiles, tile.splits](
                x, *operands, *work, m, k, ldx, *sizes, EVEN=k % self.text.layout.unit == 0,
                **tile.constants, **tile.options, **begin_with_weights(x.device, tile),
            )  # fmt: skip


def family(spec: KernelSpec) -> str:
    """The lines of the shipped table that a kernel takes."""
    if spec.act is None:
        return "weight-only"
    one_sum = byte_operand(spec.act) == "i8" and not Layout.of(spec.weight, spec.act).cell
    return "integers" if one_sum else "bytes"


@compat.chosen_once(maxsize=4096)
def choose_tile(spec: KernelSpec, n: tuple[int, ...], k: int, m: int, device: torch.device) -> Tile:
    """How to cut a product, from its sizes and the shipped table."""
    return choose(spec, n, k, m, lambda rows: ceil_div(m, rows), ways(spec), device)


def choose(
    spec: KernelSpec,
    n: Sequence[int],
    k: int,
    m: int,
    tiles_of_rows: Callable[[int], int],
    allowed: Collection[Way],
    device: torch.device,
) -> Tile:
    """The tile of the table's line for m rows of x, and how often K is split; `tiles_of_rows` tells, of the rows of a tile, how
    many tiles all rows of x take."""
    gpu = compat.gpu(device)
    shape = shape_for(gpu.architecture, family(spec), m, allowed)
    tile = cut(spec, shape, gpu.shared, gpu.architecture)
    if tile.way != "fused":
        return tile
    tiles = tiles_across(n, tile.columns, spec.paired) * tiles_of_rows(tile.rows)
    # Enough blocks for every multiprocessor, each with at least four iterations.
    steps = ceil_div(k, Layout.of(spec.weight, spec.act).unit * tile.units)
    wanted = min(shape.waves * gpu.processors // tiles, steps // 4, 16)
    return replace(tile, splits=1 << max(0, wanted.bit_length() - 1))


def plan(spec: KernelSpec, n: tuple[int, ...], k: int, m: int, device: torch.device) -> str:
    """How a product is cut, in a few characters: the tile, or that the weight is decoded first."""
    tile = choose_tile(spec, n, k, m, device)
    if tile.way == "vendor":
        return "decoded, library"
    text = f"{tile.rows}x{tile.columns}"
    return f"decoded, {text}" if tile.way == "own" else text


def cut(spec: KernelSpec, shape: Shape, shared: int, architecture: str = "") -> Tile:
    """The tile of a line of the table, with fewer stages, rows or columns where `shared` bytes or the registers do not hold
    them."""
    if shape.way == "own":
        return cut_own(spec, shape, shared, architecture)
    shape = _for_pairs(spec, shape, architecture) if spec.paired else shape
    layout, element = text_of(spec).layout, 1 if spec.act is not None else OUT_DTYPES[spec.x].itemsize
    terms = int(spec.x == "f32" and spec.act is None)  # x is cut into terms of 16 bits, which lie beside it
    if terms and layout.unit >= 512 and architecture.startswith("sm_") and architecture not in ("sm_90", "sm_100"):
        shape = replace(shape, columns=min(shape.columns, 64))  # Triton 3.6 spills more of them
    units, rows = max(1, shape.depth // layout.unit), shape.rows
    codes = shape.columns * spec.weight.format.bits // 8 * spec.sums

    if architecture.startswith("sm_10"):  # its tensor cores do not read registers: the decoded operand lies there too
        shared -= shape.columns * units * layout.unit * element

    def stage() -> int:
        return units * layout.unit * (rows * element + codes)

    if spec.act is not None and byte_operand(spec.act) == "e4m3" and layout.unit > 128:
        rows = min(rows, 64)  # two accumulators, and the operands of more than two steps
    if layout.shifted and layout.cell:
        rows = min(rows, 64)  # a third accumulator
    if terms:
        units, rows = 1, min(rows, 16 if layout.unit >= 512 else 32)
    while rows > MMA and (2 + terms) * stage() > shared:
        rows //= 2
    stages = max(1, min(shape.stages, shared // stage() - terms))
    registers = (255 if terms else shape.registers) if architecture.startswith("sm_") else 0
    order = natural(architecture)
    return Tile(rows, shape.columns, units, 1, stages, shape.warps, shape.way, natural=order, registers=registers)


def _for_pairs(spec: KernelSpec, shape: Shape, architecture: str) -> Shape:
    """A line of the table for two sums, and two weights on their way: the largest tiles that were found to spill nothing, but
    for up to 100 bytes of a thread with some odd widths, zero points and residuals."""
    layout = Layout.of(spec.weight, spec.act)
    wide = layout.unit >= 512  # odd widths are decoded 512 columns at a time
    if architecture.startswith("gfx"):
        return replace(shape, columns=64, warps=4) if shape.columns > 64 else shape
    if architecture in ("", "sm_90"):
        return replace(shape, rows=min(shape.rows, 32 if wide and 0 < layout.group < layout.unit else 64))
    if architecture == "sm_100":  # sums of floats lie in a memory of their own, operands in shared memory
        if wide:  # that memory has 512 columns
            shape = replace(shape, columns=min(shape.columns, 64))
        return replace(shape, rows=min(shape.rows, 32 if layout.unit > 128 else 64))
    # Instructions that read both operands from registers.
    if spec.act is not None or spec.weight.format.bits == 8:
        return replace(shape, rows=min(shape.rows, 32 if wide else 64))
    if wide:
        return replace(shape, rows=min(shape.rows, 16), columns=min(shape.columns, 64), stages=2, warps=4)
    return replace(shape, rows=min(shape.rows, 32))


@functools.lru_cache(maxsize=512)
def prepare(spec: str, x: str, y: str, extras: tuple[str, ...]) -> Matmul:
    """What generated code calls: the matmul of a canonical `MatmulSpec` for operands of these dtypes."""
    what = MatmulSpec.parse(spec)
    return Matmul(KernelSpec.of(what, x, y, extras))


def run(
    spec: KernelSpec,
    x: torch.Tensor,
    parts: Sequence[torch.Tensor],
    extras: Sequence[torch.Tensor],
    n: Sequence[int],
    k: int,
    tile: Tile | None = None,
    text: Text | None = None,
    static: Sequence[torch.Tensor] = (),
) -> torch.Tensor:
    """Launch the kernel of `spec`.

    Args:
        x: `[..., k]`.
        parts: packed parts of each segment, one after the other.
        extras: "row" `[columns]`, or "mat" `[..., columns]`.
        n: rows of each segment.
        tile: how to cut the work, in place of the tuned choice.
        text: another text for the same arguments than `text_of(spec)`.
        static: scale and zero point of x that were chosen before.

    Returns:
        `[..., columns]` of dtype `spec.y`.
    """
    columns = n[0] if spec.paired else sum(n)
    rows = dense_rows(x)
    y = torch.empty(rows.shape[0], columns, dtype=OUT_DTYPES[spec.y], device=x.device)
    kinds = [kind for kind, _ in spec.extras]
    operands = [dense_rows(e) if kind == "mat" else e.contiguous() for e, kind in zip(extras, kinds, strict=True)]
    mats = [e.stride(0) for e, kind in zip(operands, kinds, strict=True) if kind == "mat"]
    inputs = (rows,) if spec.act is None else quantize_input(rows, *static, spec=spec)
    matmul = Matmul(spec, text)
    with compat.on(x.device):
        matmul(*inputs, *parts, *operands, y, rows.shape[0], k, inputs[0].stride(0), *n, *mats, columns, tile=tile)
    return y.reshape(*x.shape[:-1], columns)


def quantize_input(x: torch.Tensor, *static: torch.Tensor, spec: KernelSpec) -> tuple[torch.Tensor, ...]:
    """What a kernel of bytes reads in place of x.

    Args:
        x: `[..., k]`; a row that holds NaN or infinity gets a scale of NaN.
        static: scale, and zero point, that were chosen before (see `MatmulSpec`).
        spec: with `act`.

    Returns:
        Codes, int8 or float8_e4m3fn `[M, K]` with K the next whole unit of the packing; scales, fp32 `[M, groups]`; where the
        kernel reads them, sums of numbers (codes less zero point), int32 or fp32 `[M, cells of the layout]`; and zero points of
        the codes, int32 `[M, 1]`. Unsigned codes are moved down to int8, and so are their zero points.
    """
    assert spec.act is not None
    layout, k, m = Layout.of(spec.weight, spec.act), x.shape[-1], math.prod(x.shape[:-1])
    operand = byte_operand(spec.act)
    codes, sums = _BYTE_DTYPES[operand], torch.int32 if integer_sums(operand, layout) else torch.float32
    wide = x.reshape(m, k).float()
    shared = isinstance(spec.act.granularity, PerTensor)  # one scale for all rows, which a bad row is not to spoil
    if shared:
        finite = torch.isfinite(wide).all(-1, keepdim=True)
        wide = torch.where(finite, wide, torch.zeros_like(wide))
    q, scale, zero = quantize_values(wide, spec.act, static)
    if shared:
        scale = torch.where(finite, scale, math.nan)
    q = q if zero is None else q - zero
    columns = ceil_div(k, layout.unit) * layout.unit
    q = torch.nn.functional.pad(q, (0, columns - k))
    middle = (spec.act.format.max + 1) / 2
    moved = None if zero is None else (zero - middle).expand(m, 1)
    found = [(q if moved is None else q + moved).to(codes), scale]
    if Bytes.of(spec.weight.format, operand).corrected(spec.weight):
        cell = layout.cell or columns
        q = torch.nn.functional.pad(q[:, :k], (0, -k % cell))
        found.append(q.reshape(m, q.shape[1] // cell, cell).sum(-1).to(sums))
    return (*found, moved.to(torch.int32)) if moved is not None else tuple(found)


__all__ = [
    "Matmul",
    "Tile",
    "TritonLowering",
    "choose_tile",
    "cut",
    "family",
    "fit",
    "packing",
    "plan",
    "prepare",
    "quantize_input",
    "run",
    "text_of",
]
