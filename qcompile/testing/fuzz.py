"""`fuzz`: look for an input on which a kernel is wrong, as long as asked.

Hypothesis finds it and makes it small; the message says which element, by how much, and what would have been allowed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

from qcompile.testing.hypotheses import HealthCheck, SearchStrategy, given, seed, settings
from qcompile.testing.problems import Problem


def fuzz(
    kernel: Callable[[Problem], Tensor],
    problems: SearchStrategy[Problem],
    *,
    examples: int = 100,
    seconds: float = 0.0,
    start: int = 0,
) -> int:
    """Call a kernel on problems and check every result.

    Args:
        kernel: takes a problem, gives `[m, n]`.
        problems: see `qcompile.testing.problems.problems`.
        examples: problems of one round, the same in every process.
        seconds: go on with further rounds, of other problems, until so much time is over.
        start: number of the first round: other problems for every number.

    Returns:
        How many problems were tried.

    Raises:
        AssertionError: the smallest problem found on which the result is further off than derived.
        Exception: whatever the kernel raises, with the smallest problem found.
    """
    tried, began = 0, time.monotonic()
    for number in range(start, 2**31):

        @seed(number)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.nested_given],
        )
        @given(problems)
        def round_of(problem: Problem) -> None:
            nonlocal tried
            tried += 1
            problem.check(kernel(problem))

        round_of()
        if time.monotonic() - began >= seconds:
            break
    return tried
