"""Where the elements of a parameter are, and how its state is stored: both follow from its shape and its sharding alone.

Blocks run over the flattened tensor. For a shard to hold the bytes of the whole, a cut between rows must not cut a block, so a
matrix whose rows are a multiple of 64 elements gets blocks that divide its rows: 256 elements, or 128, or 64 (4 bits: 128 or
64). Its codes are then a matrix of as many rows as the parameter, and shard as it does. State of other tensors has blocks of
the full size, from the first element on; where such a tensor is sharded its state is float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.state import PLAIN, Storage
from qcompile.optim.rules import Moment

SMALL = 4096  # state of fewer elements stays float32: it is no memory, and norms and biases are sensitive
FLOAT32 = Storage("f32")
DEFAULTS = {
    8: {True: Storage("dyn8", 256), False: Storage("udyn8", 256)},
    4: {True: Storage("dyn4", 128), False: Storage("ulin4", 128)},
}
SMALLEST_BLOCK = 64
NAMES = {dtype: name for name, dtype in PLAIN.items()}

Bits = int | Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """The part of a parameter that this process holds.

    Attributes:
        shape: of the whole parameter. local: of the part.
        offset: index of the part's first element among those of the whole, for random bits. The elements follow each other in
            the whole, unless a dimension other than the first is cut: then it is one that no other part has.
        mesh, placements: of a DTensor that is cut; None and () otherwise.
    """

    shape: tuple[int, ...]
    local: tuple[int, ...]
    offset: int = 0
    mesh: Any = None
    placements: tuple[Any, ...] = ()

    @property
    def row(self) -> int:
        """Elements of one row of the whole; 0 for a vector."""
        return math.prod(self.shape[1:]) if len(self.shape) > 1 else 0

    @property
    def local_row(self) -> int:
        """Elements of one row of the part."""
        return math.prod(self.local[1:]) if len(self.local) > 1 else 0

    @property
    def cut(self) -> bool:
        """Whether there are other parts."""
        return self.local != self.shape or any(p.is_shard() for p in self.placements)

    def in_rows(self, storage: Storage) -> bool:
        """Whether blocks divide rows, of every part."""
        if not self.row or self.row % storage.block:
            return False
        if any(p.is_shard() and p.dim != 0 for p in self.placements):
            # Equal parts of a matrix's columns, each of whole blocks.
            return len(self.shape) == 2 and self.row % self.local_row == 0 and self.local_row % storage.block == 0
        return True

    def part_shapes(self, storage: Storage, whole: bool = False) -> list[tuple[int, ...]]:
        """Shapes of the tensors of a storage, of the part or of the whole."""
        shape = self.shape if whole else self.local
        if storage.plain:
            return [shape]
        if self.in_rows(storage):
            row = math.prod(shape[1:])
            return [(shape[0], row * storage.bits // 8), (shape[0], row // storage.block)]
        return [part.shape for part in storage.parts(math.prod(shape))]

    def wrap(self, local: Tensor, storage: Storage, which: int = 0) -> Tensor:
        """A tensor of the part as a tensor of the whole: part number `which` of a storage, in its shape."""
        local = local.reshape(self.part_shapes(storage)[which])
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor

        shape = torch.Size(self.part_shapes(storage, whole=True)[which])
        stride = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        wrapped: Tensor = DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )
        return wrapped


def local_of(t: Tensor) -> Tensor:
    """The part of a tensor that this process holds: itself, but for a DTensor."""
    return t.to_local() if hasattr(t, "to_local") else t


def layout_of(p: Tensor) -> Layout:
    """The layout of a parameter. Raises `QCError` ("optim.sharding") for one that holds partial sums."""
    if (low_bit := getattr(p, "low_bit", None)) is not None:  # codes or scales, see weights.py
        whole: Layout = low_bit.layout
        return whole
    placements = tuple(getattr(p, "placements", ()))
    if not placements:
        return Layout(tuple(p.shape), tuple(p.shape))
    mesh: Any = p.device_mesh  # type: ignore[attr-defined]
    if any(placement.is_partial() for placement in placements):
        raise QCError(
            "optim.sharding", f"a parameter placed as {placements}", why="sums that are yet to be added have no step"
        )
    coordinate, sizes = mesh.get_coordinate(), mesh.shape
    # A strided shard was cut before the dimensions on its left (FSDP after tensor parallelism).
    order = sorted(range(len(placements)), key=lambda i: hasattr(placements[i], "split_factor"))
    first, rows = 0, p.shape[0] if p.dim() else 1
    other, count = 0, 1
    for i in order:
        if not placements[i].is_shard():
            continue
        if placements[i].dim == 0:
            size = -(-rows // sizes[i])
            start = min(coordinate[i] * size, rows)
            first, rows = first + start, min(size, rows - start)
        else:
            other, count = other * sizes[i] + coordinate[i], count * sizes[i]
    local = tuple(local_of(p).shape)
    layout = Layout(tuple(p.shape), local, 0, mesh, placements)
    index = first * (layout.row or 1) + other * p.numel()
    return Layout(layout.shape, local, index, mesh, placements)


def storage_of(layout: Layout, moment: Moment, bits: Bits) -> Storage:
    """How a moment of a parameter is stored.

    Args:
        bits: 32, 8 or 4, or a text for each key of the state, as `{"exp_avg": "dyn8/g128"}`; float32 where it has none.
    """
    numel = math.prod(layout.shape)
    if not isinstance(bits, int):
        storage = Storage.parse(bits.get(moment.key, "f32"))
    elif bits == 32:
        return FLOAT32
    else:
        storage = DEFAULTS[bits][moment.signed]
        block = storage.block
        while block > SMALLEST_BLOCK and layout.row % block:
            block //= 2
        storage = _blocked(storage.name, block if layout.row and layout.row % block == 0 else storage.block)
    if numel < SMALL or storage.plain:
        return storage if storage.plain else FLOAT32
    return FLOAT32 if layout.cut and not layout.in_rows(storage) else storage


@lru_cache(maxsize=64)
def _blocked(name: str, block: int) -> Storage:
    """A storage is checked when it is made, and every step of every parameter asks for some."""
    return Storage(name, block)


def check_bits(bits: object, moments: Sequence[str]) -> None:
    """Refuse what is no choice of storages. Raises `QCError` ("optim.state-bits", "step.storage")."""
    if isinstance(bits, Mapping):
        if unknown := [key for key in bits if key not in moments]:
            raise QCError(
                "optim.state-bits", f"there is no state {unknown[0]!r}", next=f"there is {' and '.join(moments)}"
            )
        for text in bits.values():
            if Storage.parse(text).stochastic:
                raise QCError("optim.state-bits", f"state cannot be {text}", why="random bits are the parameter's")
    elif bits not in (32, 8, 4) or isinstance(bits, bool):
        raise QCError(
            "optim.state-bits",
            f"state_bits cannot be {bits!r}",
            next='use 32, 8 or 4, or a storage for each state, as {"exp_avg": "dyn8/g128", "exp_avg_sq": "udyn8/g128"}',
        )
