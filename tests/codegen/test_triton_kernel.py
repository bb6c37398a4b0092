"""Generated Triton kernels against the exact product, in Triton's interpreter.

Every bound is computed by `qcompile.codegen.devices.triton_bounds` from the kernel's own arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton import Tile, TritonLowering, run, text_of
from qcompile.codegen.devices.triton_lines import Layout
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import quantize
from qcompile.ir.formats import FORMATS, Format
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import pack_codes, pack_scales
from qcompile.ir.scheme import Scheme
from qcompile.testing.fuzz import fuzz
from qcompile.testing.interpret import interpret
from qcompile.testing.problems import problems
from tests.codegen.products import DTYPES, SCHEMES, TILES, check, spec_of, weight


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


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
    y = check(spec, values, parts, n, k, tile)
    assert (y[m // 2] == 0).all()


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


# A format, and the types of x whose numbers hold its own.
ODD = [
    (Format("e6m1", "float", 8, exponent=6, mantissa=1), ("bf16",)),
    (Format("e5m0", "float", 6, exponent=5), ("bf16",)),
    (Format("e5m2i", "float", 8, exponent=5, mantissa=2, nonfinite="ieee"), ("f16", "bf16", "f32")),
    (Format("e1m6", "float", 8, exponent=1, mantissa=6), ("f16", "bf16", "f32")),
    (Format("thousands", "table", 2, table=(-1000.0, 0.0, 1000.0)), ()),
    (Format("threes", "table", 2, table=(-3.0, 0.0, 3.0)), ("f16", "bf16", "f32")),
    (Format("hundred", "table", 2, table=(-1e5, 0.5, 1e5)), ("bf16",)),
]


@pytest.mark.parametrize(("fmt", "types"), ODD, ids=lambda item: getattr(item, "name", ""))
def test_a_format_is_right_or_refused(fmt: Format, types: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What a type cannot hold has no kernel; a new entry is no promise that it does."""
    monkeypatch.setitem(FORMATS, fmt.name, fmt)
    scheme = f"{fmt.name}/g64:fp16@mma16"
    for x in ("f16", "bf16", "f32"):
        verdict = TritonLowering().supports(KernelSpec(Scheme.parse(scheme), x=x, y=x))
        assert verdict.ok == (x in types), (x, verdict.reason)
        assert verdict.ok or fmt.name in verdict.reason
        if verdict.ok:
            kernel = lambda problem: run(problem.spec, problem.x, problem.parts, [], [problem.n], problem.k)  # noqa: E731
            with interpret():
                fuzz(kernel, problems(scheme, x, max_m=4, max_n=20, max_k=140), examples=6)


def test_the_text_of_a_spec_is_always_the_same() -> None:
    spec = spec_of("e3m2/g32:e8m0", "bf16")
    text_of.cache_clear()
    first = text_of(spec).source
    text_of.cache_clear()
    assert text_of(spec).source == first


def test_an_architecture_without_bf16_is_refused() -> None:
    lowering = TritonLowering(architecture="sm_75")
    assert "bf16" in lowering.supports(spec_of("int4/g128:fp16", "bf16")).reason
    assert lowering.supports(spec_of("int4/g128:fp16", "f16"))
