"""Random bits are Philox, at any cut; stochastic rounding is unbiased."""

import math
from bisect import bisect_right
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import QCError
from qcompile.ir.elements import decode_element, encode_element
from qcompile.ir.formats import FORMATS, Format
from qcompile.ir.rounding import philox4x32, random_bits, random_bits_at, round_to_integer
from qcompile.testing import oracles

words = st.integers(0, 2**32 - 1)
EVERY_BITS = torch.arange(65536)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers_of_random123(word: int, answer: tuple[int, ...]) -> None:
    counter = (torch.tensor([word]),) * 4
    assert tuple(int(w) for w in philox4x32(counter, (word, word))) == answer


@given(st.tuples(words, words, words, words), st.tuples(words, words))
def test_philox_equals_integers_of_any_size(counter: tuple[int, int, int, int], key: tuple[int, int]) -> None:
    a, b, c, d = torch.tensor(counter).unbind()
    assert tuple(int(w) for w in philox4x32((a, b, c, d), key)) == oracles.philox4x32(counter, key)


@given(st.integers(0, 2**62), st.integers(0, 2**40), st.tuples(words, words))
def test_element_i_takes_its_half_of_its_word(seed: int, offset: int, stream: tuple[int, int]) -> None:
    ours = random_bits(20, seed, offset, stream).tolist()
    assert ours == [oracles.random_bits(offset + i, seed, stream) for i in range(20)]


@given(st.integers(0, 2**40), st.lists(st.integers(0, 40), max_size=6), st.integers(0, 99))
def test_bits_do_not_depend_on_tiling(offset: int, cuts: list[int], seed: int) -> None:
    whole = random_bits(40, seed, offset)
    edges = [0, *sorted(cuts), 40]
    tiles = [random_bits(b - a, seed, offset + a) for a, b in pairwise(edges)]
    assert torch.equal(torch.cat(tiles), whole)
    index = torch.arange(40).flip(0).reshape(4, 10)
    assert torch.equal(random_bits_at(index + offset, seed), whole[index])
    as_tensors = random_bits(40, torch.tensor(seed), torch.tensor(offset), (torch.tensor(0), 0))
    assert torch.equal(as_tensors, whole)


def test_bits_are_uniform() -> None:
    # Hoeffding: a mean of n values in [0, 1] is off by t with probability <= 2 exp(-2 n t^2); t for 2**-40.
    n = 1 << 18
    bits = random_bits(n, seed=1)
    t = math.sqrt(41 * math.log(2) / (2 * n))
    for bit in range(16):
        assert abs(float((bits >> bit & 1).double().mean()) - 0.5) <= t
    pairs = (bits[1:] ^ bits[:-1]) & 1  # neighbours share a block
    assert abs(float(pairs.double().mean()) - 0.5) <= t


@given(st.floats(-300, 300, width=32))
def test_expectation_over_all_bits_is_the_value(t: float) -> None:
    rounded = round_to_integer(torch.full((65536,), t), "stochastic", EVERY_BITS)
    assert abs(float(rounded.double().mean()) - t) <= 2.0**-17
    assert set(rounded.unique().tolist()) <= {math.floor(t), math.floor(t) + 1}
    if (t * 65536).is_integer():
        assert float(rounded.double().mean()) == t


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=str)
@settings(max_examples=15)  # of 65536 elements, for each of the formats
@given(st.data())
def test_every_format_rounds_without_bias(fmt: Format, data: st.DataObject) -> None:
    y = data.draw(st.floats(fmt.low, fmt.max, width=32))
    codes = encode_element(torch.full((65536,), y), fmt, "stochastic", EVERY_BITS)
    values = decode_element(codes, fmt).double()
    neighbours = sorted({v for v in fmt.values if fmt.low <= v <= fmt.max})
    at = min(max(bisect_right(neighbours, y), 1), len(neighbours) - 1)
    gap = neighbours[at] - neighbours[at - 1]
    # the chance is the fraction (y - below) / gap, rounded to 16 bits: off by at most 2**-17. For tables the
    # fraction is itself computed in float32: differences and a quotient of numbers up to 1, 2**-24 each.
    slack = 4 * 2.0**-24 if fmt.kind == "table" else 0.0
    assert abs(float(values.mean()) - y) <= 2.0**-17 * gap + slack
    assert set(values.unique().tolist()) <= {neighbours[at - 1], neighbours[at]}


def test_stochastic_rounding_needs_bits() -> None:
    with pytest.raises(QCError, match=r"rounding\.no-bits"):
        round_to_integer(torch.zeros(1), "stochastic")
