"""Formats mean what their fields say, and elements encode to the nearest level."""

import math
from itertools import pairwise
from statistics import NormalDist
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.elements import decode_element, encode_element
from qcompile.ir.formats import FORMATS, SCALE_FORMATS, Format, ScaleFormat
from qcompile.ir.scales import load_scale
from qcompile.testing import oracles
from qcompile.testing.strategies import formats

ALL = list(FORMATS.values())
FLOATS = [f for f in ALL if f.kind == "float"]
TORCH_FLOATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def used_codes(fmt: Format) -> list[int]:
    """Codes of finite values that `encode` may produce."""
    codes = len(fmt.table) or 1 << fmt.bits
    return [c for c in range(codes) if math.isfinite(fmt.values[c]) and fmt.values[c] >= fmt.low]


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_every_code_round_trips(fmt: Format) -> None:
    codes = torch.tensor(used_codes(fmt), dtype=torch.uint8)
    for rounding in ("nearest", "floor"):
        assert torch.equal(encode_element(decode_element(codes, fmt), fmt, rounding), codes)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_levels_are_float32_numbers_and_decode_reads_them(fmt: Format) -> None:
    codes = torch.arange(1 << fmt.bits).to(torch.uint8)
    levels = fmt.levels()
    assert levels.shape == (1 << fmt.bits,)
    assert levels.dtype == torch.float32
    assert torch.equal(torch.nan_to_num(decode_element(codes, fmt)), torch.nan_to_num(levels))
    if fmt.kind != "table":  # nf4's published constants are float32 numbers printed with 16 digits
        assert all(v == float(levels[c]) or math.isnan(v) for c, v in enumerate(fmt.values))


@pytest.mark.parametrize("fmt", FLOATS, ids=str)
def test_float_levels_follow_their_fields(fmt: Format) -> None:
    for code, value in enumerate(fmt.values):
        exact = oracles.float_level(fmt, code)
        assert (exact == value) if exact is not None else not math.isfinite(value)


@pytest.mark.parametrize("name", TORCH_FLOATS)
def test_eight_bit_floats_agree_with_torch_bit_for_bit(name: str) -> None:
    fmt, dtype = Format.of(name), TORCH_FLOATS[name]
    codes = torch.arange(256).to(torch.uint8)
    theirs, ours = codes.view(dtype).float(), fmt.levels()
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0))
    # every bfloat16 and half number, and the float32 neighbours of every level and midpoint between levels
    levels = ours[ours.isfinite()].unique()
    points = torch.cat((levels, (levels[1:] + levels[:-1]) / 2))
    every16 = torch.arange(-(2**15), 2**15).to(torch.int16)
    points = torch.cat((points, every16.view(torch.bfloat16).float(), every16.view(torch.float16).float()))
    points = around(points)
    points = points[points.abs() <= fmt.max]
    assert torch.equal(encode_element(points, fmt, "nearest"), points.to(dtype).view(torch.uint8))


def test_nan_and_infinity_are_defined() -> None:
    y = torch.tensor([math.nan, math.inf, -math.inf, 1e30, -1e30])
    levels = {f.name: decode_element(encode_element(y, f, "nearest"), f).tolist() for f in ALL}
    assert math.isnan(levels["e4m3"][0])
    assert math.isnan(levels["e4m3"][1])
    assert math.isnan(levels["e5m2"][0])
    assert levels["e5m2"][1:3] == [math.inf, -math.inf]
    for fmt in ALL:
        assert levels[fmt.name][3:] == [fmt.max, fmt.low]
        if fmt.nonfinite == "none":
            assert levels[fmt.name][:3] == [fmt.values[fmt.zero_code], fmt.max, fmt.low]


def around(y: Tensor) -> Tensor:
    """`y` and its float32 neighbours."""
    return torch.cat((y, y.nextafter(torch.tensor(9e9)), y.nextafter(torch.tensor(-9e9))))


def assert_nearest(y: Tensor, fmt: Format) -> None:
    for value, code in zip(y.tolist(), encode_element(y, fmt, "nearest").tolist(), strict=True):
        assert code in oracles.nearest_codes(value, fmt)


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_nearest_is_nearest_around_every_midpoint(fmt: Format) -> None:
    levels = sorted(fmt.values[c] for c in used_codes(fmt))
    assert_nearest(around(torch.tensor([(a + b) / 2 for a, b in pairwise(levels)])), fmt)


@given(formats(), st.data())
def test_nearest_is_nearest(fmt: Format, data: st.DataObject) -> None:
    y = data.draw(st.lists(st.floats(-2 * fmt.max, 2 * fmt.max, width=32), min_size=1))
    assert_nearest(torch.tensor(y), fmt)


