"""Generated Triton kernels against the exact product, in Triton's interpreter.

Every bound is computed by `qcompile.codegen.devices.triton_bounds` from the kernel's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton import Tile, TritonLowering, run, text_of
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, expected, gamma, terms, unit_of
from qcompile.codegen.devices.triton_lines import Layout
from qcompile.codegen.devices.triton_numbers import why_no_bytes
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import quantize
from qcompile.ir.formats import FORMATS
from qcompile.ir.matmul import OUT_DTYPES, quantize_rows
from qcompile.ir.packing import pack_codes, pack_scales, unpack_codes, unpack_scales
from qcompile.ir.scheme import Scheme
from qcompile.testing.interpret import interpret

# Every format, with every way that scales meet it, and every kind of scale, zero and nesting.
SCHEMES = [
    *(f"{name}/axis0" for name in FORMATS),
    *(f"{name}/g{16 * 2 ** (i % 4)}:fp16" for i, name in enumerate(FORMATS)),
    "int4/g128:fp16",
    "uint4/g256:fp16+z",
    "uint4/g32:fp16+m",
    "uint4/g64:fp16+z",
    "uint8/axis0:fp32+z",
    "uint3/axis0:bf16+m",
    "int3/g512:bf16",
    "e2m1/g32:e8m0",
    "e3m2/g96:e8m0",
    "e2m1/g16:e4m3/tensor:fp32",
    "int4/g16:int8/g64:fp16",
    "int4/g128:int8/axis0:fp32",
    "uint4/g48:pow2+z/axis0:fp32",
    "ternary/tensor",
]
DTYPES = list(OUT_DTYPES)
TILES = [
    Tile(),
    Tile(units=2, columns=32, natural=False),
    Tile(splits=3),
    Tile(rows=32, columns=16, units=4, splits=2, natural=False),
]


def spec_of(weight: str, x: str = "f16", act: str = "", **more: object) -> KernelSpec:
    scheme = Scheme.parse(f"{weight}@{'mma8' if act else 'mma16'}")
    return KernelSpec(scheme, Scheme.parse(act) if act else None, **{"x": x, "y": x, **more})  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


def weight(n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) + 0.3 * torch.randn(n, 1, generator=generator)) / 8


def allowed(want: Tensor, bound: Tensor, dtype: str) -> Tensor:
    """The sums' bound and the rounding to the result's type."""
    return bound + ROUNDOFF[dtype] * (want.abs() + bound) + SMALLEST[dtype]


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    x=st.sampled_from(DTYPES),
    tile=st.sampled_from(TILES),
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 70) | st.sampled_from([128, 130, 512, 600, 1024]),
    pad=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_product(scheme: str, x: str, tile: Tile, m: int, n: int, k: int, pad: int, seed: int) -> None:
    spec = spec_of(scheme, x)
    parts = quantize(weight(n, k, seed), spec.weight)
    torch.manual_seed(seed)
    values = torch.randn(m, k + pad).to(OUT_DTYPES[x])[:, :k]
    values[m // 2] = 0
    y = run(spec, values, parts, [], [n], k, tile)
    want = expected(spec, values, parts, n, k)
    assert (y.shape, y.dtype) == ((m, n), OUT_DTYPES[x])
    assert ((y.double() - want.value).abs() <= allowed(want.value, want.bound, x)).all()
    assert (y[m // 2] == 0).all()


def bytes_of(operand: str) -> list[str]:
    """Every format of a kind of bytes: one scale for a row, and one for each unit of the packing or two."""
    names = [name for name, fmt in FORMATS.items() if not why_no_bytes(fmt, operand)]  # type: ignore[arg-type]
    return [
        *(f"{name}/axis0{':fp32+z' if name.startswith('u') else ''}" for name in names),
        *(f"{name}/g{512 if FORMATS[name].bits % 2 else 256}:fp16" for name in names if not name.startswith("u")),
    ]


BYTES = [
    *((scheme, "int8/token") for scheme in bytes_of("i8")),
    *((scheme, "e4m3/token") for scheme in bytes_of("e4m3")),
    ("int4/g128:fp16", "int8/token"),
    ("uint4/g128:fp16+z", "int8/token"),
    ("int8/g64:fp16", "int8/token"),
    ("uint8/g192:bf16+z", "int8/token"),
    ("int4/g128:int8/axis0:fp32", "int8/token"),
    ("int8/tensor", "int8/token"),
    ("int8/axis0", "int4/token"),
    ("int8/g64:fp16", "int8/g64:fp32"),
    ("uint4/g128:fp16+z", "int8/g256:fp32"),
    ("uint4/g384:fp16+z", "int8/g256:fp32"),
    ("int8/g512:fp16", "int8/g1024:fp32"),
    ("uint8/axis0:fp32+z", "int8/g128:fp32"),
    ("e4m3/b128x128:fp32", "e4m3/g128:fp32"),
    ("e4m3/axis0", "e4m3/g64:fp32"),
    ("uint4/g128:fp16+z", "e4m3/g128:fp32"),
    ("uint4/axis0:fp32+z", "e4m3/g256:fp32"),
    ("e2m1/g128:e8m0", "e4m3/token"),
    ("int8/axis0", "uint8/token:fp32+z"),
    ("uint4/axis0:fp32+z", "uint8/token:fp32+z"),
    ("int3/axis0", "uint6/token:fp32+z"),
    ("int4/g128:fp16", "uint8/token:fp32+z"),
    ("uint4/g256:fp16+z", "uint8/tensor:fp32+z"),
    ("uint8/g64:fp16+z", "uint8/token:fp32+z"),
    ("int8/axis0", "int8/tensor:fp32"),
    ("e4m3/axis0", "e4m3/tensor:fp32"),
]


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
    y = run(spec, values, parts, [], [n], k, tile)
    want = expected(spec, values, parts, n, k)
    assert ((y.double() - want.value).abs() <= allowed(want.value, want.bound, x)).all()
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_segments_and_extras(dtype: str, tile: Tile) -> None:
    """Merged segments whose boundaries lie inside panels and tiles, and both kinds of extras."""
    n, k, m = (21, 40, 3), 260, 19
    spec = spec_of(
        "int4/g128:fp16", dtype, segments=3, epilogue="acc*0.5+e0-e1", extras=(("row", "f32"), ("mat", dtype))
    )
    torch.manual_seed(1)
    x = torch.randn(m, k).to(OUT_DTYPES[dtype])
    parts = [quantize(weight(size, k, i), spec.weight) for i, size in enumerate(n)]
    extras = [torch.randn(sum(n)), torch.randn(m, sum(n) + 3).to(OUT_DTYPES[dtype])[:, : sum(n)]]
    y = run(spec, x, [p for part in parts for p in part], extras, n, k, tile)
    each = [expected(spec, x, part, size, k) for part, size in zip(parts, n, strict=True)]
    acc, bound = torch.cat([e.value for e in each], 1), torch.cat([e.bound for e in each], 1)
    want = acc * 0.5 + extras[0].double() - extras[1].double()
    # three roundings to fp32 in the epilogue
    bound = bound + 3 * 2.0**-24 * (acc.abs() + extras[0].abs() + extras[1].double().abs() + bound)
    assert ((y.double() - want).abs() <= allowed(want, bound, dtype)).all()


@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_pair_epilogue(tile: Tile) -> None:
    """silu(a0) * a1 + e0: |silu'| < 1.1, so the error is at most 1.1 |a1| b0 + |silu(a0)| b1 + 1.1 b0 b1, and roundings."""
    n, k, m = 37, 260, 18
    spec = spec_of(
        "uint4/g32:fp16+m", "bf16", y="f32", segments=2, epilogue="silu(a0)*a1+e0", extras=(("mat", "bf16"),)
    )
    torch.manual_seed(2)
    x, extra = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    parts = [quantize(weight(n, k, i), spec.weight) for i in (3, 4)]
    y = run(spec, x, [p for part in parts for p in part], [extra], [n, n], k, tile)
    a, b = (expected(spec, x, part, n, k) for part in parts)
    silu = torch.nn.functional.silu(a.value)
    want = silu * b.value + extra.double()
    error = 1.1 * b.value.abs() * a.bound + silu.abs() * b.bound + 1.1 * a.bound * b.bound
    # silu is good to 4 units (3 of the sigmoid, 1 of the product); then one product and one sum
    roundings = 6 * 2.0**-23 * (silu * b.value).abs() + 2.0**-23 * want.abs()
    assert ((y.double() - want).abs() <= error + roundings).all()


