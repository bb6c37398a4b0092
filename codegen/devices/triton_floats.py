"""The lines of a Triton matmul of floats: the activation as it is, codes decoded to 16-bit operands.

How many instructions a weight takes decides whether memory or they are the limit: what is the same for all weights of a
thread stays outside the loop, or is known when the kernel is compiled.
"""

from __future__ import annotations

import math

from qcompile.codegen.devices.triton_instructions import Permuted, word
from qcompile.codegen.devices.triton_lines import Layout, Lines, address, scale_value
from qcompile.codegen.devices.triton_numbers import Numbers
from qcompile.codegen.devices.triton_order import PERMUTED, STRAIGHT
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.scheme import Scheme


class Exact(Lines):
    """Floats: the activation as it is, and decoded codes.

    Where a scale meets every weight (mode "operand"), and the bits of a code are a number times a power of two, one exact
    multiply-add with the scale makes the operand, and sums come in a `fold` of that power that keeps scales from
    overflowing.
    """

    def __init__(self, spec: KernelSpec, layout: Layout, numbers: Numbers) -> None:
        super().__init__(spec, layout)
        self.numbers = numbers
        self.wide = spec.x == "f32"  # operands are exact in 16 bits, what is multiplied with them has 32
        self.permuted = None if self.wide else Permuted.of(self.weight.format, numbers.operand)
        self.fold = fold(self.weight, layout, numbers)
        # Scales come as words, in both halves, where operands are made of words.
        self.words = not self.wide and (numbers.kind != "table" or self.permuted is not None)
        self.both = "wide({}, DT)" if self.wide else "twice({}, DT)" if self.words else "halves(twice({}, DT), DT)"

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
        exact = ', input_precision="ieee"' if self.wide else ""
        lines = []
        for step in range(self.numbers.steps):
            lines.append(f"k = u * {self.layout.unit} + {16 * step} + k_at")
            at = "X + x_at + k"
            lines.append(f"x{step} = tl.load({at}) if EVEN else tl.load({at}, mask=k < K, other=0.0)")
        for i, acc in self.pairs:
            lines += self._codes(i)
            lines += self._scales_of_unit(i, looping=True)
            for step in range(self.numbers.steps):
                lines += self._step(step, i, looping=True)
                product = f"tl.dot(w, ordered(x{step}, NATURAL){exact})"
                lines.append(f"p = {product}" if step == 0 else f"p += {product}")
            lines.append(f"{acc} += s[:, None] * p" if self.layout.mode == "sum" else f"{acc} += p")
        return lines

    def decode(self) -> list[str]:
        """The weights of KC units to memory, step by step."""
        lines = [*self._codes("0"), *self._scales_of_unit("0", looping=False)]
        for step in range(self.numbers.steps):
            lines += self._step(step, "0", looping=False)
            lines.append(f"k = u * {self.layout.unit} + {16 * step} + k_at")
            lines.append("tl.store(D + row + tl.trans(k), w, mask=(row_n < N)[:, None] & tl.trans(k < K))")
        return lines

    def after(self) -> list[str]:
        """One scale for a whole row meets its sum."""
        if self.fold is not None:
            return [f"{acc} = {acc} * {2.0**self.fold!r}" for _, acc in self.pairs]
        pairs = self.pairs if self.layout.mode == "row" else []
        return [f"{acc} = {acc} * ({self._scaled(i, 's', '')})[:, None]" for i, acc in pairs]

    def _codes(self, i: str) -> list[str]:
        lines = super()._codes(i)
        if self.permuted is not None:
            lines += ["if tl.target_info.is_cuda():", *(f"    {line}" for line in self.permuted.lines())]
        return lines

    def _scales_of_unit(self, i: str, *, looping: bool) -> list[str]:
        layout = self.layout
        if layout.mode == "sum":
            lines = [f"g = {quotient('u', layout)}", f"s = {self._scaled(i, 's', 'g')}"]
            return lines + ([self._zero_point(i, "g")] if self.weight.scale.zero == "z" else [])
        if layout.group and layout.group % layout.span == 0:
            return self._group_of_word(i, 0, looping=looping)
        return []

    def _group_of_word(self, i: str, offset: int, *, looping: bool) -> list[str]:
        """Scales of a word, from its column `offset` on. Padding columns may have none, and take the last."""
        unit, group, span = self.layout.unit, self.layout.group, self.layout.span
        if group % unit == 0:
            return [f"g = {quotient('(u + unit)', self.layout)}", *self._operands(i, "g", looping=looping)]
        if unit % group or (span % group and group % span):
            column = f"(u + unit) * {unit} + word * {span}" + (f" + {offset}" if offset else "")
            lines = [f"g = tl.minimum(({column}) // {group}, groups - 1)"]
            return [*lines, *self._operands(i, "g", looping=looping)]
        # Groups from those of the iteration on: without a minimum, a thread knows their distance when it is compiled.
        of_word = f"word * {span // group}" if span % group == 0 else f"word // {group // span}"
        g = f"unit * {unit // group} + {of_word}" + (f" + {offset // group}" if offset >= group else "")
        least = f"tl.minimum({g}, groups - 1 - u * {unit // group})"
        lines = [f"g = {g} if EVEN else {least}" if looping else f"g = {least}"]
        return [*lines, *self._operands(i, "g", f"u * {unit // group}", looping=looping)]

    def _step(self, step: int, i: str, *, looping: bool) -> list[str]:
        """The operand w of a step, `[BN, KC * 64]`."""
        numbers, lines = self.numbers, []
        if self.layout.group and self.layout.mode == "operand" and self.layout.group % self.layout.span:
            lines += self._group_of_word(i, 16 * step, looping=looping)
        first, second = numbers.words(step)
        operand, words = self.layout.mode == "operand", f"tl.join({first}, {second})"
        zero = word(-0.0, numbers.operand)  # added to anything, it changes nothing
        added = "z" if self.weight.scale.zero == "m" else zero
        if self.fold is not None and looping:
            added = "z" if self.weight.scale.zero or numbers.offset else zero
            lines.append(f"w = halves(number({words}, s{self._scale_of(step)}, {added}, DT), DT)")
        elif self.permuted is not None:
            read = f"tl.join(w{step}_0, w{step}_1)"
            tree = self._tree(first, second)
            if operand:
                read = f"number({read}, s, {added}, DT)"
                tree.append("w = w * halves(s, DT)" + (" + halves(z, DT)" if added == "z" else ""))
            lines += ["if tl.target_info.is_cuda():", f"    w = halves({read}, DT)", "else:"]
            lines += [f"    {line}" for line in tree]
        elif operand and not self.wide and numbers.kind != "table":
            lines.append(f"w = halves(number({self._exact(step, words)}, s, {added}, DT), DT)")
        else:
            if numbers.kind == "table":
                lines += self._tree(first, second)
            else:
                lines += [f"w = halves({words}, DT)", *self._number(step)]
                lines += ["w = w.to(tl.float32)"] if self.wide else []
            lines += ["w = w * s + z" if added == "z" else "w = w * s"] if operand else []
        lines.append("w = tl.reshape(w, (KC, 2, PANELS, 8, 4, 4, 2, 2))")
        order = PERMUTED if looping else STRAIGHT
        lines.append(f"w = tl.reshape(tl.permute(w, {order}), (BN, KC * 64))")
        return lines

    def _tree(self, first: str, second: str) -> list[str]:
        """Entries of a table by comparisons."""
        lines = [f"c = tl.join({first}, {second})", "c = tl.join(c & 0xFFFF, (c >> 16) & 0xFFFF)"]
        return [*lines, f"w = {self.numbers.table('c')}", *([] if self.wide else ["w = w.to(DT)"])]

    def _number(self, step: int) -> list[str]:
        """Bits to the number they stand for: one exact multiply-add, or less. Of floats; `_exact` is the same for words."""
        factor, constant = self.numbers.multiplier(step), self.numbers.constant(step)
        number = "w" if factor == 1.0 else f"w * {factor!r}"
        if self.weight.scale.zero == "z":
            number += f" - (z + {-constant!r})" if constant else " - z"
        elif constant:
            number += f" - {-constant!r}"
        return [f"w = {number}"] if number != "w" else []

    def _exact(self, step: int, words: str) -> str:
        """Text of words whose halves are the numbers that bits of words stand for."""
        factor, constant = self.numbers.multiplier(step), self.numbers.constant(step)
        added = (
            f"twice({constant!r} - z, DT)" if self.weight.scale.zero == "z" else word(constant, self.numbers.operand)
        )
        if added == word(0.0, self.numbers.operand) and factor == 1.0:
            return words
        return f"number({words}, {word(factor, self.numbers.operand)}, {added}, DT)"

    def _scale_of(self, step: int) -> str:
        """Which of the scales of `_folded` a step takes: one for each place of its bits in a half."""
        places = sorted({self.numbers.power(s) for s in range(self.numbers.steps)}, reverse=True)
        return str(places.index(self.numbers.power(step)))

    def _folded(self, i: str, group: str, base: str) -> list[str]:
        """Scales that make operands out of bits, and what is added."""
        assert self.fold is not None
        powers = sorted({self.numbers.power(step) for step in range(self.numbers.steps)}, reverse=True)
        lines = [f"s = {self._scale(i, 'o', group, base)}"]
        lines += [f"s{j} = twice(s * {2.0 ** (power - self.fold)!r}, DT)" for j, power in enumerate(powers)]
        if self.weight.scale.zero == "m":
            lines.append(f"z = twice({self._minimum(i, group, base)} * {2.0**-self.fold!r}, DT)")
        elif self.numbers.offset:
            lines.append(f"z = twice(s * {self.numbers.offset * 2.0**-self.fold!r}, DT)")
        return lines

    def _operands(self, i: str, group: str, base: str = "", *, looping: bool = False) -> list[str]:
        """Scale and zero point or minimum of what a lane holds, as operands."""
        if self.fold is not None and looping:
            return self._folded(i, group, base)
        lines = [f"s = {self.both.format(self._scaled(i, 'o', group, base))}"]
        if self.weight.scale.zero == "m":
            lines.append(f"z = {self.both.format(self._minimum(i, group, base))}")
        elif self.weight.scale.zero == "z":
            lines.append(self._zero_point(i, group, base))
        return lines

    def _minimum(self, i: str, group: str, base: str) -> str:
        return scale_value(f"tl.load(Z{i} + {address('o', '', group, base)})", self.weight.scale.format)

    def _zero_point(self, i: str, group: str, base: str = "") -> str:
        unit = f" * {2.0**-self.numbers.unit!r}" if self.numbers.unit else ""
        loaded = f"tl.load(Z{i} + {address('o', '', group, base)}).to(tl.float32){unit}"
        return (
            f"z = {loaded}" if self.words and self.layout.mode == "operand" else f"z = halves(twice({loaded}, DT), DT)"
        )

    def _scaled(self, i: str, rows: str, group: str, base: str = "") -> str:
        """Scales that bring sums, or operands, to the numbers' own unit."""
        return self._scale(i, rows, group, base) + (f" * {2.0**self.numbers.unit!r}" if self.numbers.unit else "")


