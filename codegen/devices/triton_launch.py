"""What launches of Triton kernels have in common: rows as kernels read them, and memory of sums that blocks share."""

from __future__ import annotations

import torch

from qcompile.codegen.devices.triton_tickets import tickets


def dense_rows(t: torch.Tensor) -> torch.Tensor:
    """`[..., k]` as a matrix whose rows are dense, copied only where they are not."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def memory_of_splits(tiles: int, splits: int, size: int, operand: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What blocks that share sums need: memory for the parts of a sum, fp32, and `tickets`.

    Args:
        tiles: each a sum of its own. splits: blocks that share one. size: numbers of a part.
        operand: on the device; it stands for both where nothing is split, as a kernel wants some pointer.
    """
    if splits < 2:
        return operand, operand
    parts = torch.empty(tiles * splits * size, dtype=torch.float32, device=operand.device)
    return parts, tickets(tiles, operand.device)


__all__ = ["dense_rows", "memory_of_splits"]
