"""Eager calls of `qcompile::qmm` run generated kernels, on CPUs and on GPUs.

Outside of compiled code the operator would run its plain-torch meaning, which decodes the whole weight per call. Here
are its implementations, which `qcompile.operators` registers: on CPUs, per spec and dtypes the kernel is built once, as an
operator of its own, and called. Where there is none (no compiler, a scheme without kernel, a build that failed, a kernel
that fails its trial) the plain-torch meaning runs, and inside `reference_only()` it always does. On a GPU the Triton kernel
of compiled code is launched.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from qcompile import compat
from qcompile.codegen.devices import triton
from qcompile.codegen.devices.cpu import CpuLowering
from qcompile.codegen.devices.cpu_bounds import UNIT, expected
from qcompile.codegen.devices.cpu_operator import operator_text
from qcompile.codegen.spec import LONG_K, KernelSpec
from qcompile.compat import load_operator
from qcompile.errors import QCError, warn
from qcompile.ir import ops
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import OUT_DTYPES, MatmulSpec, evaluate_epilogue

Operator = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], Sequence[int], int], Tensor]
Call = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], Tensor]
Spec = TypeVar("Spec")
Made = TypeVar("Made")

_LOCK = threading.Lock()
_OPERATORS: dict[KernelSpec, Operator | None] = {}  # None: looked for, and there is none
_CALLS: dict[tuple[object, ...], Call] = {}
# Unit roundoff of each result's dtype, and the smallest step where results are subnormal.
_ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}
_STEP = {"f32": 2.0**-126, "f16": 2.0**-24, "bf16": 2.0**-126}


def qmm_on_gpu(x: Tensor, parts: Sequence[Tensor], extras: Sequence[Tensor], spec: str) -> Tensor:
    """`qmm` by its Triton kernel. Raises what `check_qmm` does."""
    if ops.reference_forced():
        return ops.qmm_reference(x, parts, extras, spec)
    what = ops.check_qmm(x, parts, extras, spec)
    kernel = _gpu_kernel(spec, x.dtype, tuple(extra.dtype for extra in extras), x.device)
    if kernel is None:
        return ops.qmm_reference(x, parts, extras, spec)
    packed, static = [_words(part) for part in parts], parts[len(parts) - what.act_parts :]
    return triton.run(kernel, x, packed[: len(packed) - len(static)], extras, what.n, what.k, static=static)


def _words(part: Tensor) -> Tensor:
    """A packed part as kernels read it: dense, from a whole word on."""
    part = part.contiguous()
    return part.clone() if part.storage_offset() * part.element_size() % 4 else part


@cache
def _gpu_kernel(spec: str, x: torch.dtype, extras: tuple[torch.dtype, ...], device: torch.device) -> KernelSpec | None:
    """What the kernel of a site computes, None where there is none."""
    what = MatmulSpec.parse(spec)
    if not {x, *extras} <= set(OUT_DTYPES.values()):
        return None
    kernel = KernelSpec.of(what, x, OUT_DTYPES[what.out] if what.out else x, extras)
    lowering = triton.TritonLowering(architecture=compat.gpu(device).architecture)
    return kernel if lowering.supports(kernel) else None


def qmm_on_cpu(x: Tensor, parts: Sequence[Tensor], extras: Sequence[Tensor], spec: str) -> Tensor:
    """`qmm` by a kernel built for this processor. Raises `matmul.operands` for operands that do not fit."""
    if ops.reference_forced():
        return ops.qmm_reference(x, parts, extras, spec)
    key = (spec, x.dtype, *(extra.dtype for extra in extras))
    call = _CALLS.get(key)
    if call is None:
        call = _CALLS[key] = _call_of(spec, x.dtype, [extra.dtype for extra in extras])
    return call(x, parts, extras)


def _call_of(spec: str, x: torch.dtype, extras: Sequence[torch.dtype]) -> Call:
    """How to compute a site from now on."""
    what = MatmulSpec.parse(spec)
    operator = None
    if {x, *extras} <= set(OUT_DTYPES.values()) and len(extras) == len(what.extras) and not what.static:
        operator = operator_of(KernelSpec.of(what, x, OUT_DTYPES[what.out] if what.out else x, extras))
    if operator is None:
        return lambda x, parts, extras: ops.qmm_reference(x, parts, extras, spec)
    run, sizes, k = operator, list(what.n), what.k

    def call(x: Tensor, parts: Sequence[Tensor], extras: Sequence[Tensor]) -> Tensor:
        if not x.is_contiguous():
            x = _rows(x)
        parts = [part if part.is_contiguous() else part.contiguous() for part in parts]
        if extras:
            kinds = zip(extras, what.extras, strict=True)
            extras = [_rows(extra) if kind == "mat" else extra.contiguous() for extra, kind in kinds]
        try:
            return run(x, parts, extras, sizes, k)
        except RuntimeError as error:
            if (text := str(error).partition("\n")[0]).startswith("qmm: "):
                raise _told(x, parts, extras, spec, text) from error
            raise

    return call


def _told(x: Tensor, parts: Sequence[Tensor], extras: Sequence[Tensor], spec: str, text: str) -> QCError:
    """What does not fit, in more words than a kernel has where there are some."""
    try:
        ops.check_qmm(x, parts, extras, spec)
    except QCError as found:
        return QCError("matmul.operands", found.what, where=found.where or spec, why=found.why, next=found.next)
    except RuntimeError:  # torch's, for sizes: the kernel's own text names the operand
        pass
    return QCError("matmul.operands", text, where=spec)


def _rows(t: Tensor) -> Tensor:
    """The tensor itself where its rows are dense and lie at one common distance, a copy where they do not."""
    if t.dim() < 2 or t.is_contiguous() or t.numel() == 0:
        return t.contiguous()
    pairs = [(size, stride) for size, stride in zip(t.shape[:-1], t.stride()[:-1], strict=True) if size != 1]
    even = all(a[1] == b[0] * b[1] for a, b in itertools.pairwise(pairs))
    return t if even and (t.stride(-1) == 1 or t.shape[-1] == 1) else t.contiguous()


def operator_of(spec: KernelSpec) -> Operator | None:
    """The registered kernel of a spec, built and tried on the first request; None where there is none."""
    if spec in _OPERATORS:
        return _OPERATORS[spec]
    operator, reason = apart(_made, spec)
    with _LOCK:
        if spec not in _OPERATORS:
            _OPERATORS[spec] = operator
            if reason:
                warn(f"eager calls of qmm run the plain-torch operator, which is slow, for {spec}: {reason}")
        return _OPERATORS[spec]


def apart(make: Callable[[Spec], Made], spec: Spec) -> Made:
    """`make(spec)`, called in a thread of its own.

    It has no autocast, gradient mode, default device or tracing mode of the caller's; the context carries Inductor's settings,
    which decide the flags.
    """
    context = copy_context()
    with ThreadPoolExecutor(1, thread_name_prefix="qcompile-eager") as pool:
        return pool.submit(context.run, make, spec).result()


def _made(spec: KernelSpec) -> tuple[Operator | None, str]:
    """The operator, or why there is none ("" where that was known before and is reported with the plan)."""
    lowering = CpuLowering()
    if not lowering.supports(spec):
        return None, ""
    try:
        kernel = lowering.emit(spec)
        operator = load_operator(operator_text(kernel))
        reason = trial(spec, operator)
    except Exception as error:  # the toolchain, the loader or torch: what they raise differs by release
        return None, f"{type(error).__name__}: {error}"
    return (None, reason) if reason else (operator, "")


def trial(spec: KernelSpec, operator: Operator) -> str:
    """Run an operator on a small problem and judge it by the exact result: "" when it is right.

    It meets everything that a wrong declaration or a wrong build would confuse: several panels, a ragged last block,
    rows at a distance, a leading dimension of two, several segments, every extra, few rows and many.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32)

    few, rows = 4, 14  # streamed, and more than one block of rows, whatever the instruction set (`BLOCKING`)
    n, k = 20, LONG_K + 33 if spec.long_k else 70
    sizes = [n if spec.paired else n + i for i in range(spec.segments)]
    columns = n if spec.paired else sum(sizes)
    packed = [quantize(random(size, k), spec.weight) for size in sizes]
    x = random(rows, k + 1).to(OUT_DTYPES[spec.x])
    shapes = {"row": (columns,), "mat": (rows, columns)}
    extras = [random(*shapes[kind]).to(OUT_DTYPES[dtype]) for kind, dtype in spec.extras]
    results = []
    for count in (few, rows):
        lead = (2, count // 2)
        kinds = zip(extras, spec.extras, strict=True)
        some = [extra[:count].unflatten(0, lead) if kind == "mat" else extra for extra, (kind, _) in kinds]
        parts = [part for each in packed for part in each]
        got = operator(x[:count].unflatten(0, lead)[..., :k], parts, some, sizes, k)
        shape = (*lead, columns)
        if got.shape != shape or got.dtype != OUT_DTYPES[spec.y]:
            return f"its trial gave {got.dtype} {list(got.shape)}, not {OUT_DTYPES[spec.y]} {list(shape)}"
        results.append(got.double().reshape(count, columns))

    exact = [expected(spec, x[:, :k], parts, size, k) for parts, size in zip(packed, sizes, strict=True)]
    others = {f"e{i}": extra.double().reshape(-1, columns) for i, extra in enumerate(extras)}

    def result(signs: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The result with every sum moved by its bound, and the size of the numbers it is made of."""
        moved = [each.value + sign * each.bound for each, sign in zip(exact, signs, strict=True)]
        sums = {f"a{i}": value for i, value in enumerate(moved)} if spec.paired else {"acc": torch.cat(moved, 1)}
        y = evaluate_epilogue(spec.epilogue, sums | others).expand(rows, columns)
        return y, sum((v.abs() for v in (sums | others).values()), y.abs())

    want, size = result([0.0] * spec.segments)
    corners = (
        itertools.product((-1.0, 1.0), repeat=spec.segments)
        if spec.paired
        else ([-1.0] * spec.segments, [1.0] * spec.segments)
    )
    swing = torch.stack([(result(signs)[0] - want).abs() for signs in corners]).amax(0)
    # To first order an epilogue moves most when its operands do, so the corners bound it; twice that leaves room for the
    # second. Each operation rounds once (the kernels' functions to 4 units), the result once more.
    operations = 4 * (1 + sum(spec.epilogue.count(c) for c in "+-*/("))
    allowed = 2 * swing.amax(0) + operations * UNIT * size * (1 + size) + _ROUNDOFF[spec.y] * want.abs() + _STEP[spec.y]
    there, row = torch.cat(results), [*range(few), *range(rows)]
    want, allowed = want[row], allowed[row]
    right = ((there - want).abs() <= allowed) | (there == want) | (there.isnan() & want.isnan())
    if bool(right.all()):
        return ""
    return f"{int((~right).sum())} of {right.numel()} results of its trial are wrong"
