"""A pass's fingerprint: equal for equal meaning, different for anything the pass names."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from qcompile import Pass, PassContext
from qcompile.backend import DEFAULT_PASSES
from tests.passes import graphs


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
