"""Triton kernels from text."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")


@functools.cache
def triton_version() -> str | None:
    """The version of the installed Triton, or None. torch's builds for CPUs come without it."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def triton_kernel(source: str) -> Any:
    """The function `kernel` that a text defines, decorated by `triton.jit`; the same object for the same text.

    Triton reads a kernel's source from its file, at any time of the kernel's life: texts lie in a folder that is there as
    long as the process.
    """
    with _LOADING:
        return _load(source, os.environ.get("TRITON_INTERPRET", ""))


_LOADING = threading.Lock()  # two threads may ask for a kernel at the same time


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="qcompile-triton-")


@functools.lru_cache(maxsize=1024)
def _load(source: str, _interpreted: str) -> Any:  # a kernel is one for the interpreter, or not, from its decoration on
    name = f"qcompile_triton_{hashlib.sha256(source.encode()).hexdigest()[:16]}"
    path = Path(_folder().name, f"{name}.py")
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


def writes_triton(device: torch.device) -> bool:
    """Whether Inductor generates Triton for tensors of a device: on GPUs, and on CPUs where it is told to."""
    if device.type in ("cuda", "xpu"):
        return True
    if device.type != "cpu":
        return False
    from torch._inductor import config

    return bool(config.cpu_backend == "triton")


class Gpu(NamedTuple):
    """What kernels are cut for: "sm_90" or "gfx942", how many multiprocessors, bytes of shared memory of a block."""

    architecture: str = ""
    processors: int = 8
    shared: int = 65536


def gpu(device: torch.device) -> Gpu:
    """About a GPU; for what is none, where kernels are interpreted, the defaults, or what is pretended."""
    global _asked
    if device.type == "cuda":
        return _about(device)
    _asked = True
    return _pretended or Gpu()


@functools.lru_cache(maxsize=64)
def _about(device: torch.device) -> Gpu:
    about = torch.cuda.get_device_properties(device)
    name = getattr(about, "gcnArchName", "") if torch.version.hip else f"sm_{about.major}{about.minor}"
    shared = getattr(about, "shared_memory_per_block_optin", Gpu().shared)
    return Gpu(name.partition(":")[0], about.multi_processor_count, shared)


_pretended: Gpu | None = None
_asked = False  # whether a choice was made for a device that is none
_choices: list[Callable[[], None]] = []  # what forgets them


@contextmanager
def pretending(what: Gpu) -> Iterator[Callable[[], bool]]:
    """Inside, choices for tensors of a CPU are those for a GPU: for launches that are noted. Not for two threads at once.

    Yields:
        What tells whether there were such choices.
    """
    global _pretended, _asked
    before, _pretended, _asked = _pretended, what, False
    try:
        for forget in _choices:
            forget()
        yield lambda: _asked
    finally:
        _pretended = before
        for forget in _choices:
            forget()


def chosen_once(maxsize: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """`functools.lru_cache` for choices that ask what a device is: forgotten where another one is pretended."""

    def keep(choose: Callable[..., T]) -> Callable[..., T]:
        kept = functools.lru_cache(maxsize=maxsize)(choose)
        _choices.append(kept.cache_clear)
        return kept

    return keep


def architecture(device: torch.device) -> str:
    """That of a GPU, "" for what is none. For "meta", whose kernels only compile, that of Triton's target."""
    if device.type != "meta":
        return gpu(device).architecture
    from triton.runtime import driver

    target = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def multiplies_e4m3(architecture: str) -> bool:
    """Whether GPUs of an architecture multiply e4m3. gfx942 has another e4m3, with other NaNs and another bias."""
    if architecture.startswith("sm_"):
        return int(architecture[3:]) >= 89
    return architecture in ("", "gfx950", "gfx1200", "gfx1201")


def stream(device: torch.device) -> int:
    """The stream that work for a device goes to, 0 where there is none."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether work for a device is recorded into a CUDA graph, and not run."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def on(device: torch.device) -> AbstractContextManager[object]:
    """Inside, launches go to a device and its current stream: Triton asks for the current device, and not for a tensor's."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def for_ever(make: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
    """What `make` gives, complete, in memory that belongs to no graph. Not while one is recorded.

    A thread that warms up a graph allocates from the graph's memory. So it is made in a thread of its own.
    """
    if device.type != "cuda":
        return make()

    def work() -> torch.Tensor:
        with torch.cuda.device(device):
            made = make()
            torch.cuda.current_stream().synchronize()
            return made

    with ThreadPoolExecutor(1, thread_name_prefix="qcompile-kept") as pool:
        return pool.submit(work).result()


# Settings of `torch.backends.cuda.matmul` by which the library may add in 16 bits: parts of a split sum, all of a sum.
_SHORT_SUMS = (
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_reduced_precision_reduction",
    "allow_fp16_accumulation",
)


@contextmanager
def float32_sums() -> Iterator[None]:
    """Inside, libraries add products of 16-bit types in fp32: for results that are compared with a bound. They ask when a
    product is launched or recorded. Not for use while other threads run: compiled functions are guarded by these settings."""
    settings = torch.backends.cuda.matmul
    changed = [name for name in _SHORT_SUMS if getattr(settings, name)]
    try:
        for name in changed:
            setattr(settings, name, False)
        yield
    finally:
        for name in changed:
            setattr(settings, name, True)


def mm_float32(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """A product of 16-bit floats, `[m, k]` and `[k, n]`: as fp32, or rounded once, to `out`, `[m, n]` of the operands' type."""
    if out is not None:
        return torch.mm(a, b, out=out)
    if a.device.type != "cuda":
        return a.float() @ b.float()
    if (
        a.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation
    ):  # then torch refuses another type
        return torch.mm(a, b).float()
    return torch.mm(a, b, out_dtype=torch.float32)


def mm_int8(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """A product of int8, `[m, k]` and `[k, n]` with k and n multiples of 8, as int32."""
    m = a.shape[0]
    if a.device.type == "cuda" and m <= 16:  # the library wants more rows
        a = torch.nn.functional.pad(a, (0, 0, 0, 17 - m))
    return torch._int_mm(a, b)[:m]


def mm_e4m3(
    a: torch.Tensor,
    b: torch.Tensor,
    rows: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """A product of e4m3, `[m, k]` and `[k, n]` with dense columns, k and n multiples of 16, with accurate sums: as fp32, or
    (on sm_90 and later) scaled by `rows` `[m, 1]` and `columns` `[1, n]` and rounded to `out`, `[m, n]` of bf16."""
    if out is None or rows is None or columns is None:
        one = torch.ones((), device=a.device)
        return torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=False)
    if a.device.type != "cuda":  # torch 2.11 has scales of rows and columns on GPUs only
        return out.view(a.shape[0], -1).copy_(a.float() @ b.float() * rows * columns)
    made = out.view(a.shape[0], -1)
    torch.ops.aten._scaled_mm.out(a, b, rows, columns, out_dtype=out.dtype, use_fast_accum=False, out=made)
    return out


def descriptor(matrix: torch.Tensor, block: tuple[int, int]) -> Any:
    """A matrix whose rows are dense, as tiles of a kernel's argument: base and row stride are multiples of 16 bytes."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(matrix, list(block))
