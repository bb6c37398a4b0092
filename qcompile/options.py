"""What a user may set, as one frozen record that is checked when it is made.

`torch.compile(model, backend="qcompile", options={...})` hands the backend one mapping that holds our
settings and Inductor's side by side, or one word as `mode=`. Both are read here, once, so that every later
part sees checked values and a misspelt key is an error with a suggestion instead of a setting without effect.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from qcompile import compat
from qcompile.edits import PassEdits
from qcompile.errors import QCError, option_error, suggest

POLICIES = ("speed", "memory", "accuracy")

Policy = Literal["speed", "memory", "accuracy"]


def _one_of(key: str, got: object, choices: Collection[str]) -> str:
    if not isinstance(got, str) or got not in choices:
        raise option_error(key, got, "one of: " + ", ".join(choices), hint=suggest(str(got), choices))
    return got


# ------------------------------------------------------------------------------------------------- the record
def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise option_error(key, value, "True or False")
    return value


def _seed(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**64:
        raise option_error(key, value, "an integer from 0 to 2**64 - 1")
    return value


def _policy(key: str, value: object) -> str:
    return _one_of(key, value, POLICIES)


def _folder(key: str, value: object) -> Path | None:
    if value is None:
        return None
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise option_error(key, value, "a folder, or None")
    fix = "name a folder; it is made if it is missing"
    try:
        folder = Path(value).expanduser()
        if folder.exists() and not folder.is_dir():
            raise option_error(key, value, "a folder, but this is a file", fix=fix)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # only writing tells: rights are not all that can be in the way
            pass
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # also "~somebody" and what no path may hold
        raise option_error(key, str(value), f"a folder that can be written to: {error}", fix=fix) from error
    return folder


def _recipe(key: str, value: object) -> object:
    if value is None or value == "" or isinstance(value, bool | int | float):
        raise option_error(
            key, value, "a preset, a scheme, a Recipe or a JSON file", fix="write 'auto', 'none' or 'int4'"
        )
    return value


def _inductor(key: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise option_error(key, value, "a mapping from Inductor's setting names to values")
    known = compat.inductor_options()
    for name, setting in value.items():
        if name not in known:
            raise _unknown(str(name))
        if not _fits(setting, known[name]):
            raise option_error(name, setting, _spell(known[name]))
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
    dump      folder for the numbered graphs of every pass and every generated kernel (made at once), or None
    passes    edits of the list of passes
    seed      key of every random choice (stochastic rounding)
    inductor  Inductor's own settings, handed through: dotted name -> value; as `options=` they stand beside ours

    `options=` has one key more, which `parse` reads into `inductor`:

    mode      a mode of `torch.compile` such as "max-autotune", a name for some of Inductor's settings

    Raises QCError `options.value` for a value that does not fit.
    """

    recipe: Any = "auto"
    strict: bool = False
    policy: Policy = "speed"
    verify: bool = False
    dump: Path | None = None
    passes: PassEdits = field(default_factory=PassEdits)
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
            raise QCError(
                "options.value",
                f"options cannot be {options!r}",
                where="options of torch.compile",
                why="they must be a mapping or an Options",
                next="write options={'recipe': 'int4'}; help(qcompile.Options) lists every option and its values",
            )
        given: dict[str, Any] = dict(options) if isinstance(options, Mapping) else {}
        for key, value in more.items():
            if key in given:
                raise option_error(key, value, "given once, but it is both a keyword and a key of options")
            given[key] = value
        mode = given.pop("mode", None) if mode is None else mode
        ours = {key: given.pop(key) for key in _CHECKS if key in given and key != "inductor"}
        nested = given.pop("inductor", {})
        if not isinstance(nested, Mapping):
            raise option_error("inductor", nested, "a mapping from Inductor's setting names to values")
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


_ARGUMENTS = ("fast_guards", "dynamic", "fullgraph")  # of `qcompile.compile`, which may look like options


def _unknown(key: str) -> QCError:
    if key in _ARGUMENTS:
        return QCError(
            "options.unknown",
            f"{key!r} is no option but an argument of qcompile.compile",
            where="options of torch.compile",
            why="it changes what Dynamo does before the backend, which reads the options, is called",
            next=f"write qcompile.compile(model, {key}=True)",
        )
    ours = [*_CHECKS, "mode"]
    return QCError(
        "options.unknown",
        f"there is no option {key!r}{suggest(key, [*ours, *_ARGUMENTS, *compat.inductor_options()])}",
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
