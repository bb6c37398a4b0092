"""Graphs of packed matmuls are run here to see what a pass made of them, not to build kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qcompile.ir.ops import reference_only


@pytest.fixture(autouse=True)
def _by_reference() -> Iterator[None]:
    with reference_only():
        yield
