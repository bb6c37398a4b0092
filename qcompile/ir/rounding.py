"""Rounding to integers, and the random bits that stochastic rounding needs.

Randomness is counter-based (Philox4x32-10; Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC
2011): the bits of an element depend on the key and on the element's *global index* alone, so results do not
depend on tiling, sharding, threads or device, and a run can be resumed. One block serves eight elements:

    element i uses the low (i even) or high (i odd) 16 bits of word ((i mod 8) div 2)
    of philox4x32_10(counter = (b mod 2**32, b div 2**32, stream...), key = seed),  b = i div 8

Everything is int64 arithmetic on tensors, without branches on values: it traces, and seed and stream may be
tensors, so that a new step compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.errors import QCError

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
LANES = 8  # elements per block

Word = int | Tensor
Stream = tuple[Word, Word]


def philox4x32(counter: tuple[Word, Word, Word, Word], key: tuple[Word, Word]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: four 32-bit words, int64 tensors (broadcast against each other) or ints; at least one tensor.
        key: two 32-bit words.

    Returns:
        four int64 tensors holding 32-bit words.
    """
    c0, c1, c2, c3 = (word & _MASK for word in counter)
    k0, k1 = (word & _MASK for word in key)
    for _ in range(_ROUNDS):
        # a wrapping int64 product has the right 64 bits; the mask after the shift drops the copied sign
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    tensors = [word for word in (c0, c1, c2, c3) if isinstance(word, Tensor)]
    assert len(tensors) == 4, "a counter needs a tensor word"
    return tuple(tensors)


def random_bits(
    count: int,
    seed: Word,
    offset: Word = 0,
    stream: Stream = (0, 0),
    device: torch.device | str | None = None,
) -> Tensor:
    """16 random bits for each of the elements `offset .. offset + count - 1`.

    Args:
        count: how many.
        seed: 64-bit key; an int or an int64 tensor of one element.
        offset: global index of the first element.
        stream: two more 32-bit counter words (for example the step and a parameter's number).

    Returns:
        int64 `[count]`, values 0 .. 65535.
    """
    blocks = count // LANES + 2  # enough for any alignment of `offset` in its block
    block = torch.arange(blocks, dtype=torch.int64, device=device) + offset // LANES
    words = torch.stack(philox4x32((block, block >> 32, *stream), (seed, seed >> 32)), dim=1)
    halves = torch.stack((words & 0xFFFF, words >> 16), dim=2).reshape(-1)
    if isinstance(offset, Tensor):
        return halves[torch.arange(count, device=device) + offset % LANES]
    return halves[offset % LANES : offset % LANES + count]


def random_bits_at(index: Tensor, seed: Word, stream: Stream = (0, 0)) -> Tensor:
    """The same bits for any int64 tensor of global indices (a tile, a shard): one block per element, so
    slower.
    """
    block, lane = index // LANES, index % LANES
    words = torch.stack(philox4x32((block, block >> 32, *stream), (seed, seed >> 32)), dim=-1)
    word = torch.gather(words, -1, (lane >> 1).unsqueeze(-1)).squeeze(-1)
    return (word >> ((lane & 1) * 16)) & 0xFFFF


def round_to_integer(t: Tensor, rounding: str, bits: Tensor | None = None) -> Tensor:
    """Round float32 `t` to an integer value (still float32).

    `nearest` rounds ties to even; `floor` towards minus infinity; `stochastic` up with probability p and down
    with 1 - p, where p is the fractional part of `t` rounded to 16 bits: exact when the fraction has no more
    bits (bf16 from float32), otherwise the expectation is off by at most 2**-17.

    Args:
        bits: int64 of t's shape, 0 .. 65535, for `stochastic`.

    Raises:
        QCError `rounding.no-bits` when stochastic rounding gets none.
    """
    if rounding == "nearest":
        return torch.round(t)
    low = torch.floor(t)
    if rounding == "floor":
        return low
    if bits is None:
        raise QCError("rounding.no-bits", "stochastic rounding without random bits", next="pass seed=")
    # exact, except that a tiny negative t gives 1: up to zero, as it should nearly always go
    chance = torch.floor((t - low) * 65536.0 + 0.5)
    return low + (chance + bits >= 65536.0).to(t.dtype)


def bits_for(shape: Sequence[int], seed: Word, offset: Word, stream: Stream, device: torch.device) -> Tensor:
    """Random bits of a contiguous tensor whose first element has global index `offset`."""
    count = 1
    for size in shape:
        count = count * size
    return random_bits(count, seed, offset, stream, device).reshape(shape)
