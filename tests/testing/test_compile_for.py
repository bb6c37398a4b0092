"""Kernels compiled for GPUs that are not there: what is counted is what is in the code, and nothing stays."""

from __future__ import annotations

import math
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from qcompile.compat import aot
from qcompile.errors import QCError
from qcompile.testing import compile_for as module
from qcompile.testing.compile_for import TARGETS, Report, Target, compile_for, compile_kernel, table
from qcompile.testing.interpret import interpret
from qcompile.testing.sass import width

triton = pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

import triton.language as tl  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402

ALL = ("sm_80", "sm_90", "sm_100", "gfx942")
PROBLEM = {"a": "*fp16", "b": "*fp16", "c": "*fp16", "K": "i32", "stride": "i32"}
ALIGNED = tuple(PROBLEM)


@triton.jit
def matmul(a, b, c, K, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    here, there = a + i * stride + k[None, :], b + k[:, None] * BN + j
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(here), tl.load(there), acc)  # both loads on one line
        here += BK
        there += BK * BN
    tl.store(c + i * BN + j, acc.to(tl.float16))


@triton.jit
def specialised(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    to_a = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    to_b = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, BK])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=True):
        acc = tl.dot(to_a.load([0, k]), to_b.load([0, k]).T, acc)
    tl.store(c + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)


@triton.jit
def fetch(p, i):
    return tl.load(p + i)


@triton.jit
def add(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, fetch(x, i) + tl.load(y + i))


