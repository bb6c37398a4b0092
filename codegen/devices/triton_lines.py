"""The lines of a Triton matmul that its formats decide: loads of codes, their way to operands, scales, the end.

What both kinds of kernels share, and `Codes`, which multiplies bytes: activations that were quantized before, codes of
integer formats as they are, sums in int32. `triton_floats.Exact` multiplies floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qcompile.codegen.devices.triton_epilogue import block_expression
from qcompile.codegen.devices.triton_numbers import ByteOperand, Bytes
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.formats import FORMATS, ScaleFormat
from qcompile.ir.granularity import Nested, PerBlock, PerGroup
from qcompile.ir.packing import unit_columns
from qcompile.ir.scheme import Scheme

Mode = Literal["row", "sum", "operand"]


@dataclass(frozen=True)
class Layout:
    """How scales meet codes.

    Attributes:
        mode: "row": one scale per row, after the sum. "sum": the sum of each group is scaled; for groups that are whole
            units, and without minimum. "operand": every weight is scaled before it is multiplied.
        group: columns that share a scale, 0 when all do. act_group: the same of the activation.
        unit: columns of a unit of the packing; span: of a word.
        cell: columns of one sum that scales then meet inside the loop over K; 0 when they meet none there.
        ratio: scales that share an outer one in groups, 0 when all of a row do or there is none.
        shifted: whether bytes of x have a zero point.
    """

    mode: Mode
    group: int
    unit: int
    span: int
    cell: int
    ratio: int = 0
    act_group: int = 0
    shifted: bool = False

    @staticmethod
    def of(weight: Scheme, act: Scheme | None = None) -> Layout:
        unit = unit_columns(weight.format.bits)
        inner = weight.granularity.inner if isinstance(weight.granularity, Nested) else weight.granularity
        match inner:
            case PerGroup(group) | PerBlock(_, group):
                pass
            case _:
                group = 0
        mode: Mode = "row"
        if weight.scale.zero == "m" or group % unit:
            mode = "operand"
        elif group:
            mode = "sum"
        outer = weight.granularity.outer if isinstance(weight.granularity, Nested) else None
        ratio = outer.size // group if isinstance(outer, PerGroup) else 0
        act_group = act.granularity.size if act is not None and isinstance(act.granularity, PerGroup) else 0
        cell = math.gcd(group if mode == "sum" else 0, act_group)
        shifted = act is not None and not act.symmetric
        return Layout(mode, group, unit, unit // 4, cell, ratio, act_group, shifted)

    @property
    def units(self) -> int:
        """Units of the packing in a cell, 0 without cells."""
        return self.cell // self.unit


def storage(fmt: ScaleFormat) -> str:
    if fmt.kind == "float":
        return fmt.name
    return "i8" if fmt.dtype.is_signed else "u8"


def scale_value(text: str, fmt: ScaleFormat) -> str:
    """Text of a loaded scale's fp32 value."""
    if fmt.kind == "float":
        return f"{text}.to(tl.float32)"
    if fmt.kind == "exponent":
        bits = f"{text}.to(tl.int32)" if fmt.bias == 127 else f"({text}.to(tl.int32) + {127 - fmt.bias})"
        return f"({bits} << 23).to(tl.float32, bitcast=True)"
    element = FORMATS[fmt.name]
    if element.kind == "float":  # positive: the magnitude, put at the end of fp32's exponent
        magnitude = f"(({text}.to(tl.int32) & 0x7F) << {23 - element.mantissa}).to(tl.float32, bitcast=True)"
        return f"{magnitude} * {2.0 ** (127 - element.bias)!r}"
    return f"{text}.to(tl.float32)"


