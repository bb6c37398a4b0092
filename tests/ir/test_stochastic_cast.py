"""Stochastic rounding to 16-bit floats: the definition in fractions, every value of the random bits, every pattern."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qcompile.errors import QCError
from qcompile.ir.stochastic_cast import HALVES, stochastic_cast

EVERY_BITS = torch.arange(65536)
MANTISSA = {torch.bfloat16: 7, torch.float16: 10}
DTYPES = pytest.mark.parametrize("dtype", HALVES, ids=str)
patterns = st.integers(0, 2**32 - 1)  # every float32, NaN and infinity among them


def of_pattern(pattern: int) -> torch.Tensor:
    return torch.tensor([pattern], dtype=torch.int64).to(torch.int32).view(torch.float32)


def spacing(x: float, dtype: torch.dtype) -> Fraction:
    """The distance of numbers of `dtype` around x, as if its exponents had no upper end."""
    smallest = Fraction(torch.finfo(dtype).tiny)
    exponent = math.frexp(x)[1] - 1 if abs(x) > smallest else math.frexp(smallest)[1] - 1
    return Fraction(2) ** (exponent - MANTISSA[dtype])


def by_definition(x: float, dtype: torch.dtype, bits: int) -> float:
    """What stochastic_cast says of itself, in fractions."""
    if not math.isfinite(x):
        return x
    digits = 23 - MANTISSA[dtype]
    unit = spacing(x, dtype)
    below, fraction = divmod(abs(Fraction(x)) / unit, 1)
    chance = round(fraction * 2**digits)  # to nearest even
    size = (below + (chance + (bits >> 16 - digits) >= 2**digits)) * unit
    return math.copysign(math.inf if size > Fraction(torch.finfo(dtype).max) else float(size), x)


@DTYPES
@given(patterns, st.integers(0, 65535))
@example(0x33800001, 0)  # just above half of the smallest fp16
@example(0x387FFFFF, 65535)  # below the smallest normal fp16
@example(0x477FF000, 65535)  # half way from the largest fp16 to what would be next
@example(0x80000001, 65535)
def test_the_definition(dtype: torch.dtype, pattern: int, bits: int) -> None:
    x = of_pattern(pattern)
    got, want = stochastic_cast(x, dtype, torch.tensor([bits])).item(), by_definition(x.item(), dtype, bits)
    assert got == want or (math.isnan(got) and math.isnan(want))
    assert math.isnan(got) or math.copysign(1, got) == math.copysign(1, want)


@DTYPES
@settings(max_examples=20)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False) | st.floats(-(2.0**-13), 2.0**-13, width=32))
@example(65535.0)  # fp16: between the largest number and infinity
@example(-3.4028234663852886e38)
def test_the_mean_over_all_bits_is_the_value(dtype: torch.dtype, x: float) -> None:
    values = stochastic_cast(torch.full((65536,), x), dtype, EVERY_BITS).double().abs()
    limit = 2.0 ** (math.frexp(torch.finfo(dtype).max)[1])  # what infinity stands for, one number above the largest
    if abs(x) >= limit:
        assert values.isinf().all()
        return
    low, high = (Fraction(min(v.item(), limit)) for v in values.aminmax())
    unit = spacing(x, dtype)
    assert high - low in (0, unit)
    mean = low + Fraction(int((values > float(low)).sum()), 65536) * (high - low)
    exact = dtype == torch.bfloat16 or abs(x) >= torch.finfo(dtype).tiny
    assert low <= abs(Fraction(x)) <= high or not exact
    assert abs(mean - abs(Fraction(x))) <= (0 if exact else unit / 2**14)


@DTYPES
def test_every_number_of_the_type_is_itself(dtype: torch.dtype) -> None:
    numbers = EVERY_BITS.to(torch.uint16).view(dtype)
    for bits in (0, 1, 7, 8, 32768, 65535):
        got = stochastic_cast(numbers.float(), dtype, torch.full((65536,), bits))
        nan = numbers.isnan()
        assert torch.equal(got[~nan].view(torch.int16), numbers[~nan].view(torch.int16))
        assert (got[nan].view(torch.int16) == HALVES[dtype].nan).all()


@DTYPES
@given(patterns, st.integers(0, 65534))
def test_more_bits_never_give_less(dtype: torch.dtype, pattern: int, bits: int) -> None:
    x = of_pattern(pattern).abs().repeat(2)
    less, more = stochastic_cast(x, dtype, torch.tensor([bits, bits + 1])).tolist()
    assert less <= more or math.isnan(less)


def test_other_types_are_refused() -> None:
    with pytest.raises(QCError, match=r"rounding\.cast-dtype"):
        stochastic_cast(torch.zeros(1), torch.float32, torch.zeros(1).long())
    with pytest.raises(QCError, match=r"rounding\.cast-dtype"):
        stochastic_cast(torch.zeros(1).double(), torch.bfloat16, torch.zeros(1).long())
