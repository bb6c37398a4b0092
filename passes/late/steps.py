"""Updates of parameters become optimizer steps: one `qcompile::step_` for all parameters that compute the same.

`updates` left `parameter.copy_(rounded(value))` in the graph. Where the value, and the new state that it is computed from, is
elementwise and in the language of a `StepSpec`, the whole update is one pass over memory, written by the generator of such
steps: parameter, state and gradient are read once and written once. Everything else is computed by Inductor in float32 as it
stands in the graph, and a step of one assignment rounds it: `p=bf16~ x=f32 do=p=x`. Either way nothing but a step draws
random bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile.errors import QCError
from qcompile.ir.matmul import DTYPE_NAMES
from qcompile.ir.state import Storage
from qcompile.ir.step import StepSpec
from qcompile.passes.base import Pass, PassContext, Stage
from qcompile.passes.late.elementwise import Region, Unreadable, operation
from qcompile.passes.match import value_of
from qcompile.passes.rewrite.updates import listed

_aten, _prims = torch.ops.aten, torch.ops.prims
_COPY = _aten.copy_.default
_ROUNDED = torch.ops.qcompile.rounded.default


class Steps(Pass):
    """Elementwise updates of 16-bit parameters become `qcompile::step_`."""

    name: ClassVar[str] = "steps"
    stage: ClassVar[Stage] = "post"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        graph = gm.graph
        writes = {node.args[0]: node for node in graph.nodes if node.target is _COPY and _is_input(node.args[0])}
        updates = [node for node in writes.values() if _made(node).target is _ROUNDED]
        if not updates:
            return
        calls: dict[tuple[str, fx.Node], _Call] = {}
        why: dict[str, list[int]] = {}
        taken: set[fx.Node] = set()
        for copy in updates:
            random, row = _drawn(_made(copy))
            number = ctx.updated[value_of(random).device][row]
            try:
                unit = _unit(copy, writes)
                if not taken.isdisjoint(unit.copies):
                    raise Unreadable("it shares state with another parameter")
            except Unreadable as error:
                why.setdefault(str(error), []).append(number)
                unit = _rounding(copy)
            taken.update(unit.copies)
            call = calls.setdefault((unit.spec, random), _Call())
            call.units.append(unit)
            call.rows.append(row)
            call.numbers.append(number)
        last = next(node for node in graph.nodes if node.op == "output")
        for (spec, random), call in calls.items():
            with graph.inserting_before(last):
                call.insert(_Maker(graph), spec, random)
            ctx.plan.notes.append(f"steps: parameters {listed(call.numbers)}: step_ {spec}")
        for reason, numbers in why.items():
            ctx.plan.notes.append(
                f"steps: parameters {listed(numbers)}: computed apart from their rounding, as {reason}"
            )
        graph.eliminate_dead_code()


def _made(copy: fx.Node) -> fx.Node:
    """What a write stores; `aten.copy` in between is of other strides."""
    value = copy.args[1]
    assert isinstance(value, fx.Node)
    source = value.args[1] if value.target is _aten.copy.default else value
    assert isinstance(source, fx.Node)
    return source


def _is_input(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "placeholder"


@dataclass
class _Unit:
    """One parameter's step: its spec, operands and numbers, and the writes that it stands for."""

    spec: str
    state: list[fx.Node]
    inputs: list[fx.Node]
    numbers: list[fx.Node | float]
    copies: list[fx.Node]
    whole: bool = True  # what is written lies in the order of its elements


def _drawn(rounded: fx.Node) -> tuple[fx.Node, int]:
    """The random numbers of a rounding, and which row of them."""
    random, row = rounded.args[1:3]
    assert isinstance(random, fx.Node)
    assert isinstance(row, int)
    return random, row


def _unit(copy: fx.Node, writes: Mapping[Any, fx.Node]) -> _Unit:
    """The step of a parameter with the state that its new value is computed from. Raises `Unreadable`."""
    parameter, made = copy.args[0], _made(copy)
    assert isinstance(parameter, fx.Node)
    like = value_of(parameter)
    if like.dim() == 0:
        raise Unreadable("a parameter without dimensions is no list of elements")
    region = Region(like)
    region.leaf(parameter)
    results = {parameter: region.value(made.args[0])}
    copies = [copy]
    done: set[fx.Node] = {parameter}
    while waiting := [leaf for leaf in region.tensors if leaf not in done]:
        leaf = waiting[0]
        done.add(leaf)
        if leaf in writes:
            copies.append(writes[leaf])
            results[leaf] = region.value(_stored(writes[leaf], leaf))
    for leaf in results:
        if not value_of(leaf).is_contiguous():
            raise Unreadable(f"{leaf.name} is not contiguous")
    names = region.tensors
    lines = [*region.lines, *(f"y{i}={text}" for i, text in enumerate(results.values()))]
    lines += [f"{names[leaf]}=y{i}" for i, leaf in enumerate(results)]
    tensors = tuple(
        (name, Storage(DTYPE_NAMES[value_of(leaf).dtype], 0, leaf is parameter)) for leaf, name in names.items()
    )
    try:
        spec = StepSpec(tensors, tuple(region.numbers.values()), ";".join(lines))
    except QCError as error:  # for example a state that is only overwritten
        raise Unreadable(error.what) from error
    by_name = {name: leaf for leaf, name in names.items()}
    return _Unit(
        str(spec),
        [by_name[operand.name] for operand in spec.state],
        [by_name[operand.name] for operand in spec.inputs],
        list(region.numbers),
        copies,
    )


