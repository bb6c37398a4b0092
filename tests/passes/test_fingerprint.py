"""A pass's fingerprint: equal for equal meaning, different for anything the pass names."""

from __future__ import annotations

import argparse
import array
import collections
import copy
import enum
import functools
import itertools
import logging
import operator
import os
import random
import re
import subprocess
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy
import pytest
import torch
from torch import fx

from qcompile import Pass, PassContext, Recipe
from qcompile.backend import DEFAULT_PASSES, fingerprint
from qcompile.ir.formats import FORMATS, Format
from qcompile.options import Options
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


def by_code(body: str, head: str = "class X", name: str = "X") -> Callable[[int], Any]:
    """Two things of one name whose source cannot be read: `K` in the body is the difference."""

    def build(k: int) -> Any:
        space: dict[str, Any] = {"collections": collections, "enum": enum, "functools": functools, "torch": torch}
        exec(f"{head}:\n    {body.replace('K', str(k))}\n", space)
        return space[name]

    return build


def heir(base: str, *args: object) -> Callable[[int], Any]:
    """An object of a subclass whose content is equal: one method differs."""
    kind = by_code("def scale(self): return K", f"class X({base})")
    return lambda k: kind(k)(*args)


def with_attribute(base: str, *args: object) -> Callable[[int], Any]:
    """An object of one subclass with another attribute."""
    kind = by_code("pass", f"class X({base})")(0)

    def build(k: int) -> Any:
        found = kind(*args)
        found.k = k
        return found

    return build


def module(k: int) -> types.ModuleType:
    found = types.ModuleType("in_memory")
    vars(found)["k"] = k
    return found


def deep(depth: int, last: object) -> object:
    return functools.reduce(lambda inner, _: [inner], range(depth), last)


def aliased(first: bool) -> object:
    one, other = [1], [1]
    return one, other, one if first else other


def use(first: bool) -> object:
    def double() -> float:
        return 2.0

    def half() -> float:
        return 0.5

    return {"double": double, "half": half}, double if first else half


def in_a_set(first: bool) -> object:
    one, other = Slotted(1), Slotted(1)
    return {one}, one if first else other


def cells(shared: bool) -> object:
    def pair() -> tuple[object, object]:
        count = [0]
        return (lambda: count), (lambda: count)

    return pair() if shared else (pair()[0], pair()[1])


def traced(factor: float) -> fx.GraphModule:
    return fx.symbolic_trace(lambda x: x * factor)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wrapped(factor: float) -> Any:
    """The function that torch puts around this one is torch's, what it holds is not."""
    return torch.no_grad()(lambda x: x * factor)


def cached(factor: float) -> Any:
    return functools.lru_cache(lambda x: x * factor)


class Lazy:
    @functools.cached_property
    def table(self) -> list[int]:
        return [1, 2]


# Passes' code that calls the standard library, which holds caches, locks and the environment.
_LOG = logging.getLogger("passes")


def calls(gm: fx.GraphModule) -> object:
    logging.info("seen")
    _LOG.debug("seen")
    warnings.warn(str(os.environ.get("HOME")), stacklevel=1)
    return re.match("a", "b"), os.getenv("HOME"), numpy.linalg.svd, copy.deepcopy(gm), Lazy().table, Path("a")


def late() -> object:
    import json

    return json.dumps({})


_SET = {calls, late, traced, "a", "b", 1}


def registered(name: object) -> bool:
    """Reads a set that holds it."""
    return name in _SET | {registered} | _ITSELF


_ITSELF = {registered}
_FORMAT = Format.of("int4")

