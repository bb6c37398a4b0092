"""Products of bytes by generated Triton kernels against the exact product, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton import Tile, TritonLowering, run
from qcompile.codegen.devices.triton_bounds import expected, gamma, terms, unit_of
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import OUT_DTYPES, quantize_rows
from qcompile.ir.packing import unpack_codes, unpack_scales
from qcompile.testing.interpret import interpret
from tests.codegen.products import BYTES, DTYPES, TILES, allowed, check, spec_of, weight


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


@pytest.mark.parametrize(("scheme", "act"), BYTES)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    x=st.sampled_from(DTYPES),
    tile=st.sampled_from(TILES),
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 70) | st.sampled_from([130, 600, 1024, 1600]),
    seed=st.integers(0, 9),
)
def test_product_of_bytes(scheme: str, act: str, x: str, tile: Tile, m: int, n: int, k: int, seed: int) -> None:
    spec = spec_of(scheme, x, act=act)
    assert TritonLowering().supports(spec)
    parts = quantize(weight(n, k, seed), spec.weight)
    torch.manual_seed(seed)
    values = torch.randn(m, k).to(OUT_DTYPES[x])
    values[m // 2] = 0
    y = check(spec, values, parts, n, k, tile)
    assert (y[m // 2] == 0).all()


@pytest.mark.parametrize("act", ["int8/token", "uint8/token:fp32+z", "uint8/tensor:fp32+z"])
@pytest.mark.parametrize("scheme", ["int8/axis0", "uint4/axis0:fp32+z", "int3/tensor", "binary/axis0"])
def test_sums_of_bytes_are_exact(scheme: str, act: str) -> None:
    """One scale for a row: the integer sum and two roundings, bit for bit, whatever the splits."""
    spec = spec_of(scheme, "f32", act=act)
    n, k = 37, 1100
    x, parts = torch.randn(5, k), quantize(weight(n, k, 1), spec.weight)
    q, s = quantize_rows(x, spec.act)  # type: ignore[arg-type]
    number = spec.weight.format.levels()[unpack_codes(parts[0], spec.weight.format.bits, n, k, "mma8").long()].long()
    number = number - unpack_scales(parts[2], n).long() if len(parts) > 2 else number
    want = (q.long() @ number.T).float() * unpack_scales(parts[1], n).T * s
    for tile in TILES:
        assert torch.equal(run(spec, x, parts, [], [n], k, tile), want)


@pytest.mark.parametrize("act", ["int8/tensor:fp32", "uint8/tensor:fp32+z", "e4m3/tensor:fp32"])
def test_scales_that_were_chosen_before(act: str) -> None:
    """Values beyond their range go to its end; a row that is not finite is NaN, and leaves the others alone."""
    spec, n, k = spec_of("int8/axis0" if "8/" in act else "e4m3/axis0", "f32", act=act), 20, 70
    parts = quantize(weight(n, k, 1), spec.weight)
    x = torch.randn(6, k, generator=torch.Generator().manual_seed(2)) * torch.tensor([1.0, 1, 0.1, 20, 1, 0])[:, None]
    static = [torch.tensor([0.02])] + [torch.tensor([100], dtype=torch.uint8)] * (not spec.act.symmetric)  # type: ignore[union-attr]
    for tile in TILES[:2]:
        y = run(spec, x, parts, [], [n], k, tile, static=static)
        want = expected(spec, x, parts, n, k, static=static)
        assert ((y.double() - want.value).abs() <= allowed(want.value, want.bound, "f32")).all()
        for bad in (float("nan"), float("inf")):
            broken = x.clone()
            broken[2, 3] = bad
            got = run(spec, broken, parts, [], [n], k, tile, static=static)
            assert got[2].isnan().all()
            assert torch.equal(got[[0, 1, 3, 4, 5]], y[[0, 1, 3, 4, 5]])
    low, top = spec.act.format.low, spec.act.format.max  # type: ignore[union-attr]
    zero = 100 if len(static) > 1 else 0
    assert torch.equal(quantize_rows(x[3:4], spec.act, static)[0].amax(), torch.tensor(top - zero))  # type: ignore[arg-type]
    assert torch.equal(quantize_rows(x[3:4], spec.act, static)[0].amin(), torch.tensor(low - zero))  # type: ignore[arg-type]


@pytest.mark.parametrize("act", ["int8/token", "uint8/token:fp32+z"])
def test_segments_and_pairs_of_bytes(act: str) -> None:
    spec = spec_of("uint4/g128:fp16+z", "bf16", act=act, segments=2, epilogue="silu(a0)*a1")
    n, k, x = 37, 260, torch.randn(18, 260).bfloat16()
    parts = [quantize(weight(n, k, i), spec.weight) for i in (3, 4)]
    flat = [p for part in parts for p in part]
    one, other = (expected(spec, x, part, n, k) for part in parts)
    silu = torch.nn.functional.silu(one.value)
    want = silu * other.value
    error = 1.1 * other.value.abs() * one.bound + silu.abs() * other.bound + 1.1 * one.bound * other.bound
    error = error + 6 * 2.0**-23 * want.abs()
    got = run(spec, x, flat, [], [n, n], k, Tile(splits=2))
    assert ((got.double() - want).abs() <= allowed(want, error, "bf16")).all()
    joined = replace(spec, epilogue="acc")
    both = run(joined, x, flat, [], [n, n], k, Tile(columns=32))
    acc, bound = torch.cat((one.value, other.value), 1), torch.cat((one.bound, other.bound), 1)
    assert ((both.double() - acc).abs() <= allowed(acc, bound, "bf16")).all()


def test_bounds_of_coarse_sums_say_something() -> None:
    """On devices that keep 13 bits inside an instruction the bound stays a share of the terms, however long K is."""
    spec = spec_of("e4m3/axis0", "f32", act="e4m3/token")
    for k in (600, 8192):
        x, parts = torch.randn(2, k), quantize(weight(16, k, 1), spec.weight)
        fine, coarse = (expected(spec, x, parts, 16, k, byte_unit=unit_of(name)) for name in ("sm_120", "sm_90"))
        assert (fine.bound > 0).all()
        share = (coarse.bound - fine.bound) / (x.abs().double() @ terms(spec, parts, 16, k).size.T)
        assert (share > 2.0**-13).all()
        assert (share < 0.02).all()  # 132 cuts by 2^-13, and the rounding of x to e4m3
    with pytest.raises(ValueError, match="no digit is left"):
        gamma(4096, 2.0**-13)