EPILOGUES = {
    "exp(acc)": torch.exp,
    "log(abs(acc)+1)": lambda v: (v.abs() + 1).log(),
    "tanh(acc)": torch.tanh,
    "erf(acc)": torch.erf,
    "sigmoid(acc)": torch.sigmoid,
    "relu(acc)": torch.relu,
    "silu(acc)": torch.nn.functional.silu,
    "-acc*0.5": lambda v: -v * 0.5,
    "sqrt(abs(acc))": lambda v: v.abs().sqrt(),
    "rsqrt(acc*acc+1)": lambda v: (v * v + 1).rsqrt(),
    "maximum(acc,1.5)/3": lambda v: v.clamp_min(1.5) / 3,
    "minimum(acc,0.5)-2": lambda v: v.clamp_max(0.5) - 2,
}


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(epilogue: str) -> None:
    """Sums of small integers are exact, so what is left are the functions: at most three operations, each within 4 units of
    fp32 of its value; exp and erf multiply an error of their argument by no more than the value and 1.2."""
    spec = spec_of("int4/axis0", "f16", y="f32", epilogue=epilogue)
    k = 128
    codes = torch.randint(0, 16, (16, k), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    parts = [pack_codes(codes, 4, "mma16"), pack_scales(torch.full((16, 1), 0.125), "mma16")]
    x = torch.zeros(3, k, dtype=torch.float16)
    x[:, :8] = torch.tensor([[1.0], [-0.5], [0.25]])
    acc = x.double() @ ((codes.double() - 8) * 0.125).T
    got, want = run(spec, x, parts, [], [16], k, Tile()).double(), EPILOGUES[epilogue](acc)
    assert ((got - want).abs() <= 12 * 2.0**-23 * (want.abs() + 1e-3)).all()


@pytest.mark.parametrize("name", ["relu(acc)", "maximum(acc,e0)", "minimum(acc,e0)"])
def test_nan_goes_through(name: str) -> None:
    spec = spec_of("int4/axis0", "f16", epilogue=name, extras=(("row", "f32"),) if "e0" in name else ())
    parts = quantize(weight(16, 64, 0), spec.weight)
    x = torch.ones(2, 64, dtype=torch.float16)
    x[0, 3] = float("nan")
    y = run(spec, x, parts, [torch.zeros(16)] if "e0" in name else [], [16], 64, Tile())
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("scheme", ["int4/axis0", "uint4/g32:fp16+m", "int8/g64:fp16", "nf4/g64:fp16"])
def test_a_bad_row_is_not_finite_and_others_are_untouched(scheme: str) -> None:
    spec = spec_of(scheme, "bf16")
    parts = quantize(weight(24, 200, 0), spec.weight)
    x = torch.randn(6, 200).bfloat16()
    clean = run(spec, x, parts, [], [24], 200, Tile())
    x[1, 99], x[3, 0], x[4, 40] = float("nan"), float("inf"), -float("inf")
    y = run(spec, x, parts, [], [24], 200, Tile())
    bad = torch.tensor([False, True, False, True, True, False])
    assert not y[bad].isfinite().any()
    assert torch.equal(y[~bad], clean[~bad])


@pytest.mark.parametrize("scheme", ["int8/axis0", "uint4/g128:fp16+z", "e4m3/axis0", "int3/g64:fp16"])
def test_every_tile_gives_the_same_to_the_bit_without_splits(scheme: str) -> None:
    """The order of the sum over K is the same for every tile of as many units; splits change it, always in the same way."""
    spec = spec_of(scheme, "bf16")
    parts, x = quantize(weight(50, 700, 0), spec.weight), torch.randn(35, 700).bfloat16()
    first = run(spec, x, parts, [], [50], 700, Tile())
    for tile in (Tile(rows=32), Tile(columns=16), Tile(columns=128, stages=1)):
        assert torch.equal(run(spec, x, parts, [], [50], 700, tile), first)
    split = [run(spec, x, parts, [], [50], 700, Tile(splits=2)) for _ in range(2)]
    assert torch.equal(*split)


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    x=st.sampled_from(["f16", "bf16"]),
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 70) | st.sampled_from([130, 600]),
    seed=st.integers(0, 9),
)
def test_product_with_a_decoded_weight(scheme: str, x: str, m: int, n: int, k: int, seed: int) -> None:
    spec = spec_of(scheme, x)
    parts = quantize(weight(n, k, seed), spec.weight)
    torch.manual_seed(seed)
    values = torch.randn(m, k + 3).to(OUT_DTYPES[x])[:, :k]
    y = run(spec, values, parts, [], [n], k, Tile(way="vendor"))
    want = expected(spec, values, parts, n, k, rounded=True)
    assert ((y.double() - want.value).abs() <= allowed(want.value, want.bound, x)).all()


