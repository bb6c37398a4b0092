"""Optimizer steps on GPUs: one launch for all parameters of a call.

A kernel (`triton_step_text`) finds its work in two tables. *Tiles*, int32 `[tiles, 4]`: parameter, number of the tile in
it, how many elements it has there. *Addresses*, int64 `[parameters, parts]`. Tiles follow from the sizes alone and are made
once; addresses are kept as long as tensors stay where they are.

Elements that do not come by sixteen, and parameters that do not begin at a multiple of 16 bytes, are a second launch, of a
kernel that asks for each element: at most one tile of a parameter that is aligned.

**Graphs.** Learning rates, seeds and steps are read from tensors, so a replay can be the next step. Tables of a call that is
recorded live as long as the process, or are memory of the graph: gradients that are born in the recording have addresses that
no call before had, and a table of those is written by kernels of the graph, which get the addresses as arguments.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qcompile import compat
from qcompile.codegen.devices.triton_step_text import COLUMNS, ROWS, TILE, step_text, verdict
from qcompile.errors import QCError
from qcompile.ir import ops
from qcompile.ir.step import StepSpec
from qcompile.ir.step_reference import check_step, step_reference

KEPT = 64  # tables of addresses that are kept
WRITTEN = 64  # addresses that one kernel writes


def step_(state: Sequence[Tensor], inputs: Sequence[Tensor], hyper: Tensor, random: Tensor | None, spec: str) -> None:
    """The operator: by a kernel where Triton is written for the tensors' device, else in plain torch.

    Raises:
        QCError: "step.operands", "step.spec"; "step.capture".
    """
    if ops.reference_forced() or not compat.writes_triton(hyper.device) or not verdict(StepSpec.parse(spec)):
        step_reference(state, inputs, hyper, random, spec)
    else:
        step_by_kernel(state, inputs, hyper, random, spec)


def step_by_kernel(
    state: Sequence[Tensor], inputs: Sequence[Tensor], hyper: Tensor, random: Tensor | None, spec: str
) -> None:
    """One step of every parameter, in place, bit for bit as `step_reference` but for the patterns of NaN in plain tensors.

    Args: as of `check_step`, for a spec for which `verdict` says yes.

    Raises:
        QCError: "step.operands", "step.spec"; "step.capture" when a graph is recorded and no call of these sizes came before.
    """
    what, count = check_step(state, inputs, hyper, random, spec)
    if count == 0:
        return
    device = hyper.device
    tensors, sizes = _by_parameter(what, state, inputs, count)
    addresses = [t.data_ptr() for t in tensors]
    width = len(tensors) // count
    text = step_text(what)
    aligned = tuple(
        not any(a % 16 for a, wide in zip(addresses[i * width : (i + 1) * width], text.wide, strict=True) if wide)
        for i in range(count)
    )
    with compat.on(device):
        launches = _tiles(sizes, aligned, device)
        if not launches:
            return
        levels = [_levels(text.levels, device)] if text.levels else []
        table = _addresses(tuple(addresses), device)
        hyper_row = hyper.shape[1] if hyper.dim() == 2 else 0
        warps = warps_of(compat.architecture(device))
        rest = [hyper, *([] if random is None else [random]), *levels]
        for tiles, wide in launches:
            compat.triton_kernel(text.source)[(len(tiles),)](
                tiles, table, *rest, hyper_row, WIDE=wide, num_warps=warps, enable_fp_fusion=False
            )
    torch.autograd.graph.increment_version([t for t in state if not t.is_inference()])


def warps_of(architecture: str) -> int:
    """Warps of a block, which has a thread for each row."""
    return ROWS // (64 if architecture.startswith("gfx9") else 32)


def _by_parameter(
    spec: StepSpec, state: Sequence[Tensor], inputs: Sequence[Tensor], count: int
) -> tuple[list[Tensor], tuple[int, ...]]:
    """All tensors in the order of the kernel's table, and the elements of each parameter."""
    own, read = len(state) // count, len(inputs) // count
    tensors = [t for i in range(count) for t in (*state[i * own : (i + 1) * own], *inputs[i * read : (i + 1) * read])]
    at = 0
    for o in (*spec.state, *spec.inputs):
        if o.storage.plain:
            break
        at += len(o.parts(0))
    return tensors, tuple(t.numel() for t in tensors[at :: own + read])