@triton.jit
def row_sum(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def to_float(x, out, N: tl.constexpr, FLOAT: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(out + i, v.to(tl.float32) if FLOAT else v)


@triton.jit
def refuses(x, N: tl.constexpr):
    tl.static_assert(N == 0, "N must be nothing")


@triton.autotune(configs=[triton.Config({"N": 64}, num_warps=2), triton.Config({"N": 128}, num_warps=8)], key=[])
@triton.jit
def tuned(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + 1)


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


# ------------------------------------------------------------------------------------------------------ functions
def two_kernels(x: Tensor) -> Tensor:
    """A reduction over columns of a reduction over rows: Inductor cannot do both in one kernel."""
    return torch.softmax(x, -1).sum(0)


def test_the_kernels_of_inductor() -> None:
    x = torch.randn(8, 1024)
    reports, code = run_and_get_code(compile_for, torch.compile(two_kernels), x, targets=("sm_90", "gfx942"))
    emitted = re.findall(r"async_compile\.triton\('(\w+)'", code[0])
    assert len(emitted) == 2
    assert [report.kernel for report in reports] == [name for name in emitted for _ in range(2)]
    assert [report.target.name for report in reports] == ["sm_90", "gfx942"] * 2
    assert reports[0].whole.widest == 16  # inputs of a graph are aligned, as on a GPU
    assert reports[0].whole.shuffles > 0
    assert reports[0].whole.operands.keys() == {"in_ptr0"}


def test_an_input_that_is_not_aligned() -> None:
    x = torch.randn(8 * 1024 + 1)[1:].view(8, 1024)
    assert compile_for(two_kernels, x, targets="sm_90")[0].whole.widest == 4


def test_users_kernels_launched_by_a_compiled_function() -> None:
    def f(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        add[(1,)](x * 3, x, out, N=1024, num_warps=8)
        return out + 1

    reports = compile_for(torch.compile(f), torch.arange(1024.0), targets="sm_80")
    assert [report.kernel for report in reports].count("add") == 1
    assert len(reports) == 3
    report = next(report for report in reports if report.kernel == "add")
    assert report.threads == 256
    assert report.options["num_warps"] == 8
    assert report.whole.operands == {"x": {"LDG.E.128": 1}, "y": {"LDG.E.128": 1}}


def test_variants_of_direct_launches() -> None:
    def f(x: Tensor, half: Tensor) -> Tensor:
        out = torch.zeros(1025)
        add[(1,)](x, x, out, 1024)
        add[(1,)](x, x, out, 1024)  # the same variant
        add[(2,)](half, half, out, 1024)
        add[(1,)](x, x, out[1:], 1024)  # not aligned
        return out

    reports = compile_for(f, torch.ones(1024), torch.ones(1024).half(), targets="sm_80")
    assert [report.kernel for report in reports] == ["add"] * 3
    assert [report.whole.widest for report in reports] == [16, 16, 16]
    stores = [set(report.whole.stores) for report in reports]
    assert stores == [{"STG.E.128"}, {"STG.E.128"}, {"STG.E"}]


@pytest.mark.parametrize("run", [False, True])
def test_kernels_run_when_asked(run: bool) -> None:
    seen = []

    def f(x: Tensor) -> None:
        out = torch.zeros(64)
        add[(1,)](x, x, out, 64)
        seen.append(out)

    reports = compile_for(f, torch.ones(64), targets="sm_80", run=run)
    assert len(reports) == 1
    assert torch.equal(seen[0], torch.full((64,), 2.0 if run else 0.0))


def test_kernels_and_helpers_that_are_decorated_inside() -> None:
    def f(x: Tensor) -> Tensor:
        @triton.jit
        def inner(p, i):
            return tl.load(p + i)

        @triton.jit
        def outer(x, out, N: tl.constexpr):
            i = tl.arange(0, N)
            tl.store(out + i, inner(x, i) * 2)

        out = torch.empty_like(x)
        outer[(1,)](x, out, 512)
        return out

    reports = compile_for(f, torch.ones(512), targets="sm_80")
    assert [report.whole.operands for report in reports] == [{"x": {"LDG.E.128": 1}}]


def test_an_autotuned_kernel_in_its_first_configuration() -> None:
    reports = compile_for(lambda x: tuned[(1,)](x, torch.empty_like(x)), torch.ones(128), targets="sm_80")
    assert [report.threads for report in reports] == [64]
    report = compile_kernel(tuned, {"x": "*fp32", "out": "*fp32"}, {"N": 128}, targets="sm_80")["sm_80"]
    assert report.threads == 128  # the options are those of the call


def test_nothing_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import graph
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime import driver, interpreter
    from triton.runtime.jit import JITFunction

    def state() -> dict[str, object]:
        owners: list[Any] = [JITFunction, CachingAutotuner, interpreter.InterpretedFunction, graph, tl, tl.core]
        found: dict[str, object] = {owner.__name__: dict(vars(owner)) for owner in owners}
        found["environment"] = dict(os.environ)
        found["driver"] = (driver._active, driver._default)
        found["cache"] = triton.knobs.cache.dir
        found["kernel"] = dict(vars(add))
        found["globals"] = {name for name in globals() if not name.startswith("__import_torch")}  # Dynamo's own
        found["files"] = list(tmp_path.iterdir())
        return found

    cache_dir()  # torch itself names its cache in the environment, on first use
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = state()
    compile_for(torch.compile(two_kernels), torch.randn(4, 8), targets="gfx942")
    compile_for(lambda x: add[(1,)](x, x, x, N=64), torch.randn(64), targets="sm_80")
    refused("testing.compile", lambda: compile_kernel(refuses, {"x": "*fp32"}, {"N": 4}, targets="sm_80"))
    assert state() == before


# ------------------------------------------------------------------------------------------------------ errors
def refused(code: str, call: Callable[[], object]) -> QCError:
    with pytest.raises(QCError) as caught:
        call()
    assert caught.value.code == code
    return caught.value


def test_unknown_targets() -> None:
    error = refused("testing.unknown-target", lambda: compile_for(two_kernels, torch.ones(4, 4), targets=["sm90"]))
    assert "did you mean 'sm_90'" in error.what
    assert "gfx942" in error.next


def test_signatures_that_do_not_fit() -> None:
    def call(*args: Any, **kwargs: Any) -> Callable[[], object]:
        return lambda: compile_kernel(*args, **kwargs, targets="sm_80")

    types = {"x": "*fp32", "out": "*fp32"}
    assert "'xx'; did you mean 'x'" in refused("testing.signature", call(row_sum, {"xx": "*fp32"}, {"N": 4})).what
    assert "'out' has no type" in refused("testing.signature", call(row_sum, {"x": "*fp32"}, {"N": 4})).what
    assert "'N' has no value" in refused("testing.signature", call(row_sum, types, {})).what
    assert "no type '*float'" in refused("testing.signature", call(row_sum, {**types, "x": "*float"}, {"N": 4})).what
    assert "'z'" in refused("testing.signature", call(row_sum, types, {"N": 4}, aligned=["z"])).what
    assert "is no Triton kernel" in refused("testing.signature", call(two_kernels, types, {"N": 4})).what


def test_a_function_without_kernels() -> None:
    error = refused("testing.no-kernels", lambda: compile_for(torch.compile(lambda x: x.shape), torch.ones(4)))
    assert "launched no Triton kernel" in error.what


def test_a_kernel_that_does_not_compile() -> None:
    error = refused("testing.compile", lambda: compile_kernel(refuses, {"x": "*fp32"}, {"N": 4}, targets=ALL))
    assert error.what.startswith("The kernel refuses does not compile for sm_80. Nor do: refuses for sm_90, ")
    assert "N must be nothing" in error.why
    assert error.where == f"triton {triton.__version__}"


def test_assertions_hold_when_the_compiler_was_imported_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imported while a kernel is interpreted, Triton's compiler knows nothing of static_assert ever after."""
    from triton.compiler.code_generator import CodeGenerator

    monkeypatch.setattr(CodeGenerator, "statically_implemented_functions", {})
    refused("testing.compile", lambda: compile_kernel(refuses, {"x": "*fp32"}, {"N": 4}, targets="sm_80"))


def test_a_compiler_that_aborts(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM ends the process on instructions that a target has not: here, exchanges between lanes before sm_30."""
    monkeypatch.setattr(module, "TARGETS", {**TARGETS, "sm_20": Target("sm_20", "cuda", 20, 32, 49152)})
    types = {"x": "*fp32", "out": "*fp32"}
    error = refused("testing.compile", lambda: compile_kernel(row_sum, types, {"N": 32}, targets=["sm_20"]))
    assert "row_sum does not compile for sm_20" in error.what
    assert "SIGABRT" in error.why
    assert "LLVM ERROR: Cannot select" in error.why


def test_a_compiler_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "SECONDS", 0)
    types = {"x": "*fp32", "out": "*fp32"}
    error = refused("testing.compile", lambda: compile_kernel(row_sum, types, {"N": 32}, targets="sm_80"))
    assert "longer than 0 s" in error.why


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "triton_version", lambda: None)
    refused("testing.no-triton", lambda: compile_for(two_kernels, torch.ones(4, 4)))
    refused("testing.no-triton", lambda: compile_kernel(add, {}, {}))


def test_where_kernels_are_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.interpreter import InterpretedFunction

    with interpret():
        refused("testing.interpreter", lambda: compile_kernel(add, {}, {}))
        refused("testing.interpreter", lambda: compile_for(two_kernels, torch.ones(4, 4)))
    monkeypatch.setattr(tl, "sum", InterpretedFunction(tl.sum.fn))  # as with TRITON_INTERPRET=1
    refused("testing.interpreter", lambda: compile_kernel(add, {}, {}))