def test_the_end_of_a_product_with_a_decoded_weight() -> None:
    """Segments, extras and a pair give what the fused kernel gives, but for the roundings of the weight."""
    n, k, m = (21, 40, 3), 260, 19
    torch.manual_seed(1)
    x = torch.randn(m, k).bfloat16()
    parts = [quantize(weight(size, k, i), Scheme.parse("int4/g128:fp16@mma16")) for i, size in enumerate(n)]
    extras = [torch.randn(sum(n)), torch.randn(m, sum(n) + 3).bfloat16()[:, : sum(n)]]
    more = {"segments": 3, "epilogue": "acc*0.5+e0-e1", "extras": (("row", "f32"), ("mat", "bf16"))}
    spec = spec_of("int4/g128:fp16", "bf16", **more)
    y = run(spec, x, [p for part in parts for p in part], extras, n, k, Tile(way="vendor"))
    each = [expected(spec, x, part, size, k, rounded=True) for part, size in zip(parts, n, strict=True)]
    acc, bound = torch.cat([e.value for e in each], 1), torch.cat([e.bound for e in each], 1)
    want = acc * 0.5 + extras[0].double() - extras[1].double()
    bound = bound + 3 * 2.0**-24 * (acc.abs() + extras[0].abs() + extras[1].double().abs() + bound)
    assert ((y.double() - want).abs() <= allowed(want, bound, "bf16")).all()
    paired = spec_of("int4/g128:fp16", "bf16", y="f32", segments=2, epilogue="maximum(a0,a1)")
    both = [p for part in (parts[0], quantize(weight(21, k, 5), spec.weight)) for p in part]
    one, other = (expected(paired, x, both[i : i + 2], 21, k, rounded=True) for i in (0, 2))
    y = run(paired, x, both, [], [21, 21], k, Tile(way="vendor"))
    want, bound = torch.maximum(one.value, other.value), torch.maximum(one.bound, other.bound)
    assert ((y.double() - want).abs() <= allowed(want, bound, "f32")).all()


