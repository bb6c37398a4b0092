"""One kernel compiled for GPUs that are not there: what is counted is what is in the code."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from rich.console import Console

from qcompile.testing.compile_for import TARGETS, Report, compile_kernel, table
from qcompile.testing.sass import width
from qcompile.testing.source import opening
from tests.testing.kernels import ALIGNED, ALL, PROBLEM, add, matmul, row_sum, specialised, to_float, triton


@pytest.fixture(scope="module")
def matmuls() -> dict[str, Report]:
    """One tile of 128 x 128 x 64 by 4 warps, for every kind of matrix unit."""
    tile = {"BM": 128, "BN": 128, "BK": 64}
    return compile_kernel(matmul, PROBLEM, tile, aligned=ALIGNED, targets=ALL)


# Each target's matrix instruction, with its shape, and how many of its units work on a tile.
SHAPES = {
    "sm_80": (r"HMMA\.(16)(8)(16)\.F32", 4),  # the four warps
    "sm_90": (r"HGMMA\.(\d+)x(\d+)x(\d+)\.F32", 1),  # a group of four warps
    "sm_100": (r"UTCHMMA\.(\d+)x(\d+)x(\d+)", 1),  # one thread for the block
    "gfx942": (r"v_mfma_f32_(\d+)x(\d+)x(\d+)_f16", 4),
}


@pytest.mark.parametrize("target", ALL)
def test_the_loop_of_a_matmul_does_its_work_exactly(matmuls: dict[str, Report], target: str) -> None:
    report = matmuls[target]
    pattern, units = SHAPES[target]
    done = 0
    for opcode, number in report.loop.mma.items():
        found = re.fullmatch(pattern, opcode)
        assert found, opcode
        done += number * math.prod(map(int, found.groups())) * units
    assert done == 128 * 128 * 64
    # Each operand's tile is loaded once per iteration, 16 bytes at a time.
    threads = 4 * TARGETS[target].warp
    assert report.threads == threads
    for operand in ("a", "b"):
        loaded = sum(width(opcode) * number for opcode, number in report.loop.operands[operand].items())
        assert loaded * threads == 128 * 64 * 2
        assert report.loop.widest_of(operand) == 16
    assert set(report.loop.operands) == {"a", "b"}
    assert report.loop.widest == 16
    assert report.loop.widest_of("c") == 0
    assert report.loads == report.loop.loads
    assert not report.loop.stores
    assert report.whole.stores
    assert 64 < report.loop.instructions < report.whole.instructions
    assert report.fits
    assert report.spill_bytes == 0


def test_where_operands_come_from(matmuls: dict[str, Report]) -> None:
    """HMMA takes both operands from registers, by LDSM; HGMMA and tcgen05 read shared memory themselves."""
    assert matmuls["sm_80"].loop.shared == {"LDSM": 32}  # 2 x (64 x 64 halves for each of 2 x 2 warps) / (4 x 8 x 8)
    assert matmuls["sm_90"].loop.shared == {}
    assert matmuls["sm_100"].loop.shared == {}
    assert set(matmuls["gfx942"].loop.shared) == {"ds_read", "ds_write"}
    assert matmuls["sm_90"].loop.arrives == 1
    assert matmuls["sm_80"].whole.arrives == 0
    assert matmuls["sm_100"].tensor_memory == 128  # columns of 32 bits: those of the accumulator
    assert matmuls["sm_90"].tensor_memory == 0


def test_texts(matmuls: dict[str, Report]) -> None:
    assert "wgmma.mma_async" in matmuls["sm_90"].ptx
    assert "HGMMA" in matmuls["sm_90"].sass
    assert "v_mfma" in matmuls["gfx942"].sass
    assert matmuls["gfx942"].ptx == ""
    assert all("ttg.num-warps" in report.ttgir for report in matmuls.values())


def test_what_a_text_says_of_its_kernel() -> None:
    assert opening('@triton.jit\ndef f(x):\n    """Doubles x.\n\n    In place.\n    """\n    pass') == "Doubles x."
    assert opening(
        "    def f(x,\n          y):\n\n        # int4: the weight in rows\n        z = x  # ends\n        # none"
    ) == ("int4: the weight in rows")
    assert opening("def f(x):\n    y = x\n    # no beginning\n    return y") == ""
    assert opening("x = 1") == ""


def test_descriptions(matmuls: dict[str, Report]) -> None:
    text = str(matmuls["sm_90"])
    assert text.startswith("matmul on sm_90: 128 threads, ")
    assert "8 HGMMA.64x128x16.F32, 8 a LDGSTS.E.BYPASS.128, 8 b LDGSTS.E.BYPASS.128, 1 arrives" in text
    assert "DOES NOT FIT" not in text
    console = Console(width=200)
    with console.capture() as shown:
        console.print(table(list(matmuls.values())))
    assert all(target in shown.get() for target in ALL)
    assert "a: 8 LDGSTS.E.BYPASS.128" in shown.get()


def test_spills_are_those_that_the_assembler_tells() -> None:
    """An accumulator of 128 x 64 in one warp takes 256 registers of each thread, of which there are 255."""
    tile = {"BM": 128, "BN": 64, "BK": 16}
    report = compile_kernel(matmul, PROBLEM, tile, aligned=ALIGNED, targets="sm_80", num_warps=1)["sm_80"]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "k.ptx").write_text(report.ptx)
        ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-lineinfo", "--gpu-name=sm_80"]
        # Triton 3.7 adds an option; either way the numbers must be those of the assembler.
        ptxas += ["--regAllocOptLevel=2"] if triton.__version__ >= "3.7" else []
        done = subprocess.run([*ptxas, "k.ptx", "-o", "k.o"], cwd=folder, capture_output=True, text=True, check=True)
    told = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert told
    assert report.spill_bytes == int(told[1]) + int(told[2]) > 0
    assert f"Used {report.registers} registers" in done.stderr
    assert report.registers == TARGETS["sm_80"].register_limit
    assert 0 < report.loop.spill_bytes < report.spill_bytes


def test_spills_on_amd() -> None:
    """512 registers for each of 64 threads: 128 KiB, of which the accumulator of 128 x 128 is half."""
    tile = {"BM": 128, "BN": 128, "BK": 32}
    options = {"num_warps": 1, "num_stages": 2}
    report = compile_kernel(matmul, PROBLEM, tile, aligned=ALIGNED, targets="gfx942", **options)["gfx942"]
    assert report.registers == TARGETS["gfx942"].register_limit
    spilled = re.search(r"vgpr_spill_count: (\d+)", report.sass)
    assert spilled
    # Each spilled register is stored at least once, and loaded at least once.
    assert report.spill_bytes >= 2 * 4 * int(spilled[1]) > 0


def test_shared_memory_beyond_the_limit_is_reported() -> None:
    """Two stages of 64 x 256 halves for each operand are 128 KiB: more than 99 KiB, less than 163."""
    tile = {"BM": 64, "BN": 64, "BK": 256}
    reports = compile_kernel(matmul, PROBLEM, tile, aligned=ALIGNED, targets=("sm_86", "sm_80"), num_stages=3)
    assert [(report.shared, report.shared_limit) for report in reports.values()] == [(131072, 101376), (131072, 166912)]
    assert [report.fits for report in reports.values()] == [False, True]
    assert "shared 131072 of 101376 DOES NOT FIT" in str(reports["sm_86"])


def test_too_many_threads_do_not_fit() -> None:
    """16 warps are 512 threads on NVIDIA's devices, and 1024 on AMD's, which is the limit; warps are powers of two."""
    types = {"x": "*fp32", "y": "*fp32", "out": "*fp32"}
    for warps, fits in ((16, True), (32, False)):
        report = compile_kernel(add, types, {"N": 4096}, targets="gfx942", num_warps=warps)["gfx942"]
        assert report.threads == 64 * warps
        assert report.fits == fits


def test_alignment_decides_the_width_of_loads() -> None:
    types = {"x": "*fp16", "y": "*fp16", "out": "*fp16"}
    wide = compile_kernel(add, types, {"N": 1024}, targets=("sm_80", "gfx942"))
    narrow = compile_kernel(add, types, {"N": 1024}, aligned=["y"], targets=("sm_80", "gfx942"))
    # 1024 elements of 2 bytes: 8 for each of 128 threads, 4 for each of 256. x is read in a helper that is inlined.
    assert wide["sm_80"].whole.operands == {"x": {"LDG.E.128": 1}, "y": {"LDG.E.128": 1}}
    assert narrow["sm_80"].whole.operands["y"] == {"LDG.E.128": 1}
    assert narrow["sm_80"].whole.operands["x"] == {"LDG.E.U16": 8}
    assert narrow["sm_80"].whole.widest_of("x") == 2
    assert wide["sm_80"].loads == {"LDG.E.128": 2}
    assert wide["sm_80"].loop.instructions == 0
    assert wide["gfx942"].whole.widest_of("x") == 8
    assert narrow["gfx942"].whole.widest_of("x") == 2
    assert narrow["gfx942"].whole.widest_of("y") == 8


def test_shuffles() -> None:
    """The sum of 32 values, one in each lane of a warp, takes log2(32) exchanges."""
    types = {"x": "*fp32", "out": "*fp32"}
    reports = compile_kernel(row_sum, types, {"N": 32}, targets=("sm_80", "gfx942"), num_warps=1)
    assert reports["sm_80"].whole.shuffles == 5
    assert reports["gfx942"].whole.shuffles >= 5
    assert reports["sm_80"].whole.barriers == 0
    more = compile_kernel(row_sum, types, {"N": 128}, targets="sm_80", num_warps=4)["sm_80"].whole
    assert more.barriers > 0 < more.shared["STS"]  # warps meet in shared memory
    none = compile_kernel(to_float, types, {"N": 32, "FLOAT": True}, targets="gfx942", num_warps=1)["gfx942"]
    assert none.whole.shuffles == 0


def test_conversions_from_integers() -> None:
    """512 values: 4 for each of 128 threads, 2 for each of 256."""
    targets = ("sm_80", "gfx942")
    floats = compile_kernel(to_float, {"x": "*i32", "out": "*fp32"}, {"N": 512, "FLOAT": True}, targets=targets)
    assert [report.whole.i2f for report in floats.values()] == [4, 2]
    integers = compile_kernel(to_float, {"x": "*i32", "out": "*i32"}, {"N": 512, "FLOAT": False}, targets=targets)
    assert [report.whole.i2f for report in integers.values()] == [0, 0]


def test_every_target() -> None:
    reports = compile_kernel(add, {"x": "*fp32", "y": "*fp32", "out": "*fp32"}, {"N": 1024})
    assert list(reports) == list(TARGETS)
    for name, report in reports.items():
        assert report.target is TARGETS[name]
        assert 0 < report.registers <= report.target.register_limit
        assert report.fits
        assert report.whole.widest == 16
        assert f".target sm_{name[3:]}" in report.ptx if name.startswith("sm") else name in report.sass


def test_specialised_warps() -> None:
    types = {**dict.fromkeys("ab", "*fp16"), "c": "*fp32", **dict.fromkeys("MNK", "i32")}
    tile = {"BM": 128, "BN": 128, "BK": 64}
    report = compile_kernel(specialised, types, tile, aligned=types, targets="sm_90")["sm_90"]
    assert report.whole.setmaxnreg > 0
    assert report.threads > 4 * 32  # warps that load are added
    assert set(report.whole.loads) == {"UTMALDG.2D"}
    assert report.whole.widest == 0
    # The loop is that of the warps that compute; the tile is halved between two groups of warps, or not.
    assert {re.sub(r"x\d+x", "x_x", opcode) for opcode in report.loop.mma} == {"HGMMA.64x_x16.F32"}
    assert report.loop.loads == {}
    assert report.loop.arrives == 1
