"""One spelling per scheme, and refusals that help."""

import copy
import json
import pickle
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qcompile.errors import QCError
from qcompile.ir.codec import quantize
from qcompile.ir.formats import FORMATS, SCALE_FORMATS
from qcompile.ir.scheme import Nested, PerAxis, PerBlock, PerGroup, PerTensor, PerToken, Scale, Scheme
from qcompile.testing.strategies import schemes, shapes, tensors


@given(schemes())
def test_parse_inverts_str(scheme: Scheme) -> None:
    assert Scheme.parse(str(scheme)) == scheme
    assert str(Scheme.parse(str(scheme))) == str(scheme)
    assert pickle.loads(pickle.dumps(scheme)) == scheme == copy.deepcopy(scheme)
    assert Scheme.parse(json.loads(json.dumps(str(scheme)))) == scheme


@given(schemes(), schemes())
def test_spelling_is_injective(a: Scheme, b: Scheme) -> None:
    assert (a == b) == (str(a) == str(b))


@pytest.mark.parametrize(
    ("spelling", "canonical"),
    [
        ("int8/axis0", "int8/axis0:fp32"),
        ("int4/g64", "int4/g64:fp16"),
        ("int4/g064:fp16", "int4/g64:fp16"),
        ("uint4/g32:fp16+m@tile16~nearest", "uint4/g32:fp16+m"),
        ("int8/token", "int8/token:fp32"),
        ("e4m3/b128x128", "e4m3/b128x128:fp32"),
        ("e2m1/g16:e4m3/tensor", "e2m1/g16:e4m3/tensor:fp32"),
        ("int4/g64@rows~stochastic", "int4/g64:fp16@rows~stochastic"),
    ],
)
def test_defaults_are_filled_in_and_never_printed_twice(spelling: str, canonical: str) -> None:
    assert str(Scheme.parse(spelling)) == canonical


@pytest.mark.parametrize(
    ("spelling", "code", "position", "hint"),
    [
        ("itn4/g64", "scheme.unknown-format", 0, "int4"),
        ("INT4/g64", "scheme.unknown-format", 0, "int4"),
        ("int4", "scheme.incomplete", 4, ""),
        ("int4/", "scheme.unknown-granularity", 5, ""),
        ("int4/tokn", "scheme.unknown-granularity", 5, "token"),
        ("int4/g-3", "scheme.unknown-granularity", 5, "g32"),
        ("int4/g64 ", "scheme.unknown-granularity", 5, "g64"),
        ("int4/g64:fp61", "scheme.unknown-scale", 9, "fp16"),
        ("uint4/g64:fp16+zz", "scheme.unknown-zero", 15, "z"),
        ("uint4/g64:fp16+", "scheme.unknown-zero", 15, ""),
        ("int4/g64@tile", "scheme.unknown-packing", 9, "tile16"),
        ("int4/g64~flor", "scheme.unknown-rounding", 9, "floor"),
        ("int4/g64~floor@rows", "scheme.unknown-rounding", 9, ""),
        ("e2m1/g16:e4m3/tensr:fp32", "scheme.unknown-granularity", 14, "tensor"),
    ],
)
def test_misspellings_name_the_position_and_the_nearest_word(
    spelling: str, code: str, position: int, hint: str
) -> None:
    with pytest.raises(QCError) as caught:
        Scheme.parse(spelling)
    assert caught.value.code == code
    assert caught.value.where == f"position {position} of {spelling!r}"
    assert (f"did you mean {hint!r}" in caught.value.what) if hint else caught.value.next


