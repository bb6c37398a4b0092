"""The lines of a Triton matmul that its formats decide: loads of codes, their way to operands, scales, the end.

`Exact` multiplies floats: the activation as it is, codes decoded to 16-bit operands. `Codes` multiplies bytes: activations
that were quantized before, codes of integer formats as they are, sums in int32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from qcompile.codegen.devices.triton_epilogue import block_expression
from qcompile.codegen.devices.triton_numbers import ByteOperand, Bytes, Numbers
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
    """

    mode: Mode
    group: int
    unit: int
    span: int
    cell: int
    ratio: int = 0
    act_group: int = 0

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
        return Layout(mode, group, unit, unit // 4, cell, ratio, act_group)

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
                lines.append(f"q{plane['index']}_{j} = tl.load(W{i} + {at})")
        return lines

    def _scale(self, i: str, rows: str, group: str) -> str:
        """Text of fp32 scales. `rows`: "s" (of a tile) or "o" (of what a lane holds)."""
        weight = self.weight
        value = scale_value(f"tl.load(S{i} + {_at(rows, '', group)})", weight.scale.format)
        if weight.outer is not None:
            outer = f"{group} // {self.layout.ratio}" if group and self.layout.ratio > 1 else group
            outer = outer if self.layout.ratio else ""
            value += " * " + scale_value(f"tl.load(O{i} + {_at(rows, '_outer', outer)})", weight.outer.format)
        return value


class Exact(Lines):
    """Floats: the activation as it is, and decoded codes."""

    def __init__(self, spec: KernelSpec, layout: Layout, numbers: Numbers) -> None:
        super().__init__(spec, layout)
        self.numbers = numbers
        self.wide = spec.x == "f32"  # operands are exact in 16 bits, what is multiplied with them has 32
        self.both = "wide" if self.wide else "twice"

    def before(self) -> list[str]:
        """What all columns share."""
        lines = []
        for i in self.names if not self.layout.group else []:
            if self.layout.mode == "operand":
                lines += self._operands(i, "")
            elif self.weight.scale.zero == "z":
                lines.append(self._zero_point(i, ""))
        return lines

    def loop(self) -> list[str]:
        """One iteration: KC units."""
        lines, exact = [], ', input_precision="ieee"' if self.wide else ""
        for step in range(self.numbers.steps):
            lines.append(f"k = u * {self.layout.unit} + {16 * step} + k_at")
            at = "X + x_at + k"
            lines.append(f"x{step} = tl.load({at}) if EVEN else tl.load({at}, mask=k < K, other=0.0)")
        for i, acc in self.pairs:
            lines += self._codes(i)
            lines += self._scales_of_unit(i)
            for step in range(self.numbers.steps):
                lines += self._step(step, i)
                product = f"tl.dot(w, x{step}{exact})"
                lines.append(f"p = {product}" if step == 0 else f"p += {product}")
            lines.append(f"{acc} += s[:, None] * p" if self.layout.mode == "sum" else f"{acc} += p")
        return lines

    def decode(self) -> list[str]:
        """The weights of KC units to memory, step by step."""
        lines = [*self._codes("0"), *self._scales_of_unit("0")]
        for step in range(self.numbers.steps):
            lines += self._step(step, "0")
            lines.append(f"k = u * {self.layout.unit} + {16 * step} + k_at")
            lines.append("tl.store(D + row + tl.trans(k), w, mask=(row_n < N)[:, None] & tl.trans(k < K))")
        return lines

    def after(self) -> list[str]:
        """One scale for a whole row meets its sum."""
        pairs = self.pairs if self.layout.mode == "row" else []
        return [f"{acc} = {acc} * ({self._scaled(i, 's', '')})[:, None]" for i, acc in pairs]

    def _scales_of_unit(self, i: str) -> list[str]:
        layout = self.layout
        if layout.mode == "sum":
            lines = [f"g = u * {layout.unit} // {layout.group}", f"s = {self._scaled(i, 's', 'g')}"]
            return lines + ([self._zero_point(i, "g")] if self.weight.scale.zero == "z" else [])
        if layout.group and layout.group % layout.span == 0:
            return self._group_of_word(i, "")
        return []

    def _group_of_word(self, i: str, offset: str) -> list[str]:
        layout = self.layout
        column = f"(u + unit) * {layout.unit} + word * {layout.span}{offset}"
        return [f"g = tl.minimum(({column}) // {layout.group}, groups - 1)", *self._operands(i, "g")]

    def _step(self, step: int, i: str) -> list[str]:
        """The operand w of a step, `[BN, KC * 64]`."""
        numbers, lines = self.numbers, []
        if self.layout.group and self.layout.mode == "operand" and self.layout.group % self.layout.span:
            lines += self._group_of_word(i, f" + {16 * step}")
        first, second = numbers.words(step)
        if numbers.kind == "table":
            lines += [
                f"c = tl.join({first}, {second})",
                "c = tl.join(c & 0xFFFF, (c >> 16) & 0xFFFF)",
                f"w = {numbers.table('c')}",
                *([] if self.wide else ["w = w.to(DT)"]),
            ]
        else:
            lines.append(f"w = halves(tl.join({first}, {second}), DT)")
            lines += self._number(step)
            lines += ["w = w.to(tl.float32)"] if self.wide else []
        if self.layout.mode == "operand":
            lines.append("w = w * s + z" if self.weight.scale.zero == "m" else "w = w * s")
        lines.append("w = tl.reshape(w, (KC, 2, PANELS, 8, 4, 4, 2, 2))")
        lines.append("w = tl.reshape(tl.permute(w, (2, 1, 3, 0, 5, 6, 4, 7)), (BN, KC * 64))")
        return lines

    def _number(self, step: int) -> list[str]:
        """Bits to the number they stand for: one exact multiply-add, or less."""
        factor, constant = self.numbers.multiplier(step), self.numbers.constant(step)
        number = "w" if factor == 1.0 else f"w * {factor!r}"
        if self.weight.scale.zero == "z":
            number += f" - (z + {-constant!r})" if constant else " - z"
        elif constant:
            number += f" - {-constant!r}"
        return [f"w = {number}"] if number != "w" else []

    def _operands(self, i: str, group: str) -> list[str]:
        """Scale and zero point or minimum of what a lane holds, as operands."""
        lines = [f"s = {self.both}({self._scaled(i, 'o', group)}, DT)"]
        if self.weight.scale.zero == "m":
            minimum = scale_value(f"tl.load(Z{i} + {_at('o', '', group)})", self.weight.scale.format)
            lines.append(f"z = {self.both}({minimum}, DT)")
        elif self.weight.scale.zero == "z":
            lines.append(self._zero_point(i, group))
        return lines

    def _zero_point(self, i: str, group: str) -> str:
        unit = f" * {2.0**-self.numbers.unit!r}" if self.numbers.unit else ""
        return f"z = twice(tl.load(Z{i} + {_at('o', '', group)}).to(tl.float32){unit}, DT)"

    def _scaled(self, i: str, rows: str, group: str) -> str:
        """Scales that bring sums, or operands, to the numbers' own unit."""
        return self._scale(i, rows, group) + (f" * {2.0**self.numbers.unit!r}" if self.numbers.unit else "")


class Codes(Lines):
    """Bytes: activations that were quantized before, codes as they are or moved to their place in a byte.

    The sum of `factor * byte + offset - zero` over k is the sum of bytes, and a correction with the sum of x over the same k,
    which comes with x.
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
        return lines

    def loop(self) -> list[str]:
        """One iteration: KC units. Memory of x goes on to the end of the last unit, so there is no mask."""
        layout, unit, steps = self.layout, self.layout.unit, range(self.numbers.steps)
        lines = [f"x{step} = tl.load(X + x_at + (u * {unit} + {16 * step} + k_at))" for step in steps]
        if layout.cell and self.corrected:
            xs = f"tl.load(XG + m_at * cells + u * {unit} // {layout.cell})"
            if layout.units > 1:  # once for a cell, which iterations share
                xs = f"tl.where(u * {unit} % {layout.cell} == 0, {xs}, 0)"
            lines.append(f"xs = {xs}")
        if layout.act_group:
            lines.append(f"sx = tl.load(XS + m_at * x_groups + u * {unit} // {layout.act_group})")
        for i, acc in self.pairs:
            lines += self._codes(i)
            for step in steps:
                operand = f"octets({self.numbers.word(step)})"
                lines.append(f"w = {operand}" + ("" if self.whole else ".to(tl.float8e4nv, bitcast=True)"))
                lines.append("w = tl.reshape(w, (KC, 2, PANELS, 8, 4, 4, 2, 2))")
                lines.append("w = tl.reshape(tl.permute(w, (2, 1, 3, 0, 5, 4, 6, 7)), (BN, KC * 64))")
                lines.append(self._product(step, acc))
            if not layout.cell:
                continue
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
                zero = f"({zero} - tl.load(Z{i} + {_at('s', '', group)}).to(tl.{kind}))[:, None]"
            total = f"{total} + {zero} * xs[None, :]"
        return f"({total})" + (".to(tl.float32)" if self.integers else "")


def integer_sums(operand: ByteOperand, layout: Layout) -> bool:
    """Whether sums stay int32 until a scale meets them: sums of bytes, but those of at most 256 columns, which are below
    2^22 in any case (256 * 127 * 128) and exact in fp32."""
    return operand == "i8" and not 0 < layout.cell <= 256


def _at(rows: str, kind: str, group: str) -> str:
    return f"{rows}{kind or '_at'}" + (f" + {group} * 16" if group else "")