def test_no_rows() -> None:
    spec = spec_of("int4/g128:fp16")
    y = run(
        spec, torch.empty(0, 256, dtype=torch.float16), quantize(weight(20, 256, 0), spec.weight), [], [20], 256, Tile()
    )
    assert y.shape == (0, 20)


@pytest.mark.parametrize("decode", ["subnormal", "magic"])
def test_every_code_is_exact_either_way(decode: str) -> None:
    """x picks one column after the other: the result is the number itself, for every code and place in a unit."""
    from qcompile.codegen.devices import triton_text

    for name in ("uint2", "int3", "int4", "uint5", "int6", "uint7", "int8", "binary", "ternary"):
        for dtype in ("f16", "bf16"):
            spec = spec_of(f"{name}/axis0", dtype, y="f32")
            fmt = spec.weight.format
            k = Layout.of(spec.weight).unit
            count = len(fmt.table) or 1 << fmt.bits
            codes = (torch.arange(16)[:, None] * 37 + torch.arange(k)[None, :] * 11).remainder(count).to(torch.uint8)
            parts = [pack_codes(codes, fmt.bits, "mma16"), pack_scales(torch.ones(16, 1), "mma16")]
            text = triton_text.kernel_text(spec, decode)  # type: ignore[arg-type]
            y = run(spec, torch.eye(k).to(OUT_DTYPES[dtype]), parts, [], [16], k, Tile(), text)
            assert torch.equal(y.T, fmt.levels()[codes.long()]), (name, dtype)


