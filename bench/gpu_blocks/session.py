"""Running blocks: what they are given, what becomes of their errors, and how long they may take."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from gpu_blocks import BLOCKS, TOTAL, Block, Size
from gpu_blocks.device import Device
from gpu_blocks.results import ROOT, Results
from gpu_blocks.warm import Job, Warmer

T = TypeVar("T")
GRACE = 60.0  # seconds over a block's budget after which its process is ended
BROKEN = 3  # exit status of a process whose device no longer answers


class Wrong(Exception):
    """A result that is further off than derived."""


class Session:
    """What a block works with.

    Attributes:
        device: see there. results: the file. size: how much to do. warmer: compiles ahead, None where nothing compiles.
        failures: what was wrong, in this process.
    """

    def __init__(self, device: Device, results: Results, size: Size, resume: bool, warmer: Warmer | None) -> None:
        self.device, self.results, self.size, self.resume, self.warmer = device, results, size, resume, warmer
        self.failures: list[str] = []
        self.block, self.until, self.cut = BLOCKS[0], 0.0, False
        self.told: set[str] = set()

    def pick(self, full: T, quick: T, tiny: T) -> T:
        """Of three values the one for this run."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    def left(self) -> float:
        """Seconds of this block's budget."""
        return self.until - time.monotonic()

    def say(self, *words: object) -> None:
        """Print a line at once."""
        print(*words, flush=True)

    def open(self, configs: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Those of the questions that are not answered yet."""
        asked = [dict(config) for config in configs]
        return [config for config in asked if not (self.resume and self.results.has(self.block.number, config))]

    def items(
        self, configs: Iterable[Mapping[str, Any]], cost: Callable[[Mapping[str, Any]], float] = lambda _: 0.0
    ) -> Iterator[dict[str, Any]]:
        """The open questions, one by one, as long as there is time: `cost` seconds for the next."""
        asked = list(configs)
        todo = self.open(asked)
        if len(todo) < len(asked):
            self.say(f"  {len(asked) - len(todo)} of {len(asked)} were answered before")
        for index, config in enumerate(todo):
            if self.left() <= cost(config):
                self.cut = True
                self.say(f"  out of time: {len(todo) - index} of {len(asked)} are left; --resume goes on")
                return
            yield config

    def ask(
        self,
        configs: Iterable[Mapping[str, Any]],
        answer: Callable[[dict[str, Any]], object],
        cost: Callable[[Mapping[str, Any]], float] = lambda _: 0.0,
    ) -> None:
        """Answer the open questions, `items`, one by one, each `guarded`."""
        for config in self.items(configs, cost):
            with self.guarded(config):
                answer(config)

    @contextmanager
    def guarded(self, config: Mapping[str, Any]) -> Iterator[None]:
        """An error in here is the answer to a question, written down as a failure, and the next question may be asked; one
        that has harmed the device is raised again."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            trace = traceback.format_exc()
            known = isinstance(error, Wrong) or text in self.told
            self.told.add(text)
            self.say(f"    FAILED {dict(config)}: {text[:300]}" if known else f"    FAILED {dict(config)}\n{trace}")
            self.record(config, {"failed": text[:500], "trace": trace[-3000:]}, ok=False)
            if not _answers(self.device):
                raise
        else:
            return
        gc.collect()  # what the frames of the error held
        self.device.free()

    def record(self, config: Mapping[str, Any], result: Mapping[str, Any], ok: bool = True) -> None:
        """Write down an answer; one that is not `ok` makes the run fail."""
        self.results.add(self.block.number, config, result, ok)
        if not ok:
            self.failures.append(f"block {self.block.number}: {dict(config)}")

    def wrong(self, name: str, error: Wrong) -> None:
        """A variant with a wrong result: the run will fail, and goes on with the others."""
        self.say(f"    WRONG {error}")
        self.record({"wrong": name}, {"error": str(error)}, ok=False)

    def refused(self, name: str, error: Exception) -> None:
        """A variant that the device cannot launch is a line: too much shared memory, say. What may have harmed the
        device is raised again, and so is everything where nothing has limits."""
        if self.device.interpreted or isinstance(error, torch.AcceleratorError):
            raise error
        self.say(f"    {name}: {type(error).__name__}: {str(error).partition(chr(10))[0][:150]}")

    def compile(self, jobs: Iterable[Job]) -> None:
        """Compile ahead, for at most two thirds of what is left of the budget. Whatever fails here, a launch says again."""
        asked: list[Job] = []
        with self.guarded({"what": "jobs to compile"}):
            asked.extend(jobs)
        if self.warmer is None or not asked:
            return
        begun, failed = time.monotonic(), list[str]()
        with self.guarded({"what": "compiling ahead"}):
            failed = self.warmer.compile(asked, self.left() * 2 / 3)
        self.say(f"  compiled {len(asked) - len(failed)} of {len(asked)} kernels in {time.monotonic() - begun:.1f} s")
        for text in sorted(set(failed)):
            self.say(f"  did not compile ({failed.count(text)}): {text}")

    def run(self, block: Block, seconds: float) -> str:
        """Run a block.

        Returns:
            "ok", "cut" (out of time), "wrong" or "error".
        """
        whole = {"block": block.number}
        if self.resume and self.results.has(block.number, whole):
            self.say(f"\n{block.number}: {block.title}: complete, from {self.results.path}")
            return "ok"
        self.say(f"\n{block.number}: {block.title}")
        self.block, self.until, self.cut = block, time.monotonic() + seconds, False
        before, begun = len(self.failures), time.monotonic()
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True)
        try:
            importlib.import_module(f"gpu_blocks.{block.module}").run(self)
            self.device.synchronize()
        except Exception as error:
            self.say(traceback.format_exc())
            wrong = isinstance(error, Wrong)
            self.record({"failed": str(error)[:500]}, {"error": type(error).__name__}, ok=False)
            return "wrong" if wrong else "error"
        finally:
            faulthandler.cancel_dump_traceback_later()
        took = time.monotonic() - begun
        self.say(f"  block {block.number}: {took:.0f} s of {seconds:.0f}")
        if len(self.failures) > before:
            return "wrong"
        if not self.cut:
            self.results.add(block.number, whole, {"seconds": took})
        return "cut" if self.cut else "ok"


