"""Two processes: what is sharded by `fully_shard`, or replicated, takes the steps of one process, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qcompile.errors import QCError
from qcompile.optim.layout import Layout, layout_of, storage_of
from qcompile.optim.rules import FIRST, SECOND
from tests.optim.two import EXPECTED
from tests.processes import run_two


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path: Path) -> None:
    for lines, errors in run_two("tests.optim.two", tmp_path):
        assert lines == EXPECTED, errors


class Placement:
    """A placement as layouts look at it."""

    def __init__(self, dim: int | None = None, *, strided: bool = False, partial: bool = False) -> None:
        self.dim, self._partial = dim, partial
        if strided:
            self.split_factor = 2

    def is_shard(self) -> bool:
        return self.dim is not None

    def is_partial(self) -> bool:
        return self._partial


class Mesh:
    """The place of one process among others."""

    def __init__(self, shape: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
        self.shape, self.coordinate = shape, coordinate

    def get_coordinate(self) -> tuple[int, ...]:
        return self.coordinate


class Sharded:
    """A parameter of which a process holds a part."""

    def __init__(self, shape: tuple[int, ...], local: tuple[int, ...], mesh: Mesh, placements: list[Placement]) -> None:
        self.shape, self.local = torch.Size(shape), torch.empty(local, device="meta")
        self.device_mesh, self.placements = mesh, placements

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def to_local(self) -> torch.Tensor:
        return self.local


def offsets(shape: tuple[int, ...], mesh: tuple[int, int], placements: list[Placement]) -> list[int]:
    coordinates = [(i, j) for i in range(mesh[0]) for j in range(mesh[1])]
    parts = [Sharded(shape, (1, *shape[1:]), Mesh(mesh, at), placements) for at in coordinates]
    return [layout_of(part).offset for part in parts]  # type: ignore[arg-type]


def test_first_elements_of_shards() -> None:
    row, keep = Placement(0), Placement()
    assert offsets((10, 64), (1, 4), [keep, row]) == [0, 3 * 64, 6 * 64, 9 * 64]
    assert offsets((5, 64), (1, 4), [keep, row]) == [0, 2 * 64, 4 * 64, 5 * 64]  # the last has none
    assert offsets((9,), (2, 2), [row, keep]) == [0, 0, 5, 5]  # two copies of each
    assert offsets((16, 2), (2, 2), [row, row]) == [0, 8, 16, 24]
    # Cut for tensor parallelism first, then for FSDP, whose dimension of the mesh is the first.
    assert offsets((16, 2), (2, 2), [Placement(0, strided=True), row]) == [0, 16, 8, 24]
    assert offsets((16, 64), (2, 2), [row, Placement(1)]) == [0, 16 * 64, 8 * 64, 8 * 64 + 16 * 64]
    with pytest.raises(QCError, match=r"optim\.sharding"):
        offsets((16, 2), (2, 2), [row, Placement(partial=True)])


@pytest.mark.parametrize(
    ("shape", "bits", "first", "second"),
    [
        ((32, 512), 8, "dyn8/g256", "udyn8/g256"),
        ((32, 384), 8, "dyn8/g128", "udyn8/g128"),
        ((32, 576), 8, "dyn8/g64", "udyn8/g64"),
        ((32, 576), 4, "dyn4/g64", "ulin4/g64"),
        ((32, 512), 4, "dyn4/g128", "ulin4/g128"),
        ((64, 64, 3, 3), 8, "dyn8/g64", "udyn8/g64"),
        ((63, 65), 8, "f32", "f32"),  # 4095 elements
        ((64, 65), 8, "dyn8/g256", "udyn8/g256"),
        ((4096,), 4, "dyn4/g128", "ulin4/g128"),
        ((4096, 0), 8, "f32", "f32"),
        ((64, 512), 32, "f32", "f32"),
    ],
)
def test_storages(shape: tuple[int, ...], bits: int, first: str, second: str) -> None:
    layout = Layout(shape, shape)
    assert [str(storage_of(layout, moment, bits)) for moment in (FIRST, SECOND)] == [first, second]
    half = Layout(shape, (shape[0] // 2, *shape[1:]), placements=(Placement(0),))
    in_rows = len(shape) > 1 and shape[1] != 65
    assert str(storage_of(half, FIRST, bits)) == (first if in_rows else "f32")