@pytest.mark.parametrize("x", DTYPES)
@pytest.mark.parametrize(
    "scheme", ["int4/g128:fp16", "uint4/g32:fp16+m", "nf4/g64:fp16", "e3m2/g96:e8m0", "int3/axis0"]
)
def test_either_order_of_columns_is_the_same_to_the_bit(scheme: str, x: str) -> None:
    """Every row of x picks one column, so that no sum has an order."""
    spec, n, k = spec_of(scheme, x, y="f32"), 32, 200
    parts, picked = quantize(weight(n, k, 1), spec.weight), torch.eye(k).to(OUT_DTYPES[x])
    for tile in (Tile(rows=64), Tile(rows=128, units=2, columns=32)):
        y = run(spec, picked, parts, [], [n], k, tile)
        assert y.count_nonzero() > n * k // 2
        assert torch.equal(y, run(spec, picked, parts, [], [n], k, replace(tile, natural=False)))


@pytest.mark.parametrize(
    ("scheme", "act", "word"),
    [
        ("int4/g24:fp16@mma16", "", "multiple of 16"),
        ("int4/b32x24@mma16", "", "multiple of 16"),
        ("int4/axis1@mma16", "", "axis1"),
        ("int4/g32:fp16", "", "tile16"),
        ("int4/axis0@mma16", "int8/token", "mma8"),
        ("int4/g32:fp16@mma8", "int8/token", "128 columns"),
        ("uint4/g128:fp16+m@mma8", "int8/token", "no minimum"),
        ("e4m3/axis0@mma8", "int8/token", "no integer"),
        ("int4/axis0@mma8", "e5m2/token", "or e4m3"),
        ("int8/axis0@mma8", "e4m3/token", "more bits than the 4"),
        ("e5m2/axis0@mma8", "e4m3/token", "not inside e4m3"),
        ("int8/axis0@mma8", "int8/g32:fp32", "64 columns"),
    ],
)
def test_refusals_have_a_reason(scheme: str, act: str, word: str) -> None:
    verdict = TritonLowering().supports(KernelSpec(Scheme.parse(scheme), Scheme.parse(act) if act else None))
    assert not verdict
    assert word in verdict.reason


def test_the_text_of_a_spec_is_always_the_same() -> None:
    spec = spec_of("e3m2/g32:e8m0", "bf16")
    text_of.cache_clear()
    first = text_of(spec).source
    text_of.cache_clear()
    assert text_of(spec).source == first


GOLDEN = {
    "weight_only": spec_of("int4/g128:fp16", "bf16"),
    "operand": spec_of("uint3/g64:fp16+m", "f16", segments=2, epilogue="acc+e0", extras=(("row", "f32"),)),
    "pair_of_bytes": spec_of("uint4/g128:fp16+z", "bf16", act="int8/token", segments=2, epilogue="silu(a0)*a1"),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_text(name: str) -> None:
    """The whole text, to be read in a review. After a change that is meant: rewrite the file with the text of the spec."""
    file = Path(__file__).parent / "golden" / f"{name}.txt"
    assert text_of(GOLDEN[name]).source == file.read_text(encoding="utf-8"), (
        f"text_of(GOLDEN[{name!r}]).source is another text than {file}"
    )


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


def test_an_architecture_without_bf16_is_refused() -> None:
    lowering = TritonLowering(architecture="sm_75")
    assert "bf16" in lowering.supports(spec_of("int4/g128:fp16", "bf16")).reason
    assert lowering.supports(spec_of("int4/g128:fp16", "f16"))
