"""Hypothesis is no requirement: who lacks it is told by the modules that need it."""

from __future__ import annotations

import importlib
import sys

import pytest

from qcompile import QCError


@pytest.mark.parametrize("name", ["fuzz", "graphs", "problems", "strategies"])
def test_no_hypothesis(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("capture", "fuzz", "graphs", "problems", "rewrites", "strategies", "hypotheses"):
        monkeypatch.delitem(sys.modules, f"qcompile.testing.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "hypothesis", None)
    with pytest.raises(QCError) as caught:
        importlib.import_module(f"qcompile.testing.{name}")
    assert (caught.value.code, caught.value.next) == ("testing.no-hypothesis", "install the package hypothesis")
