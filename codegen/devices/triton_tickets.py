"""Zeros that kernels find and leave behind: the counters by which the last block of a split sum knows that it is the last.

Filling a new tensor for each call would take as long as a small product. So they are cut out of slabs that live as long as
the process, and are filled once:

* Calls that run at once share the counters of their stream: kernels of one stream run one after the other, and each leaves
  zeros.
* A call that is recorded into a graph gets counters of its own, that no other call has: graphs may be replayed at the same
  time, on any streams. What a graph is given is never given to another one, even after it: some hundred bytes for a call.

No slab is made while a graph is recorded, as its memory would be the graph's, and its zeros written by a replay; there, a
call that finds no room is recorded with a fill of its own, and a warning says so once. Any call that is not recorded makes
room, before there is little left: who warms up before each recording never sees a fill. And a slab is made in another thread:
torch lets a thread that warms up a graph allocate from the graph's memory only, and what stays there is an error.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass

import torch

from qcompile import compat
from qcompile.errors import warn
from qcompile.ir.packing import ceil_div

SLAB = 1 << 20  # counters of a slab, 4 MB
LEAST = 4096  # counters of a stream
LINE = 32  # counters of one line of the cache, which different calls do not share


@dataclass
class _Slab:
    zeros: torch.Tensor
    used: int = 0

    @property
    def left(self) -> int:
        """Counters that nobody has."""
        return self.zeros.numel() - self.used


_LOCK = threading.Lock()
_SLABS: dict[torch.device, _Slab] = {}
_OF_STREAM: dict[tuple[torch.device, int], torch.Tensor] = {}
_KEPT: list[torch.Tensor] = []  # every slab: a recorded graph knows its counters by their address only


def tickets(count: int, device: torch.device) -> torch.Tensor:
    """`[count or more]` int32 zeros for one launch on the current stream of a device, whose kernel leaves zeros behind."""
    with _LOCK:
        if compat.capturing(device):
            found = _cut(count, device)
            if found is None:
                _warn_filled()
                return _zeros(count, device)
            return found
        key = (device, compat.stream(device))
        kept, wanted = _OF_STREAM.get(key), 0
        if kept is None or kept.numel() < count:
            kept, wanted = None, max(2 * count, LEAST)
        slab = _SLABS.get(device)
        if slab is None or slab.left < max(wanted, SLAB // 2):
            slab = _SLABS[device] = _Slab(compat.for_ever(lambda: _zeros(max(SLAB, 2 * wanted), device), device))
            _KEPT.append(slab.zeros)
        if kept is None:
            kept = _cut(wanted, device)
            assert kept is not None
            _OF_STREAM[key] = kept
        return kept


def clear(device: torch.device) -> None:
    """Zeros in all counters of a device, after a kernel that left none. Not while one runs there."""
    with _LOCK:
        for zeros in _KEPT:
            if zeros.device == device:
                zeros.zero_()


@functools.cache
def _warn_filled() -> None:
    warn(
        "a recorded graph fills counters of its own, which takes a kernel in every replay: call the function once outside of "
        "the recording, right before it"
    )


def _zeros(count: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32, device=device)


def _cut(count: int, device: torch.device) -> torch.Tensor | None:
    """The next counters of a device's slab, None where it has not so many."""
    slab = _SLABS.get(device)
    length = ceil_div(count, LINE) * LINE
    if slab is None or slab.left < length:
        return None
    slab.used += length
    return slab.zeros[slab.used - length : slab.used]


__all__ = ["clear", "tickets"]
