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
    refuse_nonfinite,
)
from qcompile.ir.elements import decode_element
from qcompile.ir.formats import FORMATS
from qcompile.ir.qparams import effective_scale
from qcompile.ir.scales import spread
from qcompile.ir.scheme import Nested, PerTensor, Scheme
from qcompile.testing import oracles
from qcompile.testing.strategies import flat_granularities, schemes, shapes, tensors
from tests.ir.support import SEED, same

deterministic = schemes(roundings=("nearest", "floor"))
nearest = schemes(roundings=("nearest",))


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


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_with_nan_or_infinity_are_refused_by_index(bad: float) -> None:
    w = torch.zeros(20, 33)
    w[17, 5] = bad
    with pytest.raises(QCError, match=r"index \[17, 5\]") as caught:
        quantize(w, "int4/g32")
    assert caught.value.code == "codec.nonfinite-weight"
    with pytest.raises(QCError) as caught:
        refuse_nonfinite(w, "layer.weight")
    assert caught.value.where == "layer.weight: index [17, 5]"


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
