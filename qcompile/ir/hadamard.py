"""Hadamard matrices, and the rotation of a tensor's last dimension by them, in blocks.

A rotation spreads outliers over its block before values are rounded to few bits, and can be undone, or be taken into the
weights on both sides. A Hadamard matrix has entries +1 and -1 and orthogonal rows: over sqrt(size) it is a rotation that
needs no table of angles, and no multiplications.

* `2**n`: Sylvester's construction, H(2n) = [[H, H], [H, -H]], with one H of order 1.
* An odd factor (dimensions such as 3072 = 12 * 256, 5120 = 20 * 256, 14336 = 28 * 512): Paley's constructions from squares
  modulo a prime q (R. E. A. C. Paley, "On orthogonal matrices", 1933). The first, for q = 3 modulo 4, has order q + 1
  (12, 20, 44, ...); the second, for q = 1 modulo 4, order 2 (q + 1) (28, 36, 76, ...). Of order `2**n * m` the smallest
  order of the same m that has one is taken, and Sylvester's construction goes on from there.

So a matrix of size 2 n is always Sylvester's of order 2 times that of size n, where n has one.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.rounding import Word, random_bits


def hadamard(size: int) -> Tensor:
    """The matrix of an order.

    Returns:
        int8 `[size, size]` of +1 and -1, with `H @ H.T == size * I`. Symmetric for powers of two. To be read only: one
        tensor serves all calls.

    Raises:
        QCError: `hadamard.size` when neither construction has this order.
    """
    return _matrix(size)


def has_hadamard(size: int) -> bool:
    """Whether `hadamard(size)` has an answer."""
    return size >= 1 and _base(size) > 0


@functools.cache
def _matrix(size: int) -> Tensor:
    _check_order(size)
    base = _base(size)
    matrix = torch.ones(1, 1, dtype=torch.int8) if base == 1 else _paley(base)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _check_order(size: int) -> None:
    if not has_hadamard(size):
        raise QCError(
            "hadamard.size",
            f"There is no Hadamard matrix of order {size} here.",
            why="orders are powers of two, and those that Paley's constructions from a prime give, times powers of two",
            next="take a block of another size, a power of two for example",
        )


def _base(size: int) -> int:
    """The order that Sylvester's construction starts from, 0 when there is none."""
    order = size // (size & -size)  # the odd factor
    while order <= size:
        if order == 1 or _first(order) or _second(order):
            return order
        order *= 2
    return 0


def _first(order: int) -> bool:
    return order % 4 == 0 and _prime(order - 1)


def _second(order: int) -> bool:
    return order % 4 == 0 and (order // 2 - 1) % 4 == 1 and _prime(order // 2 - 1)


def _prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, math.isqrt(q) + 1))


def _paley(order: int) -> Tensor:
    """Both constructions border Jacobsthal's matrix, Q[i, j] = 1, -1 or 0 as i - j is a square, none, or 0 modulo q."""
    q = order - 1 if _first(order) else order // 2 - 1
    index = torch.arange(q)
    character = torch.full((q,), -1, dtype=torch.int8)
    character[index * index % q] = 1
    character[0] = 0
    bordered = torch.ones(q + 1, q + 1, dtype=torch.int8)
    bordered[0, 0] = 0
    bordered[1:, 1:] = character[(index[:, None] - index[None, :]) % q]
    unit = torch.eye(q + 1, dtype=torch.int8)
    if _first(order):
        bordered[1:, 0] = -1  # Q is skew here: so is the whole, and S + I is a Hadamard matrix
        return bordered + unit
    plus, minus = torch.tensor([[1, 1], [1, -1]]), torch.tensor([[1, -1], [-1, -1]])
    return (torch.kron(bordered, plus) + torch.kron(unit, minus)).to(torch.int8)


def random_signs(count: int, seed: Word) -> Tensor:
    """`count` signs, int8 +1 or -1: the lowest random bit of each element (see `rounding`), 1 for -1."""
    return (1 - 2 * (random_bits(count, seed) & 1)).to(torch.int8)


def rotate(
    x: Tensor, size: int, signs: Tensor | None = None, inverse: bool = False, dtype: torch.dtype | None = None
) -> Tensor:
    """Rotate blocks of the last dimension: `y = H (s x) / sqrt(size)`, or back, `x = s (H^T y) / sqrt(size)`.

    Args:
        x: floats `[..., K]`, K a multiple of `size`; computed in float32, or float64 where x has it.
        size: of a block, an order that `hadamard` has.
        signs: int8 `[K]` of +1 and -1, or None for +1.
        dtype: a float one of the result, None for that of x.

    Returns:
        `[..., K]`.

    Raises:
        QCError: `hadamard.size`; `rotate.shape` when K is no multiple of the size, `rotate.signs` when there are not K,
            `rotate.dtype` when x or the result would be of integers.
    """
    check_rotation(x, size, signs, dtype)
    matrix = hadamard(size).to(x.device, torch.promote_types(x.dtype, torch.float32))
    wide = x.to(matrix.dtype)
    if signs is not None and not inverse:
        wide = wide * signs
    turned: Tensor = wide.unflatten(-1, (-1, size)) @ (matrix if inverse else matrix.T)
    y = turned.flatten(-2) / math.sqrt(size)
    if signs is not None and inverse:
        y = y * signs
    return y.to(dtype or x.dtype)


def check_rotation(x: Tensor, size: int, signs: Tensor | None, dtype: torch.dtype | None = None) -> None:
    """Raise what `rotate` raises for such operands."""
    _check_order(size)
    for what, given in (("operand", x.dtype), ("result", dtype or x.dtype)):
        if not (given.is_floating_point or given.is_complex):
            raise QCError(
                "rotate.dtype",
                f"A rotation has no {what} in {given}.",
                why="it divides by the square root of its size, which whole numbers do not survive",
                next="rotate floats: the decoded values in place of codes, or x.float()",
            )
    if x.dim() == 0 or x.shape[-1] % size:
        raise QCError(
            "rotate.shape",
            f"Blocks of {size} do not divide the last dimension of {tuple(x.shape)}.",
            next="take a size that divides it",
        )
    if signs is not None and (tuple(signs.shape) != (x.shape[-1],) or signs.dtype != torch.int8):
        raise QCError(
            "rotate.signs",
            f"Signs of shape {tuple(signs.shape)} and {signs.dtype} for {x.shape[-1]} values.",
            next="pass an int8 tensor with one +1 or -1 for each value of the last dimension",
        )
