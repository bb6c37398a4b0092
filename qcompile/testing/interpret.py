"""Triton kernels without a GPU: every kernel of a compiled function, as Inductor emits it, over CPU tensors.

A generated kernel is proven by running it, and most machines that run tests have no GPU. Triton's interpreter needs
none, but it must be chosen before a process starts, knows nothing of Inductor, and computes bf16 wrongly. Inside
`interpret()` all three are repaired, and nothing is left behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qcompile.codegen.devices.triton_tickets import clear
from qcompile.compat import triton_version
from qcompile.compat.triton import interpreted
from qcompile.errors import QCError

_checked: set[str] = set()  # versions of Triton whose repaired interpreter was found to be right
_depth = 0


@contextmanager
def interpret() -> Iterator[None]:
    """Inside, Triton kernels run on CPU tensors: those of functions under `torch.compile`, and your own.

    ```python
    with interpret():
        out = torch.compile(f)(x)  # Inductor's Triton kernels, fused as for a GPU
        my_kernel[(4,)](x, y, BLOCK=64)  # a @triton.jit kernel, decorated here or long before
    ```

    bf16 is computed in fp32 and rounded to nearest even, operation by operation; libdevice has bodies in numpy.
    Inline assembly and atomics on bf16 do not run. Caches are empty inside; compiled functions are forgotten at both
    ends and compile anew when they are next called. May be nested; not for two threads at once.

    Raises:
        QCError: `testing.no-triton` when Triton is not installed, `testing.interpreter` when the interpreter of this
            version of Triton computes bf16 wrongly even when repaired (checked once in a process).
    """
    global _depth
    version = triton_version()
    if version is None:
        raise QCError(
            "testing.no-triton",
            "There is no Triton to interpret kernels with.",
            why="torch's builds for CPUs come without it",
            next="install the package triton; a GPU is not needed",
        )
    if _depth:
        _depth += 1
        try:
            yield
        finally:
            _depth -= 1
        return
    with interpreted():
        if version not in _checked:
            _check(version)
            _checked.add(version)
        clear(torch.device("cpu"))  # a kernel that was at fault may have left some of what others find
        _depth = 1
        try:
            yield
        finally:
            _depth = 0


def _check(version: str) -> None:
    from qcompile.testing.interpreter_faults import FAULTS

    found = [name for name, has in FAULTS.items() if has()]
    if found:
        raise QCError(
            "testing.interpreter",
            f"Triton's interpreter is wrong: {', '.join(found)}.",
            where=f"triton {version}",
            why="results of interpreted kernels would prove nothing",
            next="use a version of Triton that qcompile was tested with (constraints.txt)",
        )
