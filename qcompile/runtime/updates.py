"""Random words of an optimizer's updates: who counts the steps, and where the count is kept.

An element's random bits depend on the seed, the step, the parameter's number and the element's place (`ir/rounding.py`).
Compiled code gets the first three as a tensor, one row for each parameter, which is written before each call: a new step is no
new graph. The number of steps is kept in the optimizer, as `param_groups[0]["rounding_steps"]`, an int64 tensor: `state_dict`
saves it and `load_state_dict` brings it back, before or after compiling, so that a run which is resumed draws the bits that it
would have drawn. Without an optimizer (a function that updates parameters) the count lives with the compiled code.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

STEPS = "rounding_steps"
_STEP = 1  # column of the step, see ir/step_reference.py


class Counter:
    """The steps of an optimizer that were rounded stochastically.

    Args:
        optimizer: where they are kept, or None.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        self._own = torch.zeros((), dtype=torch.int64)
        self.tensor()  # before Dynamo writes the guards on the groups

    def tensor(self) -> Tensor:
        """The count, as it is kept."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is None:
            return self._own
        kept: Tensor = optimizer.param_groups[0].setdefault(STEPS, self._own)
        return kept

    def withdraw(self) -> None:
        """Leave no count behind where nothing was counted, as in a graph that was made to be looked at."""
        optimizer = None if self._optimizer is None else self._optimizer()
        if optimizer is not None and not int(self.tensor()):
            del optimizer.param_groups[0][STEPS]

    def next(self) -> int:
        """One more step: its number, from 1."""
        kept = self.tensor()
        kept.add_(1)
        return int(kept)

    def numbers(self, parameters: Sequence[Tensor]) -> list[int]:
        """Each parameter's number, counted over all groups of the optimizer as `qcompile.optim` counts; those of no
        optimizer are counted in their own order, behind."""
        optimizer = None if self._optimizer is None else self._optimizer()
        groups = [] if optimizer is None else optimizer.param_groups
        order = {id(p): i for i, p in enumerate(p for group in groups for p in group["params"])}
        return [order.setdefault(id(p), len(order)) for p in parameters]


class Stepping:
    """Code that takes `(*random, *rest)`, called with `rest`.

    Args:
        compiled: the code.
        random: int64 `[parameters, 4]`, one for each device; the column of steps is written at each call.
        counter: what counts.
    """

    def __init__(self, compiled: Callable[..., Any], random: Sequence[Tensor], counter: Counter) -> None:
        self.compiled, self.random, self.counter = compiled, tuple(random), counter

    def __call__(self, *args: Any) -> Any:
        step = self.counter.next()
        for words in self.random:
            words.select(1, _STEP).fill_(step)
        return self.compiled(*self.random, *args)


__all__ = ["STEPS", "Counter", "Stepping"]
