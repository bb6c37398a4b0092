"""What the fields of a rule may hold, and the JSON files that hold rules.

One table serves rules that are written in Python and rules that are read: a value of another type would fail far from
its line, or mean something else in silence (an empty text where a scheme belongs is not "keep it float").
"""

from __future__ import annotations

import json
import math
import numbers
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from qcompile.errors import QCError, suggest
from qcompile.ir.fit import FITS
from qcompile.ir.scheme import Scheme

VERSION = 1
KEYS = ("version", "name", "rules", "updates")
UPDATES = ("nearest", "stochastic")
FILE = f'a recipe file is {{"version": {VERSION}, "name": ..., "rules": [...]}}'
_INFINITE = ("inf", "-inf")  # JSON has no number for these

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def shown(value: object) -> str:
    """A value as an error may quote it, however long or deep it is."""
    return _short.repr(value)


def _scheme(value: object) -> Scheme | None:
    if value is None or isinstance(value, Scheme):
        return value
    return Scheme.parse(_text(value))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _kinds(value: object) -> tuple[Any, ...]:
    """What is in it, in an order of its own where it has none; which of these are kinds is for the rule to say."""
    if isinstance(value, set | frozenset):
        return tuple(sorted(value, key=str))
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _count(value: Any) -> int:
    whole = isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not whole or value < 0:
        raise TypeError
    return int(value)


def _decibels(value: Any) -> float:
    named = isinstance(value, str) and value in _INFINITE
    if isinstance(value, bool) or not (named or isinstance(value, numbers.Real)):
        raise TypeError
    found = float(value)
    if math.isnan(found):
        raise ValueError
    return found


FIELDS: Mapping[str, tuple[Callable[[object], Any], str]] = {
    "weight": (_scheme, "a scheme such as 'int8/g64', or None (in a file: null) to keep sites float"),
    "act": (_scheme, "a scheme such as 'int8/token', or None (in a file: null) to use activations exactly"),
    "path": (_text, "text such as 'model.layers.*'"),
    "kind": (_kinds, "a kind of site, or a list of them"),
    "min_weights": (_count, "a whole number, 0 or more"),
    "min_sqnr": (_decibels, "a number of decibels such as 30.0, or 'inf' for weights that are exact"),
    "fit": (_text, " or ".join(map(repr, FITS))),
    "device": (_text, "'cpu' or 'gpu', or '' for both"),
    "grad": (_scheme, "a scheme such as 'int8/token', or None (in a file: null) for products in float"),
    "estimator": (_text, "the name of an estimator such as 'ste' or 'lsq'"),
}


def checked(field: str, value: object) -> Any:
    """The value of a field of a rule as the rule keeps it. Raises `QCError` ("recipe.rule", or the scheme's own error)
    naming the field."""
    check, want = FIELDS[field]
    try:
        return check(value)
    except (TypeError, ValueError, OverflowError):
        raise QCError(
            "recipe.rule", f"{field!r} of a rule cannot be {shown(value)}", where=field, next=f"give it {want}"
        ) from None
    except QCError as error:
        raise error.at(field) from error


def checked_updates(value: object) -> None:
    """Refuse what is no way to write updated parameters. Raises `QCError` ("recipe.updates")."""
    if not isinstance(value, str) or value not in UPDATES:
        near = suggest(value, UPDATES) if isinstance(value, str) else ""
        raise QCError(
            "recipe.updates",
            f"updates cannot be {shown(value)}{near}",
            where="updates",
            why="16-bit parameters are written to the nearest number, as torch does, or stochastically",
            next=f"use {' or '.join(map(repr, UPDATES))}",
        )


def plain(value: Any) -> Any:
    """The JSON value for a field of a rule."""
    if isinstance(value, Scheme) or (isinstance(value, float) and math.isinf(value)):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def read(path: Path) -> Any:
    """The JSON value in a file. Raises `QCError` ("recipe.file") for a file that cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise QCError("recipe.file", f"cannot read recipe {path}", why=str(error), next="check the path") from error
    except (ValueError, RecursionError) as error:  # broken syntax, bytes that are no text, lists in lists in lists
        raise QCError(
            "recipe.file", f"{path} is not a JSON file", why=str(error), next=f"mend it there; {FILE}"
        ) from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f'{name} is no number in JSON; a "min_sqnr" without a limit is the text "inf"')
