"""Hypothesis runs the same examples everywhere: a failure in CI is a failure here. And one disk cache for a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=40, print_blob=True)
settings.load_profile("ci")


@pytest.fixture(scope="session")
def disk_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder for Inductor's caches, one for the whole run.

    Tests that ask for it start from nothing an earlier run has left. They do not start from nothing each: what the
    compiler can do and its precompiled header take it up to a minute to find out, and hold for every test (also of
    other workers).
    """
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "inductor"


@pytest.fixture(scope="session")
def own_disk_cache(disk_cache: Path) -> Iterator[Path]:
    """What this process compiles goes to `disk_cache` and comes from there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(disk_cache))
        yield disk_cache
