"""The key/value cache: pages, appending, and the reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.codec import fake_quant
from qcompile.ir.kvcache import Cache, CacheLayout, append, attention, extend, read, read_codes
from qcompile.ir.packing import unpack_codes

# Keys and values of different widths, one plane and several, heads that are folded, padded, and neither.
LAYOUTS = [
    ("int8/token:fp32", 128, ""),
    ("int4/token:fp16", 64, ""),
    ("int4/token:fp16", 32, "int8/token:fp16"),
    ("int8/token:bf16", 80, "int4/token:bf16"),
    ("e4m3/token:fp32", 96, ""),
    ("int6/token:fp16", 20, "int2/token:fp16"),
    ("nf4/token:fp16", 16, "int3/token:fp16"),
]
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def layout_of(name: tuple[str, int, str]) -> CacheLayout:
    return CacheLayout.of(*name)


def garbage(layout: CacheLayout, pages: int, heads: int, seed: int = 0) -> Cache:
    """A cache that holds anything."""
    cache, generator = Cache.empty(layout, pages, heads), torch.Generator().manual_seed(seed)
    for part in cache.parts:
        part.view(torch.uint8).random_(0, 256, generator=generator)
    return cache


def tokens(n: int, heads: int, dim: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, heads, dim, generator=generator) * torch.randn(n, 1, 1, generator=generator).exp2()


@pytest.mark.parametrize("name", LAYOUTS, ids=str)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    cuts=st.lists(st.integers(0, 300), max_size=3),
    n=st.integers(0, 300) | st.just(520),
    heads=st.integers(1, 2),
    seed=st.integers(0, 9),
)
def test_what_is_written_is_read(name: tuple[str, int, str], cuts: list[int], n: int, heads: int, seed: int) -> None:
    """In pieces of any size, over garbage: each token is what the codec makes of it."""
    layout = layout_of(name)
    pages = -(-max(n, 1) // layout.page)
    cache = garbage(layout, pages + 2, heads, seed)
    table = torch.randperm(pages + 2, generator=torch.Generator().manual_seed(seed))[:pages]
    keys, values = tokens(n, heads, layout.head_dim, seed), tokens(n, heads, layout.head_dim, seed + 1)
    ends = sorted({min(cut, n) for cut in cuts} | {n})
    for start, stop in zip([0, *ends], ends, strict=False):
        extend(cache, keys[start:stop], values[start:stop], table, start)
    found = read(cache, table, n)
    assert torch.equal(found[0], fake_quant(keys, layout.key))
    assert torch.equal(found[1], fake_quant(values, layout.value))


@pytest.mark.parametrize("name", LAYOUTS, ids=str)
def test_a_token_changes_its_own_bits_only(name: tuple[str, int, str]) -> None:
    layout, heads = layout_of(name), 2
    # A byte for each plane of each code at most; of keys of one plane nothing but bytes of the token's own.
    most = [layout.head_dim * len(scheme.format.planes) for scheme in (layout.key, layout.value)] + [2]
    if layout.key.format.bits in (4, 8) and layout.head_dim % 32 == 0:
        most[0] = layout.head_dim * layout.key.format.bits // 8
    for slot in (0, 1, 16, 77, layout.page - 1):
        cache, table, token = garbage(layout, 3, heads), torch.arange(3), layout.page + slot
        parts = [part.view(torch.uint8) for part in cache.parts[:2]] + [cache.scales.view(BITS[cache.scales.dtype])]
        before, old = [part.clone() for part in parts], read_codes(cache, table, 3 * layout.page)[0]
        new = tokens(1, heads, layout.head_dim)
        append(cache, new, new, torch.tensor([1]), torch.tensor([slot]))
        found = (x[token] for x in read(cache, table, 3 * layout.page))
        for x, scheme in zip(found, (layout.key, layout.value), strict=True):
            assert torch.equal(x, fake_quant(new, scheme)[0])
        others = torch.arange(3 * layout.page) != token
        for codes, then in zip(read_codes(cache, table, 3 * layout.page)[0], old, strict=True):
            assert torch.equal(codes[others], then[others])
        for part, was, limit in zip(parts, before, most, strict=True):
            changed = part.ne(was).flatten(2)
            assert not changed[[0, 2]].any()
            assert 0 < changed[1].sum(1).max() <= limit


def test_tokens_that_share_a_byte_are_written_at_once() -> None:
    """At 4 bits a byte of the values holds tokens 64 apart; all tokens of two pages in one call, in any order."""
    layout = CacheLayout.of("int4/token:fp16", 32)
    keys, values = tokens(256, 2, 32), tokens(256, 2, 32, 1)
    cache, order = garbage(layout, 2, 2), torch.randperm(256, generator=torch.Generator().manual_seed(0))
    append(cache, keys[order], values[order], order // 128, order % 128)
    whole = Cache.empty(layout, 2, 2)
    extend(whole, keys, values, torch.arange(2), 0)
    assert all(torch.equal(one, other) for one, other in zip(cache.parts, whole.parts, strict=True))


@pytest.mark.parametrize("name", LAYOUTS, ids=str)
def test_the_order_of_codes_in_the_packing(name: tuple[str, int, str]) -> None:
    """Written out element by element from the module's text."""
    layout, generator = layout_of(name), torch.Generator().manual_seed(0)
    key_bits, value_bits = layout.key.format.bits, layout.value.format.bits
    shape = (1, layout.page, layout.head_dim)
    codes = torch.randint(0, 1 << key_bits, shape, generator=generator).to(torch.uint8)
    rows, width = layout.page // layout.fold, layout.key_columns // layout.fold
    matrix = unpack_codes(layout.pack_keys(codes).reshape(rows // 16, -1), key_bits, rows, layout.key_columns, "mma16")
    for token in range(layout.page):
        start = token // rows * width
        assert torch.equal(matrix[token % rows, start : start + layout.head_dim], codes[0, token])
    codes = torch.randint(0, 1 << value_bits, shape, generator=generator).to(torch.uint8)
    packed = layout.pack_values(codes).reshape(layout.value_rows // 16, -1)
    matrix = unpack_codes(packed, value_bits, layout.value_rows, layout.page, "mma16")
    for token in range(layout.page):
        step, place = divmod(token, layout.page // layout.value_steps)
        column = place // 16 * 16 * layout.value_steps + step * 16 + place % 16
        assert torch.equal(matrix[: layout.head_dim, column], codes[0, token])


def test_nothing_is_padded_at_common_sizes() -> None:
    for bits, name in ((4, "int4/token:fp16"), (8, "int8/token:fp16")):
        for dim in (32, 64, 128, 256):
            layout = CacheLayout.of(name, dim)
            assert layout.page == 128
            assert layout.key_bytes == layout.value_bytes == 128 * dim * bits // 8


def test_the_reference_is_attention_over_the_decoded_cache() -> None:
    layout, scale = CacheLayout.of("int8/token:fp32", 64, "int4/token:fp32"), 0.2
    cache, lengths = garbage(layout, 6, 2), [200, 0, 3]
    table = torch.tensor([[4, 1], [0, 0], [5, 3]], dtype=torch.int32)
    for row, length in zip(table, lengths, strict=True):
        extend(cache, tokens(length, 2, 64), tokens(length, 2, 64, 1), row, 0)
    q = tokens(3, 6, 64, 2).double()
    out = attention(q, cache, table, lengths, scale)
    assert (out[1] == 0).all()
    for b in (0, 2):
        keys, values = (t.double().transpose(0, 1)[None] for t in read(cache, table[b], lengths[b]))
        want = torch.nn.functional.scaled_dot_product_attention(
            q[b, None, :, None], keys, values, scale=scale, enable_gqa=True
        )
        torch.testing.assert_close(out[b], want[0, :, 0], rtol=1e-12, atol=1e-12)  # both in float64


def test_a_bad_token_is_nan_and_others_are_untouched() -> None:
    layout = CacheLayout.of("int8/token:fp32", 32)
    cache, x = Cache.empty(layout, 1, 1), tokens(3, 1, 32)
    x[1, 0, 5] = float("nan")
    extend(cache, x, x, torch.tensor([0]), 0)
    keys, values = read(cache, torch.tensor([0]), 3)
    for found in (keys, values):
        assert found[1].isnan().all()
        assert found[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("key", "dim", "value", "word"),
    [
        ("int8/axis0", 64, "", "token"),
        ("uint4/token:fp16+z", 64, "", "no zero point"),
        ("int8/token:fp32", 64, "int4/token:e8m0", "a float"),
        ("int8/token:fp32", 64, "int4/token:fp16", "fp16"),
        ("int8/token:fp32", 257, "", "256"),
        ("int8/token:fp32", 0, "", "256"),
    ],
)
def test_refusals_have_a_reason(key: str, dim: int, value: str, word: str) -> None:
    with pytest.raises(QCError, match=word):
        CacheLayout.of(key, dim, value)


def test_packing_in_pages_is_packing_alone() -> None:
    """Many pages in one call, and one."""
    layout = CacheLayout.of("int3/token:fp16", 48)
    codes = torch.randint(0, 8, (3, layout.page, 48), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for pack, unpack in ((layout.pack_keys, layout.unpack_keys), (layout.pack_values, layout.unpack_values)):
        assert torch.equal(pack(codes), torch.cat([pack(page[None]) for page in codes]))
        assert torch.equal(unpack(pack(codes)), codes)
