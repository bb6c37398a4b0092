"""What the shipped tiles of the Triton kernels become: machine code of every target, read without a GPU."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton import Tile, TritonLowering, cut, family, fit, text_of
from qcompile.codegen.devices.triton_overlap import ahead, can_overlap
from qcompile.codegen.devices.triton_text import bytes_text
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.triton import Shape, shapes
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
    "uint4/g32:fp16+m": 3.6,
    "int8/axis0": 3.3,
    "e4m3/axis0": 3.8,
    "e5m2/axis0": 3.8,
    "e3m2/axis0": 4.6,
    "e2m1/g32:e8m0": 3.9,
    "int3/g512:fp16": 2.6,
    "int2/g256:fp16": 2.4,
    "nf4/g64:fp16": 4.8,
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


# Where a decoded weight stays in the registers that it was loaded to: it comes back from no memory and no other lane. The
# tensor cores of sm_100 read it from memory; on AMD lanes hold other rows than those that the layout gives them.
IN_REGISTERS = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_120"}


@functools.cache
def build(spec: KernelSpec, tile: Tile, *targets: str) -> dict[str, Report]:
    text = text_of(spec)
    signature = {name: f"*{kind}" for name, kind in text.pointers} | dict.fromkeys(text.sizes, "i32")
    reports = {}
    for early in sorted({can_overlap(target) for target in targets}):
        reports |= compile_kernel(
            compat.triton_kernel(text.source),
            signature,
            tile.constants | {"EVEN": True, "PDL": early, "AHEAD": ahead(tile)},
            targets=[target for target in targets if can_overlap(target) == early],
            aligned=set(signature) - {"M"},
            **tile.options,
        )
    return reports


def spec_of(scheme: str, act: str = "", dtype: str = "bf16") -> KernelSpec:
    weight = Scheme.parse(f"{scheme}@{'mma8' if act else 'mma16'}")
    return KernelSpec(weight, Scheme.parse(act) if act else None, x=dtype, y=dtype)


def fused(target: str, spec: KernelSpec) -> list[Shape]:
    """The shipped lines for kernels that decode beside their products."""
    return [shape for shape in shapes(target, family(spec)) if shape.way == "fused"]


def tile_of(target: str, spec: KernelSpec, line: int, splits: int = 1) -> Tile:
    """A line of the shipped table, for a long K."""
    layout, shared = text_of(spec).layout, TARGETS[target].shared_limit if target else 65536
    tile = cut(spec, fused(target, spec)[line], shared, target)
    return fit(replace(tile, splits=splits), layout, layout.unit * 4096)


def tiles_of(target: str, spec: KernelSpec) -> list[Tile]:
    """What the lines of the shipped table become, each once."""
    return list(dict.fromkeys(tile_of(target, spec, line) for line in range(len(fused(target, spec)))))


def per_weight(report: Report, spec: KernelSpec, tile: Tile) -> float:
    """Instructions per weight in the loop over K."""
    return report.loop.instructions * report.threads / (tile.columns * tile.units * text_of(spec).layout.unit)


def stays_in_registers(report: Report) -> bool:
    return not report.loop.shuffles and not {"STS", "STSM"} & set(report.loop.shared)


@pytest.mark.parametrize("target", ["sm_86", "sm_90"])
@pytest.mark.parametrize("scheme", ["int4/g128:fp16", "uint4/g32:fp16+m", "binary/g64:fp16", "int8/axis0"])
def test_activations_in_fp32(scheme: str, target: str) -> None:
    """Their terms of 16 bits lie beside them: tiles are smaller, and hold."""
    spec = spec_of(scheme, dtype="f32")
    (report,) = build(spec, tiles_of(target, spec)[-1], target).values()
    assert report.fits, report
    assert report.spill_bytes == 0, report


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
    assert stays_in_registers(report)
    assert "LDSM" not in report.loop.shared
    assert per_weight(report, spec, tile) <= BUDGET[scheme]


# The same for bytes, at a tile of 16 rows and at the largest shipped one, where tensor cores leave rows / 16 issue slots for
# each weight (a weight meets every row, 2048 rows a cycle): 16 * 128 / 16 / 2048 of a cycle's four.
BYTES_BUDGET = {
    ("int8/axis0", "int8/token"): (1.5, 1.6),
    ("uint4/axis0:fp32+z", "int8/token"): (2.5, 2.5),
    ("int3/axis0", "int8/token"): (1.7, 1.7),
    ("int8/axis0", "uint8/token:fp32+z"): (1.6, 1.7),
    ("int8/g128:fp16", "int8/g128:fp32"): (2.5, 6.2),
    ("e4m3/axis0", "e4m3/token"): (1.6, 2.6),
    ("e4m3/b128x128:fp32", "e4m3/g128:fp32"): (2.2, 4.1),
    ("int4/axis0", "e4m3/token"): (2.7, 4.6),
    ("uint4/g128:fp16+z", "e4m3/g128:fp32"): (3.6, 7.7),
    ("e3m2/axis0", "e4m3/token"): (2.7, 4.0),
    ("int2/axis0", "e4m3/token"): (2.1, 3.5),
}


@pytest.mark.parametrize("last", [False, True], ids=["few rows", "many rows"])
@pytest.mark.parametrize(("scheme", "act"), BYTES_BUDGET)
def test_bytes_on_hopper(scheme: str, act: str, last: bool) -> None:
    """Instructions on bytes that take the weight from registers; sums become floats without a conversion inside the loop."""
    spec = spec_of(scheme, act)
    tile = tile_of("sm_90", spec, -1 if last else 0)
    (report,) = build(spec, tile, "sm_90").values()
    assert report.fits
    # Zero points are converted, once for a group; weights and sums are not.
    assert (report.spill_bytes, report.loop.shuffles, report.loop.i2f) == (0, 0, 2 * ("g128:fp16+z" in scheme))
    assert all(name.startswith("QGMMA" if "e4m3" in act else "IGMMA") for name in report.loop.mma)
    assert report.loop.widest_of("W0") == 16
    assert stays_in_registers(report)
    assert "LDSM" not in report.loop.shared
    assert per_weight(report, spec, tile) <= BYTES_BUDGET[scheme, act][last]


# What multiplies integers and e4m3 (None: no instruction does).
BYTES_MMA = {
    "sm_80": ("IMMA", None),
    "sm_86": ("IMMA", None),
    "sm_89": ("IMMA", "QMMA"),
    "sm_90": ("IGMMA", "QGMMA"),
    "sm_100": ("IMMA", "UTCQMMA"),
    "sm_120": ("IMMA", "QMMA"),
    "gfx942": ("v_mfma_i32", None),
}


@pytest.mark.parametrize("act", ["int8/token", "e4m3/g128:fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_bytes_on_every_target(act: str, target: str) -> None:
    spec, wanted = spec_of("uint4/g128:fp16+z", act), BYTES_MMA[target]["e4m3" in act]
    if wanted is None:
        assert "e4m3" in TritonLowering(architecture=target).supports(spec).reason
        return
    for tile in tiles_of(target, spec):
        (report,) = build(spec, tile, target).values()
        assert report.fits, report
        assert report.spill_bytes == 0, report
        assert report.loop.widest_of("W0") == 16
        assert all(name.startswith(wanted) for name in report.loop.mma)
        assert target not in IN_REGISTERS or stays_in_registers(report)


# Instructions per weight where tensor cores are mma.sync, for the first and the last shipped shape, with Triton 3.6 or 3.7.
SYNC_BUDGET = {
    "int4/g128:fp16": (3.0, 5.9),
    "uint4/g32:fp16+m": (4.0, 6.9),
    "int3/g512:fp16": (2.9, 3.7),
}


@pytest.mark.parametrize("scheme", SYNC_BUDGET)
@pytest.mark.parametrize("target", TARGETS)
def test_every_shape_on_every_target(scheme: str, target: str) -> None:
    spec = spec_of(scheme)
    tiles = tiles_of(target, spec)
    for tile in tiles:
        (report,) = build(spec, tile, target).values()
        assert report.fits, report
        assert report.spill_bytes == 0, report
        assert report.loop.widest_of("W0") == 16
        assert report.loop.mma
        assert all(name.startswith(MMA[target]) for name in report.loop.mma)
        assert target not in IN_REGISTERS or stays_in_registers(report)
        if MMA[target] == "HMMA" and tile in (tiles[0], tiles[-1]):
            assert per_weight(report, spec, tile) <= SYNC_BUDGET[scheme][tile != tiles[0]]


def test_how_many_rows_compiles_nothing() -> None:
    """One row, an even number, a multiple of 16: Triton would make another binary for each."""
    spec = spec_of("int4/g128:fp16")
    for text in (text_of(spec).source, bytes_text(spec_of("int8/axis0", "int8/token")).source):
        kernel = compat.triton_kernel(text)
        assert [p.name for p in kernel.params if p.do_not_specialize] == ["M"]


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
