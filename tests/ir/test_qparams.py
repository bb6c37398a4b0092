"""How scales and zero points are chosen: statistics, roundings of the scale itself, empty groups, ends of the range."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.ir.codec import choose_qparams, decode, encode, fake_quant
from qcompile.ir.formats import FORMATS, SCALE_FORMATS
from qcompile.ir.qparams import effective_scale
from qcompile.ir.scales import load_scale, spread
from qcompile.ir.scheme import Nested, Scale, Scheme
from qcompile.testing import oracles
from qcompile.testing.strategies import flat_granularities, nested_granularities, schemes, shapes, tensors

SIGNED_ABSMAX = [f for f in FORMATS.values() if f.signed and f.statistic == "absmax"]


@given(schemes(granularities=nested_granularities()), shapes(24), st.data())
def test_nested_scales_are_the_wanted_ones_rounded_twice(
    scheme: Scheme, shape: tuple[int, int], data: st.DataObject
) -> None:
    x = data.draw(tensors(shape))
    assert isinstance(scheme.granularity, Nested)
    assert scheme.outer is not None
    qparams = choose_qparams(x, scheme)
    assert qparams.outer is not None
    flat = Scheme(scheme.format, scheme.granularity.inner, Scale(SCALE_FORMATS["fp32"], scheme.scale.zero))
    wanted = choose_qparams(x, flat).scale
    live = torch.zeros_like(wanted, dtype=torch.bool)
    for index, slices in oracles.cells(shape, scheme.granularity.inner.cell(2)):
        elements = x[slices] if scheme.format.signed or scheme.scale.zero else x[slices].clamp(min=0)
        live[index] = bool((elements != 0).any())
    inner, outer = scheme.scale.format, load_scale(qparams.outer, scheme.outer.format).double()
    top = {"e4m3": 448.0, "int8": 127.0, "pow2": 1.0}[inner.name]
    for index, slices in oracles.cells(wanted.shape, scheme.granularity.outer_cell(2)):
        got, fmt = outer[index], scheme.outer.format
        most = torch.where(live[slices], wanted[slices], 0.0).max().double() / top
        most = most.clamp(max(fmt.low, 2.0**-102), fmt.high)  # outer * inner stays a normal float32
        if not live[slices].any():
            assert got == 1.0
        elif fmt.kind == "exponent":  # the next power of two; the quotient was rounded before, by 2**-24
            assert most * (1 - 2.0**-23) <= got < 2 * most
        else:
            assert got == most.float().to(fmt.dtype).double()
        ratio = (wanted[slices].double() / got)[live[slices]]
        stored = load_scale(qparams.scale[slices], inner).double()[live[slices]]
        low = max(inner.low, 2.0**-24)
        if inner.kind == "exponent":
            assert bool((stored >= (ratio * (1 - 2.0**-23)).clamp(low, top)).all())
            assert bool((stored < 2 * ratio.clamp(low, top)).all())
        else:  # nearest, up to the rounding of the quotient
            levels = torch.tensor([v for v in inner.values if low <= v <= top], dtype=torch.float64)
            ratio = ratio.clamp(low, top)
            best = (ratio[:, None] - levels).abs().min(1).values
            assert bool(((stored - ratio).abs() <= best + 2.0**-23 * ratio).all())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", ["fp16", "fp32", "e8m0", "pow2", "fp32~floor"])
def test_zero_groups(name: str, scale: str) -> None:
    scheme = Scheme.parse(f"{name}/g4:{scale}")
    x = torch.zeros(3, 8)
    x[1] = torch.linspace(-1, 1, 8)
    qparams = choose_qparams(x, scheme)
    value = decode(encode(x, scheme, qparams), scheme, qparams)
    if scheme.format.values[scheme.format.zero_code] == 0:
        assert effective_scale(qparams, scheme, 2)[[0, 2]].tolist() == [[1.0, 1.0], [1.0, 1.0]]
        assert bool((value[[0, 2]] == 0).all())
    else:  # binary has no zero: scale 0, or as near as the scale's format comes
        assert float(value[[0, 2]].abs().max()) <= (2.0**-126 if scale in ("e8m0", "pow2") else 0.0)
    assert bool((encode(x, scheme, qparams)[[0, 2]] == scheme.format.zero_code).all())


def test_a_tiny_group_beside_a_huge_one_is_not_an_empty_group() -> None:
    x = torch.tensor([[2.0**-140, 0.0, 2.0**100, 0.0, 0.0, 0.0]])
    qparams = choose_qparams(x, "int4/g2:e4m3/tensor:fp32")
    # the least inner scale, the largest, and 1 for the group of zeros
    assert load_scale(qparams.scale, SCALE_FORMATS["e4m3"]).tolist() == [[2.0**-9, 448.0, 1.0]]


@given(st.integers(1, 5), st.integers(1, 40), st.data())
def test_int8_token_is_the_formula_kernels_use(rows: int, k: int, data: st.DataObject) -> None:
    x = data.draw(tensors((2, rows, k), exponents=(-100, 100)))
    scheme = Scheme.parse("int8/token:fp32")
    absmax = x.abs().amax(-1, keepdim=True)
    live = absmax > 127 * 2.0**-126  # where neither the quotient nor the scale leaves the normal range
    qparams = choose_qparams(x, scheme)
    codes = encode(x, scheme, qparams).float() - 128
    assert torch.equal(torch.where(live, qparams.scale, 0.0), torch.where(live, absmax / 127, 0.0))
    assert torch.equal(torch.where(live, codes, 0.0), torch.where(live, torch.round(x * (127 / absmax)), 0.0))
    assert bool((qparams.scale[absmax == 0] == 1).all())


def half_steps() -> tuple[Tensor, Tensor]:
    """Rows `[500, 128]` of (2k + 1) / 254 times their peak, where the order of operations decides the rounding."""
    peak = torch.rand(500, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    x = peak * (torch.arange(127) * 2 + 1) / 254
    return torch.cat((x, peak), 1), peak


def test_weights_are_divided_and_tokens_multiplied() -> None:
    x, peak = half_steps()
    divided, multiplied = torch.round(x / (peak / 127)), torch.round(x * (torch.full_like(peak, 127) / peak))
    assert bool((divided != multiplied).any())
    assert bool((divided != torch.round(x * (1 / (peak / 127)))).any())
    for text, expected in (("int8/axis0:fp32", divided), ("int8/token:fp32", multiplied)):
        assert torch.equal(encode(x, text, choose_qparams(x, text)).float() - 128, expected)


def test_means_are_exact_and_count_ragged_groups() -> None:
    # 1 and 30 bits below it: a float32 sum would lose the small ones, a float64 sum is exact
    x = torch.tensor([[1.0, *[2.0**-25] * 64, -1.0, 3.0]])
    scales = choose_qparams(x, "ternary/g65:fp32").scale[0].tolist()
    assert scales == [float(torch.tensor((1 + 64 * 2.0**-25) / 65)), 2.0]
    assert choose_qparams(x, "binary/b1x65:fp32").scale[0].tolist() == scales
    assert choose_qparams(x, "binary/axis0:fp32").scale.item() == float(torch.tensor((5 + 64 * 2.0**-25) / 67))


def test_a_minimum_of_zero_is_stored_as_positive_zero() -> None:
    for x in (torch.tensor([[0.0, -0.0, 1.0]]), torch.tensor([[-0.0, 0.0, 1.0]])):
        minimum = choose_qparams(x, "uint4/axis0:fp32+m").zero
        assert minimum is not None
        assert not minimum.signbit().any()


def test_a_range_beyond_float32_still_has_a_scale() -> None:
    x = torch.tensor([[-3e38, 3e38]])
    for zero in ("z", "m"):  # the two ends, their difference and the quotient are rounded: four times 2**-24
        scale = choose_qparams(x, f"uint8/axis0:fp32+{zero}").scale.item()
        assert abs(scale - 6e38 / 255) <= 2.0**-22 * 6e38 / 255
    assert fake_quant(x, "uint8/axis0:fp32+z").isfinite().all()


def test_scales_of_the_documented_examples() -> None:
    row = torch.tensor([[-1.0, 0.3, 0.75, 2.0]])

    def chosen(text: str) -> tuple[float, float | None, list[int]]:
        q = choose_qparams(row, text)
        scheme = Scheme.parse(text)
        zero = None if q.zero is None else float(q.zero)
        return float(effective_scale(q, scheme, 2)), zero, encode(row, scheme, q)[0].tolist()

    # 2/127; codes 128 + round(x * 63.5)
    assert chosen("int8/axis0:fp32") == (float(torch.tensor(2 / 127)), None, [64, 147, 176, 255])
    # 3/15 = 0.2 as half = 0.199951171875; m = -1; 1.3/s = 6.50..., 1.75/s = 8.75
    assert chosen("uint4/g4:fp16+m") == (0.199951171875, -1.0, [0, 7, 9, 15])
    # 2/7 as half = 0.28564453125
    assert chosen("int4/g4:fp16") == (0.28564453125, None, [8 - 4, 8 + 1, 8 + 3, 8 + 7])
    # s as for +m; z = round(1 / s) = 5
    assert chosen("uint4/g4:fp16+z") == (0.199951171875, 5.0, [0, 7, 9, 15])
    # mean |x| = 1.0125; codes 0, 1, 2 are -1, 0, 1
    assert chosen("ternary/axis0:fp32") == (float(torch.tensor(1.0125)), None, [0, 1, 2, 2])
    assert chosen("binary/axis0:fp32") == (float(torch.tensor(1.0125)), None, [0, 1, 1, 1])


def test_power_of_two_scales() -> None:
    peaks = torch.tensor([[3.0], [4.0], [5.9], [6.0], [6.1], [7.9], [8.0]])
    mx, up = (
        effective_scale(choose_qparams(peaks, s), s, 2) for s in map(Scheme.parse, ("e2m1/g1:e8m0", "e2m1/g1:pow2"))
    )
    assert mx[:, 0].tolist() == [
        0.5,
        1,
        1,
        1,
        1,
        1,
        2,
    ]  # 2**(floor(log2 absmax) - 2): 6.1 and 7.9 saturate at 6
    assert up[:, 0].tolist() == [0.5, 1, 1, 1, 2, 2, 2]  # the least power of two whose 6 * s reaches absmax


@given(
    schemes(st.sampled_from(SIGNED_ABSMAX), flat_granularities(), ("pow2",), roundings=("nearest",)),
    shapes(30),
    st.data(),
)
def test_powers_of_two_do_not_clip(scheme: Scheme, shape: tuple[int, int], data: st.DataObject) -> None:
    x = data.draw(tensors(shape))
    s = spread(effective_scale(choose_qparams(x, scheme), scheme, 2), scheme.granularity.cell(2), x.shape)
    # the quotient absmax / Q is rounded once, before it is rounded up
    assert bool((x.abs().double() <= s.double() * scheme.format.max * (1 + 2.0**-23)).all())