class _Launch(NamedTuple):
    tiles: Tensor
    wide: bool


_LOCK = threading.RLock()


@functools.lru_cache(maxsize=1024)  # a captured graph reads tiles by their address: see `_PINNED`
def _made_tiles(sizes: tuple[int, ...], aligned: tuple[bool, ...], device: torch.device) -> tuple[_Launch, ...]:
    if compat.capturing(device):
        raise QCError(
            "step.capture",
            "A graph is recorded, and the tables of this step are not on the device yet.",
            next="do one step before it is recorded",
        )
    found = []
    for wide in (True, False):
        tiles = [_of_parameter(i, n, ok, wide) for i, (n, ok) in enumerate(zip(sizes, aligned, strict=True))]
        every = torch.cat(tiles)
        if len(every):
            found.append(_Launch(compat.for_ever(functools.partial(every.to, device), device), wide))
    return tuple(found)


def _of_parameter(i: int, n: int, aligned: bool, wide: bool) -> Tensor:
    """The tiles of a parameter for one of the two kernels."""
    tiles, rest = -(-n // TILE), n % TILE
    ragged = 1 if rest % COLUMNS else 0  # the last tile does not come by sixteen
    begin, end = (0, tiles - ragged if aligned else 0) if wide else (tiles - ragged if aligned else 0, tiles)
    number = torch.arange(begin, end, dtype=torch.int32, device="cpu")
    count = torch.full_like(number, TILE)
    if len(number) and end == tiles and rest:
        count[-1] = rest
    return torch.stack((torch.full_like(number, i), number, count, torch.zeros_like(number)), 1)


def _tiles(sizes: tuple[int, ...], aligned: tuple[bool, ...], device: torch.device) -> tuple[_Launch, ...]:
    found = _made_tiles(sizes, aligned, device)
    if compat.capturing(device):
        _PINNED.extend(launch.tiles for launch in found)
    return found


@functools.cache
def _levels(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Levels and boundaries of state, on a device."""
    if compat.capturing(device):
        raise QCError(
            "step.capture",
            "A graph is recorded, and the levels of this step's state are not on the device yet.",
            next="do one step before it is recorded",
        )
    return compat.for_ever(lambda: torch.tensor(levels, dtype=torch.float32, device=device), device)


_ADDRESSES: OrderedDict[tuple[torch.device, tuple[int, ...]], Tensor] = OrderedDict()
_PINNED: list[Tensor] = []  # what recorded graphs read


def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """A table of addresses: the one made before, or in a graph that is recorded one that the graph writes."""
    key, capturing = (device, addresses), compat.capturing(device)
    with _LOCK:
        found = _ADDRESSES.get(key)
        if found is not None:
            _ADDRESSES.move_to_end(key)
            if capturing:
                _PINNED.append(found)
            return found
        if capturing:
            return _written(addresses, device)
        made = compat.for_ever(lambda: torch.tensor(addresses, dtype=torch.int64, device=device), device)
        _ADDRESSES[key] = made
        if len(_ADDRESSES) > KEPT:
            _ADDRESSES.popitem(last=False)
        return made


def _written(addresses: Sequence[int], device: torch.device) -> Tensor:
    """The table, of memory of the current stream, written by kernels."""
    table = torch.empty(len(addresses), dtype=torch.int64, device=device)
    for at in range(0, len(addresses), WRITTEN):
        some = addresses[at : at + WRITTEN]
        compat.triton_kernel(_writer())[(1,)](table[at:], len(some), *some, *[0] * (WRITTEN - len(some)), num_warps=1)
    return table


@functools.cache
def _writer() -> str:
    """A kernel that writes its arguments to a table."""
    names = [f"a{i}" for i in range(WRITTEN)]
    lines = "\n".join(f"    tl.store(TABLE + {i}, {name}, mask=count > {i})" for i, name in enumerate(names))
    every = ", ".join(repr(name) for name in ["count", *names])
    arguments = ", ".join(f'{name}: "i64"' for name in names)
    return (
        "import triton\nimport triton.language as tl\n\n\n"
        f'@triton.jit(do_not_specialize=[{every}], do_not_specialize_on_alignment=["TABLE"])\n'
        f"def kernel(TABLE, count, {arguments}):\n    # addresses of a step's tensors\n{lines}\n"
    )


__all__ = ["step_", "step_by_kernel", "warps_of"]
