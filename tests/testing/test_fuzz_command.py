"""`make fuzz` says what it tried of each kind, names the kinds that it did not come to, and how to repeat a failure."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).resolve().parent.parent / "fuzz.py"


@pytest.fixture(scope="module")
def command() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("fuzz_command", FILE)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def kinds(command: ModuleType, seconds: float) -> tuple[dict[str, Any], list[tuple[str, int]]]:
    """Two kinds and one that is not installed, turns of which take so long, and a list of the turns taken."""
    turns: list[tuple[str, int]] = []

    def looking(name: str) -> Any:
        def look(number: int) -> int:
            turns.append((name, number))
            time.sleep(seconds)
            return 7

        return look

    made = {
        "much": command.Kind("much", 0.75, looking("much")),
        "little": command.Kind("little", 0.25, looking("little")),
        "none": command.Kind("nothing", 0.5, looking("none"), "no_such_package"),
    }
    return made, turns


def test_kinds_take_turns_by_their_share(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    some, turns = kinds(command, 0.05)
    assert command.main(["--seconds", "0.9", "--seed", "5"], some) == 0
    assert turns[:2] == [("much", 5), ("little", 5)]
    much = [number for name, number in turns if name == "much"]
    little = [number for name, number in turns if name == "little"]
    assert much == list(range(5, 5 + len(much)))  # each turn a round of its own
    assert len(much) > len(little) >= 1
    shown = capsys.readouterr().out
    assert f"{7 * len(much)} much in" in shown
    assert f"{7 * len(little)} little in" in shown
    assert "no nothing: no_such_package is not installed" in shown


def test_kinds_that_had_no_turn_are_named(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    some, turns = kinds(command, 0.1)
    assert command.main(["--seconds", "0.05"], some) == 0
    assert [name for name, _ in turns] == ["much"]
    shown = capsys.readouterr().out
    assert "7 much in 0 seconds, nothing wrong" in shown
    assert "no little: the time was over before its first turn" in shown


def test_a_failure_is_repeated_by_one_turn(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    some, turns = kinds(command, 0.0)
    right = some["little"].look

    def wrong(number: int) -> int:
        if number == 8:
            raise AssertionError("wrong")
        return int(right(number))

    some["little"] = command.Kind("little", 1e9, wrong)
    with pytest.raises(AssertionError, match="wrong"):
        command.main(["--seconds", "60", "--seed", "6"], some)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "repeat it: python tests/fuzz.py --only little --seed 8 --seconds 0"
    )
    turns.clear()
    with pytest.raises(AssertionError, match="wrong"):
        command.main("--only little --seed 8 --seconds 0".split(), some)
    assert turns == []
