"""A pass's fingerprint: equal for equal meaning, different for anything the pass names."""

from __future__ import annotations

import enum
import logging
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import fx

from qcompile import Pass, PassContext
from qcompile.backend import DEFAULT_PASSES
from qcompile.passes.fingerprint import describe
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


class Shown:
    """Its text says nothing of its content."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return "Shown"


class Slotted:
    __slots__ = ("__value",)  # Python stores a private name under another one

    def __init__(self, value: object) -> None:
        self.__value = value


@dataclass
class Hidden:
    value: object = field(repr=False)


class Kind(enum.Enum):
    A = 1
    B = 2


def linear(weight: float) -> torch.nn.Module:
    layer = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(layer.weight, weight)
    torch.nn.init.zeros_(layer.bias)
    return layer


def normal(mean: float) -> Any:
    """Torch shows the size of a tensor here, not what is in it."""
    return torch.distributions.Normal(torch.full((8,), mean), torch.ones(8))


def table(value: float) -> Any:
    """Longer than numpy prints."""
    found = numpy.zeros(5000)
    found[2500] = value
    return found


PAIRS = [
    (table(1), table(2)),
    (linear(1), linear(2)),
    *((kind(1), kind(2)) for kind in (Shown, Slotted, Hidden)),
    (Shown(table(1)), Shown(table(2))),
    (Kind.A, Kind.B),
    (re.compile("x" * 300 + "a"), re.compile("x" * 300 + "b")),
    (Path("a"), Path("b")),
    (logging.getLogger("a"), logging.getLogger("b")),
    (numpy.add, numpy.subtract),
    (numpy.float32(1), numpy.float32(2)),
    (numpy.array([Shown(1)]), numpy.array([Shown(2)])),
    (SimpleNamespace(a=table(1)), SimpleNamespace(a=table(2))),
    (object(), Shown(1)),
    (torch.float32, torch.float16),
    (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor),
    (torch.ops.higher_order.cond, torch.ops.higher_order.scan),
    (normal(1), normal(2)),
]


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_objects_are_what_they_hold(index: int) -> None:
    one, other = PAIRS[index]
    assert describe(one) == describe(one) != describe(other)


def test_descriptions_are_equal_in_every_process() -> None:
    """Only then does a disk cache ever find anything."""
    script = "from tests.passes.test_fingerprint import *; print([describe(pair) for pair in PAIRS])"
    root = Path(__file__).parents[2]
    runs = [subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout != "", runs[0].stderr


def test_what_hides_its_state_is_never_found_in_another_process() -> None:
    script = "import threading; from qcompile.passes.fingerprint import describe; print(describe(threading.Lock()))"
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout != runs[1].stdout, runs[0].stderr