@pytest.mark.parametrize(
    ("spelling", "code"),
    [
        ("e4m3/g64:fp16+z", "scheme.zero-on-float"),
        ("nf4/g64:fp16+m", "scheme.zero-on-float"),
        ("ternary/axis0:fp32+z", "scheme.zero-on-float"),
        ("int4/g64:fp16+m", "scheme.zero-on-signed"),
        ("int4/g64:fp16+z", "scheme.zero-on-signed"),
        ("uint4/g64:e8m0+m", "scheme.minimum-format"),
        ("uint4/g64:int8+m/tensor", "scheme.minimum-format"),
        ("int4/g0", "scheme.granularity-size"),
        ("int4/b0x4", "scheme.granularity-size"),
        ("e2m1/g16:e4m3", "scheme.scale-needs-outer"),
        ("int4/g64:int8", "scheme.scale-needs-outer"),
        ("int4/g64:fp16/axis0", "scheme.inner-scale"),
        ("int4/g64:int8/axis0:e4m3", "scheme.outer-format"),
        ("uint4/g64:int8/axis0:fp32+z", "scheme.outer-format"),
        ("int4/g64:int8/g96", "scheme.nesting"),
        ("int4/g64:int8/g64", "scheme.nesting"),
        ("int4/token:int8/g64", "scheme.nesting"),
        ("int4/tensor:int8/token", "scheme.nesting"),
        ("int4/axis0:int8/token", "scheme.nesting"),
        ("int4/b4x4:int8/axis0", "scheme.nesting"),
        ("int4/b4x4:int8/b8x6", "scheme.nesting"),
        ("int4/g2:int8/g4:int8/tensor", "scheme.nesting"),
    ],
)
def test_impossible_combinations_are_refused_at_construction(spelling: str, code: str) -> None:
    with pytest.raises(QCError) as caught:
        Scheme.parse(spelling)
    assert caught.value.code == code
    assert repr(spelling) in caught.value.where
    assert caught.value.why
    assert caught.value.next


@pytest.mark.parametrize("value", [4, None, ["int8/g64"]], ids=str)
@pytest.mark.parametrize("read", [Scheme.parse, Scheme.of])
def test_what_is_no_text_is_no_scheme(read: Callable[[object], Scheme], value: object) -> None:
    with pytest.raises(QCError, match="a scheme cannot be") as caught:
        read(value)
    assert (caught.value.code, "int8/g64" in caught.value.next) == ("scheme.text", True)


@pytest.mark.parametrize(("spelling", "ndim"), [("int8/b2x2", 1), ("int8/axis2", 2), ("int4/g64:int8/axis1", 2)])
def test_what_does_not_fit_a_tensors_dimensions_says_what_would(spelling: str, ndim: int) -> None:
    granularity = Scheme.parse(spelling).granularity
    with pytest.raises(QCError) as caught:
        granularity.cell(ndim)
    assert caught.value.next


def test_construction_refuses_what_has_no_spelling() -> None:
    int4, fp32, int8 = FORMATS["int4"], Scale(SCALE_FORMATS["fp32"]), Scale(SCALE_FORMATS["int8"])
    nested = Nested(PerGroup(4), PerTensor())
    refused: list[Callable[[], object]] = [
        lambda: Scheme(int4, nested, int8),
        lambda: Scheme(int4, PerTensor(), fp32, outer=fp32),
        lambda: Scheme(int4, PerTensor(), fp32, packing="tile8"),  # type: ignore[arg-type]
        lambda: Scheme(int4, PerTensor(), fp32, rounding="up"),  # type: ignore[arg-type]
        lambda: PerGroup(-1),
        lambda: PerAxis(-1),
        lambda: PerBlock(1, 0),
        lambda: Nested(PerTensor(), PerToken()),
    ]
    for build in refused:
        with pytest.raises(QCError, match=r"\[scheme\."):
            build()


@given(schemes(), shapes(40), st.data())
def test_bits_per_weight_counts_the_bytes_of_the_parts(
    scheme: Scheme, shape: tuple[int, int], data: st.DataObject
) -> None:
    parts = quantize(data.draw(tensors(shape)), scheme)
    assert scheme.bits_per_weight(*shape) == 8 * sum(p.nbytes for p in parts) / (shape[0] * shape[1])


def test_bits_per_weight_of_aligned_shapes_is_the_textbook_number() -> None:
    assert Scheme.parse("int4/g64:fp16").bits_per_weight(64, 128) == 4 + 16 / 64
    assert Scheme.parse("uint4/g32:fp16+m").bits_per_weight(64, 128) == 4 + 32 / 32
    assert Scheme.parse("uint4/g32:fp16+z").bits_per_weight(64, 128) == 4 + 24 / 32
    assert Scheme.parse("e2m1/g16:e4m3/axis0:fp32").bits_per_weight(64, 128) == 4 + 8 / 16 + 32 / 128


def test_group_size() -> None:
    sizes = {"int4/g64": 64, "int4/g200": 100, "int8/axis0": 100, "int8/tensor": 100, "int8/b8x16": 16}
    assert {text: Scheme.parse(text).group_size(100) for text in sizes} == sizes
    assert Scheme.parse("int4/g64").groups(100) == 2
    assert Scheme.parse("e2m1/g16:e4m3/g48:fp32").outer_groups(100) == 3
