"""Products with a weight for each expert against a loop over the experts, and as machine code.

Bounds are those of the plain kernels (`qcompile.codegen.devices.triton_bounds`): the arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton import Tile, TritonLowering, cut, family, fit, run, text_of
from qcompile.codegen.devices.triton_bounds import Expected, expected
from qcompile.codegen.devices.triton_grouped import Grouped, choose_grouped, grouped_text, run_grouped, tiles_of_rows
from qcompile.codegen.devices.triton_overlap import can_overlap
from qcompile.codegen.devices.triton_text import Text
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.triton import shapes
from qcompile.errors import QCError
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.testing.compile_for import TARGETS, Report, compile_kernel
from qcompile.testing.interpret import interpret
from tests.codegen.products import allowed, spec_of

# Every way that scales meet codes, every kind of scale and zero, nesting, planes; then bytes.
SCHEMES = [
    ("int4/axis0", ""),
    ("int4/g128:fp16", ""),
    ("uint4/g64:fp16+z", ""),
    ("uint4/g256:fp16+z", ""),
    ("uint4/g32:fp16+m", ""),
    ("uint3/axis0:bf16+m", ""),
    ("int3/g512:bf16", ""),
    ("nf4/g64:fp16", ""),
    ("e3m2/g96:e8m0", ""),
    ("e2m1/g16:e4m3/tensor:fp32", ""),
    ("int4/g16:int8/g64:fp16", ""),
    ("int4/g128:int8/axis0:fp32", ""),
    ("uint8/axis0:fp32+z", ""),
    ("ternary/tensor", ""),
    ("int8/axis0", "int8/token"),
    ("uint3/axis0:fp32+z", "int8/token"),
    ("uint4/g128:fp16+z", "int8/g256:fp32"),
    ("e4m3/b128x128:fp32", "e4m3/g128:fp32"),
    ("uint4/g128:fp16+z", "e4m3/token"),
]
DTYPES = list(OUT_DTYPES)
TILES = [
    Tile(),
    Tile(units=2, columns=32, natural=False),
    Tile(splits=3, columns=32),
    Tile(rows=32, columns=16, units=4),
]


def weights(spec: KernelSpec, experts: int, n: int, k: int, seed: int) -> list[list[Tensor]]:
    """The parts of each expert."""
    generator = torch.Generator().manual_seed(seed)
    return [quantize(torch.randn(n, k, generator=generator) / 8 + e / 16, spec.weight) for e in range(experts)]


def stacked(each: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(list(part)) for part in zip(*each, strict=True)]


def offsets(counts: Sequence[int]) -> Tensor:
    """Where each expert's rows end, in a buffer that goes on with what would spoil every sum of them."""
    return torch.tensor([*counts, -1000, -1000]).cumsum(0).int()[: len(counts)]


def of_experts(counts: Sequence[int], product: Callable[[int, slice], Tensor]) -> Tensor:
    """What a loop over the experts computes: `product(expert, rows)` for those with rows."""
    ends = [0, *offsets(counts).tolist()]
    return torch.cat([product(e, slice(*rows)) for e, rows in enumerate(pairwise(ends)) if rows[0] < rows[1]])


def reference(
    spec: KernelSpec, x: Tensor, counts: Sequence[int], each: Sequence[Sequence[Tensor]], n: int, k: int
) -> Expected:
    def product(e: int, rows: slice) -> Tensor:
        found = expected(spec, x[rows], each[e], n, k)
        return torch.stack((found.value, found.bound), 1)

    return Expected(*of_experts(counts, product).unbind(1))


ROUTINGS = st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any) | st.sampled_from(
    [[0, 0, 50, 0], [1], [0, 0, 0, 1], [1, 1, 1, 1], [16, 0, 32], [0, 17, 20, 0, 0]]
)


