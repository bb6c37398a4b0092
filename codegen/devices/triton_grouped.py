"""Products of a mixture of experts: every row of x meets the weight of one expert, all in one launch.

Rows are sorted by expert and `offs` says where each one's end, as for torch's own grouped product; both stay on the
device. The grid is the largest number of tiles that any routing needs, and every block finds its expert and rows from
`offs` itself, so nothing waits for the host, no kernel runs before, and a recorded graph serves every routing. A tile
never has rows of two experts; blocks without rows return at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from qcompile import compat
from qcompile.codegen.devices.triton import Tile, choose, fit, quantize_input
from qcompile.codegen.devices.triton_launch import SplitMemory, dense_rows
from qcompile.codegen.devices.triton_overlap import begin
from qcompile.codegen.devices.triton_text import Text, kernel_text
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.triton import FUSED, tiles_across
from qcompile.errors import QCError
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import ceil_div, packed_parts

LEAST = 32  # lanes of the scan over experts, so that few numbers of them need kernels of their own


@functools.lru_cache(maxsize=512)
def grouped_text(spec: KernelSpec) -> Text:
    """The text of a spec's kernel with a weight for each expert."""
    return kernel_text(spec, experts=True)


def tiles_of_rows(m: int, experts: int, rows: int) -> int:
    """How many tiles of `rows` rows the worst routing of `m` rows makes: one row for each expert, all others for one."""
    active = min(m, experts)
    return active + (m - active) // rows


@compat.chosen_once(maxsize=4096)
def choose_grouped(spec: KernelSpec, n: tuple[int, ...], k: int, m: int, experts: int, device: torch.device) -> Tile:
    """How to cut a product: the shipped line for as many rows as an expert has where as many as possible have some."""
    return choose(spec, n, k, ceil_div(m, min(m, experts)), lambda rows: tiles_of_rows(m, experts, rows), FUSED, device)


class Grouped:
    """The kernel of a spec with a weight for each expert, as a callable over raw operands, for generated code.

    One object serves every number of rows and of experts.
    """

    def __init__(self, spec: KernelSpec, text: Text | None = None) -> None:
        self.spec, self.text = spec, text or grouped_text(spec)
        self.kernel = compat.triton_kernel(self.text.source)

    def __call__(self, x: torch.Tensor, *rest: Any, tile: Tile | None = None) -> None:
        """Write y, but for rows behind the last expert's.

        Args:
            x: rows of k values, sorted by expert; with an activation scheme their codes, see `triton.quantize_input`.
            rest: scales and sums of x, if it has a scheme; `offs`, int32 `[E]`; parts of each segment, extras, y, as
                `run_grouped` has them; then the integers M, K, the row stride of x, the rows of each segment, the row stride
                of each "mat" extra, and that of y.
            tile: how to cut the work, in place of the tuned choice; never with a weight that is decoded first.
        """
        spec, pointers = self.spec, self.text.pointers[1:-2]
        (m, k, ldx, *sizes) = rest[len(pointers) :]
        if m == 0:
            return
        operands = [
            t.view(torch.int32) if name.startswith("W") else t
            for t, (name, _) in zip(rest[: len(pointers)], pointers, strict=True)
        ]
        experts, n = operands[self.text.inputs - 1].numel(), sizes[: spec.segments]
        tile = fit(tile or choose_grouped(spec, tuple(n), k, m, experts, x.device), self.text.layout, k)
        tiles = tiles_across(n, tile.columns, spec.paired) * tiles_of_rows(m, experts, tile.rows)
        with SplitMemory(tiles, tile.splits, spec.sums * tile.rows * tile.columns, operands[-1]) as work:
            self.kernel[tiles, tile.splits](
                x, *operands, *work, m, k, experts, ldx, *sizes,
                EVEN=k % self.text.layout.unit == 0, EXPERTS=max(LEAST, 1 << (experts - 1).bit_length()),
                **tile.constants, **tile.options, **begin(x.device),
            )  # fmt: skip


def run_grouped(
    spec: KernelSpec,
    x: torch.Tensor,
    offs: torch.Tensor,
    parts: Sequence[torch.Tensor],
    extras: Sequence[torch.Tensor],
    n: Sequence[int],
    k: int,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Launch the kernel of `spec`: rows `offs[e - 1]` to `offs[e]` of x (from 0 for the first) times the weight of e.

    Args:
        x: `[T, k]`, sorted by expert.
        offs: int32 `[E]`, not decreasing, at most T: where each expert's rows end. Not read on the host.
        parts: packed parts of each segment, one after the other, each `[E, ...]`: those of the experts, stacked.
        extras: "row" `[E, columns]`, a row for each expert, or "mat" `[T, columns]`.
        n: rows of each segment.
        tile: how to cut the work, in place of the tuned choice.

    Returns:
        `[T, columns]` of dtype `spec.y`. Rows from `offs[-1]` on are not written.

    Raises:
        QCError: `kernel.experts` for operands of other shapes.
    """
    columns = n[0] if spec.paired else sum(n)
    experts = _checked(spec, x, offs, parts, n, k)
    m = x.shape[0]
    y = torch.empty(m, columns, dtype=OUT_DTYPES[spec.y], device=x.device)
    shapes = {"row": (experts, columns), "mat": (m, columns)}
    operands, mats = [], []
    for i, (extra, (kind, _)) in enumerate(zip(extras, spec.extras, strict=True)):
        if tuple(extra.shape) != shapes[kind]:
            raise _wrong(f"extra {i} ({kind})", extra, f"{list(shapes[kind])}")
        operands.append(dense_rows(extra) if kind == "mat" else extra.contiguous())
        mats += [operands[-1].stride(0)] if kind == "mat" else []
    if m == 0:
        return y
    inputs = (dense_rows(x),) if spec.act is None else quantize_input(x, spec=spec)
    stacked = [part.contiguous() for part in parts]
    operands = [*inputs[1:], offs.contiguous(), *stacked, *operands, y]
    with compat.on(x.device):
        Grouped(spec)(inputs[0], *operands, m, k, inputs[0].stride(0), *n, *mats, columns, tile=tile)
    return y


def _checked(
    spec: KernelSpec, x: torch.Tensor, offs: torch.Tensor, parts: Sequence[torch.Tensor], n: Sequence[int], k: int
) -> int:
    """The number of experts, of operands that fit together."""
    if x.dim() != 2 or x.shape[1] != k:
        raise _wrong("x", x, f"[T, {k}]")
    if offs.dim() != 1 or offs.dtype != torch.int32 or not len(offs):
        raise _wrong("offs", offs, "int32 [E]")
    wanted = [
        (f"{part.name} of segment {i}", part) for i, rows in enumerate(n) for part in packed_parts(spec.weight, rows, k)
    ]
    for (name, part), given in zip(wanted, parts, strict=True):
        shape = (len(offs), *part.shape)
        if (tuple(given.shape), given.dtype) != (shape, part.dtype):
            raise _wrong(name, given, f"{part.dtype} {list(shape)}")
    return len(offs)


def _wrong(name: str, given: torch.Tensor, wanted: str) -> QCError:
    return QCError(
        "kernel.experts",
        f"{name} is {given.dtype} {list(given.shape)}",
        why=f"a product with a weight for each expert takes {wanted}",
        next="sort rows by expert and stack the parts of the experts",
    )


__all__ = ["Grouped", "choose_grouped", "grouped_text", "run_grouped", "tiles_of_rows"]
