"""Graphs of packed matmuls are run here to see what a pass made of them, not to build kernels. What a late pass notes is
noted when it runs: no earlier run may have filled the disk caches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.ir.ops import reference_only


@pytest.fixture(autouse=True)
def _by_reference(own_disk_cache: Path) -> Iterator[None]:
    with reference_only():
        yield
