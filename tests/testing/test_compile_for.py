"""Whole functions compiled for GPUs that are not there, and what is refused: nothing stays."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from qcompile.codegen.devices.triton import cut
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.triton import shape_for
from qcompile.compat import aot
from qcompile.errors import QCError
from qcompile.ir.scheme import Scheme
from qcompile.testing import targets as module
from qcompile.testing.compile_for import TARGETS, Report, Target, compile_for, compile_kernel
from qcompile.testing.interpret import interpret
from tests.testing.kernels import ALL, add, refuses, row_sum, tl, triton, tuned


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


class Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


def quantized(recipe: str, rows: int, *targets: str, strict: bool = True) -> list[Report]:
    compiled = torch.compile(Linear(), backend="qcompile", options={"recipe": recipe, "strict": strict})
    with torch.no_grad():
        return compile_for(compiled, torch.randn(rows, 512, dtype=torch.bfloat16), targets=targets)


def test_own_kernels_are_cut_for_each_target() -> None:
    reports = quantized("int4/g128:fp16", 4, "sm_80", "sm_90", "gfx942")
    assert [report.target.name for report in reports] == ["sm_80", "sm_90", "gfx942"]
    for report in reports:
        spec = KernelSpec(Scheme.parse("int4/g128:fp16@mma16"), x="bf16", y="bf16")
        gpu = report.target.gpu
        tile = cut(spec, shape_for(gpu.architecture, "weight-only", 4), gpu.shared, gpu.architecture)
        assert report.about == str(spec)
        assert (report.options["num_warps"], report.options["num_stages"]) == (tile.warps, tile.stages)
        assert report.options.get("maxnreg", 0) == tile.registers
        # From sm_90 on a kernel may begin before the one before has ended: it waits for that one, and asks for weights before.
        early = report.target.name == "sm_90"
        assert (bool(report.whole.waits), bool(report.whole.prefetches)) == (early, early)
        assert bool(report.unwaited) != early


def test_what_is_launched_depends_on_the_target() -> None:
    """Many rows of bytes meet a decoded weight on sm_90, loaded by descriptors, and one fused kernel elsewhere."""
    reports = quantized("w8a8", 2048, "sm_80", "sm_90")
    launched = {
        name: [r for r in reports if r.target.name == name and r.kernel == "kernel"] for name in ("sm_80", "sm_90")
    }
    assert [r.about.partition("token:fp32")[2] for r in launched["sm_80"]] == [""]
    assert [r.about.partition("token:fp32")[2] for r in launched["sm_90"]] == [
        ": the weight in rows",
        ": a weight that was decoded to bytes",
    ]
    assert "UTMALDG" in launched["sm_90"][1].sass


def test_kernels_that_are_run_compile_for_each_target() -> None:
    compiled, x = (
        torch.compile(Linear(), backend="qcompile", options={"recipe": "int8"}),
        torch.randn(4, 512).bfloat16(),
    )
    with torch.no_grad():
        results = []
        reports = compile_for(lambda: results.append(compiled(x)), targets=("sm_80", "sm_90"), run=True)
        assert len(reports) == len(results) == 2
        assert torch.equal(*results)


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
        found["globals"] = {
            name for name in add.fn.__globals__ if not name.startswith("__import_torch")
        }  # Dynamo's own
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


def test_a_target_without_kernels() -> None:
    """e4m3 multiplies on sm_90 and not on sm_80: its site stays float there, for a library."""
    error = refused("testing.no-kernels", lambda: quantized("e4m3/axis0 e4m3/token", 4, "sm_90", "sm_80", strict=False))
    assert error.what.endswith("launches no Triton kernel for sm_80.")
    assert "targets=('sm_90',)" in error.next


def test_a_kernel_that_does_not_compile() -> None:
    error = refused("testing.compile", lambda: compile_kernel(refuses, {"x": "*fp32"}, {"N": 4}, targets=ALL))
    assert "mend the kernel" in error.next
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
    monkeypatch.setattr(module, "TARGETS", {**TARGETS, "sm_20": Target("sm_20", "cuda", 20, 32, 49152, 14)})
    types = {"x": "*fp32", "out": "*fp32"}
    error = refused("testing.compile", lambda: compile_kernel(row_sum, types, {"N": 32}, targets=["sm_20", "sm_80"]))
    assert "targets=('sm_80',)" in error.next
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