def _stored(copy: fx.Node, leaf: fx.Node) -> Any:
    """The float32 value behind a write to state: rounding to the state's own type is the write's business."""
    value = copy.args[1]
    if isinstance(value, fx.Node) and value_of(leaf).dtype != torch.float32:
        name, args, _ = operation(value)
        source = args[1] if name == "copy" else args[0] if name in ("convert_element_type", "_to_copy") else None
        if isinstance(source, fx.Node) and value_of(source).dtype == torch.float32:
            return source
    return value


def _rounding(copy: fx.Node) -> _Unit:
    """The step that rounds a value which the graph computes."""
    parameter, made = copy.args[0], _made(copy)
    assert isinstance(parameter, fx.Node)
    like = value_of(parameter)
    spec = f"p={DTYPE_NAMES[like.dtype]}~ x=f32 do=p=x"
    value = made.args[0]
    assert isinstance(value, fx.Node)
    return _Unit(spec, [parameter], [value], [], [copy], like.is_contiguous())


@dataclass
class _Call:
    """The parameters of one spec, with the same random words."""

    units: list[_Unit] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def insert(self, make: _Maker, spec: str, random: fx.Node) -> None:
        state, back = [], []
        for unit in self.units:
            nodes = unit.state
            if not unit.whole:
                nodes = [make(_aten.clone.default, unit.state[0], memory_format=torch.contiguous_format)]
                back.append((unit.state[0], nodes[0]))
            state += nodes
        inputs = [make.whole(node) for unit in self.units for node in unit.inputs]
        words = make.rows(random, self.rows)
        hyper = make.numbers([unit.numbers for unit in self.units], value_of(state[0]).device)
        make(torch.ops.qcompile.step_.default, state, inputs, hyper, words, spec)
        for copy in (copy for unit in self.units for copy in unit.copies):
            copy.replace_all_uses_with(copy.args[0])  # type: ignore[arg-type]
            make.graph.erase_node(copy)
        for parameter, node in back:
            make(_COPY, parameter, node)


class _Maker:
    """Adds calls at the graph's insert point, with their values."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        inputs = (value_of(node) for node in graph.nodes if node.op == "placeholder")
        self.mode = next(value.fake_mode for value in inputs if hasattr(value, "fake_mode"))

    def __call__(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), value_of)
        with self.mode:
            node.meta["val"] = target(*values, **named)
        return node

    def whole(self, node: fx.Node) -> fx.Node:
        """A tensor that lies in the order of its elements."""
        if value_of(node).is_contiguous():
            return node
        return self(_aten.clone.default, node, memory_format=torch.contiguous_format)

    def rows(self, table: fx.Node, rows: Sequence[int]) -> fx.Node:
        """Some rows of a table."""
        if list(rows) == list(range(len(value_of(table)))):
            return table
        return self(_aten.cat.default, [self(_aten.slice.Tensor, table, 0, row, row + 1) for row in rows])

    def numbers(self, rows: Sequence[Sequence[fx.Node | float]], device: torch.device) -> fx.Node:
        """The operand `hyper`: float32, one row for all parameters or one for each."""
        rows = [rows[0]] if all(list(row) == list(rows[0]) for row in rows) else rows
        columns = []
        for column in zip(*rows, strict=True):
            if all(isinstance(number, float) and number == column[0] for number in column):
                shape = [len(rows), 1]
                columns.append(self(_aten.full.default, shape, column[0], dtype=torch.float32, device=device))
            else:
                entries = [self.number(number, device) for number in column]
                columns.append(self(_aten.reshape.default, self(_aten.cat.default, entries), [len(rows), 1]))
        if not columns:
            return self(_aten.full.default, [0], 0.0, dtype=torch.float32, device=device)
        table = columns[0] if len(columns) == 1 else self(_aten.cat.default, columns, 1)
        return self(_aten.reshape.default, table, [len(columns)]) if len(rows) == 1 else table

    def number(self, number: fx.Node | float, device: torch.device) -> fx.Node:
        """One number as float32 `[1]`."""
        if isinstance(number, float):
            return self(_aten.full.default, [1], number, dtype=torch.float32, device=device)
        if value_of(number).dtype != torch.float32:
            number = self(_prims.convert_element_type.default, number, torch.float32)
        if value_of(number).device != device:
            number = self(_prims.device_put.default, number, device)
        return self(_aten.reshape.default, number, [1])


__all__ = ["Steps"]
