"""Packed codes to tensor-core operands, as Triton text derived from a format's fields and its planes' positions.

A 32-bit word of the `mma16` packing holds, at the same place of its two halves, the two codes that one operand register
of the instruction wants as 16-bit floats. So a few ANDs and shifts turn a word into two floats without a conversion:

* an unsigned integer v at bit t of a half *is* the subnormal number v 2^t times the smallest one (2^-24 in fp16, 2^-133
  in bf16), and one exact multiply-add gives v - z in a common unit ("subnormal"); or, with the exponent of 1024 (fp16) or
  128 (bf16) put above it, the number 1024 + v 2^t, and the same multiply-add gives v - z ("magic");
* a float's magnitude, moved to the end of the wider format's exponent field, is the same number times a power of two;
* a table's entries are chosen by the bits of the code, on NVIDIA by its permutations of bytes: see `triton_instructions`.

Nothing here names a format: an entry of `FORMATS` is enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from qcompile.ir.formats import FORMATS, Format
from qcompile.ir.scheme import Scheme

IntegerDecode = Literal["subnormal", "magic"]
ByteOperand = Literal["i8", "e4m3"]
Run = tuple[int, int, int]  # lowest bit in the code, its place in the operand, count: bits that move together


@dataclass(frozen=True)
class Operand:
    """A 16-bit float that tensor cores multiply.

    Attributes:
        name: Triton's name. mantissa: its stored bits. bias: of the exponent. top: exponent of the largest power of two
            that a multiplication by it may use.
    """

    name: str
    mantissa: int
    bias: int
    top: int

    @property
    def smallest(self) -> int:
        """Exponent of the smallest subnormal number."""
        return 1 - self.bias - self.mantissa


OPERANDS = {"f16": Operand("fp16", 10, 15, 15), "bf16": Operand("bf16", 7, 127, 120)}


@dataclass(frozen=True)
class Numbers:
    """How the codes of a format become operands.

    Attributes:
        fmt, operand: from what, to what.
        unit: the operand is the number divided by 2**unit.
        base: for integers, what is added to every code before `multiply` (see the module), else 0.
        factor, offset: number = code * factor + offset for codes of integer formats.
        kind: "int" (a multiply-add finishes it), "float" (a multiplication by a power of two, or nothing) or "table".
        decode: how integers are read.
    """

    fmt: Format
    operand: Operand
    unit: int
    kind: Literal["int", "float", "table"]
    decode: IntegerDecode = "subnormal"
    factor: int = 1
    offset: int = 0

    @staticmethod
    def of(fmt: Format, dtype: str, *, exact: bool = False, decode: IntegerDecode = "subnormal") -> Numbers:
        """The cheapest way for a format.

        Args:
            dtype: "f16" or "bf16".
            exact: the operand is to be the number itself (unit 0) where that is possible; needed where a scale meets it.
            decode: how integers are read where both ways work; codes of 8 bits have no room under bf16's magic.
        """
        operand = OPERANDS[dtype]
        found = affine(fmt)
        if found is not None:
            factor, offset = found
            fits = fmt.bits <= operand.mantissa
            # fp16 cannot multiply by 2^24: in its subnormal numbers the unit stays, and a scale of the operand may overflow.
            wanted: IntegerDecode = "magic" if exact and operand.name == "fp16" else decode
            if wanted == "magic" and fits:
                return Numbers(fmt, operand, 0, "int", "magic", factor, offset)
            unit = -operand.smallest - operand.top + (factor - 1).bit_length()
            return Numbers(fmt, operand, unit, "int", "subnormal", factor, offset)
        if fmt.kind == "float":
            # Left as it is, fp16 is small by a few binades, which costs nothing; bf16 is so small that its products are
            # subnormal in fp32.
            free = operand.name == "fp16" and not exact
            return Numbers(fmt, operand, operand.bias - fmt.bias if free else 0, "float")
        return Numbers(fmt, operand, 0, "table")

    @property
    def steps(self) -> int:
        """Instructions' worth of columns in one word."""
        return 8 // min(self.fmt.planes)

    def multiplier(self, step: int) -> float:
        """By what the bits of a step are multiplied."""
        if self.kind == "float":
            return 2.0 ** (self.operand.bias - self.fmt.bias - self.unit)
        place = self._place(step)
        if self.decode == "magic":
            return self.factor * 2.0**-place
        return self.factor * 2.0 ** (-self.operand.smallest - self.unit - place)

    def read(self, step: int) -> tuple[float, ...]:
        """What the bits of an integer's smallest and largest code are as a float, before `multiplier`."""
        ones = (len(self.fmt.table) or 1 << self.fmt.bits) - 1
        if self.decode == "magic":
            return tuple(2.0**self.operand.mantissa + code * 2.0 ** self._place(step) for code in (0, ones))
        return tuple(code * 2.0 ** (self.operand.smallest + self._place(step)) for code in (0, ones))

    def fits(self, step: int) -> bool:
        """Whether an integer's bits stay below the exponent that is put above them, or in the subnormal numbers."""
        return self._place(step) + self.fmt.bits <= self.operand.mantissa + (self.decode == "subnormal")

    def power(self, step: int) -> int:
        """The bits of a step, read as a float, are the number divided by 2 to this power, but for an integer's offset.

        For floats, and for subnormal integers whose factor is a power of two.
        """
        return round(math.log2(self.multiplier(step))) + self.unit

    def constant(self, step: int) -> float:
        """What is added after the multiplication when the zero point is 0, in the operand's unit."""
        hidden = 0.0
        if self.decode == "magic":
            hidden = self.factor * 2.0 ** (self.operand.mantissa - self._place(step))
        return self.offset * 2.0**-self.unit - hidden

    def words(self, step: int) -> tuple[str, str]:
        """Text of the 32-bit words whose halves are the operands of a step's first and second eight columns."""
        first, second = (" | ".join(self._moves(step, i1)) for i1 in (0, 1))
        if self.kind == "int" and self.decode == "magic":
            exponent = (self.operand.bias + self.operand.mantissa) << self.operand.mantissa
            first, second = (f"{text} | {both(exponent)}" for text in (first, second))
        return first, second

    def table(self, code: str) -> str:
        """Text that selects the entry of a code: one comparison for each bit."""

        def tree(low: int, bit: int) -> str:
            if bit < 0:
                value = self.fmt.values[low]
                return repr(value if math.isfinite(value) else 0.0)
            return f"tl.where(({code} & {1 << bit}) != 0, {tree(low + (1 << bit), bit - 1)}, {tree(low, bit - 1)})"

        return tree(0, self.fmt.bits - 1)

    def _place(self, step: int) -> int:
        """The bit of a half where an integer's lowest bit is left or put."""
        width = self.fmt.planes[0]
        place = step % (8 // width) * width if self.fmt.planes != _TRIPLES else 4 * (step % 4 // 2)
        room = self.operand.mantissa + (self.decode == "subnormal")
        # Magic adds factor * 2^(mantissa - place), which must have no more than mantissa + 1 bits with the offset in it.
        least = self.factor.bit_length() - 1 if self.decode == "magic" else 0
        return max(place, least) if max(place, least) + self.fmt.bits <= room else least

    def _target(self, step: int) -> Iterator[Run]:
        """The runs of bits that make the half of a register."""
        fmt = self.fmt
        if self.kind == "float":
            magnitude = fmt.exponent + fmt.mantissa
            yield 0, self.operand.mantissa - fmt.mantissa, magnitude
            if fmt.signed:
                yield magnitude, 15, 1
        elif self.kind == "table":
            yield 0, 0, fmt.bits
        else:
            yield 0, self._place(step), fmt.bits

    def _moves(self, step: int, i1: int) -> Iterator[str]:
        """Terms of the OR that collects the bits of a code, each a shifted and masked word of a plane."""
        if self.kind == "int" and self.fmt.planes == _TRIPLES:
            right = 8 * i1 + 4 * (step % 4 // 2) - self._place(step)
            yield f"({_shifted(_triples(step), right)} & {both(7 << self._place(step))})"
            return
        runs = list(self._target(step))
        if copies := self._copies(step, runs):
            place, factor = copies
            kept = sum(((1 << count) - 1) << target for _, target, count in runs)
            code = f"({_shifted('q0_0', 8 * i1)} & {both(((1 << self.fmt.bits) - 1) << place)})"
            yield f"({code} * {factor} & {both(kept)})"
            return
        for run in runs:
            for word, source, target, mask in _moved(self.fmt, step, run):
                yield f"({_shifted(word, source + 8 * i1 - target)} & {both(mask)})"

    def _copies(self, step: int, runs: Sequence[Run]) -> tuple[int, int] | None:
        """Where the code lies in a byte and what it is multiplied by, to have all its bits wherever a run needs some of
        them; `None` where copies would meet. A product is done by other units than ANDs and shifts are."""
        bits, place = self.fmt.bits, step * self.fmt.bits
        shifts = sorted(target - first for first, target, _ in runs)
        apart = all(b - a >= bits for a, b in itertools.pairwise(shifts))
        if len(shifts) < 2 or self.fmt.planes != (4,) or not apart or shifts[0] < place or shifts[-1] + bits > 16:
            return None
        return place, sum(1 << (shift - place) for shift in shifts)


@dataclass(frozen=True)
class Bytes:
    """How codes become bytes that tensor cores multiply, four at a time.

    A 32-bit word of the `mma8` packing holds the codes of four neighbouring columns at the same place of its bytes; ANDs take
    them out. As signed bytes they are the integers. As e4m3, an integer v below 16 *is* the number v 2^-9, and the bits of a
    smaller float, moved, are the same number times a power of two.

    Attributes:
        fmt: of the codes. operand: "i8" or "e4m3". factor, offset: number = byte * factor + offset.
    """

    fmt: Format
    operand: ByteOperand
    factor: float
    offset: int

    @staticmethod
    def of(fmt: Format, operand: ByteOperand = "i8") -> Bytes:
        """Raises `ValueError` for a format without numbers of this kind; see `why_no_bytes`."""
        if why := why_no_bytes(fmt, operand):
            raise ValueError(why)
        found = affine(fmt)
        if found is None:
            return Bytes(fmt, operand, 2.0 ** (_E4M3.bias - fmt.bias), 0)
        factor, offset = found
        if operand == "e4m3":
            return Bytes(fmt, operand, factor * 2.0**_INTEGER, offset)
        return Bytes(fmt, operand, factor, offset + 128 if fmt.bits == 8 else offset)

    def corrected(self, weight: Scheme) -> bool:
        """Whether sums of bytes need the sum of x to become sums of numbers."""
        return self.offset != 0 or weight.scale.zero == "z"

    @property
    def steps(self) -> int:
        """Blocks of 16 columns in one word."""
        return 8 // min(self.fmt.planes)

    def word(self, step: int) -> str:
        """Text of the 32-bit word whose bytes are the operands of a step; integers of 8 bits less 128, as bytes have a sign."""
        if self.fmt.bits == 8:
            return "q0_0" if self.operand == "e4m3" else f"q0_0 ^ {_signed(0x80808080)}"
        return " | ".join(self._moves(step))

    def _target(self) -> Iterator[Run]:
        """The runs of bits that make a byte."""
        fmt = self.fmt
        if affine(fmt) is not None:
            yield 0, 0, fmt.bits
        else:
            yield 0, _E4M3.mantissa - fmt.mantissa, fmt.exponent + fmt.mantissa
            yield fmt.exponent + fmt.mantissa, 7, 1

    def _moves(self, step: int) -> Iterator[str]:
        """Terms of the OR that collects the bits of a code."""
        for run in self._target():
            for word, source, target, mask in _moved(self.fmt, step, run):
                yield f"({_shifted(word, source - target)} & {_signed(mask * 0x01010101)})"


_E4M3 = FORMATS["e4m3"]
_INTEGER = 9  # v is v 2^-9 in e4m3


def byte_operand(act: Scheme) -> ByteOperand:
    """As what kind of bytes activations of a scheme are multiplied."""
    return "i8" if act.format.kind == "int" else "e4m3"


def why_no_bytes(fmt: Format, operand: ByteOperand) -> str:
    """Why numbers of a format are no bytes of this kind, "" when they are."""
    found = affine(fmt) is not None
    if operand == "i8":
        return "" if found else f"{fmt.name} is no integer format"
    if found:
        return "" if fmt.bits <= 4 else f"{fmt.name} has more bits than the 4 of an integer in e4m3"
    inside = fmt.kind == "float" and fmt.signed and fmt.exponent <= _E4M3.exponent and fmt.mantissa <= _E4M3.mantissa
    return "" if inside else f"{fmt.name} is not inside e4m3"


@lru_cache(maxsize=256)
def why_no_operand(fmt: Format, dtype: str) -> str:
    """Why the numbers of a format are no operands of a type ("f16", "bf16"), "" when they are."""
    operand = OPERANDS[dtype]
    if fmt.kind == "float":
        # Its exponent field is read as one of the operand's, where the top one means infinity and NaN.
        room = operand.bias.bit_length() + 1
        if fmt.exponent > room or (fmt.exponent == room and fmt.nonfinite != "ieee") or fmt.mantissa > operand.mantissa:
            return f"{fmt.name} is not inside {operand.name}"
        return ""
    if affine(fmt) is None:
        return "" if max(map(abs, fmt.table)) <= _largest(operand) else f"{fmt.name} is not inside {operand.name}"
    for exact, decode in itertools.product((False, True), get_args(IntegerDecode)):
        numbers = Numbers.of(fmt, dtype, exact=exact, decode=decode)
        for step in range(numbers.steps):
            read = numbers.read(step)
            values = (
                *read,
                numbers.multiplier(step),
                numbers.constant(step),
                *(v * numbers.multiplier(step) for v in read),
            )
            if not all(_is_exact(value, operand) for value in values) or not numbers.fits(step):
                return f"integers of {fmt.name} are too large for {operand.name}"
    return ""


def _largest(operand: Operand) -> float:
    return float((2 - 2.0**-operand.mantissa) * 2.0**operand.bias)


def _is_exact(value: float, operand: Operand) -> bool:
    """Whether a number is one of an operand's, subnormal ones too."""
    exponent = max(math.frexp(value)[1] - 1, 1 - operand.bias) - operand.mantissa
    return abs(value) <= _largest(operand) and (value * 2.0**-exponent).is_integer()


def affine(fmt: Format) -> tuple[int, int] | None:
    """(a, b) with value = a code + b for every code that is ever stored, `None` when there is none."""
    if fmt.kind == "int":
        return 1, -fmt.offset
    values = fmt.table
    if fmt.kind == "table" and len(values) > 1 and all(v == int(v) for v in values):
        step, start = int(values[1] - values[0]), int(values[0])
        if all(v == start + i * step for i, v in enumerate(values)):
            return step, start
    return None


def _moved(fmt: Format, step: int, run: Run) -> Iterator[tuple[str, int, int, int]]:
    """Where a run of bits lies in the words of a step: (word, its bit there, the bit it goes to, mask of that place)."""
    first, place, count = run
    low = 0
    for plane, width in enumerate(fmt.planes):
        start, stop = max(first, low), min(first + count, low + width)
        if start < stop:
            per = 8 // width
            target = place + start - first
            mask = ((1 << (stop - start)) - 1) << target
            yield f"q{plane}_{step // per}", step % per * width + start - low, target, mask
        low += width


_TRIPLES = (2, 1)  # planes of 3 bits


def _triples(step: int) -> str:
    """Text of words of 4-bit fields with the codes of steps `step` and `step + 2` (or `- 2`): two bits of a plane and one of
    the other, which a product brings from both places to where they belong. It carries nothing into bits that are kept."""
    half, odd = step // 4, step % 2
    low, high = _shifted(f"q0_{half}", 2 * odd), _shifted("q1_0", 4 * half)
    spread = f"({high} & {_signed(0x0A0A0A0A if odd else 0x05050505)}) * {10 if odd else 20}"
    return f"chosen({low}, {spread}, {_signed(0x33333333)})"


def _shifted(word: str, right: int) -> str:
    if right == 0:
        return word
    return f"({word} >> {right})" if right > 0 else f"({word} << {-right})"


def both(half: int) -> str:
    """A constant in both halves."""
    return _signed(half << 16 | half)


def _signed(value: int) -> str:
    """32 bits as Triton reads them into an int32."""
    return hex(value) if value < 1 << 31 else f"-{hex((1 << 32) - value)}"
