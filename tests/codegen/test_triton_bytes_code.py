"""Machine code of the kernels around a weight that was decoded to bytes, for every target and without a GPU."""

from __future__ import annotations

import math
import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton import Tile, TritonLowering
from qcompile.codegen.devices.triton_decoded import COLUMNS, ROWS, WARPS, cut_own
from qcompile.codegen.devices.triton_text import bytes_text, decode_text
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.triton import shape_for
from qcompile.ir.scheme import Scheme
from qcompile.testing.compile_for import TARGETS, Report, compile_kernel
from tests.codegen.test_triton_code import BYTES_MMA

PAIR = {"segments": 2, "epilogue": "silu(a0)*a1"}


def spec_of(scheme: str, act: str, **more: object) -> KernelSpec:
    weight = Scheme.parse(f"{scheme}@mma8")
    return KernelSpec(weight, Scheme.parse(act), x="bf16", y="bf16", **more)  # type: ignore[arg-type]


def tile_of(spec: KernelSpec, target: str) -> Tile:
    """The shipped line, cut for a target."""
    return cut_own(spec, shape_for("sm_90", "integers", 4096, ("own",)), TARGETS[target].shared_limit, target)


def build(spec: KernelSpec, tile: Tile, *targets: str) -> dict[str, Report]:
    text = bytes_text(spec)
    signature = {name: f"*{kind}" for name, kind in text.pointers} | dict.fromkeys(text.sizes, "i32")
    depth, kind = math.gcd(tile.depth, text.layout.cell), dict(text.pointers)["X"]
    if tile.tma:
        signature |= {
            "X": f"tensordesc<{kind}[{tile.rows}, {depth}]>",
            "D": f"tensordesc<{kind}[{tile.columns}, {depth}]>",
        }
    constants = {"BM": tile.rows, "BN": tile.columns, "BK": depth, "STAGES": tile.stages, "TMA": tile.tma}
    return compile_kernel(
        compat.triton_kernel(text.source),
        signature,
        constants | {"FLAT": tile.flat},
        targets=targets,
        aligned=[name for name, kind in signature.items() if name != "M" and not kind.startswith("tensordesc")],
        **tile.options,
    )


# Instructions of a thread for each instruction of the tensor cores in the loop on sm_90 (64x128x32 of int8 and e4m3, 64x64x32
# in pairs that hold three sums), as Triton 3.6 and 3.7 compile it: addresses, barriers, and what meets sums there. One of
# 64x128x32 takes a multiprocessor 64 cycles, and its four schedulers have 256 issue slots in them for four warps.
BUDGET = {
    ("int8/axis0", "int8/token", ""): 14,
    ("uint4/axis0:fp32+z", "int8/token", ""): 14,
    ("e4m3/axis0", "e4m3/token", ""): 40,
    ("int4/axis0", "e4m3/token", ""): 40,
    ("e4m3/b128x128:fp32", "e4m3/g128:fp32", ""): 69,
    ("uint4/g128:fp16+z", "int8/token", ""): 103,
    ("uint4/g128:fp16+z", "e4m3/g128:fp32", ""): 106,
    ("int8/g64:fp16", "int8/g64:fp32", ""): 197,
    ("int8/axis0", "int8/token", "pair"): 18,
    ("uint4/g128:fp16+z", "int8/token", "pair"): 59,
    ("e4m3/axis0", "e4m3/token", "pair"): 24,
}


@pytest.mark.parametrize(("scheme", "act", "kind"), BUDGET)
def test_on_hopper(scheme: str, act: str, kind: str) -> None:
    """Both operands by descriptors, straight to shared memory and from there to the tensor cores; nothing but sums and scales
    in registers, which hold them all."""
    spec = spec_of(scheme, act, **(PAIR if kind else {}))
    tile = tile_of(spec, "sm_90")
    (report,) = build(spec, tile, "sm_90").values()
    assert tile.tma
    assert report.fits
    assert (report.spill_bytes, report.loop.shuffles) == (0, 0)
    assert {name: sum(found.values()) for name, found in report.loop.operands.items() if name in "XD"} == {
        "X": 1,
        "D": spec.segments,
    }
    assert all(name.startswith("UTMALDG") for name in (*report.loop.operands["X"], *report.loop.operands["D"]))
    assert all(name.startswith("QGMMA.64x" if "e4m3" in act else "IGMMA.64x") for name in report.loop.mma)
    assert report.loop.instructions <= BUDGET[scheme, act, kind] * sum(report.loop.mma.values())


