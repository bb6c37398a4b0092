"""The call of a graph whose weights are packed: check, swap, run.

Dynamo calls a compiled graph with the user's inputs and all float parameters. This wrapper checks in one
pass whether any watched parameter was written or replaced since the last call, repairs the store if so, and
hands the compiled code the packed tensors and the inputs it still reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch

from qcompile.runtime.store import Entry, Store, stamp

_version = attrgetter("_version")
_pointer = torch.Tensor.data_ptr


@dataclass
class Slot:
    """One packed input: which entry and part it is, and from which arguments the entry is made."""

    entry: Entry
    part: int
    roots: tuple[int, ...]


@dataclass(frozen=True)
class _State:
    """Packed tensors, and what was seen of the parameters when they were found right."""

    seen: tuple[object, ...]
    epoch: int
    packed: tuple[torch.Tensor, ...]


class FrozenCall:
    """Callable with Dynamo's convention around code that takes `(*packed, *kept)`.

    Args:
        compiled: the compiled graph.
        slots: packed inputs in order.
        keep: positions of the arguments that the compiled graph still takes, in order.
        store: where entries come from.
    """

    def __init__(self, compiled: Callable[..., Any], slots: Sequence[Slot], keep: Sequence[int], store: Store) -> None:
        self.compiled, self.slots, self.store = compiled, list(slots), store
        self.keep = tuple(keep)
        self.watch = tuple(sorted({i for slot in slots for i in slot.roots}))
        self._take = _getter(self.keep)
        self._roots = _getter(self.watch)
        # One graph may serve several modules (the layers of a model, each compiled by itself): the state of each
        # is kept, by the identities of its parameters. A call only uses the state it found: another thread may be
        # calling for another module.
        self._state = _State((), -1, ())
        self._states: dict[tuple[object, ...], _State] = {}
        for slot in self.slots:
            slot.entry.users.add(self)

    def __call__(self, *args: Any) -> Any:
        roots = self._roots(args)
        try:
            seen: tuple[object, ...] = (*map(id, roots), *map(_version, roots), *map(_pointer, roots))
        except RuntimeError:  # parameters made under inference_mode have no version counter
            seen = (*map(id, roots), *map(stamp, roots))
        state = self._state
        if seen != state.seen or state.epoch != self.store.epoch:
            state = self._state = self._look(args, seen)
        return self.compiled(*state.packed, *self._take(args))

    def _look(self, args: Sequence[Any], seen: tuple[object, ...]) -> _State:
        who = seen[: len(self.watch)]
        with self.store.lock:
            epoch = self.store.epoch
            known = self._states.get(who)
            if known is not None and known.epoch == epoch and known.seen == seen:
                return known
            if self._state.epoch != epoch:
                self._states.clear()  # some of these parameters may be gone
            done: dict[int, Entry] = {}
            for slot in self.slots:
                old = slot.entry
                if id(old) not in done:
                    # Same parameters: re-encoded in place. Other parameters (a new module, `assign=True`):
                    # another entry, because the old one may still serve its owner.
                    roots = [args[i] for i in slot.roots]
                    done[id(old)] = self.store.entry(roots, old.expression, old.scheme, old.fit)
                    done[id(old)].users.add(self)
                slot.entry = done[id(old)]
            packed = tuple(slot.entry.parts[slot.part] for slot in self.slots)
            state = self._states[who] = _State(seen, epoch, packed)
            return state


def _getter(indices: tuple[int, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda args: tuple(args[i] for i in indices)
