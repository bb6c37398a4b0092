"""What `strategies`, `problems`, `graphs` and `fuzz` use of Hypothesis, which is no requirement of the package: where it is
missing, the import says what to install.
"""

from __future__ import annotations

from qcompile.errors import QCError

try:
    from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
    from hypothesis import strategies as st
    from hypothesis.strategies import DrawFn, SearchStrategy
except ModuleNotFoundError as error:
    raise QCError(
        "testing.no-hypothesis",
        "There is no Hypothesis to look for inputs with.",
        why="qcompile.testing.strategies, .problems, .graphs and .fuzz are built on it, and qcompile does not require it",
        next="install the package hypothesis",
    ) from error

__all__ = ["DrawFn", "HealthCheck", "Phase", "SearchStrategy", "Verbosity", "given", "seed", "settings", "st"]
