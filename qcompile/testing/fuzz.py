"""`fuzz`: look for an input on which a kernel or a pass is wrong, as long as asked.

Hypothesis finds it and makes it small. The message begins with what repeats it: the round, then the problem or the model.
Behind it stands what is wrong: for a kernel which element, by how much, and what would have been allowed; for a pass, which
law it breaks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, overload

from torch import Tensor

from qcompile.errors import QCError, suggest
from qcompile.options import Options
from qcompile.passes.base import Pass
from qcompile.plan.recipe import Recipe
from qcompile.testing.capture import Place
from qcompile.testing.graphs import Model
from qcompile.testing.hypotheses import HealthCheck, Phase, SearchStrategy, Verbosity, given, seed, settings
from qcompile.testing.problems import Problem
from qcompile.testing.rewrites import Laws, check_model

_SIMPLER = 80  # models tried on the way to a smaller one
_UNKNOWN = ("passes.unknown",)


@overload
def fuzz(
    subject: Callable[[Problem], Tensor],
    inputs: SearchStrategy[Problem],
    *,
    examples: int = 100,
    seconds: float = 0.0,
    start: int = 0,
) -> int: ...


@overload
def fuzz(
    subject: Pass | Sequence[Pass],
    inputs: SearchStrategy[Model],
    *,
    examples: int = 100,
    seconds: float = 0.0,
    start: int = 0,
    options: Mapping[str, Any] = ...,
    place: Place | None = None,
    like: Pass | None = None,
    function: bool = True,
    twice: bool = True,
    compiled: bool = False,
) -> int: ...


def fuzz(
    subject: Any,
    inputs: SearchStrategy[Any],
    *,
    examples: int = 100,
    seconds: float = 0.0,
    start: int = 0,
    **laws: Any,
) -> int:
    """Try a kernel on problems, or a pass on models, and check every result.

    Args:
        subject: a kernel, which takes a problem and gives `[m, n]`; or a pass; or several passes, each of which works on
            what the one before it made.
        inputs: `qcompile.testing.problems.problems(...)` or `qcompile.testing.graphs.models(...)`.
        examples: inputs of one round, the same in every process.
        seconds: go on with further rounds, of other inputs, until so much time is over.
        start: number of the first round: other inputs for every number.
        laws: for passes, what they promise: the attributes of `qcompile.testing.rewrites.Laws`.

    Returns:
        How many inputs were tried.

    Raises:
        AssertionError: for the smallest input found on which a result is further off than derived, or a law is broken.
        Exception: whatever the kernel or the pass raises, for the smallest input found, which its text begins with.
    """
    _check_call(subject, inputs, laws)
    _check_numbers(examples, seconds, start)
    passes = [subject] if isinstance(subject, Pass) else list(subject) if isinstance(subject, Sequence) else []
    is_class = isinstance(subject, type) and issubclass(subject, Pass)
    if not all(isinstance(item, Pass) for item in passes) or not (passes or callable(subject)) or is_class:
        raise QCError(
            "testing.subject",
            f"neither a kernel nor passes: {subject}",
            next="give a function of a problem, or instances of qcompile.Pass",
        )
    if laws and not passes:
        raise QCError(
            "testing.laws",
            f"a kernel promises no {min(laws)!r}",
            next="give a pass, or call fuzz without what passes promise",
        )
    promised, tried, began = Laws(**laws), 0, time.monotonic()
    found: list[tuple[Model, Exception]] = []
    failed: list[Problem] = []  # the latest: Hypothesis ends with the smallest

    def try_one(example: Any) -> None:
        if isinstance(example, Model) != bool(passes):
            what, wanted = (
                ("a pass", "models(...) of qcompile.testing.graphs") if passes else ("a kernel", "problems(...)")
            )
            raise QCError("testing.inputs", f"{what} cannot be tried on {example!r}", next=f"give {wanted}")
        if not passes:
            try:
                example.check(subject(example))
            except Exception:
                failed[:] = [example]
                raise
        elif not found:  # Hypothesis tries what failed again
            try:
                check_model(passes, example, promised)
            except Exception as error:
                if isinstance(error, QCError) and error.code in _UNKNOWN:
                    raise
                found.append(_smallest(example, error, lambda model: check_model(passes, model, promised)))
        if found:
            raise AssertionError("found")

    for number in range(start, 2**31):

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=False,
            report_multiple_bugs=False,
            print_blob=False,  # the round repeats it
            verbosity=Verbosity.quiet,  # the problem is in the message already
            phases=[Phase.generate] if passes else [Phase.generate, Phase.shrink],
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.nested_given],
        )
        @given(inputs)
        def round_of(example: Any) -> None:
            nonlocal tried
            tried += 1
            try_one(example)

        more = "".join(f", {name}={value!r}" for name, value in laws.items())
        again = f"found in round {number}: fuzz(..., start={number}{more}) finds it again"
        try:
            round_of()
        except Exception as error:
            if isinstance(error, QCError) and error.code in _UNKNOWN:
                raise  # a name in the call, which no model has to do with
            if not found:
                where = "".join(f"problem {problem}\n" for problem in failed if str(problem) not in str(error))
                raise _led_by(f"{again}\n{where}", error) from error.__cause__
        if found:
            model, wrong = found[0]
            raise _led_by(f"{again}\n{model.code}\n", wrong) from wrong.__cause__
        if time.monotonic() - began >= seconds:
            break
    return tried


def _check_numbers(examples: Any, seconds: Any, start: Any) -> None:
    whole = {"examples": (examples, 1, "1 or more: inputs of one round"), "start": (start, 0, "0 or more, below 2**31")}
    for name, (number, least, advice) in whole.items():
        if type(number) is not int or not least <= number < 2**31:
            raise QCError("testing.inputs", f"{name}={number!r}", next=f"give {advice}")
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 <= seconds < math.inf:
        raise QCError("testing.inputs", f"seconds={seconds!r}", next="give a number of seconds, 0 for one round")


def _check_call(subject: Any, inputs: Any, laws: Mapping[str, Any]) -> None:
    """Refuse arguments that no round could use, before the first one."""
    if isinstance(subject, SearchStrategy):
        raise QCError("testing.subject", "fuzz takes what is tried first, then inputs", next="swap the two arguments")
    if not isinstance(inputs, SearchStrategy):
        raise QCError(
            "testing.inputs",
            f"inputs cannot be {inputs!r}",
            next="give problems(...) for a kernel, models(...) for passes, or another strategy of Hypothesis",
        )
    promises = {item.name for item in fields(Laws)}
    if unknown := sorted(set(laws) - promises):
        known = [*promises, "examples", "seconds", "start"]
        raise QCError(
            "testing.laws",
            f"fuzz has no argument {unknown[0]!r}{suggest(unknown[0], known)}",
            next=f"choose of examples, seconds, start, and for passes {', '.join(sorted(promises))}",
        )
    if (like := laws.get("like")) is not None and not isinstance(like, Pass):
        raise QCError("testing.laws", f"like={like!r} is no pass", next="give an instance of qcompile.Pass")
    if isinstance(place := laws.get("place"), str):
        raise QCError("testing.laws", f"place={place!r}", next=f"write place=('after', {place!r}) or ('before', ...)")
    for name in ("function", "twice", "compiled"):
        if not isinstance(laws.get(name, True), bool):
            raise QCError("testing.laws", f"{name}={laws[name]!r}", next="give True or False")
    if place is not None and (len(place) != 2 or place[0] not in ("before", "after")):
        raise QCError("testing.laws", f"place={place!r}", next="write place=('after', 'merge') or ('before', 'merge')")
    if isinstance(options := laws.get("options", {}), Mapping):
        options = dict(options)
    Recipe.of(Options.parse(options).recipe)


def _led_by(head: str, error: Exception) -> Exception:
    """The error with something in front of its text, or noted behind it where the text is not one that can be led."""
    if isinstance(error, QCError):
        told = QCError(error.code, head + error.what, where=error.where, why=error.why, next=error.next)
        return told.with_traceback(error.__traceback__)
    if type(error).__str__ is Exception.__str__ and len(error.args) <= 1:
        error.args = (f"{head}{error}",)
    else:
        error.add_note(head)
    return error


def _smallest(model: Model, error: Exception, check: Callable[[Model], None]) -> tuple[Model, Exception]:
    """A simpler model that fails in the same way (an exception of that type), and how it fails. Models are made smaller as
    what they are: Hypothesis, which knows numbers, takes ten times the compiles."""
    budget, smaller = _SIMPLER, True
    while smaller and budget:
        smaller = False
        for candidate in model.simpler():
            if not budget:
                break
            budget -= 1
            try:
                check(candidate)
            except type(error) as found:
                model, error, smaller = candidate, found, True
                break
            except Exception:
                continue
    return model, error
