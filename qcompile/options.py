"""What a user may set, as one frozen record that is checked when it is made.

`torch.compile(model, backend="qcompile", options={...})` hands the backend one mapping that holds our
settings and Inductor's side by side, or one word as `mode=`. Both are read here, once, so that every later
part sees checked values and a misspelt key is an error with a suggestion instead of a setting without effect.
"""

from __future__ import annotations

import hashlib
import json
import os
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from qcompile import compat
from qcompile.errors import QCError, suggest

POLICIES = ("speed", "memory", "accuracy")

Policy = Literal["speed", "memory", "accuracy"]


def _value_error(key: str, got: object, want: str, *, hint: str = "", fix: str = "") -> QCError:
    return QCError(
        "options.value",
        f"option {key!r} cannot be {got!r}{hint}",
        where=f"options[{key!r}]",
        why=f"it must be {want}",
        next=fix or "qcompile.Options lists every option and its values",
    )


def _one_of(key: str, got: object, choices: Collection[str]) -> str:
    if not isinstance(got, str) or got not in choices:
        raise _value_error(key, got, "one of: " + ", ".join(choices), hint=suggest(str(got), choices))
    return got


# ------------------------------------------------------------------------------------- edits of the pass list
@runtime_checkable
class NamedPass(Protocol):
    """What an edit needs to know of a pass. What it does at its stage is the pass manager's affair."""

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> str: ...

    def fingerprint(self) -> str: ...


P = TypeVar("P", bound=NamedPass)


def _check_pass(value: object, key: str) -> NamedPass:
    if isinstance(value, type) or not isinstance(value, NamedPass):
        raise _value_error(key, value, "a pass: an instance (not a class) with a name, a stage and a fingerprint()")
    if not (isinstance(value.name, str) and value.name):
        raise _value_error(f"{key}.name", value.name, "a non-empty string")
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
            raise _value_error("passes", value, 'a mapping with the keys "insert", "replace", "drop"')
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
            raise _value_error("passes.drop", drop, "a list of pass names")
        if not (isinstance(exchange, Mapping) and all(isinstance(n, str) for n in exchange)):
            raise _value_error("passes.replace", exchange, "a mapping from a pass's name to the pass to run instead")
        if isinstance(insert, str) or not isinstance(insert, Sequence):
            raise _value_error("passes.insert", insert, 'a list of ("before" or "after", pass name, new pass)')
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
        raise _value_error("passes.insert", entry, 'a triple ("before" or "after", pass name, new pass)')

    def apply(self, passes: Sequence[P]) -> list[P | NamedPass]:
        """The edited list. Raises QCError `passes.unknown` for a name that no pass has, `passes.duplicate`
        for a name that two passes would share."""
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
        return edited

    def fingerprint(self) -> str:
        """Text that is equal exactly when the edits are: every edit and every new pass's own fingerprint."""
        return json.dumps(
            {
                "insert": [(e.side, e.anchor, e.new.name, e.new.fingerprint()) for e in self.insert],
                "replace": [(old, new.name, new.fingerprint()) for old, new in self.replace],
                "drop": self.drop,
            }
        )


# ------------------------------------------------------------------------------------------------- the record
def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _value_error(key, value, "True or False")
    return value


