"""What the user calls a tensor.

Dynamo names parameters as the frame that it compiles sees them. Behind a graph break that is a layer of the model, and
all layers look alike from inside; the tensor itself knows better.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn


def owner_of(target: Any) -> Any:
    """The object whose method is given, a module itself."""
    return target if isinstance(target, nn.Module) else getattr(target, "__self__", None)


def names_of(target: Any, inputs: Iterable[Any]) -> dict[int, list[str]]:
    """Every name of every parameter and buffer, by id, in the modules that a callable is seen to use: itself or its owner,
    attributes of an owner that is no module, cells of a closure, what a `partial` holds, arguments."""
    found: list[tuple[str, Any]] = [("", owner_of(target)), *(("", value) for value in inputs)]
    for thing in (owner_of(target), target):
        if not isinstance(thing, nn.Module):
            found += [(f"{name}.", value) for name, value in getattr(thing, "__dict__", {}).items()]
    while isinstance(target, partial):
        found += [("", value) for value in (*target.args, *target.keywords.values())]
        target = target.func
    inner = inspect.unwrap(target)
    for cell in (inner.__closure__ if inspect.isfunction(inner) else None) or ():
        try:
            found += [("", cell.cell_contents), ("", owner_of(cell.cell_contents))]
        except ValueError:  # a cell that is still empty
            continue
    names: dict[int, list[str]] = {}
    for prefix, module in found:
        if not isinstance(module, nn.Module):
            continue
        for tensors in (module.named_parameters, module.named_buffers):
            for name, tensor in tensors(remove_duplicate=False):
                names.setdefault(id(tensor), []).append(prefix + _spoken(name))
    return names


def _spoken(name: str) -> str:
    """What stands behind a parametrized weight is that weight to whoever reads the ledger."""
    parts = name.split(".")
    behind = parts[-3:-2] == ["parametrizations"] and parts[-1].startswith("original")
    return ".".join([*parts[:-3], parts[-2]] if behind else parts)
