"""Instructions of NVIDIA's in Triton text, where Triton has no word for them or its compiler finds others.

Every kernel has another way as well, for AMD's devices. In the interpreter these are run by `compat.assembly`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from qcompile.codegen.devices.triton_numbers import Operand, affine, both
from qcompile.ir.formats import Format


@dataclass(frozen=True)
class Permuted:
    """A table of 16 entries of 16 bits, read by permutations of bytes: an instruction of NVIDIA's chooses four of eight bytes,
    by three bits each (PTX ISA, "prmt").

    So two of them and a selection by the fourth bit find one byte of four entries, those of two neighbouring columns in both
    steps. Low and high bytes are put together by one more permutation for each operand register. For the eight codes of a
    word: six instructions to get selectors and masks, twelve to look up, four to put together.

    It is one block of assembly: Triton 3.6 takes pieces that several operands share for reasons to exchange operands through
    shared memory.

    Attributes:
        low, high: (entries 0-3, 4-7, 8-11, 12-15): low bytes, and high ones.
    """

    low: tuple[int, ...]
    high: tuple[int, ...]

    @staticmethod
    def of(fmt: Format, operand: Operand) -> Permuted | None:
        """`None` for formats that are read in other ways."""
        if fmt.kind != "table" or fmt.planes != (4,) or affine(fmt) is not None:
            return None
        values = [v if math.isfinite(v) else 0.0 for v in fmt.values]
        dtype = torch.float16 if operand.name == "fp16" else torch.bfloat16
        entries = torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.uint8).reshape(-1, 2)
        low, high = (
            tuple(int.from_bytes(bytes(plane[i : i + 4].tolist()), "little") for i in range(0, 16, 4))
            for plane in functional.pad(entries, (0, 0, 0, 16 - len(values))).T
        )
        return Permuted(low, high)

    def lines(self) -> list[str]:
        """Lines that make of a word q0_0 the words w0_0, w0_1 (first and second eight columns of step 0), w1_0 and w1_1."""
        kinds = "(tl.int32, tl.int32, tl.int32, tl.int32)"
        return [
            "w0_0, w0_1, w1_0, w1_1 = tl.inline_asm_elementwise(",
            f'    "{self.assembly()}",',
            f'    "=r,=r,=r,=r,r", [q0_0], {kinds}, True, 1)',
        ]

    def assembly(self) -> str:
        """The block: words $0 to $3 from $4."""
        return "{ " + "".join(f"{line}; " for line in self._instructions()) + "}"

    def _instructions(self) -> Iterator[str]:
        yield ".reg .b32 zero, code, up, c, m, a, b, l0, h0, l1, h1, tl<4>, th<4>"
        # An assembler that knew the table's words would make them anew for every use. So they are added to a zero that it does
        # not know: the number of a block along an axis that the grid does not have.
        yield "mov.u32 zero, %ctaid.z"
        for plane, words in (("l", self.low), ("h", self.high)):
            yield from (f"add.s32 t{plane}{j}, zero, {word:#x}" for j, word in enumerate(words))
        yield "and.b32 code, $4, 0x77777777"
        yield "shl.b32 up, $4, 4"
        for i1, (codes, masks) in enumerate((("0x20", "0xEAC8"), ("0x31", "0xFBD9"))):
            yield f"prmt.b32 c, code, code, {codes}"  # bytes 0 and 2, or 1 and 3: the codes as four selectors
            yield f"prmt.b32 m, up, $4, {masks}"  # the highest bits of those codes, eight times
            for plane in "lh":
                yield f"prmt.b32 a, t{plane}0, t{plane}1, c"
                yield f"prmt.b32 b, t{plane}2, t{plane}3, c"
                yield f"lop3.b32 {plane}{i1}, b, a, m, 0xE4"
        for step, places in enumerate(("0x6240", "0x7351")):
            yield from (f"prmt.b32 ${2 * step + i1}, l{i1}, h{i1}, {places}" for i1 in (0, 1))


# Device functions.
HELPERS = {
    "chosen": '''@triton.jit
def chosen(a, b, mask: tl.constexpr):
    """Bits of `a` where the mask has ones, and of `b` elsewhere: two instructions where a compiler finds no way in one."""
    if not tl.target_info.is_cuda():
        return (a & mask) | (b & ~mask)
    return tl.inline_asm_elementwise("lop3.b32 $0, $1, $2, $3, 0xE4;", "=r,r,r,r", [a, b, mask], tl.int32, True, 1)''',
    "twice": '''@triton.jit
def twice(values, DT: tl.constexpr):
    """fp32 values, as 16-bit floats, in both halves of 32-bit words, in a new last dimension of one."""
    word = values.to(DT).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    word = word | (word << 16)
    if DT == tl.bfloat16:  # fp16, which scales often are, needs no conversion
        if tl.target_info.is_cuda():
            word = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, $1;", "=r,f", [values], tl.int32, True, 1)
    return tl.expand_dims(word, -1)''',
    "number": '''@triton.jit
def number(words, factor, added, DT: tl.constexpr):
    """words * factor + added, rounded once, for both halves of 32-bit words as 16-bit floats; words again."""
    if tl.target_info.is_cuda():
        if DT == tl.bfloat16:
            return tl.inline_asm_elementwise(
                "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [words, factor, added], tl.int32, True, 1
            )
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [words, factor, added], tl.int32, True, 1
        )
    low, high = tl.split(tl.fma(halves(words, DT), halves(factor, DT), halves(added, DT)))
    low, high = low.to(tl.int16, bitcast=True).to(tl.int32), high.to(tl.int16, bitcast=True).to(tl.int32)
    return (low & 0xFFFF) | (high << 16)''',
    "halves": '''@triton.jit
def halves(words, DT: tl.constexpr):
    """Both halves of 32-bit words as 16-bit floats, in a new last dimension."""
    return tl.join(words.to(tl.int16).to(DT, bitcast=True), (words >> 16).to(tl.int16).to(DT, bitcast=True))''',
}


def word(value: float, operand: Operand) -> str:
    """Text of a number as a 16-bit float, rounded, in both halves of a 32-bit word: a block of six dimensions."""
    dtype = torch.float16 if operand.name == "fp16" else torch.bfloat16
    half = int(torch.tensor(value, dtype=torch.float64).to(dtype).view(torch.int16)) & 0xFFFF
    return f"tl.full((1, 1, 1, 1, 1, 1), {both(half)}, tl.int32)"