MOST = 60  # of `fold`: 2^60 leaves products with x far from the subnormal numbers of fp32


def fold(weight: Scheme, layout: Layout, numbers: Numbers) -> int | None:
    """The power of two that sums of a kernel are divided by because scales meet bits, and not numbers; `None` where they meet
    numbers.

    A bf16 code is its number divided by up to 2^133, so its scale is multiplied by as much, less the fold. Scales of fp16
    never overflow then, those of other formats do from 2^54 on. What is added must be exact: a minimum, or the scale times
    a power of two.
    """
    offset = abs(numbers.offset)
    exact = not offset or (weight.scale.zero is None and offset & (offset - 1) == 0)
    if layout.mode != "operand" or not layout.group or weight.scale.zero == "z" or not exact:
        return None
    if numbers.operand.name != "bf16" or numbers.kind == "table" or numbers.decode == "magic":
        return None
    if numbers.factor & (numbers.factor - 1):
        return None
    high = weight.scale.format.high if weight.outer is None else math.inf
    most = 128 if math.isinf(high) else math.frexp(high)[1]
    return min(MOST, max(0, max(numbers.power(step) for step in range(numbers.steps)) + most - 127))


def quotient(unit: str, layout: Layout) -> str:
    """Text of the group of a unit, where groups are whole units."""
    return unit if layout.group == layout.unit else f"{unit} // {layout.group // layout.unit}"
