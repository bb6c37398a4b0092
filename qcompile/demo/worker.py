"""One engine in one process of its own: `python -m qcompile.demo.worker FD JOB`.

Resident memory and the time of a first call mean something only in a fresh process with an empty compile
cache, so every engine gets both. The process then stays alive and takes its timed turns when it is told to:
engines that live side by side and run one after the other, round by round, see the same machine, noise
included.

The parent talks through a pipe, whose file descriptor is the first argument; what goes to stdout and stderr
is a log.
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from qcompile import compat
from qcompile.demo.engines import Engine
from qcompile.demo.session import Session


@dataclass(frozen=True)
class Inputs:
    """What every engine is given, as token ids (int64).

    Attributes:
        windows: `[count, window]`, for the perplexity.
        prompt: `[1, chunk]`, for the speed.
        question: `[1, any]`, a chat prompt.
        stop: token that ends an answer.
    """

    windows: torch.Tensor
    prompt: torch.Tensor
    question: torch.Tensor
    stop: int
    answer_tokens: int = 40

    def save(self, path: Path) -> None:
        torch.save(asdict(self), path)

    @staticmethod
    def load(path: Path) -> Inputs:
        return Inputs(**torch.load(path, weights_only=True))


@dataclass
class Report:
    """What a worker found out; bytes are bytes, times are seconds.

    Attributes:
        first_prompt: first call with a prompt, compiling included. first_step: first decode step, compiling
        included. surprise: negative log likelihood of each perplexity window, in nats. answer: token ids.
        weights: what the engine computes with: packed weights, and the float ones that were not replaced.
        resident: memory of the process, after each stage. peak: the most it had from loading on (compiling
        takes memory for a while), no less than any stage's. coverage: share of the contraction FLOPs that run
        quantized, of the two graphs together; None without recipe. kernels: how many sites each kernel runs.
    """

    first_prompt: float = 0.0
    first_step: float = 0.0
    surprise: list[float] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    weights: int = 0
    resident: dict[str, int] = field(default_factory=dict)
    peak: int = 0
    coverage: float | None = None
    kernels: dict[str, int] = field(default_factory=dict)


def resident() -> int:
    """Resident memory of this process in bytes, without what could be given back at once."""
    gc.collect()
    compat.trim_memory()
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0


def measure(
    engine: Engine,
    load: Callable[[], Any],
    inputs: Inputs,
    say: Callable[[str, float], None],
) -> tuple[Session, Report]:
    """Everything that is measured once.

    Args:
        engine: which one.
        load: makes the float model.
        inputs: token ids.
        say: told what happens next and which share of the work is done.
    """
    report = Report()
    say("loading the model", 0.0)
    report.resident["start"] = resident()
    model = load()
    report.resident["loaded"] = resident()
    # Forget the peak so far; where that is refused, the loader's stays in the number.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    floats = _bytes(model)
    call = engine.start(model)
    if engine.converted:
        report.resident["converted"] = resident()
    chunk = inputs.prompt.shape[1]
    session = Session(call, model.config, chunk=chunk, window=inputs.windows.shape[1])

    verb = "compiling" if engine.backend else "running"
    with _plans(engine) as explained:
        first = session.first_calls(inputs.prompt)
        say(f"{verb} the prompt call", 0.05)
        report.first_prompt = next(first)
        say(f"{verb} the decode step", 0.4)
        report.first_step = next(first)
    report.resident["compiled"] = resident()

    for index, window in enumerate(inputs.windows):
        say(
            f"perplexity, window {index + 1} of {len(inputs.windows)}",
            0.7 + 0.25 * index / len(inputs.windows),
        )
        report.surprise.append(session.surprise(window))
    say("answering a question", 0.95)
    report.answer = session.answer(inputs.question, inputs.stop, inputs.answer_tokens)

    report.weights = floats
    if engine.backend == "qcompile":
        ledger = explained()
        report.weights = _bytes(model) if engine.converted else floats - ledger.bytes_before + ledger.bytes_after
        report.coverage = ledger.coverage
        for row in ledger.rows:
            report.kernels[row.kernel or "float"] = report.kernels.get(row.kernel or "float", 0) + 1
    report.resident["end"] = resident()
    # The system counts by thread and sums up roughly: its peak may be some pages below what it said before.
    report.peak = max(_status("VmHWM"), *report.resident.values())
    return session, report


def _bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    found = {t.data_ptr(): t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]}
    return sum(found.values())


@contextlib.contextmanager
def _plans(engine: Engine) -> Any:
    """Collects what the backend decides inside the block; yields a function that returns it as an
    `Explanation`."""
    if engine.backend != "qcompile":
        yield lambda: None
        return
    from qcompile.backend import watching
    from qcompile.ledger import summarize

    with watching() as trace:
        yield lambda: summarize(trace.contexts)


def serve(link: Connection, job: dict[str, Any]) -> None:
    """Measure, then take turns until the parent hangs up.

    Args:
        link: sends `("step", what, share)`, `("done", report)`, `("turn", prompt seconds, step seconds)`;
        receives the
            number of decode steps of the next turn.
        job: `engine` (fields), `model` (folder) and `inputs` (file).
    """
    import transformers.models.llama.modeling_llama  # noqa: F401  (150 MB of code that no model is to blame for)

    from qcompile.demo.model import load

    inputs = Inputs.load(Path(job["inputs"]))
    session, report = measure(
        Engine(**job["engine"]),
        lambda: load(Path(job["model"])),
        inputs,
        lambda what, share: link.send(("step", what, share)),
    )
    link.send(("done", asdict(report)))
    with contextlib.suppress(EOFError):
        while True:
            turn = session.turn(inputs.prompt, link.recv())
            link.send(("turn", turn.prompt, turn.steps))


if __name__ == "__main__":
    import json

    try:
        with Connection(int(sys.argv[1])) as connection:
            serve(connection, json.loads(sys.argv[2]))
    except BrokenPipeError:  # the parent was interrupted
        sys.exit(1)
