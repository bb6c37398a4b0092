"""What a graph pass is, and what it may look at.

A pass has a name (users insert, replace and drop by it), a stage, and a `run` that edits an FX graph in
place. It reads the plan and its context and nothing else. Its fingerprint goes into Inductor's cache key:
two compiles that differ only in a pass must never share a result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from qcompile.ir.matmul import MatmulSpec
from qcompile.ir.scheme import Packing, Scheme
from qcompile.options import Options
from qcompile.passes.fingerprint import describe
from qcompile.plan.plan import Plan
from qcompile.plan.recipe import Recipe
from qcompile.runtime.pins import PINS, Pins
from qcompile.runtime.store import Entry, Store
from qcompile.runtime.updates import Counter

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
        packing: the layout that kernels of a device read, for activations of a scheme.
        training: whether autograd is recording for this graph.
        packed: graph inputs that `freeze` added.
        pins: schemes that weights were trained in.
        origins: of each site, by index: the name of the node that it was in Dynamo's graph; while `explain` watches.
        random: graph inputs with the random words of updated parameters, by name, which `counter` counts.
        updated: numbers of these parameters, in the order of the rows, by device.
        others: the nodes of that graph that are no site, by name: the operator, and the line it comes from.
    """

    options: Options
    recipe: Recipe
    plan: Plan
    store: Store
    inputs: dict[str, Any]
    kernel: Callable[[MatmulSpec, torch.device, torch.dtype, int | None], Kernel]
    packing: Callable[[torch.device, Scheme | None], Packing]
    training: bool = False
    packed: list[PackedInput] = field(default_factory=list)
    pins: Pins = PINS
    origins: dict[int, str] = field(default_factory=dict)
    others: dict[str, tuple[str, str]] = field(default_factory=dict)
    random: dict[str, torch.Tensor] = field(default_factory=dict)
    updated: dict[torch.device, list[int]] = field(default_factory=dict)
    counter: Counter | None = None


class Pass:
    """Base of all passes: subclass, name it, implement `run`.

    Attributes:
        name: unique, lower case; what `options={"passes": ...}` refers to.
        stage: "dynamo" sees the user's operators and parameters; "post" sees the functional ATen graph of an
            inference graph with `qcompile.qmm` nodes in it; "compile" wraps the compiler of that graph.
        requires: names of passes that must have run before this one. A list without them, or in another order, is
            refused when it is put together: the pass would find nothing to do and say nothing.
        optional: whether the model runs just as well without it, so that its failure is no reason to fail: the graph
            stays as it was before the pass, and a warning says so. With `strict` or `verify` a failure is an error.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[Stage] = "dynamo"
    requires: ClassVar[tuple[str, ...]] = ()
    optional: ClassVar[bool] = False

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        """Edit `gm.graph` in place; the manager lints and recompiles afterwards."""
        raise NotImplementedError

    def wrap(self, inner: Callable[..., Any], ctx: PassContext) -> Callable[..., Any]:
        """Stage "compile" only: a compiler of functional graphs around another one."""
        return inner

    def fingerprint(self) -> str:
        """Changes whenever the pass may produce another graph: see `qcompile.passes.fingerprint`."""
        return hashlib.sha256(describe(self).encode()).hexdigest()[:16]


def node_device(node: fx.Node) -> torch.device:
    """Device of the node's example value."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")


def call_order(nodes: Sequence[fx.Node]) -> dict[fx.Node, int]:
    """Position of each node, for "comes before" questions."""
    return {node: index for index, node in enumerate(nodes)}
