"""The step that all optimizers of this package share: state in few bits, parameters rounded stochastically, one call per kind.

Each parameter's step is a `StepSpec`, found from its shape, its types and the switches of its group; parameters of one spec are
one call of `torch.ops.qcompile.step_`. Learning rates and all other numbers are operands: a schedule makes no new spec.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from qcompile.errors import QCError, warn
from qcompile.ir.state import Storage
from qcompile.optim.checkpoint import Saved, export, restored
from qcompile.optim.layout import NAMES, Bits, Layout, check_bits, layout_of, local_of, storage_of
from qcompile.optim.rules import Group, Moment, Rule
from qcompile.optim.tensors import new_state, state_parts
from qcompile.optim.weights import Codes, Scales

ROUNDINGS = ("stochastic", "nearest")
UNABLE = {
    "capturable": "a step counts in Python, so that a captured graph would repeat one step's numbers and random bits",
    "differentiable": "codes have no derivative, and parameters are written in place",
}
OWN = ("state_bits", "rounding", *UNABLE)  # what a checkpoint does not change


class LowBitOptimizer(torch.optim.Optimizer):
    """An optimizer whose arithmetic is a `Rule`. State is ordinary tensors, made at the first step.

    For each parameter `state` holds `step`, float32 without dimensions, and for each moment either the float32 tensor under its
    key, or `KEY_codes` (uint8) and `KEY_scales` (float32), see `qcompile/ir/state.py`.

    Args:
        params: parameters or groups of them, float32, bfloat16 or float16.
        defaults: what a group has when it does not say.
        state_bits: 8, 4 or 32, or a storage for each key. State of fewer than 4096 elements is float32.
        rounding: how bfloat16 and float16 parameters are written, "stochastic" or "nearest".
        seed: of the random bits. They depend on it, on the step, on the number of the parameter (counted over all groups) and
            on the element's place in the parameter, and on nothing else. So two optimizers of one seed, over two halves of a
            model, draw the same bits for their parameters of one number. Each element's rounding is unbiased all the same; what
            grows is the variance of sums over both, up to twice that of independent bits. Give them different seeds.

    Raises:
        QCError: "optim.state-bits", "optim.rounding", "optim.dtype", "optim.capturable", "optim.differentiable";
            "optim.weights" for codes or scales of a weight in few bits without each other.
    """

    moments: ClassVar[tuple[Moment, ...]]

    @staticmethod
    @abstractmethod
    def rule(group: Group, /) -> Rule:
        """What parameters of a group compute."""

    @staticmethod
    @abstractmethod
    def numbers(group: Group, step: int, /) -> dict[str, float]:
        """The numbers of a step, counted from 1: those of the rule, and more."""

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        state_bits: int | Mapping[str, str],
        rounding: str,
        seed: int,
    ) -> None:
        bits = dict(state_bits) if isinstance(state_bits, Mapping) else state_bits
        super().__init__(params, {**defaults, "state_bits": bits, "rounding": rounding, "seed": seed})
        self._pairs()
        self._made = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`, with what this package cannot do refused."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
            if "_made" in self.__dict__:  # else more groups may come
                self._pairs()
        except Exception:
            self.param_groups.pop()
            raise

    def _pairs(self) -> None:
        """Refuse codes and scales without each other; a loop over `p.requires_grad` finds scales alone."""
        params = [p for group in self.param_groups for p in group["params"]]
        ids, held = {id(p) for p in params}, {id(p.scales) for p in params if isinstance(p, Codes)}
        for p in params:
            if isinstance(p, Codes) and id(p.scales) not in ids:
                alone, other = "codes", "scales"
            elif isinstance(p, Scales) and p.requires_grad and id(p) not in held:
                alone, other = "scales", "codes"
            else:
                continue
            raise QCError(
                "optim.weights",
                f"{alone} {list(p.shape)} of a weight in few bits came without its {other}",
                why="a step writes both; codes are integers, whose requires_grad is False",
                next="give parameters() as they are; requires_grad_(False) freezes such weights there",
            )

    def _check(self, group: Group) -> None:
        check_bits(group["state_bits"], [moment.key for moment in self.moments])
        if group["rounding"] not in ROUNDINGS:
            raise QCError(
                "optim.rounding", f"rounding cannot be {group['rounding']!r}", next="use stochastic or nearest"
            )
        for option in UNABLE:
            if group.get(option):
                raise QCError(
                    f"optim.{option}",
                    f"{option}=True is not possible",
                    why=UNABLE[option],
                    next=f"leave {option} out, or use torch.optim",
                )
        for p in group["params"]:
            if p.dtype not in NAMES and not isinstance(p, Codes):
                raise QCError(
                    "optim.dtype",
                    f"a parameter of {p.dtype} has no step",
                    why="arithmetic is float32",
                    next="use torch.float32, torch.bfloat16 or torch.float16, or torch.optim for this parameter; "
                    "codes that low_bit_weights made are stepped as the parameters of their module, and not sharded",
                )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        Raises:
            QCError: "optim.grad" for a gradient that is sparse or of another type.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._advance()
        return loss

    # What happens here is a few calls of an operator: a compiler has nothing to gain, and numbers of Python would make it
    # compile again.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def _advance(self) -> None:
        number, work = -1, list[_Work]()
        bits = [copy.copy(group["state_bits"]) for group in self.param_groups]  # a mapping may be changed in place
        check = self.__dict__.get("_bits") != bits  # those of the last step; torch pickles no attribute
        for group in self.param_groups:
            rule = self.rule(group)
            for p in group["params"]:
                number += 1
                if p.grad is None:
                    continue
                layout = layout_of(p)
                storages = self._storages(group, rule, p, layout, check)
                if isinstance(p, Scales):  # their gradients are zeros, of replicas or of distributed checkpoints: those
                    self._begin(group, p, layout, storages)  # want state to read into
                else:
                    work.append(_Work(group, rule, p, layout, number, _gradient(p, p.grad), storages))
        self._bits = bits
        calls: dict[tuple[str, torch.device], _Call] = {}
        rows: dict[tuple[int, int], list[float]] = {}
        for item in work:  # once all of them were looked at
            self._add(calls, rows, item)
        for (text, _), call in calls.items():
            call.run(text)

    def _storages(self, group: Group, rule: Rule, p: Tensor, layout: Layout, check: bool) -> dict[Moment, Storage]:
        """How each moment of a parameter is stored; `check` that its state, if it has some, is so."""
        state = self.state.get(_keeper(p), {})
        storages = {moment: storage_of(layout, moment, group["state_bits"]) for moment in rule.moments}
        for moment, storage in storages.items() if check else ():
            if any(key in state for key in (moment.key, f"{moment.key}_codes")):
                expected = new_state(moment, storage, layout, torch.device("meta"))
                if any(key not in state or state[key].shape != t.shape for key, t in expected.items()):
                    raise QCError(
                        "optim.state-bits",
                        f"{moment.key} is not stored in {group['state_bits']} bits",
                        why="state_bits of a group was changed after its first step",
                        next="make another optimizer with these bits, and load this one's state_dict into it",
                    )
        return storages

    def _begin(self, group: Group, p: Tensor, layout: Layout, storages: dict[Moment, Storage]) -> dict[str, Any]:
        """The state of a parameter; what it does not have yet is made."""
        state: dict[str, Any] = self.state[_keeper(p)]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for moment, storage in storages.items():
            if moment.key not in state and f"{moment.key}_codes" not in state:
                _tell(layout, moment, storage, group["state_bits"])
                state.update(new_state(moment, storage, layout, p.device))
        return state

    def _add(
        self, calls: dict[tuple[str, torch.device], _Call], rows: dict[tuple[int, int], list[float]], work: _Work
    ) -> None:
        """Put a parameter's step into the call of its spec. `rows`: the numbers of a group's steps, which are few."""
        group, state = work.group, self._begin(work.group, work.p, work.layout, work.storages)
        state["step"] += 1
        step = int(state["step"])
        parts, written = _written(work.p, group["rounding"] == "stochastic")
        spec = work.rule.spec(written, _plain(work.grad.dtype, False), tuple(work.storages.values()))
        for moment, storage in work.storages.items():
            parts += map(local_of, state_parts(state, moment, storage))
        row = rows.get((id(group), step))
        if row is None:
            numbers = self.numbers(group, step)
            row = rows[id(group), step] = [numbers[name] for name in work.rule.hyper]
        call = calls.setdefault((spec, parts[0].device), _Call(written.stochastic))
        call.add(parts, work.grad, row, (group["seed"], step, work.number, work.layout.offset))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over state: of this class, or of the optimizer of `torch.optim` that has its name.

        Moments come as they are where they are stored as this optimizer stores them; else they are decoded and encoded again.
        `state_bits` and `rounding` stay those of this optimizer, all other settings of groups are the saved ones.

        Raises:
            QCError: "optim.checkpoint" for state of another shape; ValueError from torch for other groups.
        """
        saved = state_dict["param_groups"]
        home = {index: group.get("state_bits", 32) for group in saved for index in group["params"]}
        groups = [
            {**group, **{key: mine[key] for key in OWN if key in mine}}
            for group, mine in zip(saved, self.param_groups, strict=False)
        ]
        # torch would cast codes and scales to the parameter's type: what is no tensor and no container it leaves alone.
        state = {index: Saved(values, home.get(index, 32)) for index, values in state_dict["state"].items()}
        super().load_state_dict({**state_dict, "state": state, "param_groups": groups + list(saved[len(groups) :])})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
            for p in group["params"]:
                found = self.state.get(p)
                if isinstance(found, Saved):
                    self.state[p] = restored(found, p, self.moments, group["state_bits"])

    def stock_state_dict(self) -> dict[str, Any]:
        """The state as the optimizer of `torch.optim` of this name saves it: moments decoded to float32.

        Its `load_state_dict` reads it. It is as large as that optimizer's.
        """
        return export(
            self.state_dict(), self.moments, [p for group in self.param_groups for p in group["params"]], self._stock
        )

    def _stock(self, state: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer of torch keeps of a parameter, of what this one does."""
        return state


@dataclass(frozen=True)
class _Work:
    """The step of one parameter.

    Attributes:
        number: of the parameter, counted over all groups. grad: of the part of it that is here.
        storages: of its moments, in the order of the rule.
    """

    group: Group
    rule: Rule
    p: Tensor
    layout: Layout
    number: int
    grad: Tensor
    storages: dict[Moment, Storage]


class _Call:
    """Parameters of one spec, on one device."""

    def __init__(self, stochastic: bool) -> None:
        self.stochastic = stochastic
        self.state: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.rows: list[Sequence[float]] = []
        self.random: list[tuple[int, int, int, int]] = []
        self.back: list[tuple[Tensor, Tensor]] = []

    def add(self, state: list[Tensor], grad: Tensor, row: Sequence[float], random: tuple[int, int, int, int]) -> None:
        for t in state:
            whole = t.contiguous()  # the order of elements is that of indices, whatever the strides
            if whole is not t:
                self.back.append((t, whole))
            self.state.append(whole)
        self.inputs.append(grad.contiguous())
        self.rows.append(row)
        self.random.append(random)

    def run(self, spec: str) -> None:
        device = self.state[0].device
        rows = self.rows[:1] if all(row == self.rows[0] for row in self.rows) else self.rows
        hyper = torch.tensor(rows, dtype=torch.float32, device=device)
        random = torch.tensor(self.random, dtype=torch.int64, device=device) if self.stochastic else None
        torch.ops.qcompile.step_(self.state, self.inputs, hyper[0] if len(rows) == 1 else hyper, random, spec)
        for t, whole in self.back:
            t.copy_(whole)


def _keeper(p: Tensor) -> Tensor:
    """The parameter whose state that of `p` is."""
    return p.scales if isinstance(p, Codes) else p


def _written(p: Tensor, stochastic: bool) -> tuple[list[Tensor], Storage]:
    """The tensors of a parameter here, and how a step writes them."""
    if isinstance(p, Codes):
        return [p, p.scales], replace(p.low_bit.storage, stochastic=stochastic)
    return [local_of(p)], _plain(p.dtype, stochastic)


@lru_cache(maxsize=16)
def _plain(dtype: torch.dtype, stochastic: bool) -> Storage:
    return Storage(NAMES[dtype], 0, stochastic and dtype != torch.float32)


def _gradient(p: Tensor, grad: Tensor) -> Tensor:
    """The part of a gradient that is here. Raises `QCError` ("optim.grad", "optim.sharding")."""
    if grad.layout != torch.strided or grad.dtype not in NAMES:
        raise QCError(
            "optim.grad",
            f"a gradient of {grad.dtype}, {grad.layout}, of a parameter {list(p.shape)}",
            next="use dense gradients of torch.float32, torch.bfloat16 or torch.float16 (nn.Embedding has sparse=False)",
        )
    if getattr(grad, "placements", ()) != getattr(p, "placements", ()):
        raise QCError(
            "optim.sharding",
            f"a parameter placed as {getattr(p, 'placements', 'one tensor')} has a gradient placed as "
            f"{getattr(grad, 'placements', 'one tensor')}",
            next="redistribute the gradient",
        )
    return local_of(grad)


def _tell(layout: Layout, moment: Moment, storage: Storage, bits: Bits) -> None:
    """Say so where state takes more memory than was asked for."""
    wanted = storage_of(Layout(layout.shape, layout.shape), moment, bits)
    if storage != wanted:
        warn(
            f"{moment.key} of a sharded parameter {list(layout.shape)} is float32, not {wanted}: blocks would not end where "
            f"shards do, as rows are no multiple of {wanted.block} elements"
        )


def check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    """Refuse a number outside of `low <= value < high`. Raises `QCError` ("optim.value")."""
    if not low <= float(value) < high:  # type: ignore[arg-type]
        limit = f"at least {low:g}" + (f" and less than {high:g}" if high < math.inf else "")
        raise QCError("optim.value", f"{name} cannot be {value!r}", why=f"it is {limit}")