@pytest.mark.parametrize("fmt", [f for f in ALL if f.kind != "table"], ids=str)
def test_ties_go_to_the_even_code(fmt: Format) -> None:
    levels = torch.tensor(sorted({fmt.values[c] for c in used_codes(fmt)}))
    codes = encode_element((levels[1:] + levels[:-1]) / 2, fmt, "nearest")
    assert not (codes & 1).any()


def test_ties_of_tables_go_towards_zero_and_the_sign_of_zero_is_positive() -> None:
    ternary, binary = Format.of("ternary"), Format.of("binary")
    halves = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    assert decode_element(encode_element(halves, ternary, "nearest"), ternary).tolist() == [-1, 0, 0, 1]
    zeros = torch.tensor([-0.0, 0.0, -(2.0**-149)])
    assert decode_element(encode_element(zeros, binary, "nearest"), binary).tolist() == [1, 1, -1]


@given(formats(), st.data())
def test_floor_is_the_level_below(fmt: Format, data: st.DataObject) -> None:
    y = data.draw(st.floats(fmt.low, fmt.max, width=32))
    value = fmt.values[int(encode_element(torch.tensor([y]), fmt, "floor"))]
    below = max(fmt.values[c] for c in used_codes(fmt) if fmt.values[c] <= y)
    assert value == below


def test_nf4_is_made_of_normal_quantiles() -> None:
    # QLoRA: 8 positive and 7 negative quantiles between 1/2 and 0.9677083, and zero, scaled to end at 1
    quantile, top = NormalDist().inv_cdf, 0.9677083
    positive = [quantile(0.5 + (top - 0.5) * i / 8) for i in range(1, 9)]
    negative = [-quantile(0.5 + (top - 0.5) * i / 7) for i in range(7, 0, -1)]
    expected = [v / positive[-1] for v in (*negative, 0.0, *positive)]
    # the constant has 7 digits: off by 5e-8 it moves a quantile, of density phi(1.848) = 0.0723, by 7e-7
    assert all(abs(a - b) <= 7e-7 for a, b in zip(expected, Format.of("nf4").values, strict=True))


def test_symmetric_integers_leave_their_lowest_code_unused() -> None:
    for bits in range(2, 9):
        fmt = Format.of(f"int{bits}")
        assert fmt.min == fmt.low - 1 == -(2.0 ** (bits - 1))
        codes = encode_element(torch.tensor([-1e9, 1e9]), fmt, "nearest")
        assert codes.tolist() == [1, 2**bits - 1]


def test_properties_kernels_read() -> None:
    assert Format.of("int4").offset == 8
    assert Format.of("uint4").offset == 0
    assert Format.of("ternary").offset == 1
    assert {f.name for f in ALL if not f.is_integer} == {"e4m3", "e5m2", "e3m2", "e2m3", "e2m1", "nf4"}
    assert {f.bits: f.planes for f in ALL} == {
        1: (1,),
        2: (2,),
        3: (2, 1),
        4: (4,),
        5: (4, 1),
        6: (4, 2),
        7: (4, 2, 1),
        8: (8,),
    }
    with pytest.raises(QCError, match=r"format\.no-offset"):
        _ = Format.of("nf4").offset


def test_unknown_names_suggest() -> None:
    with pytest.raises(QCError, match="did you mean 'e4m3'") as caught:
        Format.of("E4M3")
    assert caught.value.code == "format.unknown"
    with pytest.raises(QCError, match="did you mean 'fp16'"):
        ScaleFormat.of("fp61")


