"""Fitted scales: never a larger error than the closed form, and exactly the closed form for weights on a grid."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.elements import decode_element, encode_element, round_element
from qcompile.ir.fit import fit_mse, why_unfit
from qcompile.ir.formats import FORMATS
from qcompile.ir.qparams import choose_qparams
from qcompile.ir.scheme import Scheme

SCHEMES = [
    "uint4/g32:fp16+m", "int4/g64:fp16", "uint4/g48:fp16+z", "nf4/g64:fp16", "int8/axis0", "e2m1/g32:e8m0",
    "e4m3/axis0:pow2", "ternary/axis0", "uint2/g32:bf16+m", "binary/g64:fp16",
]  # fmt: skip


def errors(w: Tensor, scheme: str, fit: str) -> Tensor:
    """Squared error of each group, float64 `[n, G]`."""
    size = Scheme.parse(scheme).group_size(w.shape[1])
    error = (dequantize(quantize(w, scheme, fit=fit), scheme, *w.shape).double() - w.double()).square()
    return torch.stack([piece.sum(1) for piece in error.split(size, 1)], 1)


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=8)
@given(
    n=st.integers(1, 40), k=st.sampled_from([1, 31, 64, 200]), tail=st.floats(1, 30), seed=st.integers(0, 99),
    exponent=st.sampled_from([0, -10, 8]),
)  # fmt: skip
def test_no_group_gets_worse(scheme: str, n: int, k: int, tail: float, seed: int, exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator) * 2.0**exponent
    w[:, ::17] *= tail
    before, after = (errors(w, scheme, fit) for fit in ("minmax", "mse"))
    # Both are compared as float32 sums of k squares, each within gamma(k + 3) of the exact one (see cpu_bounds).
    assert (after <= before * (1 + 2 * (k + 3) * 2.0**-24)).all()


@pytest.mark.parametrize("scheme", SCHEMES[:5])
def test_gaussian_weights_gain(scheme: str) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    assert errors(w, scheme, "mse").sum() < errors(w, scheme, "minmax").sum()


@pytest.mark.parametrize("scheme", SCHEMES[:5])
def test_a_weight_on_the_grid_keeps_its_codes(scheme: str) -> None:
    w = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    once = dequantize(quantize(w, scheme), scheme, *w.shape)
    for a, b in zip(quantize(once, scheme, fit="mse"), quantize(once, scheme), strict=True):
        assert torch.equal(a, b)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """Weights are fitted in pieces that fit into the cache; where the pieces end may not matter."""
    w = torch.randn(700, 1000, generator=torch.Generator().manual_seed(2))  # three pieces
    whole, part = fit_mse(w, Scheme.parse("int4/g64")), fit_mse(w[300:400], Scheme.parse("int4/g64"))
    # Sums over one group may be ordered differently in tensors of other shapes, so a near tie may fall the other way.
    differ = (whole.scale[300:400] != part.scale).float().mean()
    assert differ < 0.01


def test_zero_and_constant_groups() -> None:
    w = torch.zeros(4, 64)
    w[1], w[2, :32] = 3.0, -2.0
    for scheme in ("uint4/g32:fp16+m", "int4/g32:fp16", "uint4/g32:fp16+z"):
        assert torch.equal(dequantize(quantize(w, scheme, fit="mse"), scheme, 4, 64)[0], w[0])
        assert (errors(w, scheme, "mse") <= errors(w, scheme, "minmax")).all()


def test_where_rows_share_a_scale_there_is_no_fit() -> None:
    assert why_unfit("minmax", Scheme.parse("int8/tensor")) == ""
    for text in ("int8/tensor", "int8/b32x32", "e2m1/g16:e4m3/tensor", "int8/axis1"):
        assert text.split("/")[0] in why_unfit("mse", Scheme.parse(text))


@pytest.mark.parametrize("name", FORMATS)
def test_round_element_is_encode_and_decode(name: str) -> None:
    y = torch.randn(4096, generator=torch.Generator().manual_seed(3)) * FORMATS[name].max
    expected = decode_element(encode_element(y, FORMATS[name], "nearest"), FORMATS[name])
    assert torch.equal(round_element(y, FORMATS[name]), expected)


def test_the_start_is_the_closed_form() -> None:
    w = torch.randn(8, 64)
    scheme = Scheme.parse("uint4/g32:fp16+m")
    fitted, start = fit_mse(w, scheme), choose_qparams(w, scheme)
    assert fitted.zero is not None
    assert start.zero is not None
    assert fitted.scale.shape == start.scale.shape
    assert (fitted.zero.dtype, fitted.scale.dtype) == (start.zero.dtype, start.scale.dtype)
