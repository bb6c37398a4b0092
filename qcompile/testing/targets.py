"""GPUs that are not there: what a kernel can be compiled for, and what such a device lends to a block."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qcompile.compat import Gpu, aot, triton_version
from qcompile.errors import QCError, suggest


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: as in `TARGETS`.
        backend, arch: as Triton names them.
        warp: lanes of a warp.
        shared_limit: bytes of shared memory that one block may have.
        processors: multiprocessors of the device that stands for it.
        register_limit: registers of 32 bits that one thread may have.
        tensor_memory: columns of tensor memory that one block may have.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared_limit: int
    processors: int
    register_limit: int = 255
    tensor_memory: int = 0

    @property
    def gpu(self) -> Gpu:
        """What qcompile cuts its kernels for."""
        return Gpu(self.name, self.processors, self.shared_limit)


# CUDA C++ Programming Guide, "Compute Capabilities", table of technical specifications: the maximum amount of shared
# memory per thread block, of registers per thread, and (PTX ISA, "Tensor Memory") 512 columns of tensor memory.
# Multiprocessors: of an A100, A10, L40S, H200, B200, RTX 5090 and MI300X, by their data sheets.
# AMD Instinct MI300 (CDNA3) ISA guide: 64 KiB of LDS per work-group; 512 VGPRs, of which up to 256 are for accumulators.
_KIB = 1024
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target("sm_80", "cuda", 80, 32, 163 * _KIB, 108),
            Target("sm_86", "cuda", 86, 32, 99 * _KIB, 72),
            Target("sm_89", "cuda", 89, 32, 99 * _KIB, 142),
            Target("sm_90", "cuda", 90, 32, 227 * _KIB, 132),
            Target("sm_100", "cuda", 100, 32, 227 * _KIB, 148, tensor_memory=512),
            Target("sm_120", "cuda", 120, 32, 99 * _KIB, 170),
            Target("gfx942", "hip", "gfx942", 64, 64 * _KIB, 304, register_limit=512),
        )
    }
)


# What devices are called, and what they are.
DEVICES = {
    "A100": "sm_80",
    "A10": "sm_86",
    "L40": "sm_89",
    "L4": "sm_89",
    "H100": "sm_90",
    "H200": "sm_90",
    "GH200": "sm_90",
    "B200": "sm_100",
    "MI300": "gfx942",
    "4090": "sm_89",
    "3090": "sm_86",
    "5090": "sm_120",
}


def chosen(targets: Collection[str]) -> list[Target]:
    """The targets of these names.

    Raises:
        QCError: `testing.unknown-target`; `testing.no-triton`, `testing.interpreter` where nothing can be compiled.
    """
    if triton_version() is None:
        raise QCError(
            "testing.no-triton",
            "There is no Triton to compile kernels with.",
            why="torch's builds for CPUs come without it",
            next="install the package triton; a GPU is not needed",
        )
    if aot.only_interprets():
        raise QCError(
            "testing.interpreter",
            "Kernels are interpreted here and cannot be compiled.",
            why="inside interpret(), and with TRITON_INTERPRET=1, Triton's own functions are those of its interpreter",
            next="leave interpret(), which compile_for enters itself; start the process without TRITON_INTERPRET",
        )
    names = [targets] if isinstance(targets, str) else list(targets)
    for name in names:
        if name not in TARGETS:
            device = next((of for word, of in DEVICES.items() if word in str(name).upper()), "")
            hint = f"; {device!r} is that architecture" if device else suggest(str(name), TARGETS)
            raise QCError(
                "testing.unknown-target", f"There is no target {name!r}{hint}", next=f"choose of {', '.join(TARGETS)}"
            )
    if not names:
        raise QCError("testing.unknown-target", "No target to compile for", next=f"choose of {', '.join(TARGETS)}")
    return [TARGETS[name] for name in names]


__all__ = ["DEVICES", "TARGETS", "Target", "chosen"]
