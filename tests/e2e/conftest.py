"""Every test starts from nothing: no compiled code, its own seed, and disk caches that no earlier run has filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile import compat


@pytest.fixture(autouse=True)
def _fresh_start(own_disk_cache: Path) -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No code is generated: what Inductor would compile runs as it is. The graphs are collected."""
    found: list[Any] = []

    def inner(gm: Any, inputs: Sequence[Any], **settings: Any) -> Callable[[list[Any]], Any]:
        found.append(gm)

        def call(args: list[Any]) -> Any:
            return list(gm.forward(*args))

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(compat, "inner_compile", lambda: inner)
    return found
