"""Optimizer state: the maps are the published ones, codes are nearest levels, blocks keep their own scale."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.elements import encode_element
from qcompile.ir.formats import Format
from qcompile.ir.rounding import random_bits
from qcompile.ir.state import BLOCK_SIZES, PLAIN, STATE_FORMATS, Storage, boundaries
from tests.ir.support import same

TABLES = [fmt for fmt in STATE_FORMATS.values() if fmt.kind == "table"]
formats = pytest.mark.parametrize("fmt", TABLES, ids=str)
blocks = pytest.mark.parametrize("name", STATE_FORMATS)


def published(signed: bool, bits: int) -> list[float]:
    """`create_dynamic_map` of bitsandbytes, in its own words, for total_bits = bits and max_exponent_bits = bits - 1."""
    data, decades, fraction_bits = [], bits - 1, bits - 1
    for i in range(decades):
        extra = 0 if signed else 1
        items = 2 ** (i + fraction_bits - decades + extra) + 1
        ends = torch.linspace(0.1, 1, items, dtype=torch.float64)
        means = (ends[:-1] + ends[1:]) / 2
        data += (10.0 ** (-(decades - 1) + i) * means).tolist()
        if signed:
            data += (-(10.0 ** (-(decades - 1) + i)) * means).tolist()
    return sorted([*data, 0.0, 1.0])


@pytest.mark.parametrize(("name", "signed", "bits"), [("dyn8", True, 8), ("udyn8", False, 8), ("dyn4", True, 4)])
def test_dynamic_maps_are_the_published_ones(name: str, signed: bool, bits: int) -> None:
    got, want = STATE_FORMATS[name].table, published(signed, bits)
    if not signed:  # no level 0, but something below the smallest of the others
        assert want.pop(0) == 0.0
        assert 0 < got[0] < got[1] / 4
        got = got[1:]
    assert len(STATE_FORMATS[name].table) == 2**bits
    # Each is the double nearest to the same number up to a few roundings, and then a float32.
    assert all(abs(a - b) <= 2**-24 * abs(b) + 2**-50 for a, b in zip(got, want, strict=True))


def test_second_moments_have_no_zero() -> None:
    assert all(min(STATE_FORMATS[name].table) > 0 for name in ("udyn8", "ulin4"))
    assert 0.0 in STATE_FORMATS["dyn8"].table
    assert 0.0 in STATE_FORMATS["dyn4"].table


@formats
@given(st.data())
def test_boundaries_are_comparisons_for_the_nearest_level(fmt: Format, data: st.DataObject) -> None:
    edge = data.draw(st.sampled_from(boundaries(fmt)) | st.floats(-1.25, 1.25, width=32))
    y = torch.tensor([edge, math.nextafter(edge, 2), math.nextafter(edge, -2)], dtype=torch.float64).float()
    y = torch.cat([y, torch.nextafter(y, torch.tensor(9.0)), torch.nextafter(y, torch.tensor(-9.0))])
    counted = (y.unsqueeze(1) >= torch.tensor(boundaries(fmt))).sum(1)
    assert torch.equal(counted.to(torch.uint8), encode_element(y, fmt, "nearest"))
    for value, code in zip(y.tolist(), counted.tolist(), strict=True):
        distance = [abs(Fraction(level) - Fraction(value)) for level in fmt.table]
        assert distance[code] == min(distance)


storages = st.sampled_from([*PLAIN, *STATE_FORMATS]).flatmap(
    lambda name: st.builds(
        Storage,
        st.just(name),
        st.just(0) if name in PLAIN else st.sampled_from(BLOCK_SIZES),
        st.booleans() if name in ("bf16", "f16") or "int" in name else st.just(False),
    )
)


@given(storages)
def test_text(storage: Storage) -> None:
    assert Storage.parse(str(storage)) == storage


@pytest.mark.parametrize(
    "text", ["f64", "dyn8", "f32~", "f32/g64", "dyn8/g100", "dyn8/g8", "dyn8/g64~", "nf4/g64", "", "~"]
)
def test_what_is_no_storage(text: str) -> None:
    with pytest.raises(QCError, match=r"step\.storage"):
        Storage.parse(text)


def values(n: int, of: int) -> Tensor:
    generator = torch.Generator().manual_seed(of)
    return torch.randn(n, generator=generator) * 10.0 ** torch.randint(-6, 6, (n,), generator=generator)


@given(storages, st.integers(1, 700), st.integers(0, 99))
def test_what_is_stored_is_read_back_and_stays(storage: Storage, n: int, of: int) -> None:
    """Sizes are those of `parts`, errors at most half the distance of levels beside it, and a second write is the first."""
    x = values(n, of)
    x = x if storage.plain or storage.format.signed else x.abs()
    bits = random_bits(n, of) if storage.stochastic else None
    parts = storage.written(x, bits)
    assert [(t.shape, t.dtype) for t in parts] == [(torch.Size(p.shape), p.dtype) for p in storage.parts(n)]
    got = storage.read(parts, n)
    assert got.shape == (n,)
    if storage.plain:
        # Numbers of 1 .. 2 are 2**-7 apart in bf16, 2**-10 in f16, where those that are subnormal are 2**-24 apart.
        ulps = {"f32": 0.0, "bf16": 2.0**-8, "f16": 2.0**-11}[storage.name] * (2 if storage.stochastic else 1)
        inside = x.abs() <= torch.finfo(PLAIN[storage.name]).max
        assert ((got - x).abs() <= x.abs() * ulps + 2.0**-24)[inside].all()
        assert same(storage.written(got, bits)[0], parts[0])
        return
    fmt, scale = storage.format, parts[1].repeat_interleave(storage.block)[:n].double()
    levels = torch.tensor([v for v in fmt.values if v >= fmt.low], dtype=torch.float64)
    y = x.double() / scale
    above = torch.bucketize(y, levels).clamp(1, len(levels) - 1)
    gap = levels[above] - levels[above - 1]
    beyond = (levels[0] - y).clamp(min=0)  # tables with a sign end a little short of -1
    # y is computed with three roundings (scale, reciprocal, product) and the value read with one: each 2**-24 of it.
    allowed = gap * (1.0 if storage.stochastic else 0.5) + beyond + y.abs() * 2.0**-21
    assert ((got.double() / scale - y).abs() <= allowed).all()
    assert torch.equal(parts[1], torch.tensor([b.abs().max().item() for b in x.split(storage.block)]) / fmt.max)
    if not storage.stochastic:
        again = storage.written(got)
        for i, block in enumerate(x.split(storage.block)):
            if block.max() == block.abs().max():  # which has the largest level, so the scale is the same
                at = slice(i * storage.block, i * storage.block + len(block))
                ones = torch.ones_like(again[1])
                assert torch.equal(storage.read((again[0], ones), n)[at], storage.read((parts[0], ones), n)[at])


@blocks
def test_blocks_do_not_know_each_other(name: str) -> None:
    storage, x = Storage(name, 32), values(32 * 5 + 7, 3).abs()
    codes, scales = storage.written(x)
    per = 32 * storage.bits // 8
    for i, block in enumerate(x.split(32)):
        one = storage.written(block)
        assert torch.equal(one[0], codes[i * per :][: len(one[0])])
        assert torch.equal(one[1], scales[i : i + 1])


@blocks
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_seen(name: str, bad: float) -> None:
    storage, x = Storage(name, 16), values(48, 1).abs()
    x[20] = bad
    got = storage.read(storage.written(x), 48)
    assert got[16:32].isnan().all()
    assert not torch.cat([got[:16], got[32:]]).isnan().any()
    assert storage.read(storage.written(got), 48)[16:32].isnan().all()


@blocks
@pytest.mark.parametrize("size", [0.0, -0.0, 1e-45, 2.0**-127])
def test_a_block_of_nothing_is_zero(name: str, size: float) -> None:
    storage = Storage(name, 16)
    codes, scales = storage.written(torch.full((19,), size))
    zero = storage.format.zero_code
    assert scales.tolist() == [0.0, 0.0]
    assert set(codes.tolist()) <= {zero, zero | zero << 4}
    assert storage.read((codes, scales), 19).tolist() == [0.0] * 19
    # The smallest scale that is one: its reciprocal is finite.
    top = storage.format.max
    assert storage.written(torch.full((2,), 2.0**-125 * top))[1].tolist() == [2.0**-125]


def test_two_codes_share_a_byte() -> None:
    codes, _ = Storage("ulin4", 16).written(torch.tensor([1 / 16, 1.0, 3 / 16]))
    assert codes.tolist() == [0xF0, 0x02]
    assert Storage("ulin4", 16).read((codes, torch.ones(1)), 3).tolist() == [1 / 16, 1.0, 3 / 16]


def test_random_bits_are_needed() -> None:
    with pytest.raises(QCError, match=r"rounding\.no-bits"):
        Storage("bf16", stochastic=True).written(torch.zeros(3))
