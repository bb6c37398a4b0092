"""Things that a pass may hold or name, in pairs that a fingerprint has to tell apart."""

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
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from torch import fx

from qcompile import Recipe
from qcompile.backend import DEFAULT_PASSES
from qcompile.ir.formats import Format


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
FORMAT = Format.of("int4")

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


class Raises:
    def __reduce__(self) -> str:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")
