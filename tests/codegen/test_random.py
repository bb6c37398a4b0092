"""Random bits and stochastic rounding of kernels: those of the definition, bit for bit, at any cut, and their cost."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile import compat
from qcompile.codegen.devices.cpu import ISAS, detect_isa
from qcompile.codegen.devices.cpu_text import fragment
from qcompile.codegen.devices.triton_random import helper_text
from qcompile.ir.rounding import random_bits, round_to_integer
from qcompile.ir.stochastic_cast import stochastic_cast
from qcompile.testing.compile_for import Report, compile_kernel
from qcompile.testing.interpret import interpret

needs_triton = pytest.mark.skipif(
    compat.triton_version() is None, reason="triton is not installed: torch's builds for CPUs come without it"
)

# What can be done with the bits of elements: name -> (type of the results, what they are).
RESULTS: dict[str, tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]] = {
    "bits": (torch.uint16, lambda _, bits: bits.to(torch.uint16)),
    "stochastic_bf16": (torch.bfloat16, lambda x, bits: stochastic_cast(x, torch.bfloat16, bits)),
    "stochastic_fp16": (torch.float16, lambda x, bits: stochastic_cast(x, torch.float16, bits)),
    "stochastic_integer": (torch.float32, lambda x, bits: round_to_integer(x, "stochastic", bits)),
}
POINTER = {torch.uint16: "*u16", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


@dataclass(frozen=True)
class Draw:
    """Values, and where their random bits begin."""

    x: Tensor
    seed: int
    offset: int
    stream: tuple[int, int]

    @property
    def bits(self) -> Tensor:
        return random_bits(len(self.x), self.seed, self.offset, self.stream)


def drawn(count: int, offset: int, seed: int, stream: tuple[int, int], integers: bool, of: int) -> Draw:
    """Every kind of float32: any pattern, moderate numbers, the ends of ranges, and what its bits just lift, or do not."""
    generator = torch.Generator().manual_seed(of)
    x = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)
    x[::2] = torch.randn(len(x[::2]), generator=generator) * 8
    ends = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.9, 65536.0, 3.4028235e38, 6.1e-5, -(2.0**-25), 1e-45]
    x[1:23:2] = torch.tensor(ends)[: len(x[1:23:2])]
    draw = Draw(x.round() if integers else x, seed, offset, stream)
    short = 65536 - draw.bits  # of 65536 parts: with its bits they make one
    x[2::8] = x[2::8].floor() + ((short[2::8] - 0.5) / 65536).float()  # half a part is rounded up
    word, less = draw.x.view(torch.int32), of % 2
    word[4::8] = (word[4::8] & -65536) | ((short[4::8] - less) & 0xFFFF).int()
    word[6::8] = (word[6::8] & -8192) | ((8192 - (draw.bits[6::8] >> 3) - less) & 0x1FFF).int()
    return draw


words = st.integers(0, 2**32 - 1)
draws = st.builds(
    drawn,
    count=st.integers(1, 40) | st.integers(1, 600),
    offset=st.integers(0, 40) | st.integers(0, 2**62) | st.sampled_from([2**35 - 8, 2**35 - 3, 2**35, 2**62 + 5]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stream=st.tuples(words, words),
    integers=st.booleans(),
    of=st.integers(0, 99),
)


def same(got: Tensor, want: Tensor) -> bool:
    """Equal patterns; where the result is fp32 any NaN is a NaN, and zeros need not agree in sign."""
    if got.dtype == torch.float32:
        return torch.equal(got.nan_to_num(1e30, 2e30, 3e30), want.nan_to_num(1e30, 2e30, 3e30))
    return torch.equal(got.view(torch.int16), want.view(torch.int16))


# ------------------------------------------------------------------------------------------------------------------ C++

CPP = """
extern "C" void kernel(const float* x, uint16_t* bits, uint16_t* bf16, uint16_t* fp16, float* integer,
                       int64_t count, int64_t seed, int64_t offset, int64_t stream0, int64_t stream1) {
  const Philox random{(uint64_t)seed, (uint32_t)stream0, (uint32_t)stream1};
  constexpr int TILE = 320;  // no multiple of every batch
  alignas(64) uint16_t made[TILE + Philox::BATCH];
  for (int64_t i = 0; i < count; i += TILE) {
    const uint16_t* r = random.fill<TILE>((uint64_t)(offset + i), made);
    memcpy(bits + i, r, 2 * TILE);
    for (int64_t j = 0; j < TILE; j += 16) {
      const VF y = fload(x + i + j);
      store_16(bf16 + i + j, stochastic_bf16(y, load_u16(r + j)));
      store_16(fp16 + i + j, stochastic_fp16(y, load_u16(r + j)));
      fstore(integer + i + j, stochastic_integer(y, load_u16(r + j)));
    }
  }
}
"""
CPP_TYPES = ["const float*", *["uint16_t*"] * 3, "float*", *["int64_t"] * 5]
# What Philox has no lanes for, by instruction set: the text for fewer is right on a machine that has more.
WITHOUT = {"avx512vnni": (), "avx2": ("__AVX512F__",), "portable": ("__AVX512F__", "__AVX2__")}
RUNNABLE = ISAS[ISAS.index(detect_isa()) :]
SMALL = 2.0**22  # beyond, floats are integers, and the instructions' conversions end


@functools.cache
def cpp_kernel(isa: str) -> Callable[..., None]:
    text = fragment("fragments", "prelude") + "namespace {\nconstexpr int DIGITS = 1, CODE_TOP = 1;\n"
    text += fragment("fragments", isa) + "".join(f"#undef {macro}\n" for macro in WITHOUT[isa])
    return compat.load_cpp_kernel(CPP_TYPES, f"{text}{fragment('templates', 'philox')}}}\n{CPP}")


@pytest.mark.parametrize("isa", RUNNABLE)
@settings(max_examples=60)
@given(draw=draws)
def test_cpp(isa: str, draw: Draw) -> None:
    count = len(draw.x)
    x = torch.nn.functional.pad(draw.x, (0, -count % 320))
    out = [torch.empty(len(x), dtype=torch.int32).to(dtype) for dtype, _ in RESULTS.values()]
    raw = [t.view(torch.uint16) if t.dtype != torch.float32 else t for t in out]
    cpp_kernel(isa)(x, *raw, count, draw.seed, draw.offset, *draw.stream)
    for (name, (_, reference)), got in zip(RESULTS.items(), out, strict=True):
        meant = draw.x.abs() < SMALL if name == "stochastic_integer" else slice(None)
        assert same(got[:count][meant], reference(draw.x, draw.bits)[meant]), name


# --------------------------------------------------------------------------------------------------------------- Triton

KERNEL = """import triton
import triton.language as tl


