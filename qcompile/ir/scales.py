"""Scales: reduced over cells, stored in their format, spread back over elements.

Granularity gives the length of a cell along each dimension (`granularity.Cell`); these few functions are all
that is needed to treat tensor, axis, group, token, block and nested scales, with ragged last cells, by one
path. Nothing branches on a value, so everything traces.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qcompile.ir.elements import encode_element
from qcompile.ir.formats import FORMATS, ScaleFormat
from qcompile.ir.granularity import Cell

Reduction = Callable[[Tensor, int], Tensor]


def amax(x: Tensor, dim: int) -> Tensor:
    return torch.amax(x, dim)


def amin(x: Tensor, dim: int) -> Tensor:
    return torch.amin(x, dim)


def total(x: Tensor, dim: int) -> Tensor:
    return torch.sum(x, dim, dtype=torch.float64)


def reduce_cells(x: Tensor, cell: Cell, reduction: Reduction) -> Tensor:
    """Reduce every cell of `x` to one element: `[N, K]` with cell (1, 32) gives `[N, ceil(K/32)]`."""
    for dim, length in enumerate(cell):
        size = x.shape[dim]
        if length == 1:
            continue
        if isinstance(size, int) and size == 0:  # an empty dimension has one empty cell when taken whole, else none
            if length is None:
                x = x.new_zeros([1 if d == dim else s for d, s in enumerate(x.shape)])
        elif length is None:
            x = reduction(x, dim).unsqueeze(dim)
        else:
            count, rest = size // length, size % length
            parts = []
            if count:
                parts.append(reduction(x.narrow(dim, 0, count * length).unflatten(dim, (count, length)), dim + 1))
            if rest:
                parts.append(reduction(x.narrow(dim, count * length, rest), dim).unsqueeze(dim))
            x = torch.cat(parts, dim) if len(parts) > 1 else parts[0]
    return x


def cell_counts(shape: Sequence[int], cell: Cell, device: torch.device) -> Tensor:
    """Number of elements in each cell, float64, broadcastable to the reduced shape."""
    counts = torch.ones([1] * len(cell), dtype=torch.float64, device=device)
    for dim, length in enumerate(cell):
        size = shape[dim]
        if length is None:
            counts = counts * size
        elif length > 1:
            starts = torch.arange(0, size, length, device=device)
            along = [-1 if d == dim else 1 for d in range(len(cell))]
            counts = counts * torch.clamp(size - starts, max=length).reshape(along)
    return counts


def spread(s: Tensor, cell: Cell, shape: Sequence[int]) -> Tensor:
    """Repeat the elements of `s` over their cells; the result broadcasts against a tensor of `shape`."""
    for dim, length in enumerate(cell):
        if length is None or length == 1:
            continue
        size = shape[dim]
        rest = size % length if isinstance(size, int) else 0
        if rest and size > length:
            # A shorter last cell by itself: Inductor's C++ (2.13) splits loops at the length of a cell, and loses it.
            whole, last = s.narrow(dim, 0, size // length), s.narrow(dim, size // length, 1)
            s = torch.cat([_repeated(whole, dim, length), _repeated(last, dim, rest)], dim)
        else:
            s = _repeated(s, dim, length)
            s = s if isinstance(size, int) and s.shape[dim] == size else s.narrow(dim, 0, size)
    return s


def _repeated(s: Tensor, dim: int, times: int) -> Tensor:
    return s.unsqueeze(dim + 1).expand([*s.shape[: dim + 1], times, *s.shape[dim + 1 :]]).flatten(dim, dim + 1)


def store_scale(
    raw: Tensor,
    fmt: ScaleFormat,
    fill: float = 1.0,
    *,
    down: bool = False,
    low: float = 0.0,
    high: float = 2.0**128,
) -> Tensor:
    """Round wanted scales (float32, >= 0) to their stored form.

    A scale is clamped to the range of its format (and to `low`..`high`) and rounded: `float` and `element`
    formats to nearest even, powers of two up (so that nothing clips) or, with `down`, down. NaN stays NaN
    where the format has one.

    Args:
        raw: 0 stands for a cell without anything to scale (all its elements are zero).
        fill: the scale of such cells.
    """
    wanted = torch.clamp(raw, max(fmt.low, low), min(fmt.high, high))
    if fmt.kind == "exponent":
        word = torch.where(raw == 0, max(fill, fmt.low), wanted).view(torch.int32)
        exponent = (word >> 23) - 127
        if not down:
            exponent = exponent + ((word & 0x7FFFFF) != 0).to(torch.int32)
        return torch.where(torch.isnan(raw), fmt.nan, exponent + fmt.bias).to(fmt.dtype)
    wanted = torch.where(raw == 0, fill, wanted)
    if fmt.kind == "float":
        return wanted.to(fmt.dtype)
    element = FORMATS[fmt.name]
    if element.kind == "float":
        return encode_element(wanted, element, "nearest")
    # an integer has no NaN; the outer scale of such a cell is NaN already
    return torch.round(torch.nan_to_num(wanted, nan=1.0)).to(fmt.dtype)


def load_scale(stored: Tensor, fmt: ScaleFormat) -> Tensor:
    """Float32 value of stored scales; exact."""
    if fmt.kind == "float":
        return stored.to(torch.float32)
    table = torch.tensor(fmt.values, dtype=torch.float32, device=stored.device)
    return table[stored.view(torch.uint8).to(torch.int64)]
