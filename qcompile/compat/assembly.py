"""Assembly inside Triton kernels, interpreted: PTX's instructions that our kernels use, in numpy.

Triton's interpreter runs no assembly. Here a block of it is read line by line, each register an array; an instruction that
is not in the table raises NotImplementedError. Source: PTX ISA, the sections named like the instructions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np

from qcompile.compat.interpreter import narrow, replace, widen


def choose_bytes(low: Any, high: Any, choice: Any) -> Any:
    """PTX's `prmt.b32`: four of the bytes of two words, int32, the lowest of `low` first; of four bits of `choice`, three are
    the number of a byte and the fourth is whether every bit is to be the highest of that byte (PTX ISA, "prmt")."""
    low, high, choice = np.broadcast_arrays(*(np.asarray(arg).astype(np.int32) for arg in (low, high, choice)))
    both = high.astype(np.int64) << 32 | low.view(np.uint32)
    out = np.zeros(low.shape, np.int64)
    for i in range(4):
        one = (choice >> 4 * i) & 15
        byte = (both >> 8 * (one & 7).astype(np.int64)) & 255
        out |= np.where(one & 8, (byte >> 7) * 255, byte) << 8 * i
    return out.astype(np.uint32).view(np.int32)


def _halves(low: Any, high: Any) -> Any:
    """uint16 to the halves of int32."""
    return (low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)).view(np.int32)


def _f16(values: Any) -> Any:
    return values.astype(np.float16).view(np.uint16)


def _bf16(values: Any) -> Any:
    """float64 as bf16 patterns, rounded once: cut to float32 with a last bit that says whether anything was cut off."""
    near = values.astype(np.float32)
    cut = np.where(np.abs(near) > np.abs(values), np.nextafter(near, np.float32(0)), near)
    odd = cut.view(np.uint32) | (np.isfinite(values) & (cut != values)).astype(np.uint32)
    return narrow(odd.view(np.float32))


def _fma(read: Callable[[Any], Any], write: Callable[[Any], Any]) -> Callable[..., Any]:
    """A multiply-add of both halves of int32 words, rounded once: products of 16-bit floats are exact in float64."""

    def function(*words: Any) -> Any:
        words = tuple(np.ascontiguousarray(word).view(np.uint32) for word in np.broadcast_arrays(*words))
        low, high = (
            write(a * b + c)
            for a, b, c in (
                [read((word >> shift & 0xFFFF).astype(np.uint16)).astype(np.float64) for word in words]
                for shift in (0, 16)
            )
        )
        return _halves(low, high)

    return function


def _lop3(*args: Any) -> Any:
    """Any function of three bits, by its table: bit 4 a + 2 b + c of the last argument."""
    *words, table = np.broadcast_arrays(*args)
    out = np.zeros_like(words[0])
    for row in range(8):
        a, b, c = (word if row >> (2 - i) & 1 else ~word for i, word in enumerate(words))
        out |= a & b & c & -(table >> row & 1)
    return out


_INSTRUCTIONS: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(
    {
        "mov.u32": lambda a: a,
        "add.s32": np.add,
        "and.b32": np.bitwise_and,
        "shl.b32": np.left_shift,
        "lop3.b32": _lop3,
        "prmt.b32": choose_bytes,
        "cvt.rn.bf16x2.f32": lambda high, low: _halves(narrow(low), narrow(high)),
        "prefetch.global.L2": lambda: None,  # of an address, which is in the place of a target
        "fma.rn.bf16x2": _fma(widen, _bf16),
        "fma.rn.f16x2": _fma(lambda h: h.view(np.float16), _f16),
    }
)
_BLOCK = {"%ctaid.z": np.int32(0)}  # kernels here have grids of two dimensions


def run(text: str, outputs: int, inputs: list[Any]) -> list[Any]:
    """What a block of assembly writes to its first registers $0 ..., `outputs` of them; the next ones are `inputs`, int32 or
    float32 arrays."""
    registers = _BLOCK | {f"${outputs + i}": value for i, value in enumerate(inputs)}
    for line in text.strip(" {}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        if name not in _INSTRUCTIONS:
            raise NotImplementedError(f"the instruction {name} has no body for the interpreter")
        target, *args = (operand.strip() for operand in operands.split(","))
        values = [
            registers[arg] if re.match(r"[$%a-z]", arg) else np.uint32(int(arg, 0)).view(np.int32) for arg in args
        ]
        with np.errstate(all="ignore"):
            registers[target] = _INSTRUCTIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


def replace_assembly(stack: ExitStack, interpreter: Any) -> None:
    """`tl.inline_asm_elementwise` of words, while `stack` is open, and the two instructions of dependent launches: here a
    kernel runs when the one before it has ended."""
    from triton.language.extra import cuda

    for name in ("gdc_wait", "gdc_launch_dependents"):
        replace(stack, cuda, name, lambda: None)

    def create_inline_asm(
        self: Any, text: str, constraints: str, values: Any, types: Any, pure: bool, pack: int
    ) -> Any:
        out = run(text, constraints.count("="), [value.data for value in values])
        shape = np.broadcast_shapes(*(value.data.shape for value in values))
        words = [interpreter.TensorHandle(np.broadcast_to(one, shape).copy(), interpreter.tl.int32) for one in out]
        return SimpleNamespace(get_result=lambda i: words[i])

    replace(stack, interpreter.InterpreterBuilder, "create_inline_asm", create_inline_asm)