# What tells one pass from another, by finding: (equal to itself in every process, different from the other).
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
    (torch.relu, torch.tanh),
    (torch._C._nn.gelu, torch._C._nn.softplus),
    (normal(1), normal(2)),
    # one object or two
    *((make(True), make(False)) for make in (aliased, use, in_a_set, cells)),
    # subclasses
    *(
        (make(1), make(2))
        for make in (
            heir("collections.namedtuple('Y', 'x')", 1.0), heir("dict"), heir("list"), heir("set"), heir("frozenset"),
            heir("float", 1.0), heir("int", 1), heir("str", "a"), heir("tuple"), heir("functools.partial", print),
            heir("torch.nn.Identity"),
            with_attribute("collections.defaultdict"), with_attribute("set"), with_attribute("int", 1),
            by_code("A = 1\n    def scale(self): return K", "class X(enum.Enum)"),
            by_code("A = 1\n    def scale(self): return K\nX = X.A", "class X(enum.Enum)"),
            by_code("def scale(cls): return K\nclass X(metaclass=Y): pass", "class Y(type)"),
            by_code("scale = property(None, None, lambda self: K)"),
        )
    ),
    (functools.partial(print, 1), functools.partial(print, 2)),
    (collections.defaultdict(int), collections.defaultdict(list)),
    (numpy.ma.array([1.0], mask=[False]), numpy.ma.array([1.0], mask=[True])),
    # state that a text does not show
    (random.Random(1), random.Random(2)),
    (generator(1), generator(2)),
    (bytearray(b"1"), bytearray(b"2")),
    (array.array("d", [1]), array.array("d", [2])),
    (argparse.Namespace(t=table(1)), argparse.Namespace(t=table(2))),
    (collections.UserList([table(1)]), collections.UserList([table(2)])),
    (operator.methodcaller("m", table(1)), operator.methodcaller("m", table(2))),
    (slice(table(1)), slice(table(2))),
    ({"k": 1}.get, {"k": 2}.get),
    (itertools.count(1), itertools.count(2)),
    (types.MappingProxyType({1: 2}), types.MappingProxyType({1: 3})),
    (wrapped(1), wrapped(2)),
    (cached(1), cached(2)),
    (traced(1), traced(2)),
    (traced(1).graph, traced(2).graph),
    # code
    *(
        tuple(by_code(body, f"def f({args})", "f")(0) for args, body in pair)
        for pair in (
            (("*a", "return len(a)"), ("a", "return len(a)")),
            (("a, /", "return a"), ("a", "return a")),
            (("a", "return a"), ("*, a", "return a")),
            (("a, b", "return 1"), ("b, a", "return 1")),
            (
                ("a, b", "try:\n        a()\n        b()\n    except ValueError:\n        a()"),
                ("a, b", "try:\n        a()\n    except ValueError:\n        a()\n    else:\n        b()"),
            ),
        )
    ),
    # values that were once read the wrong way
    (torch.tensor([1j]).conj(), torch.tensor([1j])),
    (torch.tensor([1j]).conj().imag, torch.tensor([1.0])),
    (deep(400, 1), deep(400, 2)),
    (module(1), module(2)),
    # the standard library, sets and ours
    (calls, late),
    (_SET, _SET - {1}),
    (registered, calls),
    (list(DEFAULT_PASSES), list(DEFAULT_PASSES[1:])),
    (Recipe.of("int8"), Recipe.of("int4")),
]  # fmt: skip


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_objects_are_what_they_hold(index: int) -> None:
    one, other = PAIRS[index]
    assert describe(one) == describe(one) != describe(other)


def test_descriptions_are_equal_in_every_process() -> None:
    """Only then does a disk cache ever find anything. Hashes of text, and so the order of sets, differ between these
    processes."""
    script = "from tests.passes.test_fingerprint import *; print([describe(pair[0]) for pair in PAIRS])"
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONHASHSEED": seed, f"SEED{seed}": ""},
            capture_output=True, text=True,
        )
        for seed in "12"
    ]  # fmt: skip
    assert runs[0].stdout == runs[1].stdout != "", runs[0].stderr


def test_use_changes_no_text() -> None:
    """What Python and this package keep for speed is no difference."""
    before = [describe(item) for item in (calls, Lazy, _FORMAT, FORMATS, Kind)]
    re.compile(f"never seen {id(before)}")
    copy.copy(Lazy()), _FORMAT.max, Kind(1)
    assert [describe(item) for item in (calls, Lazy, _FORMAT, FORMATS, Kind)] == before


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


class Raises:
    def __reduce__(self) -> str:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


class Endless:
    """Every copy of it holds another one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Endless, (Endless(),)


def numbers() -> Iterator[int]:
    yield 1


NEVER: dict[str, Callable[[], object]] = {
    "lock": threading.Lock,
    "holder of a lock": lambda: Shown(threading.Lock()),
    "generator": numbers,
    "file": lambda: open(os.devnull),  # noqa: SIM115
    "weak": lambda: weakref.ref(Shown(1)),
    "raises": Raises,
    "endless": Endless,
    "meta": lambda: torch.empty(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
    "unknown ufunc": lambda: numpy.frompyfunc(lambda x: x, 1, 1),
}


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_what_hides_its_state_is_never_found(name: str) -> None:
    """Not even in this process: an address is used again."""
    value = NEVER[name]()
    assert describe(value) != describe(value)
    assert describe([1, value]) != describe([1, value])


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


def test_sets_of_functions_that_name_each_other_end() -> None:
    """Nine functions, each naming a set for each of the others: as many tables as orders of nine, if all were made."""
    count = 9
    space: dict[str, Any] = {}
    for i in range(count):
        names = ", ".join(f"s{j}" for j in range(count) if j != i)
        exec(f"def f{i}(): return {names}", space)
    space |= {f"s{i}": {space[f"f{i}"]} for i in range(count)}
    assert describe(space["f0"]).startswith("never found")


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
