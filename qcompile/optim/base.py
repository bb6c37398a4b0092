"""The step that all optimizers of this package share: state in few bits, parameters rounded stochastically, one call per kind.

Each parameter's step is a `StepSpec`, found from its shape, its types and the switches of its group; parameters of one spec are
one call of `torch.ops.qcompile.step_`. Learning rates and all other numbers are operands: a schedule makes no new spec.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
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
from qcompile.optim.weights import low_bit_of, scales_of

ROUNDINGS = ("stochastic", "nearest")
OWN = ("state_bits", "rounding")  # what a checkpoint does not change


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
            on the element's place in the parameter, and on nothing else.

    Raises:
        QCError: "optim.state-bits", "optim.rounding", "optim.dtype".
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

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`, with what this package cannot do refused."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check(group)
        except Exception:
            self.param_groups.pop()
            raise

    def _check(self, group: Group) -> None:
        check_bits(group["state_bits"], [moment.key for moment in self.moments])
        if group["rounding"] not in ROUNDINGS:
            raise QCError(
                "optim.rounding", f"rounding cannot be {group['rounding']!r}", next="use stochastic or nearest"
            )
        for p in group["params"]:
            if p.dtype not in NAMES and low_bit_of(p) is None:
                raise QCError(
                    "optim.dtype",
                    f"a parameter of {p.dtype} has no step",
                    why="arithmetic is float32",
                    next="use torch.float32, torch.bfloat16 or torch.float16, or torch.optim for this parameter; "
                    "codes that low_bit_weights made belong to the module that it made them in, and not to a copy",
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
        number, work = -1, []
        bits = [group["state_bits"] for group in self.param_groups]
        check = self.__dict__.get("_bits") != bits  # those of the last step; torch pickles no attribute
        for group in self.param_groups:
            rule = self.rule(group)
            for p in group["params"]:
                number += 1
                if gradient_of(p) is not None:  # all of them are looked at before any is stepped
                    work.append((group, rule, p, number, _gradient(p), self._storages(group, rule, p, check)))
        self._bits = bits
        calls: dict[tuple[str, torch.device], _Call] = {}
        for item in work:
            self._add(calls, *item)
        for (text, _), call in calls.items():
            call.run(text)

    def _storages(self, group: Group, rule: Rule, p: Tensor, check: bool) -> dict[Moment, Storage]:
        """How each moment of a parameter is stored; `check` that its state, if it has some, is so."""
        layout, state = layout_of(p), self.state.get(p, {})
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

    def _add(
        self,
        calls: dict[tuple[str, torch.device], _Call],
        group: Group,
        rule: Rule,
        p: Tensor,
        number: int,
        grad: Tensor,
        storages: dict[Moment, Storage],
    ) -> None:
        layout, state = layout_of(p), self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
        for moment, storage in storages.items():
            if not any(key in state for key in (moment.key, f"{moment.key}_codes")):
                _tell(layout, moment, storage, group["state_bits"])
                state.update(new_state(moment, storage, layout, p.device))
        state["step"] += 1
        step = int(state["step"])
        parts, written = _written(p, group["rounding"] == "stochastic")
        spec = rule.spec(written, _plain(grad.dtype, False), tuple(storages.values()))
        for moment, storage in storages.items():
            parts += map(local_of, state_parts(state, moment, storage))
        numbers = self.numbers(group, step)
        call = calls.setdefault((spec, parts[0].device), _Call(written.stochastic))
        call.add(parts, grad, [numbers[name] for name in rule.hyper], (group["seed"], step, number, layout.offset))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those of weights in few bits too."""
        super().zero_grad(set_to_none)
        for group in self.param_groups:
            for weight in filter(None, map(low_bit_of, group["params"])):
                weight.grad = None

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
            {**group, **{key: mine[key] for key in OWN}} for group, mine in zip(saved, self.param_groups, strict=False)
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


def _written(p: Tensor, stochastic: bool) -> tuple[list[Tensor], Storage]:
    """The tensors of a parameter here, and how a step writes them."""
    weight = low_bit_of(p)
    if weight is not None:
        return [p, scales_of(p)], replace(weight.storage, stochastic=stochastic)
    return [local_of(p)], _plain(p.dtype, stochastic)


@lru_cache(maxsize=16)
def _plain(dtype: torch.dtype, stochastic: bool) -> Storage:
    return Storage(NAMES[dtype], 0, stochastic and dtype != torch.float32)


def gradient_of(p: Tensor) -> Tensor | None:
    """The gradient of a parameter, or of the weight that its codes are."""
    weight = low_bit_of(p)
    return p.grad if weight is None else weight.grad


def _gradient(p: Tensor) -> Tensor:
    grad = gradient_of(p)
    assert grad is not None
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
