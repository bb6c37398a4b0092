"""The generated attention kernel: against the exact result in Triton's interpreter, and its machine code.

Every bound is computed by `qcompile.codegen.devices.triton_attention_bounds` from the kernel's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton_attention import DTYPES, Block, block_for, choose_block, decode_attention
from qcompile.codegen.devices.triton_attention_bounds import expected
from qcompile.codegen.devices.triton_attention_text import AttentionSpec, attention_text
from qcompile.codegen.devices.triton_overlap import can_overlap
from qcompile.errors import QCError
from qcompile.ir.formats import FORMATS
from qcompile.ir.kvcache import Cache, CacheLayout, attention, extend
from qcompile.testing.compile_for import TARGETS, Report, compile_kernel
from qcompile.testing.interpret import interpret

# Every format, at head sizes that are folded, padded, of one unit and of several.
SMALL = [(f"{name}/token:fp16", (16, 32, 20)[i % 3], "") for i, name in enumerate(FORMATS)]
LAYOUTS = [
    ("int8/token:fp32", 128, ""),
    ("int4/token:fp16", 128, ""),
    ("int4/token:fp32", 64, "int8/token:fp32"),
    ("int8/token:bf16", 80, "int4/token:bf16"),
    ("e4m3/token:bf16", 96, ""),
    ("e5m2/token:fp16", 32, ""),
    ("int8/token:fp16", 256, "int4/token:fp16"),
]
CALLS = {
    "dtype": st.sampled_from(list(DTYPES)),
    "lengths": st.lists(st.sampled_from([0, 1, 127, 128, 129, 300]) | st.integers(0, 300), min_size=1, max_size=2),
    "kv": st.integers(1, 2),
    "group": st.sampled_from([1, 3, 8, 9, 16]),
    "block": st.builds(Block, splits=st.integers(1, 4), natural=st.booleans()),
    "seed": st.integers(0, 9),
}


def filled(
    layout: CacheLayout, lengths: Sequence[int], heads: int, seed: int, size: float = 1.0
) -> tuple[Cache, Tensor]:
    """A cache with sequences of these lengths and their table. What no token was written to is NaN where it can be, and
    page numbers behind the last page of a sequence lead nowhere."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // layout.page) for length in lengths]
    cache = Cache.empty(layout, sum(counts) + 1, heads)
    codes = torch.full((1, layout.page, layout.head_dim), 0xFF, dtype=torch.uint8)
    cache.keys[:], cache.values[:] = layout.pack_keys(codes), layout.pack_values(codes)
    cache.scales.fill_(float("nan"))
    pages = torch.randperm(sum(counts) + 1, generator=generator).to(torch.int32)
    table = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32)
    for row, count, length in zip(table, counts, lengths, strict=True):
        row[:count], pages = pages[:count], pages[count:]
        shape = (length, heads, layout.head_dim)
        keys, values = (torch.randn(shape, generator=generator) for _ in range(2))
        extend(cache, 2 * keys, size * values * torch.randn(length, 1, 1, generator=generator).exp2(), row, 0)
    return cache, table


