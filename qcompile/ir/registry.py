"""Tables of formats by name, in which a name keeps its meaning.

Packed weights, kernels and recipes know a format by its name alone. Were it to mean another one later, codes would be read
as what they are not, and nobody would say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, MutableMapping
from typing import Protocol, TypeVar

from qcompile.errors import QCError


class Named(Protocol):
    """What a registry holds."""

    @property
    def name(self) -> str:
        """What it is found by."""


E = TypeVar("E", bound=Named)


class Registry(MutableMapping[str, E]):
    """Entries by name. A name keeps its meaning: packed weights and kernels are found by it.

    Raises:
        QCError: `format.entry` for a key that is not the entry's name, or an entry of another type; `format.redefined` for a
            name that has meant another entry in this process, even if that was taken out again.
    """

    def __init__(self, kind: type[E], entries: Iterable[E]) -> None:
        self._kind = kind
        self._entries: dict[str, E] = {}
        self._meant: dict[str, E] = {}
        self.update({entry.name: entry for entry in entries})

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, name: str, entry: E) -> None:
        if not isinstance(entry, self._kind) or entry.name != name:
            given = f"the format {entry.name!r}" if isinstance(entry, self._kind) else f"a {type(entry).__name__}"
            raise QCError("format.entry", f"{given} under the name {name!r}", next="give an entry under its own name")
        if self._meant.setdefault(name, entry) != entry:
            raise QCError(
                "format.redefined",
                f"{name!r} means another format already",
                why="packed weights and kernels of this process are found by the name",
                next="give the changed one a name of its own, or define it in a new process",
            )
        self._entries[name] = entry