def work(
    numbers: Sequence[int], size: Size, interpret: bool, resume: bool, out: Path | None, journal: Path, seconds: float
) -> int:
    """Run blocks in this process.

    Args:
        journal: gets a line "number state" for every block that begins ("begun") and ends.
        seconds: for all of them; those that do not begin in time are left out.

    Returns:
        0, or `BROKEN` when the device no longer answers: blocks that are left want another process.
    """
    until, budgets = time.monotonic() + seconds, _budgets(numbers, size)
    with ExitStack() as stack:
        if interpret:
            os.environ.setdefault("QCOMPILE_ISA", "portable")  # no C++ is made: do not try what the compiler can do
            from qcompile.testing.interpret import interpret as interpreting

            stack.enter_context(interpreting())
        stack.enter_context(torch.no_grad())
        torch.manual_seed(0)
        device = Device(interpret)
        name = device.name.replace(" ", "-")
        results = Results(
            out or ROOT / ("bench-results" if interpret else "bench/results") / f"gpu-{name}.jsonl", name, size
        )
        about = results.about
        print(f"{device.name}; {about['versions']}; {about['commit']}; {results.path}", flush=True)
        warmer = None if interpret else Warmer(_target())
        if warmer is not None:
            stack.callback(warmer.close)
        session = Session(device, results, size, resume, warmer)
        for number in numbers:
            block = next(block for block in BLOCKS if block.number == number)
            left = until - time.monotonic()
            if left <= 0:
                break
            _note(journal, number, "begun")
            state = session.run(block, min(budgets[number], left))
            _note(journal, number, state)
            if state != "ok" and not _answers(device):
                return BROKEN
    return 0


def _budgets(numbers: Sequence[int], size: Size) -> dict[int, float]:
    """Budgets of the blocks that run: the whole time is theirs."""
    own = {block.number: block.budget(size) for block in BLOCKS if block.number in numbers}
    more = max(1.0, TOTAL[size] / sum(own.values()))
    return {number: more * seconds for number, seconds in own.items()}


def _note(journal: Path, number: int, state: str) -> None:
    with journal.open("a", encoding="utf-8") as file:
        file.write(f"{number} {state}\n")


def _answers(device: Device) -> bool:
    try:
        device.synchronize()
        device.randn(8).sum().item()
    except torch.OutOfMemoryError:
        return True  # it says so itself
    except RuntimeError as error:
        print(f"the device no longer answers: {error}", file=sys.stderr, flush=True)
        return False
    return True


def _target() -> tuple[str, int | str, int]:
    about = torch.cuda.get_device_properties(0)
    if torch.version.hip:
        return "hip", about.gcnArchName.partition(":")[0], about.warp_size
    return "cuda", about.major * 10 + about.minor, 32


__all__ = ["BROKEN", "Session", "Wrong", "work"]
