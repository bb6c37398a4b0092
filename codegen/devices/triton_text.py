"""A Triton kernel's text: what the template needs to know, derived from the spec.

The template has the shape of the computation (tiles, the loop over K, split K, the end); the lines that depend on
formats, scales and the epilogue are made here and in `triton_numbers`. The text of a spec is always the same, sizes and
tile shapes are arguments of the kernel, so one text serves every matrix and every configuration.

The transposed product is computed, `y^T[N, M] = W[N, K] x^T[K, M]`: the decoded weight is then the operand that tensor
cores take from registers, and it never passes through shared memory.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

import jinja2

from qcompile.codegen.devices.triton_epilogue import block_expression
from qcompile.codegen.devices.triton_numbers import IntegerDecode, Numbers
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.formats import FORMATS, ScaleFormat
from qcompile.ir.granularity import Nested, PerGroup
from qcompile.ir.packing import unit_columns
from qcompile.ir.scheme import Scheme

TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
Mode = Literal["row", "sum", "operand"]


@dataclass(frozen=True)
class Layout:
    """How scales meet codes.

    Attributes:
        mode: "row": one scale per row, after the sum. "sum": the sum of each group is scaled; for groups that are whole
            units, and without minimum. "operand": every weight is scaled before it is multiplied.
        group: columns that share a scale, 0 when all do.
        unit: columns of a unit of the packing; span: of a word; units: how many share a scale in mode "sum", else 0.
        ratio: scales that share an outer one in groups, 0 when all of a row do or there is none.
    """

    mode: Mode
    group: int
    unit: int
    span: int
    units: int
    ratio: int = 0

    @staticmethod
    def of(weight: Scheme) -> Layout:
        unit = unit_columns(weight.format.bits)
        inner = weight.granularity.inner if isinstance(weight.granularity, Nested) else weight.granularity
        group = inner.size if isinstance(inner, PerGroup) else 0
        mode: Mode = "row"
        if weight.scale.zero == "m" or group % unit:
            mode = "operand"
        elif group:
            mode = "sum"
        outer = weight.granularity.outer if isinstance(weight.granularity, Nested) else None
        ratio = outer.size // group if isinstance(outer, PerGroup) else 0
        return Layout(mode, group, unit, unit // 4, group // unit if mode == "sum" else 0, ratio)


@dataclass(frozen=True)
class Text:
    """A kernel's source and its arguments.

    Attributes:
        source: defines `kernel`. pointers: (name, Triton type of the elements) in order, the workspace's two last.
        sizes: names of the run-time integers, in order. layout: see there.
    """

    source: str
    pointers: tuple[tuple[str, str], ...]
    sizes: tuple[str, ...]
    layout: Layout


def weight_only(spec: KernelSpec, decode: IntegerDecode = "subnormal") -> Text:
    """The kernel of a spec without activation scheme.

    Args:
        decode: how integers are read (see `triton_numbers`).
    """
    layout = Layout.of(spec.weight)
    operand = spec.x if spec.x != "f32" else "f16"
    numbers = Numbers.of(spec.weight.format, operand, exact=layout.mode == "operand", decode=decode)
    parts = _parts(spec.weight)
    pointers = [("X", TYPES[spec.x])]
    pointers += [(f"{name}{i}", kind) for i in range(spec.segments) for name, kind in parts]
    pointers += [(f"E{i}", TYPES[dtype]) for i, (_, dtype) in enumerate(spec.extras)] + [("Y", TYPES[spec.y])]
    sizes = ["ldx", *(f"N{i}" for i in range(spec.segments))]
    sizes += [f"lde{i}" for i, (kind, _) in enumerate(spec.extras) if kind == "mat"] + ["ldy"]
    body = _Body(spec, layout, numbers)
    source = _template("weight_only").render(
        spec=spec,
        pointers=[name for name, _ in pointers],
        sizes=sizes,
        operand={"fp16": "float16", "bf16": "bfloat16"}[numbers.operand.name],
        segments=spec.segments,
        choose=[name for name, _ in parts] if spec.segments > 1 and not spec.paired else [],
        unit=layout.unit,
        span=layout.span,
        group=layout.group,
        grouped=bool(layout.group),
        mode=layout.mode,
        lanes=layout.mode == "operand" or spec.weight.scale.zero is not None,
        nested=spec.weight.outer is not None,
        outer_group=layout.group * layout.ratio,
        panel_words=256 * spec.weight.format.bits // min(spec.weight.format.planes),
        planes=body.planes(),
        accumulators=body.accumulators,
        before=body.before(),
        body=body.loop(),
        after=body.after(),
        epilogue=body.epilogue(),
    )
    pointers += [("WORK", "fp32"), ("TICKETS", "i32")]
    return Text(source, tuple(pointers), ("M", "K", *sizes), layout)


@functools.cache
def _template(name: str) -> Any:
    """A template of `codegen/templates/triton`."""
    text = resources.files("qcompile.codegen").joinpath("templates", "triton", f"{name}.jinja").read_text()
    return jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(text)


def _parts(weight: Scheme) -> list[tuple[str, str]]:
    """Names and element types of the operands of one segment, as `packed_parts` orders them."""
    scale = _storage(weight.scale.format)
    found = [("W", "i32"), ("S", scale)]
    if weight.scale.zero is not None:
        found.append(("Z", "u8" if weight.scale.zero == "z" else scale))
    if weight.outer is not None:
        found.append(("O", _storage(weight.outer.format)))
    return found


def _storage(fmt: ScaleFormat) -> str:
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


class _Body:
    """The lines of a kernel that its formats decide."""

    def __init__(self, spec: KernelSpec, layout: Layout, numbers: Numbers) -> None:
        self.spec, self.weight, self.layout, self.numbers = spec, spec.weight, layout, numbers
        # Pair epilogues read every segment in one kernel; otherwise a tile belongs to one, chosen before the loop, where
        # its operands lose their number.
        self.names = [str(i) for i in range(spec.segments)] if spec.paired or spec.segments == 1 else [""]
        self.accumulators = [f"a{i}" for i in range(spec.segments)] if spec.paired else ["acc"]
        self.wide = spec.x == "f32"  # operands are exact in 16 bits, what is multiplied with them has 32
        self.both = "wide" if self.wide else "twice"

    def planes(self) -> list[dict[str, int]]:
        """Of each plane: its number, tiles in a unit, and words of a panel before it, per unit."""
        found, before, narrow = [], 0, min(self.weight.format.planes)
        for index, width in enumerate(self.weight.format.planes):
            found.append({"index": index, "tiles": width // narrow, "before": before})
            before += 256 * width // narrow
        return found

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
        for i, acc in zip(self.names, self.accumulators, strict=True):
            lines += self._codes(i)
            lines += self._scales_of_unit(i)
            for step in range(self.numbers.steps):
                lines += self._step(step, i)
                product = f"tl.dot(w, x{step}{exact})"
                lines.append(f"p = {product}" if step == 0 else f"p += {product}")
            lines.append(f"{acc} += s[:, None] * p" if self.layout.mode == "sum" else f"{acc} += p")
        return lines

    def after(self) -> list[str]:
        """One scale for a whole row meets its sum."""
        pairs = list(zip(self.names, self.accumulators, strict=True)) if self.layout.mode == "row" else []
        return [f"{acc} = {acc} * ({self._scale(i, 's', '')})[:, None]" for i, acc in pairs]

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

    def _scales_of_unit(self, i: str) -> list[str]:
        layout = self.layout
        if layout.mode == "sum":
            lines = [f"g = u * {layout.unit} // {layout.group}", f"s = {self._scale(i, 's', 'g')}"]
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

    def _scale(self, i: str, rows: str, group: str) -> str:
        """Text of fp32 scales in the numbers' own unit. `rows`: "s" (of a tile) or "o" (of what a lane holds)."""
        weight = self.weight
        value = scale_value(f"tl.load(S{i} + {_at(rows, '', group)})", weight.scale.format)
        if weight.outer is not None:
            outer = f"{group} // {self.layout.ratio}" if group and self.layout.ratio > 1 else group
            outer = outer if self.layout.ratio else ""
            value += " * " + scale_value(f"tl.load(O{i} + {_at(rows, '_outer', outer)})", weight.outer.format)
        return value + (f" * {2.0**self.numbers.unit!r}" if self.numbers.unit else "")

    def _operands(self, i: str, group: str) -> list[str]:
        """Scale and zero point or minimum of what a lane holds, as operands."""
        lines = [f"s = {self.both}({self._scale(i, 'o', group)}, DT)"]
        if self.weight.scale.zero == "m":
            minimum = scale_value(f"tl.load(Z{i} + {_at('o', '', group)})", self.weight.scale.format)
            lines.append(f"z = {self.both}({minimum}, DT)")
        elif self.weight.scale.zero == "z":
            lines.append(self._zero_point(i, group))
        return lines

    def _zero_point(self, i: str, group: str) -> str:
        unit = f" * {2.0**-self.numbers.unit!r}" if self.numbers.unit else ""
        return f"z = twice(tl.load(Z{i} + {_at('o', '', group)}).to(tl.float32){unit}, DT)"


def _at(rows: str, kind: str, group: str) -> str:
    return f"{rows}{kind or '_at'}" + (f" + {group} * 16" if group else "")
