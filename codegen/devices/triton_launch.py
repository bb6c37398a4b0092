"""What launches of Triton kernels have in common: rows as kernels read them, and memory of sums that blocks share."""

from __future__ import annotations

from types import TracebackType

import torch

from qcompile.codegen.devices.triton_tickets import tickets


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    """`[..., k]` as a matrix whose rows are dense, copied only where they are not."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


class SplitMemory:
    """What blocks that share sums need for a launch, which is made inside: memory for the parts of a sum, fp32, and `tickets`.

    Where kernels are interpreted, a launch may end between two blocks, by an error or an interrupt, and leave what it has
    counted: sums of later launches would be finished by blocks that are not the last. So it leaves zeros then too.

    Args:
        tiles: each a sum of its own. splits: blocks that share one. size: numbers of a part.
        operand: on the device; it stands for both where nothing is split, as a kernel wants some pointer.
    """

    def __init__(self, tiles: int, splits: int, size: int, operand: torch.Tensor) -> None:
        self.split, self.both = splits > 1, (operand, operand)
        if self.split:
            parts = torch.empty(tiles * splits * size, dtype=torch.float32, device=operand.device)
            self.both = (parts, tickets(tiles, operand.device))

    def __enter__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.both

    def __exit__(
        self, raised: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        # What a GPU was given to do it ends, whatever happens to the host, and other launches count there at the same time.
        if raised is not None and self.split and self.both[1].device.type != "cuda":
            self.both[1].zero_()


__all__ = ["SplitMemory", "dense_rows"]