class Lines:
    """What both kinds of kernels share.

    Attributes:
        accumulators: names of the sums. sums: their Triton type.
    """

    sums = "tl.float32"

    def __init__(self, spec: KernelSpec, layout: Layout) -> None:
        self.spec, self.weight, self.layout = spec, spec.weight, layout
        # Pair epilogues read every segment in one kernel; otherwise a tile belongs to one, chosen before the loop, where
        # its operands lose their number.
        self.names = [str(i) for i in range(spec.segments)] if spec.paired or spec.segments == 1 else [""]
        self.accumulators = [f"a{i}" for i in range(spec.segments)] if spec.paired else ["acc"]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(suffix of the operands' names, accumulator) of each sum."""
        return list(zip(self.names, self.accumulators, strict=True))

    def planes(self) -> list[dict[str, int]]:
        """Of each plane: its number, tiles in a unit, and words of a panel before it, per unit."""
        found, before, narrow = [], 0, min(self.weight.format.planes)
        for index, width in enumerate(self.weight.format.planes):
            found.append({"index": index, "tiles": width // narrow, "before": before})
            before += 256 * width // narrow
        return found

    def closing(self) -> list[str]:
        """What each split does with its own sums."""
        return []

    def epilogue(self) -> list[str]:
        lines, names = [], {name: name for name in self.accumulators}
        for i, (kind, _) in enumerate(self.spec.extras):
            at = "column" if kind == "row" else f"m.to(tl.int64) * lde{i} + column"
            mask = "n < N" if kind == "row" else "inside"
            lines.append(f"e{i} = tl.load(E{i} + {at}, mask={mask}, other=0.0).to(tl.float32)")
            names[f"e{i}"] = f"e{i}"
        lines.append(f"y = {block_expression(self.spec.epilogue, names)}")
        return lines

    def _codes(self, i: str) -> list[str]:
        lines = []
        for plane in self.planes():
            for j in range(plane["tiles"]):
                at = f"at{plane['index']} + u * {plane['tiles'] * 256}" + (f" + {j * 256}" if j else "")
                lines.append(f"q{plane['index']}_{j} = tl.reshape(tl.load(W{i} + {at}), (KC, 2, PANELS, 32, 4))")
        return lines

    def _scale(self, i: str, rows: str, group: str, base: str = "") -> str:
        """Text of fp32 scales. `rows`: "s" (of a tile) or "o" (of what a lane holds); `base`: added to the group."""
        weight, ratio = self.weight, self.layout.ratio
        value = scale_value(f"tl.load(S{i} + {address(rows, '', group, base)})", weight.scale.format)
        if weight.outer is not None:
            if group and ratio > 1:
                at = address(rows, "_outer", f"(({group} + {base}) // {ratio})" if base else f"({group} // {ratio})")
            else:
                at = address(rows, "_outer", *((group, base) if ratio else ("",)))
            value += " * " + scale_value(f"tl.load(O{i} + {at})", weight.outer.format)
        return value


class Codes(Lines):
    """Bytes: activations that were quantized before, codes as they are or moved to their place in a byte.

    The sum of `factor * byte + offset - zero` over k is the sum of bytes, and a correction with the sum of x over the same k,
    which comes with x. A zero point of x is taken off with the sum of the weight's bytes, which tensor cores find beside the
    product, as one with ones.
    """

    def __init__(self, spec: KernelSpec, layout: Layout, numbers: Bytes) -> None:
        super().__init__(spec, layout)
        self.numbers = numbers
        self.whole, self.integers = numbers.operand == "i8", integer_sums(numbers.operand, layout)
        self.dot = "tl.int32" if self.whole else "tl.float32"
        self.sums = "tl.int32" if self.integers and not layout.cell else "tl.float32"
        self.corrected = numbers.corrected(spec.weight)

    def before(self) -> list[str]:
        """What the end needs: scales of x, and sums of its codes."""
        layout = self.layout
        lines = [f"x_groups = tl.cdiv(K, {layout.act_group})" if layout.act_group else "sx = tl.load(XS + m_at)"]
        if self.corrected:
            lines.append(f"cells = tl.cdiv(K, {layout.cell})" if layout.cell else "xs = tl.load(XG + m_at)")
        if layout.shifted:
            lines += ["xz = tl.load(XZ + m_at)", f"ones = tl.full((KC * 64, {ONES}), 1, tl.int8)"]
            lines += [f"b{j} = tl.zeros((BN, {ONES}), tl.int32)" for j in range(0 if layout.cell else len(self.pairs))]
        return lines

    def loop(self) -> list[str]:
        """One iteration: KC units. Memory of x goes on to the end of the last unit, so there is no mask."""
        layout, unit, steps = self.layout, self.layout.unit, range(self.numbers.steps)
        lines = [f"x{step} = tl.load(X + x_at + (u * {unit} + {16 * step} + k_at))" for step in steps]
        if layout.cell and self.corrected:
            xs = f"for_rows(XG + m_at * cells + u * {unit} // {layout.cell}, 2 * BN)"
            if layout.units > 1:  # once for a cell, which iterations share
                xs = f"tl.where(u * {unit} % {layout.cell} == 0, {xs}, 0)"
            lines.append(f"xs = {xs}")
        if layout.act_group:
            lines.append(f"sx = for_rows(XS + m_at * x_groups + u * {unit} // {layout.act_group}, 2 * BN)")
        for j, (i, acc) in enumerate(self.pairs):
            lines += self._codes(i)
            for step in steps:
                operand = f"octets({self.numbers.word(step)})"
                lines.append(f"w = {operand}" + ("" if self.whole else ".to(tl.float8e4nv, bitcast=True)"))
                lines.append("w = tl.reshape(w, (KC, 2, PANELS, 8, 4, 4, 2, 2))")
                lines.append("w = tl.reshape(tl.permute(w, (2, 1, 3, 0, 5, 4, 6, 7)), (BN, KC * 64))")
                lines.append(self._product(step, acc))
                if layout.shifted:
                    before = "" if layout.cell and not step else f"b{j}, "
                    lines.append(f"b{j} = tl.dot(w, ones, {before}out_dtype=tl.int32)")
            if not layout.cell:
                continue
            if layout.shifted:
                lines.append(f"p -= {_zeros(j)}")
            group = f"u * {unit} // {layout.group}" if layout.group else ""
            value = self._number(i, "p", group)
            if group:
                value += f" * ({self._scale(i, 's', group)})[:, None]"
            lines.append(f"{acc} += {value}" + (" * sx[None, :]" if layout.act_group else ""))
        return lines

    def _product(self, step: int, acc: str) -> str:
        """One product. Sums of a cell, and exact ones, stay in the instruction's accumulator; long sums of e4m3, which some
        devices add with few bits, leave it at every step."""
        dot = f"tl.dot(w, x{step}, {{}}out_dtype={self.dot})"
        if self.layout.cell:
            return f"p = {dot.format('p, ' if step else '')}"
        return f"{acc} = {dot.format(f'{acc}, ')}" if self.whole else f"{acc} += {dot.format('')}"

    def closing(self) -> list[str]:
        """What each split does with its own sums: bytes become numbers less the zero point of x."""
        own = self.layout.shifted and not self.layout.cell
        return [f"{acc} -= {_zeros(j)}" for j, (_, acc) in enumerate(self.pairs) if own]

    def after(self) -> list[str]:
        """The scales that did not meet the sums inside the loop."""
        lines = []
        for i, acc in self.pairs:
            value = acc if self.layout.cell else self._number(i, acc, "")
            if not self.layout.group:
                value += f" * ({self._scale(i, 's', '')})[:, None]"
            if not self.layout.act_group:
                value += " * sx[None, :]"
            lines.append(f"{acc} = {value}")
        return lines

    def _number(self, i: str, total: str, group: str) -> str:
        """Text of the sum of numbers as fp32, from that of bytes."""
        kind, factor, offset = "float32", float(self.numbers.factor), float(self.numbers.offset)
        if self.integers:
            kind, factor, offset = "int32", int(factor), int(offset)
        elif self.whole:
            # An integer below 2^22 becomes a float by the mantissa of 1.5 * 2^23: an addition, where a conversion takes the
            # time of four.
            total = f"(({total} + 0x4B400000).to(tl.float32, bitcast=True) - 12582912.0)"
        total = f"{total} * {factor!r}" if factor != 1 else total
        if self.corrected:
            zero = f"{offset!r}"
            if self.weight.scale.zero == "z":
                zero = f"({zero} - tl.load(Z{i} + {address('s', '', group)}).to(tl.{kind}))[:, None]"
            total = f"{total} + {zero} * xs[None, :]"
        return f"({total})" + (".to(tl.float32)" if self.integers else "")


ONES = 16  # columns of the product that sums up a weight's bytes: the fewest that instructions have


def _zeros(j: int) -> str:
    """Text of what a zero point of x adds to sums. All columns of the product with ones are equal."""
    return f"tl.max(b{j}, axis=1)[:, None] * xz[None, :]"


def integer_sums(operand: ByteOperand, layout: Layout) -> bool:
    """Whether sums stay int32 until a scale meets them: sums of bytes, but those of at most 256 columns, which are below
    2^22 in any case (256 * 127 * 128) and exact in fp32; of half as many where a zero point doubles the range of x."""
    return operand == "i8" and not 0 < layout.cell <= (128 if layout.shifted else 256)


def address(rows: str, kind: str, group: str, base: str = "") -> str:
    """Text of where scales lie; `base` is added to the pointer on its own, as it is the same for all of them."""
    at = f"{rows}{kind or '_at'}" + (f" + {group} * 16" if group else "")
    return at + (f" + {base} * 16" if base else "")
