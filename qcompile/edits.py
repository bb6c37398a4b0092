"""Edits of the list of passes: what `options={"passes": ...}` says, and whether the list that results makes sense.

The list is data, so users change it by name. An edit that names nothing, and a list in which a pass would run without
what it builds on, are refused before any graph is touched: later they would look like a pass that does nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from qcompile.errors import QCError, option_error, suggest

BASE = "qcompile.passes.base"  # where the base class of passes lies, whose own methods do nothing
METHODS = {"dynamo": "run(self, gm, ctx)", "post": "run(self, gm, ctx)", "compile": "wrap(self, inner, ctx)"}
STAGES = ("dynamo", "post", "compile")  # in the order in which they run


@runtime_checkable
class NamedPass(Protocol):
    """What an edit needs to know of a pass. What it does at its stage is the pass manager's affair."""

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> str: ...

    def fingerprint(self) -> str: ...


def needs(one: NamedPass) -> tuple[str, ...]:
    """Names of the passes that must have run before this one: its `requires`, which it need not have."""
    return getattr(one, "requires", ())


P = TypeVar("P", bound=NamedPass)


def _check_pass(value: object, key: str) -> NamedPass:
    if isinstance(value, type) or not isinstance(value, NamedPass) or not callable(value.fingerprint):
        raise option_error(key, value, "a pass: an instance (not a class) with a name, a stage and a fingerprint()")
    if not (isinstance(value.name, str) and value.name):
        raise option_error(f"{key}.name", value.name, "a non-empty string")
    if value.stage not in STAGES:
        raise option_error(f"{key}.stage", value.stage, "one of: " + ", ".join(STAGES))
    if not (isinstance(needs(value), tuple) and all(isinstance(name, str) for name in needs(value))):
        raise option_error(f"{key}.requires", needs(value), "a tuple of names of passes")
    method = METHODS[value.stage]
    name = method.partition("(")[0]
    work = getattr(value, name, None)
    if not callable(work) or getattr(work, "__module__", "") == BASE:
        want = f"a pass with a method that does its work: stage {value.stage!r} calls {name}"
        raise option_error(key, value.name, want, fix=f"define {method}")
    return value


@dataclass(frozen=True)
class Insertion:
    """One new pass and its place: `Insertion("after", "merge", my_pass)`. The anchor is a pass's name."""

    side: Literal["before", "after"]
    anchor: str
    new: NamedPass


