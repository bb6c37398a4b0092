"""The C++ toolchain as Inductor uses it: compiler, vector instructions, kernels from text, and the C library.

Kernels are built by Inductor's own builder and found in its cache, so they are compiled with the same flags as the
code around them and a machine that can run Inductor can run them.
"""

from __future__ import annotations

import functools
import struct
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would call, or None when it finds none (it honours `CXX`)."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def cpp_isa() -> str | None:
    """The vector instruction set Inductor builds for ("avx512", "avx2", "asimd" ...), or None for scalar
    code."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    isa = pick_vec_isa()
    return str(isa) if isa else None


def cpp_builder(name: str, source: Path, folder: Path) -> Any:
    """Inductor's builder of one C++ file to a shared library, with Inductor's own flags and no torch headers."""
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchOptions(vec_isa=pick_vec_isa(), include_pytorch=False)
    return CppBuilder(name=name, sources=[str(source)], BuildOption=options, output_dir=str(folder))


def cpp_build(name: str, source: Path, folder: Path) -> Path:
    """Build one C++ file with `cpp_builder`; returns the library's path.

    Raises whatever the builder raises: the text holds the command line and what the compiler said.
    """
    builder = cpp_builder(name, source, folder)
    builder.build()
    return Path(builder.get_target_file_path())


def cpu_has_vnni() -> bool:
    """Whether this machine has AVX-512 with the 8-bit dot product."""
    return bool(torch.cpu._is_vnni_supported())


def cpu_has_bf16() -> bool:
    """Whether this machine multiplies bf16 matrices in hardware, so that float layers in bf16 are fast."""
    return bool(torch.cpu._is_avx512_bf16_supported())


def framed(source: str) -> str:
    """Kernel text as the generated wrapper hands it to the code cache: equal text finds the same built
    file."""
    return f"\n{source}\n"


def load_cpp_kernel(argtypes: Sequence[str], source: str) -> Callable[..., None]:
    """Build (or find on disk) C++ text whose `extern "C" void kernel(...)` is called with tensors and
    integers.

    A file that cannot be loaded (a process was killed while the linker wrote it) is deleted and built once more.
    """
    try:
        loaded = _code_cache().load_pybinding(list(argtypes), source)
    except ImportError as error:
        if not error.path:
            raise
        with _REPAIRS:
            if not whole_library(Path(error.path)):
                Path(error.path).unlink(missing_ok=True)
            loaded = _code_cache().load_pybinding(list(argtypes), source)
    return cast("Callable[..., None]", loaded)


_REPAIRS = threading.Lock()


@functools.cache
def _code_cache() -> Any:
    """Inductor's cache of kernels with Python bindings, but a file that was cut short is an `ImportError`: the system's
    loader maps it without a look at its length, and the process dies of the first access beyond the end."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    class Checked(CppPythonBindingsCodeCache):
        @classmethod
        def _load_library_inner(cls, path: str, key: str) -> Any:
            if not whole_library(Path(path)):
                raise ImportError(f"{path} is no complete library", path=path)
            return super()._load_library_inner(path, key)

    return Checked


def whole_library(path: Path) -> bool:
    """Whether a file is a shared library up to its end: linkers write the table of sections last. Other systems'
    formats (not ELF) are taken for whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if content[:4] != b"\x7fELF" or len(content) < 64:
        return content[:4] in _OTHER_FORMATS
    wide, order = content[4] == 2, "<" if content[5] == 1 else ">"
    start = struct.unpack_from(order + ("Q" if wide else "I"), content, 40 if wide else 32)[0]
    size, count = struct.unpack_from(order + "HH", content, 58 if wide else 46)
    return bool(start > 0 and start + size * count <= len(content))


# Mach-O in both orders, 32 and 64 bits, and several machines in one file; nothing of ours runs on Windows.
_OTHER_FORMATS = {bytes.fromhex(magic) for magic in ("feedface", "feedfacf", "cefaedfe", "cffaedfe", "cafebabe")}


@functools.cache
def warm_cpp() -> None:
    """Start in the background what Inductor does when it meets the process's first CPU kernel.

    It tries which vector instructions the compiler can build for and precompiles a header: seconds of waiting
    for the C++ compiler (with an empty cache) that fit into the time the graph is still being traced. Nothing
    depends on it: an error is raised again, in the foreground, by the first real kernel.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    def build() -> None:
        with suppress(Exception):
            CppPythonBindingsCodeCache.load_pybinding(["float*"], 'extern "C" void kernel(float* x) { x[0] = 0; }')

    threading.Thread(target=build, name="qcompile-warm-cpp", daemon=True).start()


def trim_memory() -> None:
    """Return freed heap pages to the system where the C library can (glibc)."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
