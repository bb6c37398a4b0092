"""What the tiles of Hadamard rotations become: machine code of every kind of tensor core, read without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton_overlap import can_overlap
from qcompile.codegen.devices.triton_rotate import Rotation, Tile, choose_tile, text_of
from qcompile.testing.compile_for import TARGETS, Report, compile_kernel

TYPES = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32"}
MMA = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "gfx942": "v_mfma"}


def build(
    rotation: Rotation, rows: int, columns: int, target: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tile, Report]:
    """The kernel that a device of this kind runs."""
    device = compat.gpu(torch.device("cpu"))._replace(
        architecture=target, processors=132, shared=TARGETS[target].shared_limit
    )
    monkeypatch.setattr(compat, "gpu", lambda _: device)
    tile = choose_tile(rotation, rows, columns, torch.device("cpu"))
    panels, used = rotation.panels(tile.width), rotation.used(tile.width)
    signature = {"X": TYPES[rotation.x], "H": TYPES["f16" if rotation.x == "f16" else "bf16"]}
    signature |= {"SIGNS": "*i32"} if rotation.signed else {}
    signature |= {"Y": TYPES[rotation.y], "M": "i32", "K": "i32", "ldx": "i32", "scale": "fp32"}
    constants = {
        "R": tile.rows,
        "P": tile.width,
        "USED": used,
        "STAGES": tile.stages,
        "EVEN": used == tile.width and columns % (panels * used) == 0,
        "FULL": rows >= tile.rows,
        "PDL": can_overlap(target),
    }
    report = compile_kernel(
        compat.triton_kernel(text_of(rotation, panels)),
        signature,
        constants,
        targets=(target,),
        aligned=set(signature) - {"M", "scale"},
        num_warps=tile.warps,
        num_stages=tile.stages,
    )[target]
    return tile, report


# Instructions per value, as measured with Triton 3.6 and 3.7 and rounded up. What memory leaves time for, at 4 bytes per
# value: 27 on an H200, 39 on an A100, 31 on an MI300X; twice that at 8 bytes.
BUDGET = {
    Rotation(128, "bf16", "bf16"): {"sm_80": 7, "sm_90": 4, "gfx942": 13},
    Rotation(24, "f16", "f16", signed=True): {"sm_90": 4.5},
    Rotation(256, "bf16", "bf16", signed=True): {"sm_80": 10, "sm_90": 7, "gfx942": 17},
    Rotation(512, "f16", "f32", signed=True, inverse=True): {"sm_89": 10},
    Rotation(128, "f32", "f32"): {"sm_80": 35, "sm_90": 12, "gfx942": 33},
    Rotation(512, "f32", "bf16", signed=True): {"gfx942": 24},
}


@pytest.mark.parametrize(
    ("rotation", "target"),
    [(rotation, target) for rotation, targets in BUDGET.items() for target in targets],
    ids=str,
)
def test_many_rows(rotation: Rotation, target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tile, report = build(rotation, 4096, 15360, target, monkeypatch)
    values = tile.rows * rotation.panels(tile.width) * rotation.used(tile.width)
    assert report.fits
    assert (report.spill_bytes, report.loop.shuffles) == (0, 0)
    assert all(name.startswith(MMA[target]) for name in report.loop.mma)
    assert report.loop.mma
    assert report.loop.instructions * report.threads / values <= BUDGET[rotation][target]


@pytest.mark.parametrize("target", ["sm_90"])
def test_few_rows(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of sixteen rows where there are fewer, with loads as wide as for many."""
    rotation = Rotation(40, "bf16", "bf16", signed=True)
    tile, report = build(rotation, 5, 5120, target, monkeypatch)
    assert tile.rows == 16
    assert report.fits
    assert report.spill_bytes == 0
    assert report.loop.mma
    assert report.loop.widest == 16
