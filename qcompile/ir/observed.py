"""Ranges that are observed in training, in a way that a gradient checkpoint can repeat.

A checkpoint runs a piece of the forward pass again within the backward pass. That run must not observe a second time, and it
must round by the range of the first run, which later calls (another micro-batch, the same module used twice) have moved since.
Nothing that torch hands out connects the two runs, but what comes in does: its least and its most element are the same, or
apart by the last bits where another graph or an unordered sum computed them. So each call leaves a line (what came, which range
was used), and a call within a backward pass looks for the nearest line.

One opaque operator, because Python that Dynamo traces cannot tell the two runs apart: graphs are traced once, and run, or are
partly computed again, in both passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile import compat

# Calls between a forward pass and its recomputation that are remembered; a line has 16 bytes.
LINES = 256


def no_lines() -> Tensor:
    """The table of a range that has seen nothing: float32 `[LINES, 4]`, NaN, which equals nothing."""
    return torch.full((LINES, 4), torch.nan)


def observe_(new: Tensor, range: Tensor, calls: Tensor, lines: Tensor, momentum: float) -> Tensor:
    """Take what came into the average, unless this is a recomputation.

    Args:
        new: float32 `[2]`, least and most element of what came.
        range: `[2]`, the average; written. The first call sets it.
        calls: int64 `[]`, ranges in the average; written. What is not finite, as a step that overflows has, would stay in the
            average for good and is left out.
        lines: `[LINES, 4]`, (least, most, range used) of the last calls; written.
        momentum: share of `new` in the average.

    Returns:
        `[2]`, dtype of `range`: the range to round by. Within a backward pass that of the call, of the last `LINES`, that saw
        the most alike, of the latest if there are several; the average as it is where there was none.
    """
    if compat.within_backward():
        apart = (lines[:, :2] - new.to(lines.dtype)).abs().sum(1).nan_to_num(torch.inf)
        nearest, age = apart.min(), (calls - 1 - torch.arange(LINES, device=calls.device)) % LINES
        line = lines[age.masked_fill(apart > nearest, LINES).argmin(), 2:].to(range.dtype)
        return torch.where(nearest.isfinite(), line, range)
    finite = new.isfinite().all()
    moved = torch.where(calls == 0, new, range + momentum * (new - range))
    range.copy_(torch.where(finite, moved, range))
    used = range.clone()
    lines.index_copy_(0, (calls % LINES).view(1), torch.cat((new, used)).to(lines.dtype).view(1, 4))
    calls.add_(finite.to(calls.dtype))
    return used


def fake_observe(new: Tensor, range: Tensor, calls: Tensor, lines: Tensor, momentum: float) -> Tensor:
    return torch.empty_like(range)


__all__ = ["LINES", "fake_observe", "no_lines", "observe_"]
