"""Matmul problems for property tests of kernels: operands that hurt, and a check whose bound is derived.

A kernel author needs two things that are tedious to write: inputs that reach the corners (ragged K, odd N, one row, zero
rows, subnormal values, strides, extreme codes) and a tolerance that is neither guessed nor loose. A `Problem` has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, expected
from qcompile.codegen.spec import KernelSpec
from qcompile.errors import QCError
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.matmul import DTYPE_NAMES, OUT_DTYPES
from qcompile.ir.packing import pack_codes
from qcompile.ir.scheme import Scheme
from qcompile.testing.hypotheses import DrawFn, SearchStrategy, st


@dataclass(frozen=True)
class Problem:
    """`y[m, n] = x[m, k] @ weight[n, k].T` with a packed weight.

    Attributes:
        spec: scheme of the weight, dtype names of x and y.
        x: `[m, k]`, rows at any distance; around it lies NaN, which a kernel that reads too far meets.
        parts: packed tensors of the weight, see `qcompile.ir.packing.packed_parts`.
        n, k: sizes of the weight.
    """

    spec: KernelSpec
    x: Tensor
    parts: tuple[Tensor, ...]
    n: int
    k: int

    @property
    def m(self) -> int:
        """Rows of x."""
        return int(self.x.shape[0])

    @property
    def weight(self) -> Tensor:
        """The decoded weight, fp32 `[n, k]`."""
        return dequantize(list(self.parts), self.spec.weight, self.n, self.k)

    def empty(self) -> Tensor:
        """Memory for the result: `[m, n]`, full of NaN, in the middle of more of it, in which `check` finds what a kernel
        writes beside the result."""
        memory = torch.full((self.m * self.n + 2 * RIM,), float("nan"), dtype=OUT_DTYPES[self.spec.y])
        return memory[RIM : RIM + self.m * self.n].view(self.m, self.n)

    def check(self, y: Tensor) -> None:
        """Compare a kernel's result with the exact one.

        What is allowed: weights (and scales, zero points, minima) rounded to the type of x before they are multiplied,
        products summed in fp32 in any order with one rounding or cut each, one rounding of the result. It is computed
        for each element from the operands' sizes (`qcompile.codegen.devices.triton_bounds`).

        Raises:
            AssertionError: naming the problem, then the element that is off the most, its value, the exact one and what is
                allowed.
        """
        assert isinstance(y, Tensor), f"problem {self}\nthe kernel returned {y!r}, not a tensor"
        shape, dtype = (self.m, self.n), OUT_DTYPES[self.spec.y]
        assert tuple(y.shape) == shape, f"problem {self}\nthe result has shape {tuple(y.shape)}, not {shape}"
        assert y.dtype == dtype, f"problem {self}\nthe result has dtype {y.dtype}, not {dtype}"
        if beside := _beside(y):
            raise AssertionError(
                f"problem {self}\nthe kernel wrote to y[{beside}] of {y.numel()} elements, counted as they lie"
            )
        want = expected(self.spec, self.x, self.parts, self.n, self.k, rounded=True)
        unit = ROUNDOFF[self.spec.y]
        allowed = want.bound + unit * (want.value.abs() + want.bound) + SMALLEST[self.spec.y]
        excess = (y.double() - want.value).abs() / allowed
        if bool((excess <= 1).all()):
            return
        worst = int(torch.where(excess.isnan(), float("inf"), excess).argmax())
        row, column = divmod(worst, self.n)
        raise AssertionError(
            f"problem {self}\n"
            f"y[{row}, {column}] = {float(y[row, column])}, exactly {float(want.value[row, column])}, allowed are "
            f"+-{float(allowed[row, column]):.3g}; {int((~(excess <= 1)).sum())} of {y.numel()} elements are off"
        )

    def __repr__(self) -> str:
        return f"<problem {self}>"

    def __str__(self) -> str:
        return f"{self.spec}: m={self.m} n={self.n} k={self.k} row stride {self.x.stride(0)}"


RIM = 8192  # elements on each side of a result: more than a block of a kernel that forgets a mask


def _beside(y: Tensor) -> str:
    """The place, counted from the first element, of the first write beside a result that `Problem.empty` made, or ""."""
    size = y.numel()
    if y.storage_offset() != RIM or y.untyped_storage().nbytes() != (size + 2 * RIM) * y.element_size():
        return ""
    memory = y.as_strided((size + 2 * RIM,), (1,), 0)
    written = ~memory.isnan()
    written[RIM : RIM + size] = False
    found = written.nonzero()
    return str(int(found[0]) - RIM) if len(found) else ""


def problems(
    weight: str | SearchStrategy[str],
    x: str | torch.dtype | Sequence[str | torch.dtype] = ("f16", "bf16"),
    y: str | torch.dtype = "",
    max_m: int = 20,
    max_n: int = 70,
    max_k: int = 600,
) -> SearchStrategy[Problem]:
    """Problems for kernels of a scheme.

    Args:
        weight: spelling of the weight's scheme with its packing ("int4/g64:fp16@rows"), or a strategy of those.
        x: dtype or dtypes of the activation, as torch or the specs have them (torch.float16, "f16"). y: of the result, that
            of x by default.
        max_m, max_n, max_k: largest sizes; all from 1 up are drawn, those around multiples of 16 more often.

    Raises:
        QCError: `scheme.*` for a spelling, `testing.problems` for a dtype or a size.
    """
    if isinstance(weight, str):
        if " " in weight.strip():
            raise QCError(
                "testing.problems",
                f"{weight!r} names two schemes",
                next="name the weight's: activations of problems are exact",
            )
        Scheme.parse(weight)
    elif not isinstance(weight, SearchStrategy):
        raise QCError("testing.problems", f"weight={weight!r}", next="give a spelling, or a strategy of spellings")
    names = [_name(dtype) for dtype in ([x] if isinstance(x, str | torch.dtype) else x)]
    if not names:
        raise QCError("testing.problems", "x names no dtype", next=f"use {', '.join(OUT_DTYPES)}")
    for name, size in (("max_m", max_m), ("max_n", max_n), ("max_k", max_k)):
        if type(size) is not int or size < 1:
            raise QCError("testing.problems", f"{name}={size!r}", next="sizes are 1 or more")
    return _problems(weight, names, (max_m, max_n, max_k), _name(y) if y else "")


def _name(dtype: str | torch.dtype) -> str:
    name = DTYPE_NAMES.get(dtype, "") if isinstance(dtype, torch.dtype) else dtype
    if name not in OUT_DTYPES:
        raise QCError(
            "testing.problems", f"no kernel has activations or results in {dtype}", next=f"use {', '.join(OUT_DTYPES)}"
        )
    return name


@st.composite
def _problems(
    draw: DrawFn, weight: str | SearchStrategy[str], names: Sequence[str], largest: tuple[int, int, int], y: str = ""
) -> Problem:
    scheme = Scheme.parse(weight if isinstance(weight, str) else draw(weight))
    name = draw(st.sampled_from(names))
    m, n, k = (draw(_sizes(top)) for top in largest)
    seed = draw(st.integers(0, 2**32 - 1))
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator) / 8 + draw(st.sampled_from([0.0, 0.05]))
    kind = draw(st.sampled_from(["random", "random", "zero groups", "one code", "outliers"]))
    if kind == "zero groups":
        values[:, : k // 2] = 0
    elif kind == "outliers":
        values[draw(st.integers(0, n - 1)), draw(st.integers(0, k - 1))] = 30.0
    parts = quantize(values, scheme)
    if kind == "one code":  # every field of the layout alike, and at the end of its range
        top = len(scheme.format.table) or 1 << scheme.format.bits
        finite = [code for code in range(top) if abs(scheme.format.values[code]) < float("inf")]
        code = draw(st.sampled_from([finite[0], finite[-1]]))
        parts[0] = pack_codes(torch.full((n, k), code, dtype=torch.uint8), scheme.format.bits, scheme.packing)
    return Problem(
        KernelSpec(scheme, None, x=name, y=y or name),
        _activation(draw, m, k, OUT_DTYPES[name], generator),
        tuple(parts),
        n,
        k,
    )


def _sizes(top: int) -> SearchStrategy[int]:
    near = [size for base in range(16, top + 2, 16) for size in (base - 1, base, base + 1) if size <= top]
    return st.integers(1, top) | st.sampled_from(near or [1])


def _activation(draw: DrawFn, m: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """`[m, k]` inside memory full of NaN: sizes, zero rows, single columns and subnormal values as drawn."""
    pad = draw(st.sampled_from([0, 1, 16]))
    memory = torch.full((m + 2, k + pad), float("nan"), dtype=dtype)
    x = memory[1 : m + 1, :k]
    x.copy_(torch.randn(m, k, generator=generator) * 2.0 ** draw(st.sampled_from([0, 0, -6, 6])))
    if draw(st.booleans()):
        x[draw(st.integers(0, m - 1))] = 0
    if draw(st.booleans()):  # one column: the result is a column of the weight
        x[0] = 0
        x[0, draw(st.integers(0, k - 1))] = 1
    if draw(st.booleans()):
        x[draw(st.integers(0, m - 1)), draw(st.integers(0, k - 1))] = torch.finfo(dtype).smallest_normal / 4
    return x


__all__ = ["Problem", "problems"]
