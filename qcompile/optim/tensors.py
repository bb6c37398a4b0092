"""A moment's tensors: made, found, decoded to float32, and written again as another storage wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qcompile.ir.state import Storage
from qcompile.optim.layout import Layout, local_of
from qcompile.optim.rules import Moment


def names(moment: Moment, storage: Storage) -> tuple[str, ...]:
    """Keys of a moment's tensors in `state`."""
    return (moment.key,) if storage.plain else (f"{moment.key}_codes", f"{moment.key}_scales")


def state_parts(state: Mapping[str, Any], moment: Moment, storage: Storage) -> tuple[Tensor, ...]:
    """A moment's tensors, in the order of operands."""
    return tuple(state[key] for key in names(moment, storage))


def new_state(moment: Moment, storage: Storage, layout: Layout, device: torch.device) -> dict[str, Tensor]:
    """The tensors of a moment that is 0 everywhere."""
    parts = storage.parts(math.prod(layout.local))
    zeros = [torch.zeros(part.shape, dtype=part.dtype, device=device) for part in parts]
    if not storage.plain:
        zero = storage.format.zero_code
        zeros[0].fill_(zero | zero << 4 if storage.bits == 4 else zero)
    return {
        key: layout.wrap(t, storage, i) for i, (key, t) in enumerate(zip(names(moment, storage), zeros, strict=True))
    }


def decoded(state: Mapping[str, Any], moment: Moment, storage: Storage, layout: Layout) -> Tensor:
    """A moment of the part of a parameter that is here: float32, in its shape."""
    parts = [local_of(t).reshape(-1) for t in state_parts(state, moment, storage)]
    return storage.read(parts, math.prod(layout.local)).reshape(layout.local)


def encoded(values: Tensor, moment: Moment, storage: Storage, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a moment with the local values `values`."""
    parts = storage.written(values.reshape(-1).to(torch.float32))
    return {
        key: layout.wrap(t, storage, i) for i, (key, t) in enumerate(zip(names(moment, storage), parts, strict=True))
    }
