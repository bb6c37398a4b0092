"""Run the plan: one process per engine, first one after the other, then in turns.

Phase one starts each engine alone, on an empty compile cache, and waits until it has measured what is
measured once. Phase two goes round all of them: every engine takes a timed turn, and the next round begins
with another one, so a slow minute of the machine falls on all alike. What is compared between engines is the
median of the ratios inside a round.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Protocol

from qcompile.demo.engines import Engine, Plan
from qcompile.errors import QCError


@dataclass
class Outcome:
    """What is known about one engine so far.

    Attributes:
        engine: which one.
        report: fields of `worker.Report`; empty until it has measured.
        turns: per round (seconds of the prompt, seconds of each decode step).
        error: what went wrong, "" otherwise.
        skipped: no time was left for it.
    """

    engine: Engine
    report: dict[str, Any] = field(default_factory=dict)
    turns: list[tuple[float, tuple[float, ...]]] = field(default_factory=list)
    error: str = ""
    skipped: bool = False


class Progress(Protocol):
    """Told what happens; `share` is the finished share of the engine's work."""

    def __call__(self, engine: Engine, what: str, share: float) -> None: ...


class Runner(Protocol):
    """An engine that is up: `worker.serve` seen from the parent."""

    def measure(self, say: Callable[[str, float], None]) -> dict[str, Any]: ...
    def turn(self, steps: int) -> tuple[float, tuple[float, ...]]: ...
    def stop(self) -> None: ...


class Process:
    """An engine in a child process.

    Args:
        engine: which one.
        model: unpacked model folder.
        inputs: file written by `worker.Inputs.save`.
        work: folder for compile caches and logs.

    Raises (from `measure` and `turn`):
        QCError: "demo.engine" when the process dies, with the end of its log.
    """

    def __init__(self, engine: Engine, model: Path, inputs: Path, work: Path) -> None:
        self.engine, self.log = engine, work / f"{engine.name}.log"
        cache = work / f"cache-{engine.warm or engine.name}"
        job = json.dumps({"engine": asdict(engine), "model": str(model), "inputs": str(inputs)})
        self.link, theirs = Pipe()
        with theirs, self.log.open("w") as log:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "qcompile.demo.worker", str(theirs.fileno()), job],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is the parent's affair
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"},
            )

    def measure(self, say: Callable[[str, float], None]) -> dict[str, Any]:
        while True:
            kind, *values = self._hear()
            if kind == "done":
                report: dict[str, Any] = values[0]
                return report
            say(*values)

    def turn(self, steps: int) -> tuple[float, tuple[float, ...]]:
        try:
            self.link.send(steps)
        except OSError as error:
            raise self._died() from error
        _, prompt, seconds = self._hear()
        return prompt, tuple(seconds)

    def stop(self) -> None:
        self.link.close()
        self.child.terminate()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def _hear(self) -> Any:
        try:
            return self.link.recv()
        except (EOFError, OSError) as error:
            raise self._died() from error

    def _died(self) -> QCError:
        code = self.child.wait(10)
        lines = self.log.read_text(errors="replace").strip().splitlines()
        tail = "\n".join(lines[-12:])
        return QCError(
            "demo.engine",
            f"the process of {self.engine.label!r} ended with code {code}",
            why=tail or ("it was killed: is there enough memory?" if code < 0 else "it said nothing"),
            next=f'try it alone: torch.compile(model, backend="{self.engine.backend}")',
        )


def run(plan: Plan, start: Callable[[Engine], Runner], progress: Progress) -> Iterator[list[Outcome]]:
    """Run both phases; yields the state after every engine and every round, so that an interrupted run keeps
    it.

    Args:
        plan: what to do.
        start: brings one engine up.
        progress: told what happens.

    Yields:
        The outcomes of all engines started so far, always the same list.
    """
    outcomes: list[Outcome] = []
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        up: list[tuple[Outcome, Runner]] = []
        for engine in plan.engines:
            outcome = Outcome(engine)
            outcomes.append(outcome)
            if engine.optional and time.monotonic() - begun > plan.seconds * 5 / 6:
                outcome.skipped = True
                continue
            runner = start(engine)
            stack.callback(runner.stop)
            try:
                outcome.report = runner.measure(partial(progress, engine))
                progress(engine, "waiting for its turns", 1.0)
                up.append((outcome, runner))
            except QCError as error:
                outcome.error = str(error)
                progress(engine, "failed", 1.0)
            yield outcomes
        # A turn of everybody that does not count: the first one after a pause runs on cold memory.
        for number in range(-1, plan.rounds):
            shift = number % len(up) if up else 0
            for outcome, runner in up[shift:] + up[:shift]:
                if outcome.error:
                    continue
                progress(outcome.engine, f"speed, round {max(number, 0) + 1} of {plan.rounds}", 1.0)
                try:
                    turn = runner.turn(plan.steps if number >= 0 else 4)
                except QCError as error:
                    outcome.error = str(error)
                    continue
                if number >= 0:
                    outcome.turns.append(turn)
            if number >= 0:
                yield outcomes
            if number >= 2 and time.monotonic() - begun > plan.seconds:
                break
