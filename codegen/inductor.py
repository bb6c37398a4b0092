"""Lower `qcompile::` ops to generated kernels inside Inductor's code.

A `qmm` node becomes one extern-kernel node of Inductor's IR: Inductor plans the output buffer and the memory,
our text is compiled by Inductor's own C++ builder next to its kernels, and the generated wrapper calls it
with raw tensors and sizes. No dispatcher and no Python operator runs per call, and the kernel's text is part
of the cached code, so Inductor's disk cache holds it. Where no kernel exists the op falls back to its
plain-torch meaning.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import fx

from qcompile import compat
from qcompile.codegen.devices import cpu, cpu_bounds, triton, triton_bounds, triton_rotate
from qcompile.codegen.devices.cpu import CpuLowering, detect_isa
from qcompile.codegen.devices.triton import TritonLowering, quantize_input, text_of
from qcompile.codegen.registry import Kernel, Verdict
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.matmul import DTYPE_NAMES, OUT_DTYPES, MatmulSpec
from qcompile.ir.scheme import Packing, Scheme

_ops = torch.ops.qcompile
_POOL = ThreadPoolExecutor(2, thread_name_prefix="qcompile-build")


def verdict(spec: MatmulSpec, device: torch.device, x: torch.dtype, extras: Sequence[torch.dtype] = ()) -> Verdict:
    """Whether a generated kernel exists for a matmul on a device."""
    if x not in OUT_DTYPES.values():
        return Verdict(False, f"activations of dtype {x}")
    kernel = KernelSpec.of(spec, x, OUT_DTYPES[spec.out] if spec.out else x, tuple(extras))
    if compat.writes_triton(device):
        return TritonLowering(architecture=compat.gpu(device).architecture).supports(kernel)
    if device.type != "cpu":
        return Verdict(False, f"no kernels for {device.type} yet")
    if spec.static:
        return Verdict(False, "a scale of activations that was chosen before: kernels of CPUs choose it for each row")
    return CpuLowering().supports(kernel)


def kernel_name(device: torch.device, spec: MatmulSpec, x: torch.dtype, rows: int | None) -> str:
    """What the ledger calls the kernel of a matmul; on GPUs also how it is cut for so many rows, where that is known."""
    if not compat.writes_triton(device):
        return f"{device.type}-{detect_isa()}"
    kernel = KernelSpec.of(spec, x, OUT_DTYPES[spec.out] if spec.out else x, [x] * len(spec.extras))
    return f"{device.type}-triton" + (f" {triton.plan(kernel, spec.n, spec.k, rows, device)}" if rows else "")


def packing(device: torch.device, act: Scheme | None) -> Packing:
    """The layout that the kernels of a device read, for activations of a scheme."""
    return triton.packing(act) if compat.writes_triton(device) else "tile16"


class Proof(NamedTuple):
    """How to run the kernels of a device and what they may give: see `codegen.devices.cpu.run` and `cpu_bounds.expected`."""

    run: Callable[..., torch.Tensor]
    expected: Callable[..., Any]


def proof(device: torch.device) -> Proof:
    """For those who compare kernels with the reference."""
    if compat.writes_triton(device):
        unit = triton_bounds.unit_of(compat.gpu(device).architecture)

        def allowed(spec: KernelSpec, x: torch.Tensor, parts: Sequence[torch.Tensor], n: int, k: int) -> Any:
            # A weight that is decoded for the library is rounded to 16 bits first.
            way = triton.choose_tile(spec, (n,), k, len(x), device).way
            rounded = True if way == "vendor" and spec.act is None else None
            return triton_bounds.expected(spec, x, parts, n, k, rounded, byte_unit=unit)

        return Proof(triton.run, allowed)
    return Proof(cpu.run, cpu_bounds.expected)


def loses(spec: MatmulSpec, device: torch.device, x: torch.dtype, rows: int | None) -> str:
    """Why a float layer is faster than the generated kernel (see `verdict`) for so many rows, "" when it is not or the
    number of rows is open: one kernel then serves few rows as well."""
    if device.type != "cpu" or rows is None or compat.writes_triton(device):
        return ""
    return CpuLowering().loses(KernelSpec.of(spec, x, OUT_DTYPES[spec.out] if spec.out else x, ()), rows)


def prebuild(gm: fx.GraphModule) -> None:
    """Start building every kernel of a functional graph in the background.

    Inductor compiles one piece of the graph after the other and waits for the compiler each time; by then these are
    under way or done. It takes the very same files from the code cache.
    """
    wanted: dict[str, Kernel] = {}
    for node in gm.graph.nodes:
        if node.target is _ops.qmm.default:
            x, _, extras, text = node.args
            spec, dtype = MatmulSpec.parse(text), x.meta["val"].dtype
            dtypes = [extra.meta["val"].dtype for extra in extras]
            device = x.meta["val"].device
            if not compat.writes_triton(device) and verdict(spec, device, dtype, dtypes).ok:
                kernel = _kernel(spec, dtype, dtypes)
                wanted[kernel.source] = kernel
    for kernel in wanted.values():
        # The context carries Inductor's settings, which decide the flags and so the name of the built file.
        _POOL.submit(copy_context().run, compat.load_cpp_kernel, kernel.argtypes, compat.framed(kernel.source))


def _kernel(spec: MatmulSpec, x: torch.dtype, extras: Sequence[torch.dtype]) -> Kernel:
    return CpuLowering().emit(KernelSpec.of(spec, x, OUT_DTYPES[spec.out] if spec.out else x, tuple(extras)))


def install() -> None:
    """Register the lowerings with Inductor; calling it again changes nothing."""
    if _ops.qmm.default not in compat.inductor_lowerings():
        compat.register_lowering(_ops.qmm.default, _lower_qmm)
        compat.register_lowering(_ops.rotate.default, _lower_rotate)
        for op in (_ops.decode.default, _ops.rounded.default):
            compat.register_fallback(op)
        compat.register_fallback(_ops.step_.default, contiguous=True)


_DUMP: ContextVar[Path | None] = ContextVar("qcompile_dump", default=None)


@contextmanager
def dumping(folder: Path | None) -> Iterator[None]:
    """Write the text of every kernel generated inside the block to `folder/kernels/`."""
    token = _DUMP.set(folder)
    try:
        yield
    finally:
        _DUMP.reset(token)


def _dump(spec: KernelSpec, source: str, comment: str, suffix: str) -> None:
    folder = _DUMP.get()
    if folder is not None:
        (folder / "kernels").mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(source.encode()).hexdigest()[:12]
        (folder / "kernels" / f"{name}.{suffix}").write_text(f"{comment} {spec}\n{source}")


def _lower_qmm(x: Any, parts: Sequence[Any], extras: Sequence[Any], spec: str) -> Any:
    what = MatmulSpec.parse(spec)
    dtypes, device = [extra.get_dtype() for extra in extras], x.get_device()
    empty = any(size == 0 for size in x.get_size())  # nothing to compute, and no stride to honour
    if empty or compat.cpp_wrapper_active() or not verdict(what, device, x.get_dtype(), dtypes).ok:
        return compat.fallback(_ops.qmm.default)(x, parts, extras, spec)
    out = OUT_DTYPES[what.out] if what.out else x.get_dtype()
    kernel = KernelSpec.of(what, x.get_dtype(), out, dtypes)

    lead, dtype, gpu = list(x.get_size())[:-1], x.get_dtype(), compat.writes_triton(device)
    count = len(parts) - what.act_parts
    if gpu and what.act is not None:
        made = compat.inlined(partial(quantize_input, spec=kernel), x, *parts[count:])
        inputs = [compat.contiguous(item) for item in made]
    else:
        inputs = [compat.rows_with_one_stride(x)]
    mats = [
        compat.rows_with_one_stride(extra) if kind == "mat" else compat.contiguous(extra)
        for extra, kind in zip(extras, what.extras, strict=True)
    ]
    rows: Any = 1
    for size in lead:
        rows = rows * size

    def scalars() -> list[Any]:
        """M, K, ldx, each segment's columns, row stride of each "mat" extra, ldy."""
        strides = [compat.row_stride(e) for e, kind in zip(mats, what.extras, strict=True) if kind == "mat"]
        return [rows, what.k, compat.row_stride(inputs[0]), *what.n, *strides, what.columns]

    place: dict[str, Any] = {
        "name": "qcompile_qmm",
        "inputs": [*inputs, *map(compat.contiguous, parts[:count]), *mats],
        "scalars": scalars,
        "size": [*lead, what.columns],
        "dtype": out,
        "device": device,
    }
    if gpu:
        _dump(kernel, text_of(kernel).source, "#", "py")
        names = (spec, DTYPE_NAMES[dtype], DTYPE_NAMES[out], tuple(DTYPE_NAMES[d] for d in dtypes))
        make = f"__import__({_TRITON!r}, fromlist=['prepare']).prepare{names!r}"
    else:
        built = CpuLowering().emit(kernel)
        _dump(kernel, built.source, "//", "cpp")
        make = compat.cpp_binding(built.argtypes, built.source)
    return compat.extern_kernel(make=make, **place)