@dataclass(frozen=True)
class PassEdits:
    """Edits of the list of passes, by name: what `options={"passes": {...}}` says.

    Written as a mapping with any of three keys:

        {"insert": [("after", "merge", my_pass)],   # or ("before", ...)
         "replace": {"merge": my_merge},
         "drop": ["outline"]}

    Anchors name passes of the original list, whether replaced or dropped, or passes inserted by the same
    edits. Several insertions at one place keep the order in which they are written.
    """

    insert: tuple[Insertion, ...] = ()
    replace: tuple[tuple[str, NamedPass], ...] = ()
    drop: tuple[str, ...] = ()

    @classmethod
    def parse(cls, value: PassEdits | Mapping[str, Any] | None) -> PassEdits:
        """Read the mapping form. Raises QCError `options.unknown` (a fourth key) or `options.value`."""
        if value is None or isinstance(value, PassEdits):
            return value or cls()
        if not isinstance(value, Mapping):
            raise option_error("passes", value, 'a mapping with the keys "insert", "replace", "drop"')
        keys = [f.name for f in fields(cls)]
        for key in value:
            if key not in keys:
                raise QCError(
                    "options.unknown",
                    f"there is no edit {key!r}{suggest(str(key), keys)}",
                    where='options["passes"]',
                    why="passes are edited by name with: " + ", ".join(keys),
                    next='write {"insert": [("after", "merge", my_pass)], "drop": ["outline"]}',
                )
        insert, drop = value.get("insert", ()), value.get("drop", ())
        exchange = value.get("replace", {})
        if isinstance(drop, str) or not (isinstance(drop, Sequence) and all(isinstance(n, str) for n in drop)):
            raise option_error("passes.drop", drop, "a list of pass names")
        if not (isinstance(exchange, Mapping) and all(isinstance(n, str) for n in exchange)):
            raise option_error("passes.replace", exchange, "a mapping from a pass's name to the pass to run instead")
        if isinstance(insert, str) or not isinstance(insert, Sequence):
            raise option_error("passes.insert", insert, 'a list of ("before" or "after", pass name, new pass)')
        return cls(
            tuple(cls._insertion(entry) for entry in insert),
            tuple((name, _check_pass(new, f"passes.replace.{name}")) for name, new in exchange.items()),
            tuple(drop),
        )

    @staticmethod
    def _insertion(entry: object) -> Insertion:
        match entry:
            case Insertion():
                return entry
            case ("before" | "after" as side, str(anchor), new):
                return Insertion(side, anchor, _check_pass(new, "passes.insert"))
        raise option_error("passes.insert", entry, 'a triple ("before" or "after", pass name, new pass)')

    def apply(self, passes: Sequence[P]) -> list[P | NamedPass]:
        """The edited list. Raises QCError `passes.unknown` for a name that no pass has, `passes.duplicate`
        for a name that two passes would share, `passes.order` for a pass without one that it requires."""
        exchange, placed = dict(self.replace), set[int]()

        def around(one: P | NamedPass) -> Iterator[P | NamedPass]:
            for side in ("before", "here", "after"):
                if side == "here":
                    if one.name not in self.drop:
                        yield exchange.get(one.name, one)
                    continue
                for index, edit in enumerate(self.insert):
                    if index not in placed and (edit.side, edit.anchor) == (side, one.name):
                        placed.add(index)
                        yield from around(edit.new)

        edited = [new for one in passes for new in around(one)]
        known = [one.name for one in passes]
        lost = [edit.anchor for index, edit in enumerate(self.insert) if index not in placed]
        lost += [name for name in (*exchange, *self.drop) if name not in known]
        if lost:
            raise QCError(
                "passes.unknown",
                f"there is no pass {lost[0]!r}{suggest(lost[0], known)}",
                where='options["passes"]',
                why="passes are named: " + ", ".join(known),
                next="use one of these names",
            )
        names = [one.name for one in edited]
        for name in names:
            if names.count(name) > 1:
                raise QCError(
                    "passes.duplicate",
                    f"two passes are named {name!r}",
                    where='options["passes"]',
                    why="edits, dumps and the ledger find a pass by its name",
                    next="give the new pass a name of its own, or put it under 'replace'",
                )
        self._check_order(edited)
        return edited

    def _check_order(self, edited: Sequence[NamedPass]) -> None:
        """Every pass comes after those it requires. What replaces a pass stands for it, under both names."""
        stands_for = {id(new): old for old, new in self.replace}
        order = sorted(edited, key=lambda one: STAGES.index(one.stage))  # stages run one after the other
        place: dict[str, int] = {}
        for index, one in enumerate(order):
            for name in (one.name, stands_for.get(id(one), one.name)):
                place[name] = min(index, place.get(name, index))
        for index, one in enumerate(order):
            for name in needs(one):
                if place.get(name, index) < index:
                    continue
                there = "comes later" if name in place else "is not in the list"
                edit = f"move {name!r} before it" if name in place else f"keep {name!r}"
                raise QCError(
                    "passes.order",
                    f"pass {one.name!r} requires {name!r}, which {there}"
                    + ("" if name in place else suggest(name, place)),
                    where='options["passes"]',
                    why="the passes run in this order: " + ", ".join(other.name for other in order),
                    next=f"{edit}, or drop {one.name!r} too",
                )

    def fingerprint(self) -> str:
        """Text that is equal exactly when the edits are: every edit and every new pass's own fingerprint."""
        return json.dumps(
            {
                "insert": [(e.side, e.anchor, e.new.name, e.new.fingerprint()) for e in self.insert],
                "replace": [(old, new.name, new.fingerprint()) for old, new in self.replace],
                "drop": self.drop,
            }
        )