def _seed(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise _value_error(key, value, "an integer from 0 to 2**64 - 1")
    return value


def _policy(key: str, value: object) -> str:
    return _one_of(key, value, POLICIES)


def _folder(key: str, value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise _value_error(key, value, "a folder, or None")
    folder = Path(value).expanduser()
    if folder.exists() and not folder.is_dir():
        raise _value_error(key, value, "a folder, but this is a file", fix="name a folder; it is made if it is missing")
    return folder


def _recipe(key: str, value: object) -> object:
    if value is None or value == "" or isinstance(value, bool | int | float):
        raise _value_error(
            key, value, "a preset, a scheme, a Recipe or a JSON file", fix="write 'auto', 'none' or 'int4'"
        )
    return value


def _inductor(key: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _value_error(key, value, "a mapping from Inductor's setting names to values")
    known = compat.inductor_options()
    for name, setting in value.items():
        if name not in known:
            raise _unknown(str(name))
        if not _fits(setting, known[name]):
            raise _value_error(name, setting, _spell(known[name]))
    return types.MappingProxyType(dict(value))


_CHECKS: Mapping[str, Callable[[str, object], object]] = {
    "recipe": _recipe,
    "strict": _flag,
    "policy": _policy,
    "verify": _flag,
    "dump": _folder,
    "passes": lambda _, value: PassEdits.parse(typing.cast(Any, value)),
    "seed": _seed,
    "inductor": _inductor,
}


@dataclass(frozen=True)
class Options:
    """Every setting of the backend, checked.

    recipe    what is quantized and how: a preset ("auto", "int4" ...), a scheme, a Recipe, a JSON file
    strict    a site that cannot be quantized as asked is an error, not a float site with a reason
    policy    "speed" (a site that would be slower than float stays float), "memory", "accuracy"
    verify    compare every lowered site with its reference on the first call
    dump      folder for the numbered graphs of every pass and every generated kernel, or None
    passes    edits of the list of passes
    seed      key of every random choice (stochastic rounding)
    inductor  Inductor's own settings, handed through: dotted name -> value

    Raises QCError `options.value` for a value that does not fit.
    """

    recipe: Any = "auto"
    strict: bool = False
    policy: Policy = "speed"
    verify: bool = False
    dump: Path | None = None
    passes: PassEdits = PassEdits()
    seed: int = 0
    inductor: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for key, check in _CHECKS.items():
            object.__setattr__(self, key, check(key, getattr(self, key)))

    @classmethod
    def parse(cls, options: Options | Mapping[str, Any] | None = None, mode: str | None = None, **more: Any) -> Options:
        """Read what `torch.compile` hands a backend.

        options: one mapping of our keys and Inductor's (dotted, "-" read as "_"), or an `Options`.
        mode:    a mode of `torch.compile`, a name for Inductor settings; one given by itself wins over it.
                 `torch.compile` refuses `mode=` next to `options=`: "mode" is read as a key of options too.
        more:    the same keys as keywords, for `functools.partial(backend, recipe="int4")`.
        Raises QCError `options.unknown` (with a suggestion over both kinds of keys) or `options.value`.
        """
        if options is not None and not isinstance(options, Options | Mapping):
            raise _value_error("options", options, "a mapping or an Options")
        given: dict[str, Any] = dict(options) if isinstance(options, Mapping) else {}
        for key, value in more.items():
            if key in given:
                raise _value_error(key, value, "given once, but it is both a keyword and a key of options")
            given[key] = value
        mode = given.pop("mode", None) if mode is None else mode
        ours = {key: given.pop(key) for key in _CHECKS if key in given and key != "inductor"}
        nested = given.pop("inductor", {})
        if not isinstance(nested, Mapping):
            raise _value_error("inductor", nested, "a mapping from Inductor's setting names to values")
        inductor = {**_mode(mode), **nested}
        inductor |= {str(key).replace("-", "_"): value for key, value in given.items()}
        if isinstance(options, Options):
            return replace(options, **ours, inductor={**options.inductor, **inductor})
        return cls(**ours, inductor=inductor)

    def fingerprint(self) -> str:
        """A hash of every setting that can change the compiled code, equal in every process.

        `dump` is left out: it changes what is written, not what is computed. A recipe or a pass must have a
        `fingerprint()`, a recipe that is text or a file is read. Raises QCError `options.fingerprint`
        otherwise.
        """
        parts = {
            "recipe": _identity("recipe", self.recipe),
            "strict": self.strict,
            "policy": self.policy,
            "verify": self.verify,
            "passes": self.passes.fingerprint(),
            "seed": self.seed,
            "inductor": {name: _identity(name, self.inductor[name]) for name in sorted(self.inductor)},
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


# ------------------------------------------------------------------------------------------------ the details
def _mode(mode: object) -> Mapping[str, object]:
    modes = compat.inductor_modes()
    return {} if mode is None else modes[_one_of("mode", mode, modes)]


def _unknown(key: str) -> QCError:
    ours = [*_CHECKS, "mode"]
    return QCError(
        "options.unknown",
        f"there is no option {key!r}{suggest(key, [*ours, *compat.inductor_options()])}",
        where="options of torch.compile",
        why=f"it is neither ours ({', '.join(ours)}) nor a setting of Inductor",
        next="torch._inductor.list_options() prints Inductor's settings",
    )


def _fits(value: object, declared: object) -> bool:
    """Whether a value fits a declared type. A parameterised container is checked by its outer type only,
    since nothing in the standard library checks deeper; a callable is checked for being one."""
    origin, args = typing.get_origin(declared), typing.get_args(declared)
    if declared is Any or isinstance(declared, TypeVar):
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in args)
    if origin is Literal:
        return value in args
    outer = types.NoneType if declared is None else origin or declared
    if not isinstance(outer, type):
        return True
    return isinstance(value, outer)


def _spell(declared: object) -> str:
    return declared.__name__ if isinstance(declared, type) else str(declared).replace("typing.", "")


def _identity(key: str, value: object) -> object:
    """Something JSON can hold that is equal in every process exactly when the value means the same."""
    own = getattr(value, "fingerprint", None) or getattr(value, "uuid", None)
    if callable(own) and not isinstance(value, type):
        return str(own())
    if isinstance(value, str | os.PathLike):
        path = Path(value)
        return [str(value), hashlib.sha256(path.read_bytes()).hexdigest()] if path.is_file() else str(value)
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise QCError(
            "options.fingerprint",
            f"option {key!r} is {value!r}, which has no identity outside this process",
            where=f"options[{key!r}]",
            why="caches on disk would give its result to a process with another one",
            next="give the object a method fingerprint() -> str that changes when its meaning does",
        ) from None
