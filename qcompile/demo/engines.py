"""The engines that are compared, as a table, and how each is started.

Every engine is the same model behind the one line a user would write; nothing here reaches into a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Engine:
    """One way to run the model.

    Attributes:
        name: key in the JSON file.
        label: what the table calls it.
        backend: "" for eager, or a backend of `torch.compile`.
        recipe: for backend "qcompile".
        fast_guards: `qcompile.compile(..., fast_guards=True)` instead of plain `torch.compile`.
        converted: the float weights are given up first (`qcompile.convert`).
        warm: name of the engine whose compile cache it starts from; "" starts from an empty one.
        optional: left out when time runs short.
    """

    name: str
    label: str
    backend: str = ""
    recipe: str = ""
    fast_guards: bool = False
    converted: bool = False
    warm: str = ""
    optional: bool = False

    def start(self, model: nn.Module) -> Callable[..., Any]:
        """What to call instead of the model. Compiles nothing yet; `converted` rewrites the model in
        place."""
        if not self.backend:
            return model
        if self.backend == "inductor":
            return torch.compile(model)
        import qcompile

        if self.converted:
            qcompile.convert(model, self.recipe)
        if self.fast_guards:
            fast: Callable[..., Any] = qcompile.compile(model, fast_guards=True, recipe=self.recipe)
            return fast
        return torch.compile(model, backend=self.backend, options={"recipe": self.recipe})


EAGER = Engine("eager", "float, eager")
INDUCTOR = Engine("inductor", "float, Inductor", "inductor")
INT8, INT4, W8A8, W4A8 = (
    Engine(name, f"qcompile {name}", "qcompile", name) for name in ("int8", "int4", "w8a8", "w4a8")
)
FAST = Engine("int4-fast-guards", "int4, fast guards", "qcompile", "int4", fast_guards=True, warm="int4", optional=True)
CONVERTED = Engine("int4-converted", "int4, converted", "qcompile", "int4", converted=True, warm="int4", optional=True)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        engines: in the order in which they start.
        windows: pieces of text for the perplexity.
        rounds: how often every engine takes its turn in the speed phase.
        seconds: after five sixths of them no optional engine starts, after all of them no round after the third.
        steps: decode steps per round.
        left_out: what a reader should know is missing.
    """

    engines: tuple[Engine, ...]
    windows: int
    rounds: int
    steps: int
    seconds: float = 690  # the last round and the report take some more
    left_out: str = ""


FULL = Plan((EAGER, INDUCTOR, INT8, INT4, W8A8, W4A8, CONVERTED, FAST), windows=16, rounds=6, steps=32)
QUICK = Plan(
    (EAGER, INT4, W8A8),
    windows=8,
    rounds=5,
    steps=24,
    seconds=210,
    left_out="--quick leaves out Inductor, int8, w4a8, fast guards and convert, and takes half the text",
)
