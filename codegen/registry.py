"""Who can compute what: lowerings of one op, asked in order, with the losers' reasons kept.

A lowering is a value with four members. There is no registration at import time: the caller builds the tuple of
lowerings it wants to ask, so two compiles in one process never see each other's choices.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
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
    """One way to compute one op on one kind of device."""

    @property
    def op(self) -> str:
        """Name of the op without its namespace ("qmm")."""

    @property
    def device(self) -> str:
        """Torch's name of the device type ("cpu")."""

    def supports(self, spec: KernelSpec) -> Verdict:
        """Whether `emit` will work, and the reason when it will not."""

    def emit(self, spec: KernelSpec) -> Kernel:
        """Kernel text. Raises `QCError` ("kernel.unsupported") when `supports` says no."""


@dataclass(frozen=True)
class Choice:
    """The lowering that was taken (None: nobody could) and the reasons of those asked before it."""

    lowering: Lowering | None
    refused: tuple[tuple[str, str], ...] = field(default=())


def choose(lowerings: Iterable[Lowering], op: str, device: str, spec: KernelSpec) -> Choice:
    """The first lowering of `op` on `device` that supports `spec`."""
    refused: list[tuple[str, str]] = []
    for lowering in lowerings:
        if (lowering.op, lowering.device) != (op, device):
            continue
        verdict = lowering.supports(spec)
        if verdict:
            return Choice(lowering, tuple(refused))
        refused.append((type(lowering).__name__, verdict.reason))
    return Choice(None, tuple(refused))
