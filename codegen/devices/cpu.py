"""The CPU lowering of `qmm`: C++ text with its own threads, built through Inductor's C++ builder.

One kernel serves every size and every number of rows: it streams packed weights for a few rows and switches to blocked
matrix multiplication for many, inside one call. Integer weights are multiplied in integers: exactly with int8
activations, and with a 16-bit image of the activation (one scale for each 32 values) when the activation is not
quantized. Formats whose levels are no integers are decoded to fp32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from qcompile.codegen.devices.cpu_text import SCALES, arithmetic, kernel_text
from qcompile.codegen.registry import Kernel, Verdict
from qcompile.codegen.spec import LONG_K, KernelSpec
from qcompile.codegen.tuning.cpu import FLOAT_WINS
from qcompile.compat import cpp_compiler, cpp_isa, cpu_has_bf16, cpu_has_vnni, load_cpp_kernel
from qcompile.errors import QCError
from qcompile.ir.granularity import PerAxis, PerGroup, PerTensor, PerToken
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import BLOCK
from qcompile.ir.scheme import Scheme

ISAS = ("avx512vnni", "avx2", "portable")
# An exact int32 sum becomes a float once for so many blocks: 16 * 32 * 255 * 127 < 2^24, so that it is exact there too.
MOST_STEPS = 16


@functools.cache
def _best_isa() -> str:
    built_for = cpp_isa() or ""
    if "avx512" in built_for:
        return "avx512vnni" if cpu_has_vnni() else "avx2"
    return "avx2" if "avx2" in built_for else "portable"


def detect_isa() -> str:
    """The fragment set for this machine and compiler: "avx512vnni", "avx2" or "portable".

    `QCOMPILE_ISA` overrides it; raises `QCError` ("kernel.isa") when that names none of them.
    """
    chosen = os.environ.get("QCOMPILE_ISA", "")
    if chosen and chosen not in ISAS:
        raise QCError("kernel.isa", f"QCOMPILE_ISA={chosen!r}", next=f"use one of {', '.join(ISAS)}")
    return chosen or _best_isa()


def _weight_reason(weight: Scheme) -> str:
    """Why a weight scheme is not supported, "" when it is."""
    match weight.granularity:
        case PerTensor() | PerAxis(0):
            pass
        case PerGroup(size) if size > LONG_K:
            return f"groups of {size} weights: their integer sums would overflow; {LONG_K} at most"
        case PerGroup(size) if size % BLOCK == 0:
            pass
        case PerGroup(size):
            return f"groups of {size} weights: the group must be a multiple of {BLOCK}"
        case other:
            return f"granularity {other} of the weight; tensor, axis0 and groups of {BLOCK}, {2 * BLOCK}, ... work"
    if weight.packing != "tile16":
        return f"packing {weight.packing}: CPU kernels read tile16"
    if weight.scale.format.name not in SCALES:
        return f"scale format {weight.scale.format}: {', '.join(SCALES)} work"
    return ""


def _act_reason(act: Scheme | None, weight: Scheme) -> str:
    if act is None:
        return ""
    symmetric = act.format.kind == "int" and act.format.signed and act.format.bits <= 8 and not act.scale.zero
    if symmetric and act.scale.format.name == "fp32" and act.rounding == "nearest":
        match act.granularity, weight.granularity:
            case PerToken(), _:
                return ""
            case PerGroup(size), PerGroup(whole) if whole % size:
                return f"activation {act}: its groups must divide those of {whole} weights"
            case PerGroup(size), _ if size % BLOCK == 0 and size <= MOST_STEPS * BLOCK:
                return ""
    return (
        f"activation {act}: symmetric integers of at most 8 bits work, with fp32 scales per token or for each {BLOCK}, "
        f"{2 * BLOCK} ... {MOST_STEPS * BLOCK} values (int8/token, int8/g{BLOCK}:fp32)"
    )


@dataclass(frozen=True)
class CpuLowering:
    """Lowering of `qmm` to C++ for one instruction set."""

    isa: str = field(default_factory=detect_isa)

    def supports(self, spec: KernelSpec) -> Verdict:
        """See `Lowering`. Needs a C++ compiler; reads no sizes, so a yes holds for every N and K."""
        reason = _weight_reason(spec.weight) or _act_reason(spec.act, spec.weight)
        if not reason and cpp_compiler() is None:
            reason = "no C++ compiler"
        return Verdict(not reason, reason)

    def loses(self, spec: KernelSpec, rows: int) -> str:
        """Why torch's own layer is faster than the kernel at so many rows, "" when it is not; from measurements."""
        least = FLOAT_WINS.get((self.isa, arithmetic(spec)))
        if spec.x != "bf16" or least is None or rows < least or not cpu_has_bf16():
            return ""
        return f"{rows} rows, and this CPU's bf16 matrix instructions win from {least} on"

    def emit(self, spec: KernelSpec) -> Kernel:
        """Arguments of the entry, in order: x, then codes, scales and zeros (or minimums) of each segment, the extras,
        y; then M, K, the row stride of x, N of each segment, the row stride of each "mat" extra, the row stride
        of y. Strides are in elements; last dimensions are contiguous.

        Raises `QCError` ("kernel.unsupported").
        """
        verdict = self.supports(spec)
        if not verdict:
            raise QCError("kernel.unsupported", f"no CPU kernel for {spec}", why=verdict.reason)
        source, types = kernel_text(spec, self.isa)
        return Kernel(spec, source, types)


def _rows(t: torch.Tensor) -> torch.Tensor:
    """`[rows, columns]` with a contiguous last dimension, without a copy where the strides allow it."""
    flat = t.reshape(-1, t.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def run(
    spec: KernelSpec,
    x: torch.Tensor,
    parts: Sequence[torch.Tensor],
    extras: Sequence[torch.Tensor],
    n: int | Sequence[int],
    k: int,
    isa: str | None = None,
) -> torch.Tensor:
    """Build the kernel and call it: for tests and benchmarks.

    Args:
        x: `[..., k]` of dtype `spec.x`.
        parts: packed parts of each segment, one after the other.
        extras: "row" `[columns]` or "mat" `[..., columns]`.
        n: outputs of each segment (an integer: of all of them).

    Returns:
        `[..., columns]` of dtype `spec.y`.
    """
    sizes = [n] * spec.segments if isinstance(n, int) else list(n)
    columns = sizes[0] if spec.paired else sum(sizes)
    kernel = CpuLowering(isa or detect_isa()).emit(spec)
    call = load_cpp_kernel(kernel.argtypes, kernel.source)
    rows = _rows(x)
    y = torch.empty(rows.shape[0], columns, dtype=OUT_DTYPES[spec.y])
    mats = [_rows(e) if kind == "mat" else e.contiguous() for e, (kind, _) in zip(extras, spec.extras, strict=True)]
    strides = [e.stride(0) for e, (kind, _) in zip(mats, spec.extras, strict=True) if kind == "mat"]
    call(rows, *parts, *mats, y, rows.shape[0], k, rows.stride(0), *sizes, *strides, columns)
    return y.reshape(*x.shape[:-1], columns)