@pytest.mark.parametrize(("scheme", "act"), SCHEMES)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    counts=ROUTINGS,
    x=st.sampled_from(DTYPES),
    tile=st.sampled_from(TILES),
    n=st.integers(1, 40),
    k=st.integers(1, 70) | st.sampled_from([130, 520]),
    pad=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_product(
    scheme: str, act: str, counts: list[int], x: str, tile: Tile, n: int, k: int, pad: int, seed: int
) -> None:
    spec = spec_of(scheme, x, act)
    assert TritonLowering().supports(spec)
    each = weights(spec, len(counts), n, k, seed)
    torch.manual_seed(seed)
    values = torch.randn(sum(counts), k + pad).to(OUT_DTYPES[x])[:, :k]
    with interpret():
        y = run_grouped(spec, values, offsets(counts), stacked(each), [], [n], k, tile)
    want = reference(spec, values, counts, each, n, k)
    assert (y.shape, y.dtype) == ((sum(counts), n), OUT_DTYPES[x])
    assert ((y.double() - want.value).abs() <= allowed(want.value, want.bound, x)).all()


@pytest.mark.parametrize(
    ("scheme", "act", "tile"),
    [
        ("uint4/g128:fp16+z", "", Tile(splits=3)),
        ("uint4/g32:fp16+m", "", Tile(rows=32, units=2)),
        ("int8/axis0", "int8/token", Tile(columns=32, splits=2)),
    ],
    ids=str,
)
def test_rows_do_not_depend_on_the_routing(scheme: str, act: str, tile: Tile) -> None:
    """What the plain kernel gives for each expert alone, to the bit, again and again."""
    spec, k, n = spec_of(scheme, "bf16", act), 520, 40
    each, counts = weights(spec, 4, n, k, 1), [3, 0, 33, 16]
    x = torch.randn(sum(counts), k, generator=torch.Generator().manual_seed(2)).bfloat16()
    with interpret():
        want = of_experts(counts, lambda e, rows: run(spec, x[rows], each[e], [], [n], k, tile))
        for _ in range(2):
            assert torch.equal(run_grouped(spec, x, offsets(counts), stacked(each), [], [n], k, tile), want)


@pytest.mark.parametrize("tile", [Tile(columns=32), Tile(splits=2, columns=16)], ids=str)
def test_pair_epilogue(tile: Tile) -> None:
    """silu(a0 + e0) * a1 + e1: |silu'| < 1.1, so the error is at most 1.1 |a1| b0 + |silu| b1 + 1.1 b0 b1, and roundings."""
    n, k, counts = 37, 260, [5, 0, 18]
    more = {"segments": 2, "epilogue": "silu(a0+e0)*a1+e1", "extras": (("row", "f32"), ("mat", "bf16"))}
    spec = spec_of("uint4/g32:fp16+m", "bf16", y="f32", **more)  # type: ignore[arg-type]
    torch.manual_seed(2)
    x, mat, row = torch.randn(23, k).bfloat16(), torch.randn(23, n + 3).bfloat16()[:, :n], torch.randn(3, n)
    gate, up = (weights(spec, 3, n, k, seed) for seed in (3, 4))
    with interpret():
        y = run_grouped(spec, x, offsets(counts), [*stacked(gate), *stacked(up)], [row, mat], [n, n], k, tile)
    a, b = (reference(spec, x, counts, each, n, k) for each in (gate, up))
    bias = of_experts(counts, lambda e, rows: row[e].expand(rows.stop - rows.start, n)).double()
    silu = torch.nn.functional.silu(a.value + bias)
    want = silu * b.value + mat.double()
    before = a.bound + 2.0**-24 * ((a.value + bias).abs() + a.bound)  # the sum with e0 is rounded
    error = 1.1 * b.value.abs() * before + silu.abs() * b.bound + 1.1 * before * b.bound
    # silu is good to 4 units (3 of the sigmoid, 1 of the product); then one product and one sum
    roundings = 6 * 2.0**-23 * (silu * b.value).abs() + 2.0**-23 * want.abs()
    assert ((y.double() - want).abs() <= error + roundings).all()


