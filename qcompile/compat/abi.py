"""Kernels as operators: shared libraries that register themselves through torch's stable C ABI.

Inductor's own code cache loads Python bindings and trusts the file it finds under a name. These libraries live in the
same folder and are built with the same flags, but nothing about a file is trusted: it is written beside its place and
moved there, and it ends in the digest of its own bytes, so that what a killed process or a full disk left behind is
built again instead of failing for ever.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from qcompile.compat.cpp import cpp_build, cpp_builder
from qcompile.compat.inductor import inductor_cache_dir
from qcompile.errors import QCError

NAMESPACE = "qcompile_cpu"
_DIGEST = hashlib.sha256().digest_size
_LOCK = threading.Lock()
_BUILDING: dict[str, threading.Lock] = {}
_OPERATORS: dict[str, Callable[..., torch.Tensor]] = {}


@functools.cache
def processor() -> str:
    """Hash of what "-march=native" means here: the processor's features as the system names them."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    text = f"{platform.machine()} {platform.processor()} {features}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def _compiler_version(compiler: str) -> str:
    from torch._inductor.cpp_builder import get_compiler_version_info

    return str(get_compiler_version_info(compiler))


def library_path(source: str) -> Path:
    """Where the library of this text lies: text, command line, compiler version and processor decide."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    command = cpp_builder("o", Path("i"), Path(".")).get_command_line()
    parts = (source, command, _compiler_version(get_cpp_compiler()), processor())
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    return inductor_cache_dir() / "qcompile" / key[:2] / f"{key}.so"


def build_library(source: str) -> Path:
    """The shared library of C++ text: found whole on disk, or built. Safe against other threads and processes.

    Raises what Inductor's builder raises; its text holds the command line and what the compiler said.
    """
    path = library_path(source)
    with _LOCK:
        lock = _BUILDING.setdefault(path.name, threading.Lock())
    with lock:
        if not _whole(path):
            _build(path, source)
    return path


def _build(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        text = Path(folder, "kernel.cpp")
        text.write_text(source, encoding="utf-8")
        built = cpp_build("kernel", text, Path(folder))
        content = built.read_bytes()
        built.write_bytes(content + hashlib.sha256(content).digest())  # a loader ignores what follows the sections
        os.replace(built, path)


def _whole(path: Path) -> bool:
    """Whether a library is there and ends in the digest of the rest."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def load_operator(source: str) -> Callable[..., torch.Tensor]:
    """Build (or find on disk) C++ text with a function `qcompile_register`, and return the operator it registers.

    Loading the same text again returns the same operator.

    Raises:
        QCError: "kernel.abi" when this torch refuses the registration.
        OSError: the library cannot be loaded, for example from a folder that forbids execution.
    """
    path = build_library(source)
    with _LOCK:
        if path.stem not in _OPERATORS:
            _OPERATORS[path.stem] = _register(path)
        return _OPERATORS[path.stem]


def _register(path: Path) -> Callable[..., torch.Tensor]:
    library = ctypes.CDLL(str(path))
    register = library.qcompile_register
    register.argtypes, register.restype = [ctypes.c_char_p] * 2, ctypes.c_char_p
    name = f"k_{path.stem}"
    problem = register(NAMESPACE.encode(), name.encode())
    if problem:
        raise QCError("kernel.abi", f"torch {torch.__version__} took no operator: {problem.decode()}")
    packet = getattr(getattr(torch.ops, NAMESPACE), name)
    return cast("Callable[..., torch.Tensor]", packet.default)
