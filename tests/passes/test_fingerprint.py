"""A pass's fingerprint: equal for equal meaning, different for anything the pass names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from qcompile import Pass, PassContext
from qcompile.backend import DEFAULT_PASSES, fingerprint
from qcompile.options import Options
from tests.passes import graphs
from tests.passes.described import Raises, deep, traced


def scaled(factor: float) -> Pass:
    class Scale(Pass):
        name: ClassVar[str] = "scale"

        def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
            _by(gm, factor)

    return Scale()


def _by(gm: fx.GraphModule, factor: float) -> None:
    gm.meta["factor"] = factor


def made(text: str) -> Pass:
    """A pass whose source cannot be read, as in an interactive session."""
    space: dict[str, Any] = {"Pass": Pass}
    exec(f"class P(Pass):\n    name = 'p'\n    def run(self, gm, ctx):\n        {text}", space)
    made: Pass = space["P"]()
    return made


class Attribute(Pass):
    name: ClassVar[str] = "attribute"

    def __init__(self, factor: float) -> None:
        self.factor = factor


class Heir(Attribute):
    pass


def test_fingerprints() -> None:
    """Equal for equal passes; different for another constant, closure, attribute, helper or parent."""
    twins = [lambda: scaled(2.0), lambda: made("gm.x = 2"), lambda: Attribute(2), lambda: Heir(2)]
    for make in twins:
        assert make().fingerprint() == make().fingerprint()
    different = [
        *(make() for make in twins), scaled(3.0), made("gm.x = 3"), made("gm.y = 2"), Attribute(3), *DEFAULT_PASSES,
    ]  # fmt: skip
    assert len({item.fingerprint() for item in different}) == len(different)
    before = scaled(2.0).fingerprint()
    helper = globals()["_by"]
    try:
        globals()["_by"] = lambda gm, factor: None
        assert scaled(2.0).fingerprint() != before
    finally:
        globals()["_by"] = helper


_TABLE = {"k": 2.0}
_LIST = [torch.zeros(5000)]


class _Helper:
    def go(self) -> float:
        return 2.0


class Reads(Pass):
    """Names a dict, a list with a long tensor, a class and a module of other passes."""

    name: ClassVar[str] = "reads"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        gm.meta["k"] = (_TABLE["k"], _LIST, _Helper().go(), graphs.RECIPE)


def test_fingerprints_see_what_a_pass_names(monkeypatch: pytest.MonkeyPatch) -> None:
    prints = [Reads().fingerprint()]
    assert Reads().fingerprint() == prints[0]
    monkeypatch.setitem(_TABLE, "k", 5.0)
    prints.append(Reads().fingerprint())
    _LIST[0][2500] = 1.0
    prints.append(Reads().fingerprint())
    monkeypatch.setattr(_Helper, "go", lambda self: 3.0)
    prints.append(Reads().fingerprint())
    monkeypatch.setattr(graphs, "RECIPE", "other")
    prints.append(Reads().fingerprint())
    _LIST[0][2500] = 0.0
    assert len(set(prints)) == 5


def test_a_module_that_a_pass_imports_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never found while only an import could tell what the pass does; then by the values in the module."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "imported_by_a_pass.py").write_text("FACTOR = 2.0\n")
    item = made("from imported_by_a_pass import FACTOR; gm.x = FACTOR")
    assert item.fingerprint() != item.fingerprint()
    module = __import__("imported_by_a_pass")
    before = item.fingerprint()
    assert item.fingerprint() == before
    monkeypatch.setattr(module, "FACTOR", 3.0)
    assert item.fingerprint() != before


class Holds(Pass):
    name: ClassVar[str] = "holds"

    def __init__(self, *held: object) -> None:
        self.held = held

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        ctx.plan.notes.append("ran")


def empty_cell() -> object:
    def inner() -> object:
        return later

    if inner is None:
        later = 1
    return inner


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_pass_that_cannot_be_described_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.backend.detect_isa", lambda: "any")  # asks a compiler, which takes long
    odd = Holds(Raises(), torch.empty(3, device="meta"), torch.eye(3).to_sparse(), empty_cell(), deep(5000, 1))
    assert Holds(empty_cell(), deep(5000, 1)).fingerprint() == Holds(empty_cell(), deep(5000, 1)).fingerprint()
    gm, inputs = traced(2), [torch.ones(1)]
    edits = {"insert": [("after", "resolve", odd)]}
    ctx = graphs.context(gm, inputs, passes=Options.parse({"passes": edits}).passes)
    passes = ctx.options.passes.apply(DEFAULT_PASSES)
    assert fingerprint(passes, ctx) != fingerprint(passes, ctx)


def test_an_installed_package_of_the_same_version_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site-packages" / "mypasses"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("__version__ = '0.1'\n")
    (package / "code.py").write_text("from mypasses.helper import factor\ndef f(): return factor()\n")
    script = "import mypasses.code as c; from qcompile.passes.fingerprint import describe; print(describe(c.f))"
    found = []
    for text in ("def factor(): return 1\n", "def factor(): return 2\n"):
        (package / "helper.py").write_text(text)
        os.utime(package / "helper.py", ns=(len(found) * 10**9, len(found) * 10**9))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(package.parent), *sys.path])}
        found.append(subprocess.check_output([sys.executable, "-c", script], text=True, env=environment))
    assert "never found" not in found[0]
    assert found[0] != found[1]