@pytest.mark.parametrize(("act", "dtype"), [("", "f16"), ("int8/token", "bf16")])
def test_segments_and_extras(act: str, dtype: str) -> None:
    """Merged segments whose boundaries lie inside panels and tiles, and extras of each expert."""
    n, k, counts = (21, 40, 3), 260, [0, 19, 2]
    spec = spec_of(
        "int4/g128:fp16", dtype, act, segments=3, epilogue="acc*0.5+e0-e1", extras=(("mat", dtype), ("row", "f32"))
    )
    torch.manual_seed(1)
    x = torch.randn(21, k).to(OUT_DTYPES[dtype])
    segments = [weights(spec, 3, size, k, seed) for seed, size in enumerate(n)]
    extras = [torch.randn(21, 64).to(OUT_DTYPES[dtype]), torch.randn(3, 64)]
    parts = [part for each in segments for part in stacked(each)]
    with interpret():
        y = run_grouped(spec, x, offsets(counts), parts, extras, n, k, Tile(columns=16, splits=2))
    found = [reference(spec, x, counts, each, size, k) for each, size in zip(segments, n, strict=True)]
    acc, bound = torch.cat([e.value for e in found], 1), torch.cat([e.bound for e in found], 1)
    row = of_experts(counts, lambda e, rows: extras[1][e].expand(rows.stop - rows.start, 64)).double()
    want = acc * 0.5 + extras[0].double() - row
    # three roundings to fp32 in the epilogue
    bound = bound + 3 * 2.0**-24 * (acc.abs() + extras[0].double().abs() + row.abs() + bound)
    assert ((y.double() - want).abs() <= allowed(want, bound, dtype)).all()


def test_no_rows_and_rows_of_no_expert() -> None:
    spec = spec_of("int4/g128:fp16")
    parts, x = stacked(weights(spec, 3, 20, 256, 0)), torch.randn(20, 256).half()
    with interpret():
        assert run_grouped(spec, x[:0], offsets([0, 0, 0]), parts, [], [20], 256).shape == (0, 20)
        y = torch.full((20, 20), 7.0, dtype=torch.float16)
        Grouped(spec)(x, offsets([4, 0, 7]), *parts, y, 20, 256, 256, 20, 20, tile=Tile())
        part = run_grouped(spec, x[:11], offsets([4, 0, 7]), parts, [], [20], 256, Tile())
        # No more of x is read than there is, whatever the offsets say.
        more = run_grouped(spec, x[:11], offsets([4, 0, 70]), parts, [], [20], 256, Tile())
    assert (y[11:] == 7).all()
    assert torch.equal(y[:11], part)
    assert torch.equal(more, part)


def test_many_experts() -> None:
    """More experts than lanes of the least scan, and a number that is no power of two."""
    spec = spec_of("int8/axis0", "f32")
    each, counts = weights(spec, 70, 16, 64, 5), [0] * 70
    counts[0], counts[33], counts[69] = 1, 17, 2
    x = torch.randn(20, 64)
    with interpret():
        y = run_grouped(spec, x, offsets(counts), stacked(each), [], [16], 64, Tile(columns=16))
    want = reference(spec, x, counts, each, 16, 64)
    assert ((y.double() - want.value).abs() <= allowed(want.value, want.bound, "f32")).all()