def _lower_rotate(x: Any, size: int, signs: Any = None, inverse: bool = False, dtype: torch.dtype | None = None) -> Any:
    device, known = x.get_device(), {x.get_dtype(), dtype or x.get_dtype()} <= set(OUT_DTYPES.values())
    if compat.cpp_wrapper_active() or not (known and compat.writes_triton(device)):
        return compat.fallback(_ops.rotate.default)(x, size, signs, inverse, dtype)
    rotation = triton_rotate.rotation_of(x.get_dtype(), size, signs is not None, inverse, dtype)
    if not rotation.verdict():
        return compat.fallback(_ops.rotate.default)(x, size, signs, inverse, dtype)
    source, shape = compat.rows_with_one_stride(x), list(x.get_size())
    rows: Any = 1
    for length in shape[:-1]:
        rows = rows * length
    names = (rotation.size, rotation.x, rotation.y, rotation.signed, rotation.inverse)
    return compat.extern_kernel(
        name="qcompile_rotate",
        make=f"__import__({triton_rotate.__name__!r}, fromlist=['prepare']).prepare{names!r}",
        inputs=[source] if signs is None else [source, compat.contiguous(signs)],
        scalars=lambda: [rows, shape[-1], compat.row_stride(source)],
        size=shape,
        dtype=OUT_DTYPES[rotation.y],
        device=device,
    )


_TRITON = "qcompile.codegen.devices.triton"

__all__ = ["Proof", "dumping", "install", "kernel_name", "loses", "packing", "prebuild", "proof", "verdict"]
