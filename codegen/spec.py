"""What one kernel computes: the part of a matmul site that changes the kernel's text.

A `MatmulSpec` names one site: sizes included. A `KernelSpec` leaves the sizes out (they are run-time
arguments), adds the dtypes of the tensors at hand, and so is equal for all sites that one kernel can serve:
its string is the key under which kernels are built, cached, tuned and reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qcompile.errors import QCError
from qcompile.ir.matmul import DTYPE_NAMES, EXTRA_KINDS, OUT_DTYPES, MatmulSpec, epilogue_names
from qcompile.ir.scheme import Scheme

# Beyond this many inputs an int32 sum of 8-bit products could overflow (255 * 127 * 66311 > 2^31), so a
# weight with one scale per row is summed in pieces.
LONG_K = 65536


def dtype_name(dtype: torch.dtype | str) -> str:
    """ "f32", "bf16" or "f16" of a torch dtype (or of such a name). Raises `QCError` ("kernel.dtype") for
    others."""
    name = dtype if isinstance(dtype, str) else DTYPE_NAMES.get(dtype, str(dtype))
    if name not in OUT_DTYPES:
        raise QCError("kernel.dtype", f"kernels do not read or write {name}", next=f"use {', '.join(OUT_DTYPES)}")
    return name


@dataclass(frozen=True)
class KernelSpec:
    """A matmul without its sizes.

    Attributes:
        weight: scheme of every segment.
        act: scheme of the activation, `None` when it is used as it is.
        segments: how many packed weights share the activation.
        epilogue: as in `MatmulSpec`.
        extras: `(kind, dtype name)` of each extra operand, kind "row" or "mat".
        x: dtype name of the activation.
        y: dtype name of the result.
        long_k: whether there are more than `LONG_K` inputs (the only trace of a size).
    """

    weight: Scheme
    act: Scheme | None = None
    segments: int = 1
    epilogue: str = ""
    extras: tuple[tuple[str, str], ...] = ()
    x: str = "f32"
    y: str = "f32"
    long_k: bool = False

    def __post_init__(self) -> None:
        for name in (self.x, self.y, *(dtype for _, dtype in self.extras)):
            dtype_name(name)
        bad = [kind for kind, _ in self.extras if kind not in EXTRA_KINDS]
        if self.segments < 1 or bad:
            raise QCError("kernel.spec", f"not a kernel: segments={self.segments} extras={self.extras}")

    @staticmethod
    def of(
        spec: MatmulSpec,
        x_dtype: torch.dtype | str,
        y_dtype: torch.dtype | str,
        extra_dtypes: Sequence[torch.dtype | str] = (),
    ) -> KernelSpec:
        """The kernel that computes `spec` for tensors of these dtypes."""
        extras = tuple(zip(spec.extras, map(dtype_name, extra_dtypes), strict=True))
        return KernelSpec(
            weight=spec.weight,
            act=spec.act,
            segments=len(spec.n),
            epilogue=spec.epilogue,
            extras=extras,
            x=dtype_name(x_dtype),
            y=dtype_name(y_dtype),
            long_k=spec.k > LONG_K,
        )

    @property
    def paired(self) -> bool:
        """Whether the epilogue combines the segments column by column."""
        return any(name[0] == "a" and name != "acc" for name in epilogue_names(self.epilogue))

    @property
    def sums(self) -> int:
        """Sums that a kernel holds for each result."""
        return self.segments if self.paired else 1

    def __repr__(self) -> str:
        return f"<kernel {self}>"

    def __str__(self) -> str:
        fields = [str(self.weight), f"{self.x}->{self.y}"]
        if self.act is not None:
            fields.append(f"act={self.act}")
        if self.segments > 1:
            fields.append(f"segments={self.segments}")
        if self.epilogue:
            fields.append("y=" + self.epilogue.replace(" ", ""))
        if self.extras:
            fields.append("e=" + ",".join(f"{kind}:{dtype}" for kind, dtype in self.extras))
        if self.long_k:
            fields.append("long")
        return " ".join(fields)
