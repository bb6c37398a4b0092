"""Hadamard rotations by a Triton kernel: within the derived bound, and exactly where sums are exact."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton_rotate import PANEL, Rotation, Tile, choose_tile, expected, rotate
from qcompile.errors import QCError
from qcompile.ir.hadamard import hadamard, random_signs
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.testing.interpret import interpret

DTYPES = list(OUT_DTYPES.values())
# Powers of two, blocks that fill a panel and that do not, two and four panels.
SIZES = [1, 2, 16, 32, 64, 128, 256, 512, 12, 20, 24, 28, 40, 48, 80, 96, 108, 112, 160, 192, 216, 448]
TILES = [None, Tile(16, 128, 3, 4, 1), Tile(32, 128, 2, 4, 3), Tile(16, 64, 2, 4, 2)]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


def spread(rows: int, columns: int, dtype: torch.dtype, seed: int, pad: int = 0) -> torch.Tensor:
    """Numbers with outliers, rows at a distance with NaN between them."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((rows, columns + pad), torch.nan)
    memory[:, :columns] = torch.randn(rows, columns, generator=generator)
    memory[:, 0] *= 100
    return memory.to(dtype)[:, :columns]


@settings(max_examples=60)
@given(
    size=st.sampled_from(SIZES),
    blocks=st.integers(1, 3) | st.integers(1, 12),
    rows=st.integers(1, 20) | st.integers(1, 80),
    x=st.sampled_from(DTYPES),
    y=st.sampled_from([None, *DTYPES]),
    signed=st.booleans(),
    inverse=st.booleans(),
    tile=st.sampled_from(TILES),
    pad=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_rotation(
    size: int,
    blocks: int,
    rows: int,
    x: torch.dtype,
    y: torch.dtype | None,
    signed: bool,
    inverse: bool,
    tile: Tile | None,
    pad: int,
    seed: int,
) -> None:
    columns = size * min(blocks, 1 + 600 // size)
    values = spread(rows, columns, x, seed, pad)
    signs = random_signs(columns, seed) if signed else None
    if tile is not None and not Rotation(size, "f16", "f16").panels(tile.width):
        tile = None
    got = rotate(values, size, signs, inverse, y, tile)
    want = expected(values, size, signs, inverse, y)
    assert (got.shape, got.dtype) == (values.shape, y or x)
    assert ((got.double() - want.value).abs() <= want.bound).all()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("inverse", [False, True])
def test_one_value_at_a_time_is_exact(size: int, inverse: bool) -> None:
    """A sum with one term has no rounding, of fp32 neither, whose three operands hold all of its bits: what is left is the
    product with the scale."""
    x = torch.diag(torch.randn(size, generator=torch.Generator().manual_seed(size)))
    signs = random_signs(size, 5)
    matrix = hadamard(size).float()
    signed = (matrix * signs).T if not inverse else matrix * signs
    assert torch.equal(rotate(x, size, signs, inverse), x.diag()[:, None] * signed * torch.tensor(1 / math.sqrt(size)))


def test_any_leading_dimensions() -> None:
    x = spread(2 * 3 * 5, 48, torch.float32, 0).reshape(2, 3, 5, 48)
    flat = rotate(x.reshape(30, 48), 24)
    assert torch.equal(rotate(x, 24).reshape(30, 48), flat)
    assert torch.equal(rotate(x.transpose(0, 2), 24), rotate(x, 24).transpose(0, 2))
    assert torch.equal(rotate(x.reshape(30, 48).T.contiguous().T, 24), flat)
    assert torch.equal(rotate(x[0, 0, 0], 24), flat[0])


def test_signs_anywhere_in_memory() -> None:
    x, signs = spread(3, 36, torch.float32, 1), random_signs(39, 2)
    moved = torch.stack((signs, -signs), 1)
    assert torch.equal(rotate(x, 12, signs[3:]), rotate(x, 12, moved[3:, 0]))
    odd = spread(3, 5, torch.float16, 1)
    assert torch.equal(rotate(odd, 1, signs[3:8]), odd * signs[3:8])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_value_stays_in_its_row(bad: float, dtype: torch.dtype) -> None:
    x = spread(20, 256, dtype, 3)
    clean = rotate(x, 64)
    x[7, 70] = bad
    y = rotate(x, 64)
    assert not y[7, 64:128].isfinite().any()
    others = torch.arange(20) != 7
    assert torch.equal(y[others], clean[others])


def test_nothing_to_do() -> None:
    assert rotate(torch.empty(0, 32), 16).shape == (0, 32)
    assert rotate(torch.empty(3, 0), 16).shape == (3, 0)


@pytest.mark.parametrize(("size", "columns"), [(1024, 1024), (140, 140), (1, 8)])
def test_refusals_have_a_reason(size: int, columns: int) -> None:
    dtype = torch.float64 if size == 1 else torch.float32
    with pytest.raises(QCError, match=r"rotate\.kernel"):
        rotate(torch.zeros(2, columns, dtype=dtype), size)
    assert not Rotation(6, "f32", "f32").verdict()
    assert all(Rotation(size, "f32", "f32").verdict() for size in SIZES)


def test_a_tile_for_every_shape() -> None:
    """Panels stay as narrow as K, and no rows are left to nobody."""
    narrow = choose_tile(Rotation(16, "f16", "f16"), 1000, 32, torch.device("cpu"))
    assert narrow.width == 32
    wide = choose_tile(Rotation(16, "f16", "f16"), 1000, 4096, torch.device("cpu"))
    assert wide.width == PANEL
    assert 1 <= wide.splits <= 1000 / wide.rows + 1
    assert choose_tile(Rotation(16, "f16", "f16"), 1, 16, torch.device("cpu")).splits == 1
