"""The other way to a product on a GPU: decode the weight once, then let the vendor's library multiply.

A fused kernel decodes a weight for every tile of rows. With many rows the vendor's product of floats is faster than any
kernel that decodes beside its products, by more than it costs to write the weight once in 16 bits and to read it again.
The decoded weight lives as long as one call.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from qcompile import compat
from qcompile.codegen.devices.triton_lines import Layout
from qcompile.codegen.devices.triton_overlap import begin
from qcompile.codegen.devices.triton_text import decode_text, finish_text
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.packing import ceil_div

ROWS, COLUMNS = 32, 64  # of a block that decodes (COLUMNS outputs), or finishes (ROWS x COLUMNS results)
WARPS = 4


def can_decode(spec: KernelSpec) -> bool:
    """Whether there is such a way: for activations of 16 bits, used as they are."""
    return spec.act is None and spec.x in ("f16", "bf16")


class Decoded:
    """The product of a spec that `can_decode`, as a callable over raw operands."""

    def __init__(self, spec: KernelSpec) -> None:
        self.spec, self.layout = spec, Layout.of(spec.weight)
        self.decode = compat.triton_kernel(decode_text(spec))
        # Sums that need nothing but a cast are left to the product itself.
        self.plain = not spec.epilogue.replace("acc", "") and not spec.extras and spec.x == spec.y
        self.finish = None if self.plain else compat.triton_kernel(finish_text(spec))

    def __call__(
        self,
        x: torch.Tensor,
        parts: Sequence[torch.Tensor],
        extras: Sequence[torch.Tensor],
        y: torch.Tensor,
        n: Sequence[int],
        strides: Sequence[int],
    ) -> None:
        """Write y.

        Args:
            x: `[M, k]`.
            parts: packed parts of each segment, codes as int32.
            extras: "row" `[columns]`, "mat" `[M, columns]`.
            y: `[M, columns]`.
            n: rows of each segment.
            strides: row strides of "mat" extras and of y.
        """
        (m, k), each = x.shape, len(parts) // len(n)
        weight = torch.empty(sum(n), k, dtype=x.dtype, device=x.device)
        for i, rows in enumerate(weight.split(list(n))):
            grid = (ceil_div(n[i], COLUMNS), ceil_div(k, self.layout.unit))
            own = parts[i * each : (i + 1) * each]
            self.decode[grid](rows, *own, n[i], k, k, BN=COLUMNS, KC=1, num_warps=WARPS, **begin(x.device))
        if self.finish is None:
            torch.mm(x, weight.t(), out=y.view(m, -1))
            return
        sums = compat.mm_float32(x, weight.t())
        columns = n[0] if self.spec.paired else sum(n)
        grid = (ceil_div(m, ROWS), ceil_div(columns, COLUMNS))
        self.finish[grid](
            sums, *extras, y, m, columns, sums.stride(0), *strides,
            BM=ROWS, BN=COLUMNS, num_warps=WARPS, **begin(x.device),
        )  # fmt: skip


@functools.lru_cache(maxsize=512)
def decoded(spec: KernelSpec) -> Decoded:
    """The one of a spec."""
    return Decoded(spec)


__all__ = ["Decoded", "can_decode", "decoded"]
