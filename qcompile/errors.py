"""Errors that say what to do next.

Every failure of this project is one exception type with five fields, so that a caller can match on `code`, a
report can print a table, and a reader finds out in one message what went wrong, where, why, and what to try.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable


class QCError(Exception):
    """A refusal or failure, named by a stable dotted `code`.

    Args:
        code: stable identifier `area.problem`, for example `scheme.unknown-format`.
        what: one sentence: what happened.
        where: the place in the *user's* terms: a module path, a source line, a position in a scheme string.
        why: the rule that was broken.
        next: what the user can do about it.
    """

    def __init__(self, code: str, what: str, *, where: str = "", why: str = "", next: str = "") -> None:
        super().__init__(code, what, where, why, next)
        self.code = code
        self.what = what
        self.where = where
        self.why = why
        self.next = next

    def __str__(self) -> str:
        lines = [f"{self.what} [{self.code}]"]
        for label in ("where", "why", "next"):
            text = getattr(self, label)
            if text:
                lines.append(f"  {label}: {text}")
        return "\n".join(lines)

    def at(self, where: str) -> QCError:
        """The same error with a place, where an inner layer could not know it."""
        return QCError(
            self.code,
            self.what,
            where=f"{where}: {self.where}" if self.where else where,
            why=self.why,
            next=self.next,
        )

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own pickling passes every argument by position, which a keyword-only signature refuses.
        return (_rebuild, (type(self), self.code, self.what, self.where, self.why, self.next))


def _rebuild(cls: type[QCError], code: str, what: str, where: str, why: str, next: str) -> QCError:
    return cls(code, what, where=where, why=why, next=next)


class QCWarning(UserWarning):
    """A decision the user may want to know about, although the result is right."""


def warn(message: str) -> None:
    """Give a `QCWarning` at the user's line: the innermost one that is neither ours nor torch's nor generated code."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INNER:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, QCWarning, stacklevel=level)


_INNER = ("", "qcompile", "torch", "contextlib")


def suggest(name: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'int4'?"` for the choice nearest to `name`, or `""` when none is near.

    Case is ignored, since a scheme in capitals is the commonest misspelling.
    """
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return f"; did you mean {lowered[near[0]]!r}?" if near else ""


def option_error(key: str, got: object, want: str, *, hint: str = "", fix: str = "") -> QCError:
    """`options.value`: a setting that does not fit, in the user's words for it."""
    return QCError(
        "options.value",
        f"option {key!r} cannot be {got!r}{hint}",
        where=f"options[{key!r}]",
        why=f"it must be {want}",
        next=fix or "help(qcompile.Options) lists every option and its values",
    )
