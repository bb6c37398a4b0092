"""Products over a weight that was decoded to bytes, by a kernel of ours and by a library, in Triton's interpreter.

Bounds are those of the fused kernels (`triton_bounds`): the same sums, in fewer pieces.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices import triton
from qcompile.codegen.devices.triton import Tile, choose_tile, family, run
from qcompile.codegen.devices.triton_decoded import Octets, cut_own, ways
from qcompile.codegen.devices.triton_lines import Layout
from qcompile.codegen.devices.triton_numbers import Bytes, why_no_bytes
from qcompile.codegen.tuning.triton import shape_for
from qcompile.ir.codec import quantize
from qcompile.ir.formats import FORMATS
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import unpack_codes
from qcompile.testing.interpret import interpret
from tests.codegen.products import BYTES, check, check_pair, check_segments, spec_of, weight

# With 8 warps a block for each of 8 processors, as the interpreter has them: more tiles than blocks from 70 x 40 on.
OWN = [
    Tile(16, 16, warps=8, way="own", tma=True),
    Tile(32, 16, warps=8, way="own", depth=64),
    Tile(16, 32, way="own", tma=True, flat=True, depth=64),
    Tile(32, 64, way="own", flat=True),
]
VENDOR = Tile(way="vendor")
WHOLE = [(scheme, act) for scheme, act in BYTES if "vendor" in ways(spec_of(scheme, act=act))]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


@pytest.mark.parametrize(("scheme", "act"), BYTES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    x=st.sampled_from(["f16", "bf16"]),
    tile=st.sampled_from(OWN),
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 70) | st.sampled_from([130, 600, 1100]),
    seed=st.integers(0, 9),
)
def test_product_of_our_own(scheme: str, act: str, x: str, tile: Tile, m: int, n: int, k: int, seed: int) -> None:
    spec = spec_of(scheme, x, act=act)
    parts = quantize(weight(n, k, seed), spec.weight)
    torch.manual_seed(seed)
    values = torch.randn(m, k).to(OUT_DTYPES[x])
    values[m // 2] = 0
    y = check(spec, values, parts, n, k, tile)
    assert (y[m // 2] == 0).all()


@pytest.mark.parametrize(("scheme", "act"), WHOLE)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(
    x=st.sampled_from(["f16", "bf16"]),
    m=st.integers(1, 40),
    n=st.integers(1, 70) | st.sampled_from([16, 64]),
    k=st.integers(1, 70) | st.sampled_from([130, 600]),
    seed=st.integers(0, 9),
)
def test_product_of_a_library(scheme: str, act: str, x: str, m: int, n: int, k: int, seed: int) -> None:
    spec = spec_of(scheme, x, act=act)
    parts = quantize(weight(n, k, seed), spec.weight)
    torch.manual_seed(seed)
    values = torch.randn(m, k).to(OUT_DTYPES[x])
    check(spec, values, parts, n, k, VENDOR)


@pytest.mark.parametrize("tile", [*OWN, VENDOR], ids=str)
@pytest.mark.parametrize("scheme", ["int8/axis0", "uint4/axis0:fp32+z", "int3/tensor"])
def test_sums_of_integers_are_those_of_the_fused_kernel(scheme: str, tile: Tile) -> None:
    """Bit for bit: integers are exact in any order, and the end is the same."""
    spec = spec_of(scheme, "f32", act="int8/token")
    x, parts = torch.randn(40, 1100), quantize(weight(70, 1100, 1), spec.weight)
    assert torch.equal(run(spec, x, parts, [], [70], 1100, tile), run(spec, x, parts, [], [70], 1100, Tile()))


@pytest.mark.parametrize(("scheme", "act"), BYTES[::3])
def test_ways_to_load_and_to_loop_give_the_same(scheme: str, act: str) -> None:
    """As many columns have the same order of the sum over K: descriptors, tiles and the loop over them change nothing."""
    spec = spec_of(scheme, "bf16", act=act)
    parts, x = quantize(weight(70, 600, 0), spec.weight), torch.randn(40, 600).bfloat16()
    first = run(spec, x, parts, [], [70], 600, Tile(64, 128, warps=8, way="own"))
    for tile in (Tile(16, 16, warps=8, way="own", tma=True), Tile(16, 32, way="own", flat=True)):
        assert torch.equal(run(spec, x, parts, [], [70], 600, tile), first)


@pytest.mark.parametrize(
    ("name", "operand"),
    [(name, operand) for operand in ("i8", "e4m3") for name in FORMATS if not why_no_bytes(FORMATS[name], operand)],  # type: ignore[arg-type]
)
def test_decoded_bytes_are_what_the_fused_kernel_multiplies(name: str, operand: str) -> None:
    """Every byte of every segment is its code's number by `Bytes`, and padding columns stand for code 0 of the format."""
    spec = spec_of(f"{name}/axis0", act="int8/token" if operand == "i8" else "e4m3/token")
    numbers, layout, k = Bytes.of(spec.weight.format, operand), Layout.of(spec.weight, spec.act), 600  # type: ignore[arg-type]
    n, dtype = (37, 5), torch.int8 if operand == "i8" else torch.float8_e4m3fn
    parts = [quantize(weight(size, k, size), spec.weight) for size in n]
    flat = [part.view(torch.int32) if i == 0 else part for each in parts for i, part in enumerate(each)]
    found = Octets(spec).weight(flat, n, k, dtype)
    columns = -(-k // layout.unit) * layout.unit
    assert (found.shape, found.dtype) == ((48, columns), dtype)
    for part, rows in zip(parts, found.float()[:42].split(n), strict=True):
        codes = unpack_codes(part[0], spec.weight.format.bits, len(rows), k, "mma8").long()
        level = spec.weight.format.levels()
        assert torch.equal(rows[:, :k] * numbers.factor + numbers.offset, level[codes])
        assert (rows[:, k:] * numbers.factor + numbers.offset == level[0]).all()


@pytest.mark.parametrize("tile", [*OWN, VENDOR], ids=str)
@pytest.mark.parametrize(("scheme", "act"), [("uint4/axis0:fp32+z", "int8/token"), ("int4/axis0", "e4m3/token")])
def test_segments_and_extras(scheme: str, act: str, tile: Tile) -> None:
    check_segments(scheme, "bf16", 35, tile, act)


@pytest.mark.parametrize(
    ("scheme", "act", "tile"),
    [
        *(("uint4/g128:fp16+z", "int8/token", tile) for tile in OWN),
        *(("e4m3/b128x128:fp32", "e4m3/g128:fp32", tile) for tile in OWN[:2]),
        *(("int8/axis0", "int8/token", tile) for tile in (OWN[1], VENDOR)),
        ("e4m3/axis0", "e4m3/token", VENDOR),
    ],
)
def test_pairs(scheme: str, act: str, tile: Tile) -> None:
    check_pair(scheme, "bf16", 35, tile, act)


@pytest.mark.parametrize(("scheme", "act"), [("e4m3/axis0", "e4m3/token"), ("int8/axis0", "int8/token")])
@pytest.mark.parametrize("n", [64, 70])
def test_a_library_gets_what_it_takes(scheme: str, act: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner and outer sizes are multiples of 16, rows of both operands dense, and fp8 is scaled by the library where it can be:
    with scales of rows and columns in fp32, and a result of bf16 without anything behind."""
    spec, k, called = spec_of(scheme, "bf16", act=act), 130, []

    def noted(a: Tensor, b: Tensor, *scales: Tensor, out: Tensor | None = None) -> Tensor:
        called.append((a, b, scales, out))
        return made(a, b, *scales, **({} if out is None else {"out": out}))

    name = "mm_int8" if "int8" in act else "mm_e4m3"
    made = getattr(compat, name)
    monkeypatch.setattr(compat, name, noted)
    x, parts = torch.randn(20, k).bfloat16(), quantize(weight(n, k, 0), spec.weight)
    check(spec, x, parts, n, k, VENDOR)
    ((a, b, scales, out),) = called
    assert (a.shape[1] % 16, b.shape[0] % 16, b.shape[1] % 16) == (0, 0, 0)
    assert (a.stride(1), b.stride(0)) == (1, 1)
    assert bool(scales) == (out is not None) == (name == "mm_e4m3" and n % 16 == 0)
    if out is not None:
        assert [(s.shape, s.dtype) for s in scales] == [((20, 1), torch.float32), ((1, n), torch.float32)]
        assert (out.dtype, out.shape) == (torch.bfloat16, (20, n))


def test_a_misaligned_input_is_loaded_by_pointers() -> None:
    """Descriptors want rows at multiples of 16 bytes; codes that a graph made may lie elsewhere."""
    spec, k, n, m = spec_of("int8/axis0", "f32", act="int8/token"), 64, 40, 20
    x, parts = torch.randn(m, k), quantize(weight(n, k, 0), spec.weight)
    codes, scale = triton.quantize_input(x, spec=spec)[:2]
    sums = triton.quantize_input(x, spec=spec)[2:]
    moved = torch.zeros(m, k + 8, dtype=torch.int8)[:, :k]
    moved.copy_(codes)
    found = []
    for given_ in (codes, moved):
        y = torch.empty(m, n)
        triton.Matmul(spec)(given_, scale, *sums, *parts, y, m, k, given_.stride(0), n, n, tile=OWN[0])
        found.append(y)
    assert torch.equal(*found)


def test_the_table_knows_the_ways_of_a_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows of bytes are multiplied by our own kernel on sm_90; a way that a spec has not is never chosen."""
    row, cell = spec_of("int8/axis0", act="int8/token"), spec_of("int8/g64:fp16", act="int8/token")
    assert (ways(row), ways(cell)) == (("fused", "own", "vendor"), ("fused", "own"))
    assert (ways(spec_of("int4/axis0", "bf16")), ways(spec_of("int4/axis0", "f32"))) == (
        ("fused", "vendor"),
        ("fused",),
    )
    assert (family(row), family(cell), family(spec_of("e4m3/axis0", act="e4m3/token"))) == (
        "integers",
        "bytes",
        "bytes",
    )
    for m, way in ((1280, "fused"), (1281, "own")):
        assert shape_for("sm_90", "integers", m, ways(row)).way == way
    assert shape_for("sm_90", "integers", 4096).way == "fused"
    assert shape_for("sm_80", "integers", 4096, ways(row)) == shape_for("sm_80", "bytes", 4096, ways(row))
    assert shape_for("sm_90", "weight-only", 4096, ways(spec_of("int4/axis0", "f32"))).way == "fused"
    assert shape_for("sm_90", "weight-only", 4096, ways(spec_of("int4/axis0", "bf16"))).way == "vendor"
    monkeypatch.setattr(compat, "gpu", lambda device: compat.jit.Gpu("sm_90", 132, 232448))
    choose_tile.cache_clear()
    chosen = choose_tile(row, (4096,), 4096, 4096, torch.device("cpu"))
    choose_tile.cache_clear()
    assert (chosen.way, chosen.tma, chosen.splits) == ("own", True, 1)


def test_tiles_get_smaller_where_a_thread_holds_more() -> None:
    """Sums of cells and steps lie beside the accumulator, pairs have two, and "mat" extras are read in whole tiles."""
    line = shape_for("sm_90", "integers", 4096, ("own",))
    pair = {"segments": 2, "epilogue": "a0*a1"}
    rows = [
        cut_own(spec_of(scheme, act=act, **more), line, 232448, "sm_90").rows
        for scheme, act, more in (
            ("int8/axis0", "int8/token", {}),
            ("e4m3/axis0", "e4m3/token", {}),
            ("int8/axis0", "int8/token", pair),
            ("int8/g128:fp16", "int8/token", pair),
        )
    ]
    assert rows == [256, 128, 128, 64]
    narrow = cut_own(spec_of("int8/axis0", act="int8/token"), dataclasses.replace(line, rows=128), 65536, "sm_80")
    assert 1 <= narrow.stages * narrow.depth * (narrow.rows + narrow.columns) <= 65536
