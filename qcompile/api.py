"""The functions a user calls besides `torch.compile`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from qcompile import compat
from qcompile.backend import DEFAULT_PASSES
from qcompile.backend import qcompile as backend
from qcompile.conversion import Conversion, convert, module_of, trained_recipe
from qcompile.errors import QCError
from qcompile.ledger import Explanation, explain
from qcompile.options import Options
from qcompile.passes.base import Stage
from qcompile.plan.recipe import Recipe
from qcompile.preparation import Preparation, learned_scales, prepare
from qcompile.runtime.store import STORE
from qcompile.serialize import load, save


def refresh(model: nn.Module | torch.Tensor) -> int:
    """Tell the store that weights were written behind torch's back (`param.data.copy_()`, writes through
    numpy).

    docs/start.md lists what is noticed by itself.

    Args:
        model: a module or what `torch.compile` made of it (all its parameters), or one parameter.

    Returns:
        How many packed weights will be encoded again on their next use.

    Raises:
        QCError: "model.none" for anything else, such as a function: its parameters are not known.
    """
    return STORE.mark([model] if isinstance(model, torch.Tensor) else list(module_of(model).parameters()))


@dataclass(frozen=True)
class PassInfo:
    """One pass of the default list: what edits call it, where it runs, what it does, what it builds on."""

    name: str
    stage: Stage
    description: str
    requires: tuple[str, ...]


def default_passes() -> tuple[PassInfo, ...]:
    """The passes of the backend in the order in which they run; `options={"passes": ...}` edits this list by name."""
    return tuple(
        PassInfo(item.name, item.stage, (type(item).__doc__ or "").partition("\n")[0], item.requires)
        for item in DEFAULT_PASSES
    )


def compile(
    model: Callable[..., Any],
    *,
    fast_guards: bool = False,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> Any:
    """`torch.compile(model, backend="qcompile", options=options)` with one more knob.

    Args:
        model: module or function.
        fast_guards: skip Dynamo's checks that modules, their hooks and their attributes are what they were when the
            graph was made. That removes most of the per-call overhead of a large model; only set it when the model is
            not modified after the first call (no `train()`, no new hooks, no changed configuration).
        dynamic, fullgraph: as in `torch.compile`.
        options: every option of the backend.

    Raises:
        QCError: an unknown option, recipe or pass name, at once and not on the first call.
    """
    if "options" in options:
        raise QCError("options.nested", "options are keywords here", next='write compile(model, recipe="int4")')
    settings = Options.parse(options)
    Recipe.of(settings.recipe)
    settings.passes.apply(DEFAULT_PASSES)
    if not fast_guards:
        return torch.compile(model, backend="qcompile", dynamic=dynamic, fullgraph=fullgraph, options=options)
    # A backend object of its own: Dynamo would otherwise find the graph that the same model was given with full guards.
    guards: dict[str, Any] = {**options, "guard_filter_fn": compat.skip_module_guards}
    return torch.compile(model, backend=partial(backend), dynamic=dynamic, fullgraph=fullgraph, options=guards)


__all__ = [
    "Conversion",
    "Explanation",
    "PassInfo",
    "Preparation",
    "compile",
    "convert",
    "default_passes",
    "explain",
    "learned_scales",
    "load",
    "prepare",
    "refresh",
    "save",
    "trained_recipe",
]
