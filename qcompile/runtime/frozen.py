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

from qcompile.errors import warn
from qcompile.runtime.store import Encoding, Entry, Store, stamp

_version = attrgetter("_version")
_pointer = torch.Tensor.data_ptr


@dataclass(frozen=True)
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


_NOTHING = _State((), -1, ())


class FrozenCall:
    """Callable with Dynamo's convention around code that takes `(*packed, *kept)`.

    Args:
        compiled: the compiled graph.
        slots: packed inputs in order. Their entries are not held: a dead model's weights must not live as long as its
            compiled code.
        keep: positions of the arguments that the compiled graph still takes, in order.
        store: where entries come from.
    """

    def __init__(self, compiled: Callable[..., Any], slots: Sequence[Slot], keep: Sequence[int], store: Store) -> None:
        self.compiled, self.store = compiled, store
        self.keep = tuple(keep)
        self.watch = tuple(sorted({i for slot in slots for i in slot.roots}))
        self._take = _getter(self.keep)
        self._roots = _getter(self.watch)
        # What to ask the store for, and for each packed input which of the answers and which part of it.
        entries = list({id(slot.entry): slot for slot in slots}.values())
        index = {id(slot.entry): i for i, slot in enumerate(entries)}
        self._wanted: list[tuple[Encoding, tuple[int, ...]]] = [(slot.entry.encoding, slot.roots) for slot in entries]
        self._parts = [(index[id(slot.entry)], slot.part) for slot in slots]
        # One graph may serve several modules (the layers of a model, each compiled by itself): the state of each
        # is kept, by the identities of its parameters. A call only uses the state it found: another thread may be
        # calling for another module.
        self._state = _NOTHING
        self._states: dict[tuple[object, ...], _State] = {}
        for slot in slots:
            slot.entry.users.add(self)
        _warn_uncounted([slot.entry for slot in entries])

    def __call__(self, *args: Any) -> Any:
        roots = self._roots(args)
        try:
            # Not strides: Dynamo compiles another graph for those, see `Store.epoch`.
            seen: tuple[object, ...] = (*map(id, roots), *map(_version, roots), *map(_pointer, roots))
        except RuntimeError:  # parameters made under inference_mode have no version counter
            seen = (*map(id, roots), *map(stamp, roots))
        state = self._state
        if seen != state.seen or state.epoch != self.store.epoch:
            state = self._state = self._look(args, seen)
        torch.get_num_threads()  # torch applies its number to a thread's OpenMP when somebody asks there
        return self.compiled(*state.packed, *self._take(args))

    def forget(self) -> None:
        """Let go of all packed tensors; the next call asks the store for them again."""
        self._state = _NOTHING
        self._states.clear()

    def _look(self, args: Sequence[Any], seen: tuple[object, ...]) -> _State:
        who = seen[: len(self.watch)]
        with self.store.lock:
            epoch = self.store.epoch
            known = self._states.get(who)
            if known is not None and known.epoch == epoch and known.seen == seen:
                return known
            # Same parameters: re-encoded in place. Other parameters (a new module, `assign=True`): another entry,
            # because the old one may still serve its owner.
            entries = [self.store.entry([args[i] for i in roots], encoding) for encoding, roots in self._wanted]
            for entry in entries:
                entry.users.add(self)
            packed = tuple(entries[index].parts[part] for index, part in self._parts)
            state = self._states[who] = _State(seen, epoch, packed)
            return state


def _warn_uncounted(entries: Sequence[Entry]) -> None:
    where = [entry.expression.where for entry in entries if entry.uncounted]
    if where:
        warn(
            f"{where[0]}" + (f" and {len(where) - 1} other weights were" if where[1:] else " was") + " made under "
            "torch.inference_mode(), where torch does not count writes: after writing in place, call "
            "qcompile.refresh(model)."
        )


def _getter(indices: tuple[int, ...]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    if len(indices) > 1:
        return itemgetter(*indices)
    return lambda args: tuple(args[i] for i in indices)