@pytest.mark.parametrize("loader", ["descriptors", "pointers"])
@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize(("scheme", "act"), [("int8/axis0", "int8/token"), ("e4m3/b128x128:fp32", "e4m3/g128:fp32")])
def test_what_a_sweep_may_try_on_hopper(scheme: str, act: str, flat: bool, loader: str) -> None:
    """Pointers, which misaligned operands take, copy 16 bytes at a time to shared memory; one loop over all has no spill."""
    spec = spec_of(scheme, act)
    cut = tile_of(spec, "sm_90")
    tile = Tile(cut.rows, cut.columns, 1, 1, 3, 8, "own", cut.depth, loader == "descriptors", flat)
    (report,) = build(spec, tile, "sm_90").values()
    assert report.fits
    assert report.spill_bytes == 0
    if loader == "pointers":
        assert all(report.whole.operands[name].keys() == {"LDGSTS.E.BYPASS.128"} for name in ("X", "D"))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    ("scheme", "act", "kind"),
    [
        ("int8/axis0", "int8/token", ""),
        ("uint4/g128:fp16+z", "int8/token", "pair"),
        ("e4m3/b128x128:fp32", "e4m3/g128:fp32", ""),
        ("e4m3/axis0", "e4m3/token", "extras"),
    ],
)
def test_on_every_target(scheme: str, act: str, kind: str, target: str) -> None:
    extras = {"segments": 3, "epilogue": "acc*0.5+e0-e1", "extras": (("row", "f32"), ("mat", "bf16"))}
    more = {"": {}, "pair": PAIR, "extras": extras}[kind]
    spec = spec_of(scheme, act, **more)
    wanted = BYTES_MMA[target]["e4m3" in act]
    if wanted is None:
        assert not TritonLowering(architecture=target).supports(spec)
        return
    (report,) = build(spec, tile_of(spec, target), target).values()
    assert report.fits, report
    assert report.spill_bytes == 0, report
    assert report.loop.mma
    assert all(name.startswith(wanted) for name in report.loop.mma)
    if target not in ("sm_90", "gfx942"):
        assert (report.loop.widest_of("X"), report.loop.widest_of("D")) == (16, 16)


@pytest.mark.parametrize(
    ("name", "act"), [("int8", "int8"), ("e4m3", "e4m3"), ("uint4", "int8"), ("e2m1", "e4m3"), ("int3", "int8")]
)
def test_a_decode_moves_16_bytes_at_a_time(name: str, act: str) -> None:
    """Loads of codes and stores of rows; and so few instructions that memory is the limit: an H200 has time for 8.6 of a weight
    of 8 bits (132 multiprocessors, 128 lanes, 1.75 GHz; 2 bytes at 4.3 TB/s)."""
    spec = spec_of(f"{name}/axis0", f"{act}/token")
    signature = {"D": "*i32", "W0": "*i32", "S0": "*fp32", **dict.fromkeys(("N", "K", "ldd"), "i32")}
    units = 2 if name in ("int8", "e4m3") else 1
    for report in compile_kernel(
        compat.triton_kernel(decode_text(spec)),
        signature,
        {"BN": COLUMNS, "KC": units},
        targets=["sm_80", "sm_90"],
        aligned=set(signature) - {"N"},
        num_warps=WARPS,
    ).values():
        assert report.spill_bytes == 0
        assert report.whole.widest_of("W0") == 16
        assert set(re.findall(r"\bSTG[.\w]*", report.sass)) == {"STG.E.128"}
        weights = COLUMNS * units * bytes_text(spec).layout.unit
        assert report.whole.instructions * report.threads / weights <= 3


def test_ends_compile_everywhere() -> None:
    """The kernel that finishes a library's sums."""
    spec = spec_of("uint4/axis0:fp32+z", "int8/token", segments=2, epilogue="silu(a0)*a1+e0", extras=(("mat", "bf16"),))
    text = bytes_text(spec, given=True)
    signature = {name: f"*{kind}" for name, kind in text.pointers} | dict.fromkeys(("M", "K", *text.sizes), "i32")
    for report in compile_kernel(
        compat.triton_kernel(text.source), signature, {"BM": ROWS, "BN": COLUMNS}, num_warps=WARPS
    ).values():
        assert report.fits
        assert report.spill_bytes == 0
