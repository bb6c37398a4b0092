"""The unit of the derived bounds: they hold for sums with as many bits as kernels have, and not for one bit less."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton_bounds import Expected, expected
from qcompile.ir.packing import pack_codes, pack_scales
from tests.codegen.products import allowed, spec_of

K = 256


def hard_sum() -> tuple[Expected, Tensor]:
    """A product of one row and one column, and its terms: 32, and 255 that are just below the last of 22 bits behind the
    leading one of the sum. An accumulator that has no more loses all of each, one that has 23 half of each, as it cuts."""
    x = torch.full((1, K), 2.0**-24)
    x[0, 0] = 0.5
    numbers = torch.full((1, K), 127)
    numbers[0, 0] = 64
    spec = spec_of("int8/axis0:fp32", y="f32")
    parts = [pack_codes((numbers + 128).to(torch.uint8), 8, "mma16"), pack_scales(torch.ones(1, 1), "mma16")]
    return expected(spec, x.half(), parts, 1, K), (x.double() * numbers)[0]


def test_a_bound_by_hand() -> None:
    """One rounding of 2^-23 for each of 256 columns, for each of their 4 units of 64, for the scale, and 8 at the end."""
    want, terms = hard_sum()
    assert want.value.item() == terms.sum()
    assert want.value.item() == 32 + 255 * 127 * 2.0**-24
    by_hand = 269 / (2**23 - 269) * want.value.item()  # n u / (1 - n u)
    assert want.bound.item() == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(("bits", "holds"), [(24, True), (23, True), (22, False), (17, False)])
def test_an_accumulator_with_too_few_bits_is_found(bits: int, holds: bool) -> None:
    """Sums that are cut to so many bits behind the leading one."""
    want, terms = hard_sum()
    total = 0.0
    for term in terms.tolist():
        mantissa, exponent = math.frexp(total + term)
        total = math.ldexp(math.floor(mantissa * 2.0 ** (bits + 1)), exponent - bits - 1)
    error = abs(total - want.value.item())
    assert (error <= allowed(want.value, want.bound, "f32").item()) == holds
    assert holds or error > 1.5 * want.bound.item()
