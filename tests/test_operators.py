"""`import qcompile` is all that a program needs which holds operators, and it does not load torch by itself."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile.ir.codec import quantize

SCHEME = "int4/g32:fp16"
SPEC = f"{SCHEME} n=48 k=64 y=relu(acc)"


def lines(code: str) -> list[str]:
    """What a fresh process prints; a warning of ours is an error."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "QCWarning" not in done.stderr
    return done.stdout.splitlines()


class Packed(nn.Module):
    """All four operators in one program."""

    def __init__(self) -> None:
        super().__init__()
        for i, part in enumerate(quantize(torch.randn(48, 64), SCHEME)):
            self.register_buffer(f"part{i}", part)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        ops, parts = torch.ops.qcompile, [self.part0, self.part1]
        return (
            ops.qmm(ops.rotate(x, 64), parts, [], SPEC),
            ops.decode(parts, SCHEME, 48, 64, torch.float32),
            ops.qembedding(ids, parts, SCHEME, 48, 64, torch.float32),
        )


@pytest.mark.parametrize("first", ["import qcompile\nimport torch", "import torch\nimport qcompile"])
def test_a_saved_program_runs_after_the_import(first: str, tmp_path: Path) -> None:
    model, args = Packed(), (torch.randn(3, 64), torch.tensor([47, 0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's exporter about itself
        program = torch.export.export(model, args)
    assert "torch.ops.qcompile.qmm" in program.graph_module.code
    torch.export.save(program, tmp_path / "program.pt2")
    torch.save((args, model(*args)), tmp_path / "results.pt")
    code = f"""
{first}
import sys
assert "qcompile.backend" not in sys.modules and "qcompile.codegen.eager" not in sys.modules
args, want = torch.load({str(tmp_path / "results.pt")!r})
got = torch.export.load({str(tmp_path / "program.pt2")!r}).module()(*args)
print([torch.equal(a, b) for a, b in zip(got, want, strict=True)])
print(len(sys.modules["qcompile.codegen.eager"]._CALLS))
"""
    assert lines(code) == ["[True, True, True]", "1"]  # by the kernel, which was built for the call here


def test_a_bare_import_does_not_load_torch_and_asking_for_torch_does_not_either() -> None:
    code = """
import importlib.util, sys
import qcompile
importlib.reload(qcompile)
assert "torch" not in sys.modules
before = importlib.util.find_spec("torch")
assert "torch" not in sys.modules
import torch
assert type(torch.__loader__) is type(before.loader) and "exec_module" not in vars(torch.__loader__)
assert not any(type(finder).__module__ == "qcompile.operators" for finder in sys.meta_path)
print(torch.ops.qcompile.qmm.default)
"""
    assert lines(code) == ["qcompile.qmm.default"]


@pytest.mark.parametrize("module", ["ir.scheme", "compat", "codegen.eager"])
def test_a_module_of_ours_may_be_what_imports_torch(module: str) -> None:
    assert lines(f"import qcompile.{module}, torch\nprint(torch.ops.qcompile.decode.default)") == [
        "qcompile.decode.default"
    ]


def test_torch_is_imported_where_the_operators_cannot_be() -> None:
    code = """
import sys, warnings
import qcompile
sys.modules["qcompile.ir.ops"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
print(torch.ones(2).sum().item(), *[w.message for w in caught if issubclass(w.category, qcompile.QCWarning)])
"""
    (shown,) = lines(code)
    assert shown.startswith("2.0 the operators torch.ops.qcompile.* are not there: ModuleNotFoundError")
