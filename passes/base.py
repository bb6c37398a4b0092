"""What a graph pass is, and what it may look at.

A pass has a name (users insert, replace and drop by it), a stage, and a `run` that edits an FX graph in
place. It reads the plan and its context and nothing else. Its fingerprint goes into Inductor's cache key:
two compiles that differ only in a pass must never share a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from qcompile.ir.matmul import MatmulSpec
from qcompile.options import Options
from qcompile.plan.plan import Plan
from qcompile.plan.recipe import Recipe
from qcompile.runtime.store import Entry, Store

Stage = Literal["dynamo", "post", "compile"]


@dataclass(frozen=True)
class Kernel:
    """A lowering's answer about one matmul: its name, or why it has none."""

    name: str
    reason: str = ""
    slower_than_float: bool = False

    @property
    def found(self) -> bool:
        return bool(self.name)


@dataclass(frozen=True)
class PackedInput:
    """A graph input that the store supplies: its placeholder, the entry and part, and the parameters behind
    it."""

    name: str
    entry: Entry
    part: int
    roots: tuple[str, ...]


@dataclass
class PassContext:
    """Everything passes share while one graph is compiled.

    Attributes:
        options: the user's options.
        recipe: the resolved recipe.
        plan: decisions by site; passes write reasons back.
        store: the process-wide packed-weight store.
        inputs: example value of each placeholder, by name; parameters are the real ones.
        kernel: asks the lowerings about a matmul: `(spec, device, x dtype, rows or None) -> Kernel`.
        training: whether autograd is recording for this graph.
        packed: graph inputs that `freeze` added.
    """

    options: Options
    recipe: Recipe
    plan: Plan
    store: Store
    inputs: dict[str, Any]
    kernel: Callable[[MatmulSpec, torch.device, torch.dtype, int | None], Kernel]
    training: bool = False
    packed: list[PackedInput] = field(default_factory=list)


class Pass:
    """Base of all passes: subclass, name it, implement `run`.

    Attributes:
        name: unique, lower case; what `options={"passes": ...}` refers to.
        stage: "dynamo" sees the user's operators and parameters; "post" sees the functional ATen graph of an
            inference graph with `qcompile.qmm` nodes in it; "compile" wraps the compiler of that graph.
        requires: names of passes that must have run before this one. A list without them, or in another order, is
            refused when it is put together: the pass would find nothing to do and say nothing.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = "dynamo"
    requires: ClassVar[tuple[str, ...]] = ()

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        """Edit `gm.graph` in place; the manager lints and recompiles afterwards."""
        raise NotImplementedError

    def wrap(self, inner: Callable[..., Any], ctx: PassContext) -> Callable[..., Any]:
        """Stage "compile" only: a compiler of functional graphs around another one."""
        return inner

    def fingerprint(self) -> str:
        """Changes whenever the pass may produce another graph: its methods, its attributes, and the functions and
        constants of other modules that they name. (This package's own sources are hashed as a whole.)"""
        seen: set[int] = set()
        parts = [type(self).__qualname__]
        for cls in type(self).__mro__[: type(self).__mro__.index(Pass)]:
            parts += [f"{name}={_describe(value, seen)}" for name, value in vars(cls).items() if name not in _PLAIN]
        parts += [f"{name}={_describe(value, seen)}" for name, value in sorted(vars(self).items())]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


# What Python puts into every class, and what differs between processes without meaning anything.
_PLAIN = frozenset("__module__ __doc__ __dict__ __weakref__ __firstlineno__ __static_attributes__".split())


def _describe(value: object, seen: set[int]) -> str:
    """Text that is equal in every process exactly when a value means the same, as far as Python lets one see. Objects
    without a repr of their own print their address: they are never found equal, which is the safe side."""
    value = getattr(value, "__func__", value)  # static and class methods
    if isinstance(value, frozenset | set):
        return repr(sorted(_describe(item, seen) for item in value))
    if isinstance(value, CodeType):
        return f"{value.co_code!r} {value.co_names} {[_describe(item, seen) for item in value.co_consts]}"
    if not isinstance(value, FunctionType):
        return repr(value)
    if id(value) in seen or (value.__module__ or "").partition(".")[0] in ("torch", "qcompile"):
        return value.__qualname__
    seen.add(id(value))
    code = value.__code__
    named = {name: value.__globals__[name] for name in _names(code) if name in value.__globals__}
    known = {name: _describe(item, seen) for name, item in named.items() if isinstance(item, _CONSTANTS)}
    cells = [_describe(cell.cell_contents, seen) for cell in value.__closure__ or ()]
    return f"{_describe(code, seen)} {value.__defaults__!r} {value.__kwdefaults__!r} {cells} {sorted(known.items())}"


_CONSTANTS = (FunctionType, int, float, str, bytes, tuple, frozenset)


def _names(code: CodeType) -> set[str]:
    inner = [_names(item) for item in code.co_consts if isinstance(item, CodeType)]
    return set(code.co_names).union(*inner)


def node_device(node: fx.Node) -> torch.device:
    """Device of the node's example value."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")


def call_order(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Position of each node, for "comes before" questions."""
    return {node: index for index, node in enumerate(nodes)}
