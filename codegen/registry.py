"""Who can compute what: a lowering says yes or no to a kernel's spec, and why. The ledger shows the reason.

There is a lowering for each kind of device. There is no registration at import time: who asks
makes the lowering, for the device at hand, so two compiles in one process never see each other's choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from qcompile.codegen.spec import KernelSpec


@dataclass(frozen=True)
class Verdict:
    """Yes or no, and why. `bool(verdict)` is the answer; `reason` is "" for an unconditional yes."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class Kernel:
    """Kernel text and how it is called.

    Attributes:
        spec: what it computes.
        source: the text.
        argtypes: C types of the arguments of the entry function `kernel`, in order ("const float*", "int64_t").
    """

    spec: KernelSpec
    source: str
    argtypes: tuple[str, ...]


class Lowering(Protocol):
    """One way to compute `qmm` on one kind of device."""

    def supports(self, spec: KernelSpec) -> Verdict:
        """Whether there will be a kernel, and the reason when there will not."""
