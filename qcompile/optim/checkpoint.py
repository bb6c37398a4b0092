"""State from checkpoints and to them: of this package bit for bit, of `torch.optim` through float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.state import Storage
from qcompile.optim.layout import FLOAT32, Bits, Layout, layout_of, local_of, storage_of
from qcompile.optim.rules import Moment
from qcompile.optim.tensors import decoded, encoded, names

OWN_SETTINGS = ("state_bits", "rounding", "seed")


class Saved:
    """The saved state of one parameter, and how it is stored. Neither a tensor nor a container: torch leaves it as it is."""

    def __init__(self, values: Mapping[str, Any], bits: Bits) -> None:
        self.values = values
        self.bits = bits


def restored(saved: Saved, p: Tensor, moments: Sequence[Moment], bits: Bits) -> dict[str, Any]:
    """State of parameter `p` from a checkpoint, stored as `bits` says. Raises `QCError` ("optim.checkpoint")."""
    layout, values = layout_of(p), saved.values
    step = values.get("step")
    if step is None:  # gradient descent of torch keeps none: it is past its first step when it has a buffer
        step = float(any(values.get(moment.key) is not None for moment in moments))
    state: dict[str, Any] = {"step": torch.tensor(float(step), dtype=torch.float32)}
    for moment in moments:
        new = storage_of(layout, moment, bits)
        if (whole := values.get(moment.key)) is not None:
            local = _local(whole, layout.shape, layout, moment)
            state |= encoded(local.to(p.device, copy=True), moment, new, layout)
        elif f"{moment.key}_codes" in values:
            state |= _again(saved, moment, layout, new, p.device)
    return state


def _again(saved: Saved, moment: Moment, layout: Layout, new: Storage, device: torch.device) -> dict[str, Tensor]:
    """A moment that was saved as codes."""
    old = storage_of(layout, moment, saved.bits)
    if old.plain:
        raise QCError(
            "optim.checkpoint",
            f"codes of {moment.key} of a parameter {list(layout.shape)}, which has float32 state here",
            why="its rows do not divide into blocks, so that a shard of it has no codes",
            next="load the checkpoint where it was saved, and save stock_state_dict()",
        )
    shapes = layout.part_shapes(old, whole=True)
    parts = {
        key: _local(saved.values[key], shape, layout, moment).to(device, copy=True)
        for key, shape in zip(names(moment, old), shapes, strict=True)
    }
    if old == new:
        return {key: layout.wrap(t, old, i) for i, (key, t) in enumerate(parts.items())}
    return encoded(decoded(parts, moment, old, layout), moment, new, layout)


def _local(t: Tensor, whole: Sequence[int], layout: Layout, moment: Moment) -> Tensor:
    """The part of a saved tensor that belongs to the part of the parameter that is here."""
    if tuple(t.shape) != tuple(whole):
        raise QCError(
            "optim.checkpoint",
            f"{moment.key} has the shape {list(t.shape)}, not {list(whole)}",
            where=f"a parameter {list(layout.shape)}",
            next="load it into the parameters that it was saved for, in their order",
        )
    if not layout.cut or hasattr(t, "to_local"):
        return local_of(t)
    from torch.distributed.tensor import distribute_tensor

    return local_of(distribute_tensor(t, layout.mesh, layout.placements, src_data_rank=None))


def export(
    state_dict: dict[str, Any],
    moments: Sequence[Moment],
    params: Sequence[Tensor],
    keep: Callable[[dict[str, Any]], dict[str, Any]],
) -> dict[str, Any]:
    """A `state_dict` as torch's own optimizer has it: float32 moments, none of this package's settings."""
    bits = {index: group["state_bits"] for group in state_dict["param_groups"] for index in group["params"]}
    found = {}
    for index, values in state_dict["state"].items():
        layout = layout_of(params[index])
        state = {"step": values["step"].clone()}
        for moment in moments:
            storage = storage_of(layout, moment, bits[index])
            if names(moment, storage)[0] in values:
                local = decoded(values, moment, storage, layout)
                state[moment.key] = layout.wrap(local.clone() if storage.plain else local, FLOAT32)
        found[index] = keep(state)
    groups = [
        {key: value for key, value in group.items() if key not in OWN_SETTINGS} for group in state_dict["param_groups"]
    ]
    return {**state_dict, "state": found, "param_groups": groups}
