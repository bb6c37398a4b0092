"""The laws of choose, encode, decode, quantize."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.codec import (
    choose_qparams,
    decode,
    dequantize,
    dequantize_rows,
    encode,
    fake_quant,
    part_names,
    quantize,
)
from qcompile.ir.elements import decode_element
from qcompile.ir.formats import FORMATS, SCALE_FORMATS
from qcompile.ir.qparams import effective_scale
from qcompile.ir.scales import load_scale, spread
from qcompile.ir.scheme import Nested, PerTensor, Scale, Scheme
from qcompile.testing import oracles
from qcompile.testing.strategies import flat_granularities, nested_granularities, schemes, shapes, tensors

SEED = 11
SIGNED_ABSMAX = [f for f in FORMATS.values() if f.signed and f.statistic == "absmax"]
deterministic = schemes(roundings=("nearest", "floor"))
nearest = schemes(roundings=("nearest",))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit, NaN included (and 0.0 apart from -0.0)."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(integer), b.view(integer))


@given(nearest, shapes(), st.data())
def test_error_is_at_most_half_a_step(scheme: Scheme, shape: tuple[int, int], data: st.DataObject) -> None:
    x = data.draw(tensors(shape))
    qparams = choose_qparams(x, scheme)
    value = decode(encode(x, scheme, qparams), scheme, qparams)
    assert bool(((value.double() - x.double()).abs() <= oracles.error_bound(x, scheme, qparams)).all())


@given(deterministic, shapes(), st.data())
def test_encoding_what_was_decoded_changes_nothing(scheme: Scheme, shape: tuple[int, int], data: st.DataObject) -> None:
    x = data.draw(tensors(shape))
    qparams = choose_qparams(x, scheme)
    codes = encode(x, scheme, qparams)
    value = decode(codes, scheme, qparams)
    if scheme.rounding == "floor":
        # l * s rounds down as often as up, so a level may come back as its lower neighbour: shift half a step
        again = encode(value, Scheme.parse(str(scheme).replace("~floor", "")), qparams)
    else:
        again = encode(value, scheme, qparams)
    if scheme.scale.zero == "m":
        # The value is rounded to float32 after adding m: y comes back with an error of
        # u (2|value| / s + 3 code), which stays below half a step while |value| / s < 2**21.
        s = spread(effective_scale(qparams, scheme, 2), scheme.granularity.cell(2), value.shape)
        sharp = value.abs() / s < 2.0**21
        codes, again = codes[sharp], again[sharp]
    assert torch.equal(again, codes)


@given(schemes(granularities=st.just(PerTensor()), roundings=("nearest", "floor")), st.integers(1, 80), st.data())
def test_encode_is_monotone(scheme: Scheme, count: int, data: st.DataObject) -> None:
    qparams = choose_qparams(data.draw(tensors((count,))), scheme)
    x = data.draw(tensors((2 * count,))).sort().values  # values the scale was not chosen for, so also outside
    value = decode(encode(x, scheme, qparams), scheme, qparams)
    assert bool((value[1:] >= value[:-1]).all())


@given(schemes(), shapes(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_fake_quant_is_decode_of_encode(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    x = data.draw(tensors(shape, dtype, (-20, 10)))
    qparams = choose_qparams(x, scheme)
    codes = encode(x, scheme, qparams, seed=SEED)
    assert codes.shape == x.shape
    assert int(codes.max()) < 1 << scheme.format.bits
    value = fake_quant(x, scheme, seed=SEED)
    assert value.dtype == dtype
    assert same(value, decode(codes, scheme, qparams, dtype))
    # strides do not matter
    assert same(value, fake_quant(x.contiguous(), scheme, seed=SEED))


@given(schemes(), shapes(), st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_packed_weights_decode_to_the_same_bits(
    scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype, data: st.DataObject
) -> None:
    w = data.draw(tensors(shape, exponents=(-20, 10)))
    parts = quantize(w, scheme, seed=SEED)
    assert len(parts) == len(part_names(scheme))
    assert all(p.dtype in (torch.uint8, torch.int8) or p.dtype == scheme.scale.format.dtype for p in parts[:2])
    value = dequantize(parts, scheme, *shape, dtype)
    assert same(value, fake_quant(w, scheme, seed=SEED).to(dtype))


@given(
    schemes(granularities=flat_granularities(20), roundings=("nearest",)),
    shapes(24),
    st.booleans(),
    st.data(),
)
def test_a_granularity_is_the_tensor_scheme_on_each_cell(
    scheme: Scheme, shape: tuple[int, int], spoil: bool, data: st.DataObject
) -> None:
    x = data.draw(tensors(shape, nonfinite=spoil))
    whole = Scheme(scheme.format, PerTensor(), scheme.scale, None, scheme.packing, scheme.rounding)
    qparams = choose_qparams(x, scheme)
    codes = encode(x, scheme, qparams._replace(inverse=None))
    for index, slices in oracles.cells(shape, scheme.granularity.cell(2)):
        alone = choose_qparams(x[slices], whole)
        assert same(qparams.scale[index].reshape(1, 1), alone.scale)
        if qparams.zero is not None and alone.zero is not None:
            assert same(qparams.zero[index].reshape(1, 1), alone.zero)
        assert torch.equal(codes[slices], encode(x[slices], whole, alone))


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_with_nan_or_infinity_are_refused_by_index(bad: float) -> None:
    w = torch.zeros(20, 33)
    w[17, 5] = bad
    with pytest.raises(QCError, match=r"index \[17, 5\]") as caught:
        quantize(w, "int4/g32")
    assert caught.value.code == "codec.nonfinite-weight"


@given(schemes(), shapes(30), st.data())
def test_a_cell_with_nan_or_infinity_decodes_to_nan_and_others_are_untouched(
    scheme: Scheme, shape: tuple[int, int], data: st.DataObject
) -> None:
    granularity = scheme.granularity
    x = data.draw(tensors(shape, exponents=(-20, 10))).contiguous()
    spoiled = x.clone()
    spoiled[0, -1] = data.draw(st.sampled_from([math.nan, math.inf, -math.inf]))
    clean, dirty = fake_quant(x, scheme, seed=SEED), fake_quant(spoiled, scheme, seed=SEED)
    reach = granularity.outer if isinstance(granularity, Nested) else granularity
    hit = torch.zeros(shape, dtype=torch.bool)
    for _, slices in oracles.cells(shape, reach.cell(2)):
        touched = torch.zeros(shape, dtype=torch.bool)
        touched[slices] = True
        hit |= touched & touched[0, -1]
    assert bool(dirty[hit].isnan().all())
    assert same(dirty[~hit], clean[~hit])


@given(
    schemes(granularities=st.sampled_from([Scheme.parse(f"int8/{g}").granularity for g in ("axis0", "g7", "token")])),
    shapes(),
    st.integers(0, 3),
    st.data(),
)
def test_quantizing_commutes_with_row_shards(
    scheme: Scheme, shape: tuple[int, int], first: int, data: st.DataObject
) -> None:
    w = data.draw(tensors(shape, exponents=(-20, 10)))
    start = first * 16
    assume(start < shape[0])
    unit = 1 if scheme.packing == "rows" else 16
    whole = quantize(w, scheme, seed=SEED)
    shard = quantize(w[start : start + 16], scheme, seed=SEED, offset=start * shape[1])
    for a, b in zip(whole, shard, strict=True):
        assert same(a[start // unit : start // unit + b.shape[0]], b)


@given(st.integers(1, 40), st.integers(1, 9), st.data())
def test_stochastic_codes_do_not_depend_on_tiling(n: int, rows: int, data: st.DataObject) -> None:
    scheme = Scheme.parse("int4/tensor:fp32~stochastic")
    x = data.draw(tensors((n, 13), exponents=(-20, 10)))
    qparams = choose_qparams(x, scheme)
    whole = encode(x, scheme, qparams, seed=SEED, stream=(3, 4))
    tiles = [
        encode(x[i : i + rows], scheme, qparams, seed=SEED, offset=i * 13, stream=(3, 4)) for i in range(0, n, rows)
    ]
    assert torch.equal(torch.cat(tiles), whole)


def test_chunked_quantize_is_the_unchunked_encode() -> None:
    # more elements than one chunk of quantize, ragged last panels and groups, random bits across chunks
    w = torch.randn(307, 3000, generator=torch.Generator().manual_seed(0))
    for text in ("uint4/g64:fp16+m~stochastic", "e2m1/b40x48:e4m3/tensor:fp32", "int5/g7:fp16@rows"):
        value = dequantize(quantize(w, text, seed=SEED), text, 307, 3000)
        assert same(value, fake_quant(w, text, seed=SEED))


@given(schemes(), shapes(40), st.data())
def test_gathered_rows_are_rows_of_the_whole(scheme: Scheme, shape: tuple[int, int], data: st.DataObject) -> None:
    w = data.draw(tensors(shape, exponents=(-20, 10)))
    rows = torch.tensor(data.draw(st.lists(st.integers(0, shape[0] - 1), max_size=5)), dtype=torch.int64)
    parts = quantize(w, scheme, seed=SEED)
    assert same(dequantize_rows(parts, scheme, shape[1], rows), dequantize(parts, scheme, *shape)[rows])


def test_stochastic_rounding_asks_for_a_seed() -> None:
    with pytest.raises(QCError, match=r"codec\.seed-missing"):
        fake_quant(torch.ones(2, 2), "int4/tensor~stochastic")


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
    divided, multiplied = torch.round(x / (peak / 127)), torch.round(x * (127 / peak))
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


@pytest.mark.parametrize("shape", [(0, 32), (5, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("text", ["int8/axis0", "uint4/g32:fp16+m", "e4m3/tensor", "int4/g8:int8/axis0:fp32"])
def test_empty_weights(shape: tuple[int, int], text: str) -> None:
    w = torch.ones(shape)
    parts = quantize(w, text)
    assert dequantize(parts, text, *shape).shape == shape
    assert fake_quant(w, text).shape == shape


def test_any_rank() -> None:
    x = torch.randn(2, 3, 4, 10, generator=torch.Generator().manual_seed(0))
    shapes = {
        "tensor": (1,) * 4,
        "axis1": (1, 3, 1, 1),
        "g4": (2, 3, 4, 3),
        "token": (2, 3, 4, 1),
        "b3x5": (2, 3, 2, 2),
    }
    for text, shape in shapes.items():
        assert choose_qparams(x, f"int8/{text}").scale.shape == shape
        assert fake_quant(x, f"int8/{text}").shape == x.shape
    assert fake_quant(torch.tensor(3.0), "int8/tensor") == 3.0
    for text, size in (("axis2", (2, 2)), ("b2x2", (4,)), ("g4", ()), ("g2:int8/axis0:fp32", (4,))):
        with pytest.raises(QCError, match=r"scheme\.(rank|nesting)"):
            choose_qparams(torch.zeros(size), f"int8/{text}")


@pytest.mark.parametrize(
    "text", ["int8/token:fp32", "uint4/g4:fp16+m", "e4m3/token:fp32", "ternary/axis0:fp32~stochastic"]
)
def test_the_codec_traces_with_symbolic_sizes(text: str) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(x: Tensor) -> Tensor:
        return fake_quant(x, text, seed=SEED)

    traced = make_fx(f, tracing_mode="symbolic")(torch.randn(6, 10))
    x = torch.randn(9, 10, generator=torch.Generator().manual_seed(0))
    assert same(traced(x), f(x))


def test_wrong_parts_are_refused() -> None:
    parts = quantize(torch.ones(4, 4), "int4/g4")
    with pytest.raises(QCError, match=r"codec\.parts"):
        dequantize(parts[:1], "int4/g4", 4, 4)
    with pytest.raises(QCError, match=r"packing\.shape"):
        dequantize(parts, "int4/g4", 40, 4)
    with pytest.raises(QCError, match=r"codec\.not-a-matrix"):
        quantize(torch.ones(4), "int4/g4")


def test_levels_times_scale_is_the_value() -> None:
    w = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    q = choose_qparams(w, "nf4/g4:fp16")
    codes = encode(w, "nf4/g4:fp16", q)
    expected = decode_element(codes, FORMATS["nf4"]) * q.scale.float().repeat_interleave(4, 1)
    assert same(decode(codes, "nf4/g4:fp16", q), expected)