def queries(batch: int, heads: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Rows that do not lie beside each other."""
    x = torch.randn(batch, heads, dim + 3, generator=torch.Generator().manual_seed(seed + 99))
    return x.to(dtype)[..., :dim]


def within(y: Tensor, q: Tensor, cache: Cache, table: Tensor, lengths: Sequence[int], splits: int) -> bool:
    want = expected(q, cache, table, lengths, splits=splits)
    return bool(((y.double() - want.value).abs() <= want.bound).all())


def check(
    name: tuple[str, int, str],
    dtype: torch.dtype,
    lengths: list[int],
    kv: int,
    group: int,
    block: Block,
    seed: int,
) -> None:
    layout = CacheLayout.of(*name)
    cache, table = filled(layout, lengths, kv, seed)
    q = queries(len(lengths), kv * group, layout.head_dim, dtype, seed)
    with interpret():
        y = decode_attention(q, cache, table, torch.tensor(lengths, dtype=torch.int32), None, block)
    assert (y.shape, y.dtype) == (q.shape, dtype)
    assert within(y, q, cache, table, lengths, block.splits)
    for row, length in zip(y, lengths, strict=True):
        assert length or (row == 0).all()


@pytest.mark.parametrize("name", LAYOUTS, ids=str)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(call=st.fixed_dictionaries(CALLS))
def test_attention(name: tuple[str, int, str], call: dict[str, Any]) -> None:
    check(name, **call)


@pytest.mark.parametrize("name", SMALL, ids=str)
def test_every_format(name: tuple[str, int, str]) -> None:
    check(name, torch.float16, [150], 1, 4, Block(), 0)


def test_the_bound_knows_the_reference_and_is_not_wide() -> None:
    """One token more or less is outside; what is allowed is a few roundings of the probabilities to 16 bits."""
    layout, lengths = CacheLayout.of("int8/token:fp32", 64), [200, 140]
    cache, table = filled(layout, lengths, 2, 0)
    q = queries(2, 8, 64, torch.float16, 0)
    want = expected(q, cache, table, lengths)
    exact = attention(q.double(), cache, table, lengths, 64**-0.5)
    # The decoded cache of the reference is rounded to fp32: the products of numbers and scales, 2^-24 each.
    assert (want.value - exact).abs().max() < 2.0**-20
    assert want.bound.max() < 4 * 2.0**-11 * want.value.abs().max()
    with interpret():
        for change in (-1, 1):
            other = [length + change for length in lengths]
            cache.scales.nan_to_num_(1.0)
            y = decode_attention(q, cache, table, torch.tensor(other, dtype=torch.int32))
            assert within(y, q, cache, table, other, 1)
            assert not within(y, q, cache, table, lengths, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [2.0**-20, 2.0**-9, 2.0**14])
def test_values_of_every_size(dtype: torch.dtype, size: float) -> None:
    """The scales of values do not use up the range of fp16: relative to their size results are as good as any."""
    layout, lengths = CacheLayout.of("int4/token:fp32", 32), [150]
    cache, table = filled(layout, lengths, 1, 3, size)
    q = queries(1, 4, 32, dtype, 3)
    with interpret():
        y = decode_attention(q, cache, table, torch.tensor(lengths, dtype=torch.int32), None, Block(2))
    assert within(y, q, cache, table, lengths, 2)
    want = expected(q, cache, table, lengths, splits=2)
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0
    assert (want.bound <= 2.0**-6 * want.value.abs().amax() + 2 * smallest).all()


@pytest.mark.parametrize("group", [3, 20])
def test_blocks_give_the_same_to_the_bit(group: int) -> None:
    """Without splits whatever the order of columns; with splits every time; more heads than a block has are several."""
    layout, lengths = CacheLayout.of("int8/token:fp16", 32, "int4/token:fp16"), [300, 0, 130]
    cache, table = filled(layout, lengths, 2, 1)
    q, n = queries(3, 2 * group, 32, torch.bfloat16, 1), torch.tensor(lengths, dtype=torch.int32)
    with interpret():
        first = decode_attention(q, cache, table, n, None, Block())
        assert torch.equal(decode_attention(q, cache, table, n, None, Block(stages=1, natural=False)), first)
        split = [decode_attention(q, cache, table, n, None, Block(splits=3)) for _ in range(2)]
    assert torch.equal(*split)
    assert within(first, q, cache, table, lengths, 1)
    assert within(split[0], q, cache, table, lengths, 3)


def test_a_bad_query_is_not_finite_and_others_are_untouched() -> None:
    layout, lengths = CacheLayout.of("int4/token:fp16", 32), [140, 300]
    cache, table = filled(layout, lengths, 1, 2)
    q, n = queries(2, 4, 32, torch.float16, 2), torch.tensor(lengths, dtype=torch.int32)
    with interpret():
        clean = decode_attention(q, cache, table, n, None, Block(2))
        q[0, 1, 3], q[1, 2, 0] = float("nan"), float("inf")
        y = decode_attention(q, cache, table, n, None, Block(2))
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[0, 1] = bad[1, 2] = True
    assert y[bad].isnan().any(1).all()
    assert torch.equal(y[~bad], clean[~bad])


def test_a_bad_token_reaches_its_own_sequence_and_head() -> None:
    layout = CacheLayout.of("int8/token:fp32", 32)
    cache, table = filled(layout, [140, 20], 2, 2)
    cache.scales[table[0, 1], 1, 5, 1] = float("nan")
    with interpret():
        y = decode_attention(
            queries(2, 6, 32, torch.float16, 2), cache, table, torch.tensor([140, 20], dtype=torch.int32)
        )
    assert y[0, 3:].isnan().all()
    assert y[0, :3].isfinite().all()
    assert y[1].isfinite().all()


def test_a_length_beyond_the_table_is_cut_off() -> None:
    layout = CacheLayout.of("int8/token:fp16", 16)
    cache, table = filled(layout, [256], 1, 0)
    table, q = table[:, :2].contiguous(), queries(1, 1, 16, torch.float16, 0)
    with interpret():
        whole, beyond = (
            decode_attention(q, cache, table, torch.tensor([n], dtype=torch.int32), None, Block()) for n in (256, 999)
        )
    assert torch.equal(whole, beyond)


def test_no_queries() -> None:
    layout = CacheLayout.of("int4/token:fp16", 64)
    cache, table = filled(layout, [3], 1, 0)
    y = decode_attention(torch.empty(0, 4, 64).half(), cache, table[:0], torch.empty(0, dtype=torch.int32))
    assert y.shape == (0, 4, 64)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"q": torch.zeros(1, 3, 64).half()}, "multiple of 2"),
        ({"q": torch.zeros(1, 4, 32).half()}, "64"),
        ({"q": torch.zeros(1, 4, 64)}, "fp16 or bf16"),
        ({"q": torch.zeros(1, 64, 4).half().mT}, "beside each other"),
        ({"table": torch.zeros(1, 2, dtype=torch.int64)}, "table int32"),
        ({"table": torch.zeros(1, 4, dtype=torch.int32)[:, ::2]}, "rows dense"),
        ({"table": torch.zeros(2, 2, dtype=torch.int32)}, "as many"),
        ({"lengths": torch.zeros(1)}, "lengths int32"),
        ({"q": torch.zeros(1, 4, 64, dtype=torch.float16, device="meta")}, "one device"),
    ],
)
def test_refusals_have_a_reason(change: dict[str, Tensor], word: str) -> None:
    fine = {
        "q": torch.zeros(1, 4, 64).half(),
        "cache": Cache.empty(CacheLayout.of("int8/token:fp16", 64), 2, 2),
        "table": torch.zeros(1, 2, dtype=torch.int32),
        "lengths": torch.zeros(1, dtype=torch.int32),
    }
    with pytest.raises(QCError, match=word):
        decode_attention(**(fine | change))  # type: ignore[arg-type]


def test_choosing_a_block() -> None:
    """Enough blocks for every multiprocessor, no more than pages; pages under way fit into shared memory."""
    layout = CacheLayout.of("int4/token:fp16", 128)
    assert [choose_block(layout, blocks, 64, torch.device("cpu")).splits for blocks in (1, 4, 100)] == [16, 4, 1]
    assert choose_block(layout, 1, 3, torch.device("cpu")).splits == 3
    assert block_for(layout, "sm_90", 227 * 1024) == Block(1, 4, 4, True)
    assert block_for(layout, "gfx942", 64 * 1024) == Block(1, 2, 4, False)
    assert block_for(CacheLayout.of("int8/token:fp16", 256), "sm_80", 163 * 1024) == Block(1, 2, 8, False)
    assert block_for(CacheLayout.of("int3/token:fp16", 256), "gfx942", 64 * 1024).stages == 1


def test_the_text_of_a_spec_is_always_the_same() -> None:
    spec = AttentionSpec(CacheLayout.of("int6/token:fp16", 64, "e4m3/token:fp16"), "bf16")
    assert attention_text(spec).source == attention_text(spec).source
    assert attention_text(spec) != attention_text(replace(spec, dtype="f16"))


# Instructions per cached number (of keys and of values) in the loop over pages, 8 heads or fewer, in bf16, with Triton 3.6 or
# 3.7, so that a change that costs some is seen. An H200 at full bandwidth has time for 6.9 at 8 bits and 3.4 at 4 (see
# `test_triton_code`); of heads of 64 the softmax is half.
BUDGET = {
    ("int8/token:fp16", 128): 3.3,
    ("e4m3/token:fp16", 128): 3.8,
    ("int4/token:fp16", 128): 2.6,
    ("int4/token:fp16", 64): 3.5,
    ("int8/token:fp32", 256): 3.2,
}
MMA = {"sm_80": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}


def build(layout: CacheLayout, target: str, dtype: str = "bf16", heads: int = 8) -> Report:
    text, block = attention_text(AttentionSpec(layout, dtype)), block_for(layout, target, TARGETS[target].shared_limit)
    signature = (
        {name: f"*{kind}" for name, kind in text.pointers} | {"scale": "fp32"} | dict.fromkeys(text.sizes, "i32")
    )
    return compile_kernel(
        compat.triton_kernel(text.source),
        signature,
        {"NH": heads, "NATURAL": block.natural, "STAGES": block.stages, "PDL": can_overlap(target)},
        targets=(target,),
        aligned={name for name, _ in text.pointers} | {"ldqb", "ldqh", "ldyb", "ldyh"},
        num_warps=block.warps,
        num_stages=block.stages,
    )[target]


@pytest.mark.parametrize("name", BUDGET, ids=str)
def test_machine_code_on_hopper(name: tuple[str, int]) -> None:
    """Tensor cores that take keys and values from registers: 16-byte asynchronous loads, no conversion, nothing decoded that
    comes back from shared memory."""
    layout = CacheLayout.of(*name)
    report = build(layout, "sm_90")
    assert report.fits
    assert (report.spill_bytes, report.loop.i2f) == (0, 0)
    assert all(opcode.startswith("HGMMA") for opcode in report.loop.mma)
    assert report.loop.operands["K"].keys() == report.loop.operands["V"].keys() == {"LDGSTS.E.BYPASS.128"}
    # One arrival per dot: more, and the assembler has put the instructions into a row.
    spec = AttentionSpec(layout, "bf16")
    assert report.loop.arrives <= spec.key.steps + spec.value.steps
    # Probabilities, their maximum and scales go through shared memory; a decoded operand would take 32 stores and more for
    # each 64 rows. The lanes trade maxima, three times for each of two columns, twice across warps.
    elements = 2 * layout.page * layout.head_dim // report.threads
    written = sum(report.loop.shared.get(kind, 0) for kind in ("STS", "STSM"))
    assert written <= (20 if report.threads == 256 else 6) < elements // 4
    assert report.loop.shared.get("LDSM", 0) == 0
    assert report.loop.shuffles <= 10
    assert report.loop.instructions / elements <= BUDGET[name]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", [("int8/token:fp16", 128), ("int4/token:fp32", 64)], ids=str)
def test_every_target(name: tuple[str, int], target: str) -> None:
    """More than 8 heads, fp16."""
    report = build(CacheLayout.of(*name), target, "f16", heads=16)
    assert report.fits, report
    assert report.spill_bytes == 0, report
    assert report.loop.mma
    assert all(opcode.startswith(MMA[target]) for opcode in report.loop.mma)
    assert report.loop.i2f == 0
    assert (report.loop.widest_of("K"), report.loop.widest_of("V")) == (16, 16)
    # No lane needs another's codes: columns have the order in which the instruction takes them. Maxima of 16 heads are traded.
    # On AMD Triton 3.6 loads words in an order of its own, and lanes trade those.
    assert report.loop.shuffles <= (64 if target.startswith("gfx") else 32)
