"""What the codec's tests share."""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 11


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included (and 0.0 apart from -0.0)."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))
