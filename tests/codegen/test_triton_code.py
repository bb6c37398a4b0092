"""What the shipped tiles of the Triton kernels become: machine code of every target, read without a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton import Tile, fit, text_of
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.triton import shapes
from qcompile.ir.scheme import Scheme
from qcompile.testing.compile_for import TARGETS, Report, compile_kernel

# Instructions per weight in the loop over K for the first shipped shape of sm_90, in bf16: what the kernels have with
# Triton 3.6 or 3.7, so that a change that costs some is seen. An H200 at full bandwidth has time for 6.9 of 8 bits, 5.2 of
# 6, 3.4 of 4, 2.6 of 3 and 1.7 of 2 (132 multiprocessors, 128 lanes, 1.75 GHz, 4.3 TB/s); what is above its line is bound
# by instructions, not by memory.
BUDGET = {
    "int4/axis0": 2.2,
    "int4/g128:fp16": 3.0,
    "uint4/g128:fp16+z": 3.1,
    "uint4/g32:fp16+m": 5.0,
    "int8/axis0": 3.3,
    "e4m3/axis0": 3.8,
    "e5m2/axis0": 3.8,
    "e3m2/axis0": 4.6,
    "e2m1/g32:e8m0": 5.0,
    "int3/g512:fp16": 3.1,
    "int2/g256:fp16": 2.4,
    "nf4/g64:fp16": 17.0,
}
# What multiplies: tensor cores of each target, by the beginning of the instruction's name.
MMA = {
    "sm_80": "HMMA",
    "sm_86": "HMMA",
    "sm_89": "HMMA",
    "sm_90": "HGMMA",
    "sm_100": "UTCHMMA",
    "sm_120": "HMMA",
    "gfx942": "v_mfma",
}


def build(spec: KernelSpec, tile: Tile, *targets: str) -> dict[str, Report]:
    text = text_of(spec)
    signature = {name: f"*{kind}" for name, kind in text.pointers} | dict.fromkeys(text.sizes, "i32")
    constants = {
        "BM": tile.rows,
        "BN": tile.columns,
        "KC": tile.units,
        "SPLIT": tile.splits,
        "STAGES": tile.stages,
        "EVEN": True,
    }
    return compile_kernel(
        compat.triton_kernel(text.source),
        signature,
        constants,
        targets=targets,
        aligned=set(signature) - {"M"},
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


def spec_of(scheme: str, dtype: str = "bf16") -> KernelSpec:
    return KernelSpec(Scheme.parse(f"{scheme}@mma16"), None, x=dtype, y=dtype)


def tile_of(target: str, spec: KernelSpec, line: int, splits: int = 1) -> Tile:
    """A line of the shipped table, for a long K."""
    shape, layout = shapes(target, "weight-only")[line], text_of(spec).layout
    units = max(1, shape.depth // layout.unit)
    return fit(Tile(shape.rows, shape.columns, units, splits, shape.stages, shape.warps), layout, layout.unit * 4096)


@pytest.mark.parametrize("scheme", BUDGET)
def test_few_rows_on_hopper(scheme: str) -> None:
    """Tensor cores that take the weight from registers: 16-byte loads, no shuffle, no conversion, no weight that comes back
    from shared memory decoded."""
    spec = spec_of(scheme)
    tile = tile_of("sm_90", spec, 0)
    (report,) = build(spec, tile, "sm_90").values()
    assert report.fits
    assert (report.spill_bytes, report.loop.shuffles, report.loop.i2f) == (0, 0, 2 * ("+z" in scheme))
    assert all(name.startswith("HGMMA") for name in report.loop.mma)
    assert report.loop.widest_of("W0") == 16
    # Triton 3.6 lets scales and zero points change lanes through shared memory; the decoded operand would take 32 and more.
    assert sum(report.loop.shared.get(name, 0) for name in ("STS", "LDSM", "STSM")) <= 4
    weights = tile.columns * tile.units * text_of(spec).layout.unit
    assert report.loop.instructions * report.threads / weights <= BUDGET[scheme]


@pytest.mark.parametrize("scheme", ["int4/g128:fp16", "uint4/g32:fp16+m"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_shape_on_every_target(scheme: str, target: str) -> None:
    spec = spec_of(scheme)
    for line in range(len(shapes(target, "weight-only"))):
        (report,) = build(spec, tile_of(target, spec, line), target).values()
        assert report.fits, report
        assert report.spill_bytes == 0, report
        assert report.loop.widest_of("W0") == 16
        assert report.loop.mma
        assert all(name.startswith(MMA[target]) for name in report.loop.mma)


def test_ends_and_splits_compile_everywhere() -> None:
    """Segments, pairs, extras, every function of an epilogue, and the split over K with its ticket."""
    first = KernelSpec(
        Scheme.parse("uint4/g64:fp16+z@mma16"),
        segments=2,
        epilogue="silu(a0)*maximum(a1,e0)+tanh(e1)",
        extras=(("row", "f32"), ("mat", "bf16")),
        x="bf16",
        y="bf16",
    )
    second = KernelSpec(
        Scheme.parse("int8/axis0@mma16"),
        segments=3,
        epilogue="relu(erf(acc))+sqrt(abs(acc))*rsqrt(1+exp(-acc))-log(2+sigmoid(minimum(acc,1)))",
        x="f16",
        y="f32",
    )
    for spec in (first, second):
        for report in build(spec, tile_of("", spec, 0, splits=4), *TARGETS).values():
            assert report.fits
            assert report.spill_bytes == 0
            assert report.loop.mma