@settings(max_examples=300, deadline=None, derandomize=True)
@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=40), rows=st.sampled_from([16, 32, 64, 128]))
@example(counts=[16, 1, 1], rows=16)
def test_the_grid_is_enough_and_no_larger(counts: list[int], rows: int) -> None:
    """Enough for a routing; and some routing of as many rows needs all of it."""
    m, experts = sum(counts), len(counts)
    grid = tiles_of_rows(m, experts, rows)
    assert sum(-(-count // rows) for count in counts) <= grid
    worst = [m - min(m, experts) + 1] + [1] * (min(m, experts) - 1) if m else []
    assert sum(-(-count // rows) for count in worst) == grid


def test_tiles_fit_the_rows_of_an_expert() -> None:
    """Few rows for each expert get few rows in a tile; many splits only where there are few blocks."""
    spec, cpu = spec_of("int4/g128:fp16", "bf16"), torch.device("cpu")
    few, many = (choose_grouped(spec, (1024,), 2048, m, 64, cpu) for m in (64, 64 * 200))
    assert few.rows == 16 < many.rows
    assert (many.splits, many.way) == (1, "fused")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"offs": torch.tensor([3, 9])}, "offs is torch.int64"),
        ({"x": torch.randn(9, 255).half()}, "x is"),
        ({"extras": [torch.randn(20)]}, r"extra 0 \(row\)"),
        ({"offs": torch.tensor([3, 6, 9]).int()}, "codes of segment 0"),
    ],
    ids=["offs", "x", "row", "parts"],
)
def test_refusals_have_a_reason(change: dict[str, object], word: str) -> None:
    spec = spec_of("int4/g128:fp16", epilogue="acc+e0", extras=(("row", "f32"),))
    given_ = {
        "x": torch.randn(9, 256).half(),
        "offs": offsets([3, 6]),
        "parts": stacked(weights(spec, 2, 20, 256, 0)),
        "extras": [torch.randn(2, 20)],
        "n": [20],
        "k": 256,
    }
    with pytest.raises(QCError, match=word):
        run_grouped(spec, **{**given_, **change})  # type: ignore[arg-type]


# What multiplies on each target: floats, and integers.
MMA = {"sm_80": ("HMMA", "IMMA"), "sm_90": ("HGMMA", "IGMMA"), "gfx942": ("v_mfma", "v_mfma_i32")}


def build(text: Text, tile: Tile, target: str, **constants: object) -> Report:
    signature = {name: f"*{kind}" for name, kind in text.pointers} | dict.fromkeys(text.sizes, "i32")
    (report,) = compile_kernel(
        compat.triton_kernel(text.source),
        signature,
        tile.constants | constants | {"EVEN": True, "PDL": can_overlap(target)},
        targets=[target],
        aligned=set(signature) - {"M", "experts"},
        **tile.options,
    ).values()
    return report


@pytest.mark.parametrize(
    ("scheme", "act", "line", "splits"),
    [("int4/g128:fp16", "", -1, 1), ("uint4/g32:fp16+m", "", 0, 4), ("int8/axis0", "int8/token", 0, 1)],
)
@pytest.mark.parametrize("target", MMA)
def test_machine_code(target: str, scheme: str, act: str, line: int, splits: int) -> None:
    """The loop over K is that of the plain kernel: experts cost something at a block's begin only."""
    spec = spec_of(scheme, "bf16", act)
    layout = text_of(spec).layout
    tile = cut(spec, shapes(target, family(spec))[line], TARGETS[target].shared_limit, target)
    tile = fit(replace(tile, splits=splits), layout, layout.unit * 4096)
    report, plain = build(grouped_text(spec), tile, target, EXPERTS=128), build(text_of(spec), tile, target)
    assert report.fits
    assert report.spill_bytes == 0
    assert report.loop.widest_of("W0") == 16
    assert report.loop.mma
    assert all(name.startswith(MMA[target][bool(act)]) for name in report.loop.mma)
    weights_of_block = tile.columns * tile.units * layout.unit
    more = (report.loop.instructions - plain.loop.instructions) * report.threads / weights_of_block
    assert more <= 0.2  # as the assembler orders them: 0.03 and less
    # The scan over 128 experts and the way to the operands, for each thread; a wave of 64 lanes scans with more steps.
    assert report.whole.instructions - plain.whole.instructions <= (300 if target.startswith("gfx") else 200)
