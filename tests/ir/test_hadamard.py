"""Hadamard matrices are what they are called; rotations turn and turn back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import QCError
from qcompile.ir.hadamard import hadamard, has_hadamard, random_signs, rotate

SIZES = [1, 2, 4, 16, 128, 512, 12, 20, 28, 24, 40, 48, 80, 96, 112, 36, 44, 108, 140, 192, 320, 448]


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_orthogonal(size: int) -> None:
    matrix = hadamard(size).long()
    assert matrix.abs().eq(1).all()
    assert torch.equal(matrix @ matrix.T, size * torch.eye(size).long())


@pytest.mark.parametrize("size", [n for n in SIZES if n > 1 and has_hadamard(n // 2) and n % 2 == 0])
def test_twice_the_size_is_sylvesters(size: int) -> None:
    assert torch.equal(hadamard(size), torch.kron(hadamard(2), hadamard(size // 2)))


def test_powers_of_two_count_common_bits() -> None:
    assert all(
        hadamard(64)[i, j] == (-1) ** (i & j).bit_count() for i in range(64) for j in range(64)
    )  # Sylvester's matrix, entry by entry


@pytest.mark.parametrize("size", [0, -4, 3, 6, 10, 92, 172])
def test_orders_that_are_not_here(size: int) -> None:
    assert not has_hadamard(size)
    with pytest.raises(QCError, match=r"hadamard\.size"):
        hadamard(size)


def test_every_order_of_four_up_to_80_is_here() -> None:
    missing = {size for size in range(4, 81, 4) if not has_hadamard(size)}
    assert missing == {52}, "order 52 needs the field of 25 elements"


@given(st.sampled_from(SIZES), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_rotating_back(size: int, blocks: int, signed: bool, seed: int) -> None:
    x = torch.randn(2, 3, size * blocks, generator=torch.Generator().manual_seed(seed)).double()
    signs = random_signs(size * blocks, seed) if signed else None
    y = rotate(x, size, signs)
    # The norm stays, and so does x: two rotations, each with at most 2 * size + 2 roundings of float64 on sums whose
    # terms are together at most sqrt(size) * norm / sqrt(size).
    slack = 2 * (2 * size + 2) * 2.0**-53 * x.norm(dim=-1, keepdim=True) * math.sqrt(size)
    assert ((rotate(y, size, signs, inverse=True) - x).abs() <= slack).all()
    assert ((y.norm(dim=-1, keepdim=True) - x.norm(dim=-1, keepdim=True)).abs() <= slack).all()
    matrix = hadamard(size).double() / math.sqrt(size)
    first = x[0, 0, :size] * (1 if signs is None else signs[:size])
    assert ((matrix @ first - y[0, 0, :size]).abs() <= slack[0, 0]).all()


def test_signs_are_both_and_the_same_again() -> None:
    signs = random_signs(1000, 7)
    assert set(signs.tolist()) == {-1, 1}
    assert torch.equal(signs, random_signs(1000, 7))
    assert not torch.equal(signs, random_signs(1000, 8))


def test_types() -> None:
    x = torch.randn(2, 32).bfloat16()
    assert rotate(x, 16).dtype == torch.bfloat16
    assert torch.equal(rotate(x, 16, dtype=torch.float32), rotate(x.float(), 16))


@pytest.mark.parametrize(
    ("shape", "signs", "code"),
    [
        ((3, 20), None, "rotate.shape"),
        ((), None, "rotate.shape"),
        ((3, 32), torch.ones(16, dtype=torch.int8), "rotate.signs"),
        ((3, 32), torch.ones(32), "rotate.signs"),
    ],
)
def test_wrong_operands(shape: tuple[int, ...], signs: torch.Tensor | None, code: str) -> None:
    with pytest.raises(QCError) as raised:
        rotate(torch.zeros(shape), 16, signs)
    assert raised.value.code == code
