"""float32 to bf16 and fp16 by stochastic rounding: what every kernel does, bit for bit.

A parameter in 16 bits that takes small steps stands still under rounding to nearest: a step below half the spacing is
lost, each time. Rounded up with the probability of its fraction, it is right on average.

The definition is on the bits of |x|, so that a kernel needs an addition and a shift, and no comparison of floats:

* In units of the spacing of 16-bit numbers around it, |x| is an integer and a fraction of 16 bits (bf16), of 13 bits
  (normal fp16) or of more (subnormal fp16: rounded to 13 bits, to nearest even).
* |x| goes to the integer above when fraction + random bits reach 1, the bits being a fraction of as many digits: all
  16 random bits for bf16, the upper 13 for fp16. Otherwise to the integer below. The sign stays, that of zero too.
* The neighbour of the largest number is infinity: what passes the range on the way up, or lies beyond, is infinite.
* NaN becomes one pattern, `Half.nan`.

So the expectation over the 65536 values of the random bits is x, exactly, between the smallest normal number and the
largest, for bf16 also below; for subnormal fp16 it is off by at most 2**-14 of a spacing, 2**-38.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import QCError


@dataclass(frozen=True)
class Half:
    """A 16-bit float as a cast from float32 sees it.

    Attributes:
        mantissa: bits kept of the 23. below: how much smaller its exponent bias is. nan: the pattern of every NaN.
    """

    mantissa: int
    below: int
    nan: int

    @property
    def dropped(self) -> int:
        """Bits of a float32 mantissa that a normal number has not."""
        return 23 - self.mantissa

    @property
    def infinity(self) -> int:
        """The pattern of infinity."""
        return (0x8000 - (1 << self.mantissa)) & 0x7FFF

    @property
    def normal(self) -> float:
        """The smallest normal number."""
        return float(2.0 ** (self.below - 126))


HALVES = {torch.bfloat16: Half(7, 0, 0x7FC0), torch.float16: Half(10, 112, 0x7E00)}


def stochastic_cast(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    """Round float32 `x` to bf16 or fp16 with 16 random bits per element.

    Args:
        x: float32, any shape.
        dtype: `torch.bfloat16` or `torch.float16`.
        bits: integers of x's shape, 0 .. 65535 (see `rounding.random_bits`).

    Returns:
        Of x's shape, of `dtype`.

    Raises:
        QCError: `rounding.cast-dtype` for another result type, or an `x` that is not float32.
    """
    half = HALVES.get(dtype)
    if half is None or x.dtype != torch.float32:
        raise QCError(
            "rounding.cast-dtype",
            f"Stochastic rounding of {x.dtype} to {dtype}.",
            why="it is defined from torch.float32 to torch.bfloat16 and torch.float16",
            next="cast to one of them",
        )
    word = x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    size = word & 0x7FFFFFFF
    if half.below:
        # Beside 2**-14 the last place of a float32 is 2**-13 of a subnormal spacing: the sum rounds, and has the integer
        # and the fraction where a normal number has them, its exponent one greater.
        moved = (size.to(torch.int32).view(torch.float32) + half.normal).view(torch.int32).to(torch.int64) - (1 << 23)
        size = torch.where(size < (half.below + 1) << 23, moved, size)
    size = size + (bits.to(torch.int64) >> (16 - half.dropped))
    size = torch.clamp((size >> half.dropped) - (half.below << half.mantissa), max=half.infinity)
    pattern = torch.where(torch.isnan(x), half.nan, size | (word >> 16) & 0x8000)
    return pattern.to(torch.uint16).view(dtype)
