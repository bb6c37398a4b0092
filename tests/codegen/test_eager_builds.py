"""What stands behind an eager call: libraries on disk, the trial of a new kernel, and compiled code that comes this way."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from qcompile.backend import watching
from qcompile.codegen import eager
from qcompile.codegen.spec import KernelSpec
from qcompile.compat import abi, cpp, load_cpp_kernel
from qcompile.errors import QCWarning
from qcompile.ir.matmul import MatmulSpec
from qcompile.ir.ops import reference_only
from tests.codegen.sites import FORMS, SCHEMES, W, site

qmm = torch.ops.qcompile.qmm


def test_a_kernel_that_fails_its_trial_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that returns one wrong number, or another shape, is never used; one warning says so."""
    text = FORMS["plain"].format(w=W)
    x, parts, _ = site(text, 3)
    with reference_only():
        want = qmm(x, parts, [], text)
    load = abi.load_operator

    def broken(*args: Any) -> Any:
        operator = load(*args)

        def call(*operands: Any) -> Tensor:
            y = operator(*operands)
            y.view(-1)[-1] += 0.01
            return y

        return call

    for replacement in (broken, lambda *_: lambda x, *_: x[..., :1], lambda *_: 1 / 0):
        with monkeypatch.context() as patch:
            patch.setattr(eager, "_CALLS", {})
            patch.setattr(eager, "_OPERATORS", {})
            patch.setattr(eager, "load_operator", replacement)
            with pytest.warns(QCWarning, match="plain-torch"):
                y = qmm(x, parts, [], text)
            assert torch.equal(y, want)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # once is enough
                assert torch.equal(qmm(x, parts, [], text), want)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("weight", ["int8/axis0", *SCHEMES])
def test_the_trial_sees_every_wrong_operand(weight: str, form: str) -> None:
    """Swapped, dropped or shifted operands move its results by more than it allows."""
    text = FORMS[form].format(w=weight)
    what = MatmulSpec.parse(text)
    spec = KernelSpec.of(what, "f32", "f32", ["f32"] * len(what.extras))
    step = what.parts_per_segment

    def reference(x: Tensor, parts: Any, extras: Any, n: Any, k: int) -> Tensor:
        return torch.ops.qcompile.qmm(
            x, parts, extras, str(MatmulSpec(spec.weight, tuple(n), k, spec.act, spec.epilogue, what.extras))
        )

    def with_reference(change: Any) -> str:
        def call(*operands: Any) -> Tensor:
            with reference_only():
                return reference(*change(*operands))

        return eager.trial(spec, call)

    assert with_reference(lambda *operands: operands) == ""
    # Many rows are tried as well: what is wrong here has no place in the smaller problem.
    assert with_reference(lambda x, *rest: (torch.cat([x[:, :4], x[:, 4:].roll(1, -1)], 1), *rest))
    assert with_reference(lambda x, *rest: (x.roll(1, -1), *rest))
    assert with_reference(lambda x, *rest: (x.transpose(0, 1).reshape(x.shape), *rest))
    assert with_reference(lambda x, p, *rest: (x, [p[0].flip(0), *p[1:]], *rest))
    assert with_reference(lambda x, p, *rest: (x, [p[0], p[1].roll(1, -1), *p[2:]], *rest))
    if len(what.n) > 1:
        assert with_reference(lambda x, p, e, n, k: (x, [*p[step:], *p[:step]], e, n[::-1], k))
    if what.extras:
        assert with_reference(lambda x, p, e, n, k: (x, p, [e[0].roll(1, -1)], n, k))


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.unlink()  # the old one may be mapped
    match how:
        case "cut":
            path.write_bytes(content[: len(content) // 3])
        case "empty":
            path.write_bytes(b"")
        case "text":
            path.write_text("no library\n")
        case "bit":
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("how", ["cut", "empty", "text", "bit"])
def test_a_damaged_operator_is_built_again(how: str) -> None:
    source = f'// {how} {os.getpid()}\nextern "C" int answer() {{ return 42; }}\n'
    path = abi.build_library(source)
    good = path.read_bytes()
    damage(path, how)
    assert path.read_bytes() != good
    assert abi.build_library(source) == path
    assert ctypes.CDLL(str(path)).answer() == 42
    assert not list(path.parent.glob("build-*")), "a build left its folder"
    time = path.stat().st_mtime_ns
    assert abi.build_library(source).stat().st_mtime_ns == time, "built although nothing was wrong"
    path.unlink()


def test_text_flags_and_compiler_name_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {abi.library_path("a"), abi.library_path("b")}
    with inductor_config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        paths.add(abi.library_path("a"))
    monkeypatch.setattr(abi, "_compiler_version", lambda compiler: "another")
    paths.add(abi.library_path("a"))
    monkeypatch.setattr(abi, "processor", lambda: "another")
    paths.add(abi.library_path("a"))
    assert len(paths) == 5


_LOAD = """
import sys, torch
from qcompile.compat import load_cpp_kernel
call = load_cpp_kernel(["float*"], sys.argv[1])
x = torch.zeros(1)
call(x)
print(x.item())
"""


@pytest.mark.parametrize("how", ["cut", "text"])
def test_a_damaged_kernel_is_built_again(how: str) -> None:
    """In another process, as the one that left it would be: a loader that believes a cut file dies of it."""
    source = f'// {how} {os.getpid()}\nextern "C" void kernel(float* x) {{ x[0] = 42; }}\n'
    module = load_cpp_kernel(["float*"], source).__self__  # type: ignore[attr-defined]
    path = Path(module.__file__)
    assert cpp.whole_library(path)
    damage(path, how)
    assert not cpp.whole_library(path)
    done = subprocess.run([sys.executable, "-c", _LOAD, source], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "42.0"), done.stderr
    assert cpp.whole_library(path)
    path.unlink()


def test_under_cpp_wrapper_compiled_code_calls_the_operator() -> None:
    """Inductor's C++ wrapper cannot call raw kernels; through the dispatcher it meets the same ones."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 33)).eval(), torch.randn(5, 64)
    results, before = [], len(eager._CALLS)
    for wrapper in (False, True):
        torch.compiler.reset()
        options = {"recipe": "int8", "cpp_wrapper": wrapper}
        with torch.no_grad():
            results.append(torch.compile(model, backend="qcompile", options=options)(x))
    assert len(eager._CALLS) == before + 2, "not called through the dispatcher"
    assert torch.equal(*results)


@pytest.mark.parametrize("options", [{"verify": True}, None], ids=["verify", "watching"])
def test_what_compares_with_the_reference_runs_the_reference(
    options: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a kernel was called through the dispatcher")

    monkeypatch.setattr(eager, "_call_of", never)
    monkeypatch.setattr(eager, "_CALLS", {})
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 48), nn.SiLU(), nn.Linear(48, 33)).eval(), torch.randn(5, 64)
    torch.compiler.reset()
    with torch.no_grad(), watching("compiled" if options else "reference") as trace:
        torch.compile(model, backend="qcompile", options={"recipe": "int8", **(options or {})})(x)
    assert all(decision.quantized for decision in trace.contexts[0].plan)