{helpers}


@triton.jit
def kernel(STATE, X, Y, N, skip, BLOCKS: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    block = tl.load(STATE + 3) // 8 + first + tl.arange(0, BLOCKS)
    bits = random_bits(block, tl.load(STATE), tl.load(STATE + 1), tl.load(STATE + 2))
    at = first * 8 + tl.arange(0, BLOCKS * 8) - skip
    {load}
    tl.store(Y + at, {result}, mask=(at >= 0) & (at < N))
"""
EDGES = ", mask=(at >= 0) & (at < N)"
MASKED = "x = tl.load(X + at, mask=(at >= 0) & (at < N), other=0.0)"


def text_of(name: str) -> str:
    if name == "bits":
        return KERNEL.format(helpers=helper_text("random_bits"), load="", result="bits.to(tl.uint16)")
    return KERNEL.format(helpers=helper_text("random_bits", name), load=MASKED, result=f"{name}(x, bits)")


def launch(name: str, draw: Draw, blocks: int) -> Tensor:
    """One kernel over tiles of `blocks` blocks that begin where a block does. Its result lies between memory that must
    stay as it is."""
    skip, count = draw.offset % 8, len(draw.x)
    state = torch.tensor([draw.seed, *draw.stream, draw.offset])
    out = torch.full((count + 16,), 77, dtype=torch.int32).to(RESULTS[name][0])
    tiles = -(-(count + skip) // (8 * blocks))
    compat.triton_kernel(text_of(name))[(tiles,)](state, draw.x, out[8:], count, skip, BLOCKS=blocks)
    assert (out[:8] == 77).all()
    assert (out[-8:] == 77).all()
    return out[8:-8]


@needs_triton
def test_triton() -> None:
    @settings(max_examples=20)
    @given(draw=draws, tiles=st.sampled_from([(4, 128), (8,), (16,), (64,)]))
    def check(draw: Draw, tiles: tuple[int, ...]) -> None:
        for name, (_, reference) in RESULTS.items():
            for blocks in tiles:
                assert same(launch(name, draw, blocks), reference(draw.x, draw.bits)), name

    with interpret():  # once for all
        check()


def amortized(name: str, target: str) -> tuple[float, Report]:
    """Instructions of another element: what a kernel of twice the blocks has more. And the larger kernel."""
    signature = {"STATE": "*i64", "X": "*fp32", "Y": POINTER[RESULTS[name][0]], "N": "i64"}
    kernel = compat.triton_kernel(text_of(name).replace(MASKED, "x = tl.load(X + at)").replace(EDGES, ""))
    small, large = (
        compile_kernel(kernel, signature, {"BLOCKS": blocks, "skip": 0}, targets=(target,))[target]
        for blocks in (256, 512)
    )
    return (large.whole.instructions - small.whole.instructions) * large.threads / (256 * 8), large


# Instructions per element of whole tiles on sm_90, the store and (except of bits) the load included, as measured with
# Triton 3.6 and 3.7. An optimizer step of 10 bytes per parameter has time for 69 on an H200.
BUDGET = {"bits": 7.0, "stochastic_bf16": 12.0, "stochastic_fp16": 22.5, "stochastic_integer": 20.0}


@needs_triton
@pytest.mark.parametrize("name", BUDGET)
def test_instructions_on_hopper(name: str) -> None:
    """Nothing is exchanged between lanes for results of 16 bits, whose widest stores hold the eight elements of a block."""
    cost, report = amortized(name, "sm_90")
    assert cost <= BUDGET[name]
    assert (report.spill_bytes, report.whole.shuffles, report.whole.i2f) == (0, 0, 0)
    assert all(".128" in opcode for opcode in report.whole.stores)
    if RESULTS[name][0].itemsize == 2:
        assert not report.whole.shared


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_bits_on_other_targets(target: str) -> None:
    cost, report = amortized("bits", target)
    assert cost <= 9
    assert (report.spill_bytes, report.whole.shuffles, dict(report.whole.shared)) == (0, 0, {})