@pytest.mark.parametrize("fmt", SCALE_FORMATS.values(), ids=str)
def test_scale_formats_hold_their_range_exactly(fmt: ScaleFormat) -> None:
    if fmt.kind == "float":
        ends = torch.tensor([fmt.low, fmt.high], dtype=torch.float64)
        assert torch.equal(ends.to(fmt.dtype).double(), ends)
        return
    values = load_scale(torch.arange(256).to(torch.uint8).view(fmt.dtype), fmt)
    finite = values[values.isfinite()].tolist()
    assert fmt.low in finite
    assert fmt.high in finite
    if fmt.kind == "exponent":
        assert sorted(finite) == [2.0**e for e in range(-127, 128)]
        assert int(values.isnan().sum()) == 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "flaot", "bits": 5, "exponent": 3, "mantissa": 1}, "did you mean 'float'"),
    "statistic": ({"kind": "int", "bits": 4, "statistic": "median"}, "absmax, mean"),
    "width": ({"kind": "int", "bits": 9}, "1 to 8 bits"),
    "sign alone": ({"kind": "int", "bits": 1}, "2 bits or more"),
    "fields": ({"kind": "float", "bits": 5, "exponent": 3, "mantissa": 3}, "are not 5 bits"),
    "order": ({"kind": "table", "bits": 2, "table": (1.0, -1.0, 0.0, 0.5)}, "ascending"),
    "twice": ({"kind": "table", "bits": 2, "table": (-1.0, 0.0, 0.0, 0.5)}, "ascending"),
    "no number": ({"kind": "table", "bits": 1, "table": (0.0, math.nan)}, "finite"),
    "too many": ({"kind": "table", "bits": 1, "table": (-1.0, 0.0, 1.0)}, "2 to 2"),
    "negative": ({"kind": "table", "bits": 1, "table": (-2.0, -1.0)}, "positive"),
    "unsigned": ({"kind": "table", "bits": 1, "table": (-2.0, 1.0), "signed": False}, "is signed"),
    "below zero": ({"kind": "float", "bits": 4, "exponent": 5, "mantissa": -2}, "are not 4 bits"),
    "only infinity": ({"kind": "float", "bits": 2, "exponent": 1, "nonfinite": "ieee"}, "largest finite value"),
    "beyond float32": ({"kind": "float", "bits": 8, "signed": False, "exponent": 8}, "largest finite value"),
    "equal in float32": ({"kind": "table", "bits": 1, "table": (1.0, 1.0 + 2.0**-40)}, "ascending in float32"),
    "huge": ({"kind": "table", "bits": 1, "table": (-1e300, 1e300)}, "numbers of float32"),
    "a list": ({"kind": "table", "bits": 1, "table": [-1.0, 1.0]}, "of type tuple"),
    "a half bit": ({"kind": "int", "bits": 4.0}, "of type int"),
    "an integer's mantissa": ({"kind": "int", "bits": 4, "mantissa": 9}, "are of floats"),
    "an integer's table": ({"kind": "int", "bits": 4, "table": (5.0,)}, "of kind table"),
}


@pytest.mark.parametrize("name", BAD)
def test_fields_that_do_not_fit_are_refused(name: str) -> None:
    fields, told = BAD[name]
    with pytest.raises(QCError, match=told) as caught:
        Format("odd", **fields)
    assert caught.value.code == "format.entry"


def test_names_that_a_scheme_could_not_spell_are_refused() -> None:
    for name in ("a/b", "", "4bit", "e4m3~", "a\u00e9", 4):
        with pytest.raises(QCError, match="a name is a letter"):
            Format(name, "int", 4)  # type: ignore[arg-type]


def test_a_name_keeps_its_meaning() -> None:
    """Kernels and packed weights are found by it: one that changed would meet codes of another format."""
    entry = Format("kept", "table", 2, table=(-1.0, -0.5, 0.0, 1.0))
    FORMATS["kept"] = entry
    try:
        FORMATS["kept"] = Format("kept", "table", 2, table=(-1.0, -0.5, 0.0, 1.0))
        other = Format("kept", "table", 2, table=(-1.0, -0.2, 0.2, 1.0))
        ways = [lambda: FORMATS.update(kept=other), lambda: FORMATS.__setitem__("kept", other)]
        for way in ways:
            with pytest.raises(QCError, match="'kept' means another format already") as caught:
                way()
            assert caught.value.code == "format.redefined"
        assert FORMATS["kept"] == entry
        with pytest.raises(AttributeError):  # no way round the checks
            FORMATS.__ior__({"kept": other})  # type: ignore[attr-defined]
    finally:
        del FORMATS["kept"]
    with pytest.raises(QCError, match="means another format"):
        FORMATS["kept"] = other
    assert "kept" not in FORMATS
    with pytest.raises(QCError, match=r"the format 'kept' under the name 'other'"):
        FORMATS["other"] = entry
    with pytest.raises(QCError, match="a tuple under the name"):
        FORMATS["pair"] = (-1.0, 1.0)  # type: ignore[assignment]


def test_a_scale_format_keeps_its_meaning() -> None:
    with pytest.raises(QCError, match="'fp16' means another format already"):
        SCALE_FORMATS["fp16"] = ScaleFormat("fp16", torch.float16, "float", 2.0**-14, 65504.0)
    with pytest.raises(QCError, match="a Format under the name 'int8'"):
        SCALE_FORMATS["int8"] = FORMATS["int8"]  # type: ignore[assignment]
    assert SCALE_FORMATS["fp16"].low == 2.0**-24
