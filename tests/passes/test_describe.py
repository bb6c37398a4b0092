"""Descriptions of what passes hold: equal for equal things in every process, and different for anything else."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from qcompile.ir.formats import FORMATS
from qcompile.passes.fingerprint import describe
from tests.passes.described import FORMAT, PAIRS, Kind, Lazy, Raises, Shown, calls


@pytest.mark.parametrize("index", range(len(PAIRS)))
def test_objects_are_what_they_hold(index: int) -> None:
    one, other = PAIRS[index]
    assert describe(one) == describe(one) != describe(other)


def test_descriptions_are_equal_in_every_process() -> None:
    """Only then does a disk cache ever find anything. Hashes of text, and so the order of sets, differ between these
    processes."""
    script = (
        "from qcompile.passes.fingerprint import describe; from tests.passes.described import PAIRS; "
        "print([describe(pair[0]) for pair in PAIRS])"
    )
    root = Path(__file__).parents[2]
    runs = [
        subprocess.run(
            [sys.executable, "-c", script], cwd=root, env={**os.environ, "PYTHONHASHSEED": seed, f"SEED{seed}": ""},
            capture_output=True, text=True,
        )
        for seed in "12"
    ]  # fmt: skip
    assert runs[0].stdout == runs[1].stdout != "", runs[0].stderr


def test_use_changes_no_text() -> None:
    """What Python and this package keep for speed is no difference."""
    before = [describe(item) for item in (calls, Lazy, FORMAT, FORMATS, Kind)]
    re.compile(f"never seen {id(before)}")
    copy.copy(Lazy()), FORMAT.max, Kind(1)
    assert [describe(item) for item in (calls, Lazy, FORMAT, FORMATS, Kind)] == before


class Endless:
    """Every copy of it holds another one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Endless, (Endless(),)


def numbers() -> Iterator[int]:
    yield 1


NEVER: dict[str, Callable[[], object]] = {
    "lock": threading.Lock,
    "holder of a lock": lambda: Shown(threading.Lock()),
    "generator": numbers,
    "file": lambda: open(os.devnull),  # noqa: SIM115
    "weak": lambda: weakref.ref(Shown(1)),
    "raises": Raises,
    "endless": Endless,
    "meta": lambda: torch.empty(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
    "unknown ufunc": lambda: numpy.frompyfunc(lambda x: x, 1, 1),
}


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_what_hides_its_state_is_never_found(name: str) -> None:
    """Not even in this process: an address is used again."""
    value = NEVER[name]()
    assert describe(value) != describe(value)
    assert describe([1, value]) != describe([1, value])


def test_sets_of_functions_that_name_each_other_end() -> None:
    """Nine functions, each naming a set for each of the others: as many tables as orders of nine, if all were made."""
    count = 9
    space: dict[str, Any] = {}
    for i in range(count):
        names = ", ".join(f"s{j}" for j in range(count) if j != i)
        exec(f"def f{i}(): return {names}", space)
    space |= {f"s{i}": {space[f"f{i}"]} for i in range(count)}
    assert describe(space["f0"]).startswith("never found")
