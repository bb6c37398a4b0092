"""Products in a row, each waiting for the one before: what it is worth that a kernel begins before that one has ended.

Eight products of one row, y of one x of the next, in a CUDA graph. With programmatic dependent launch a kernel asks L2 for
its first weights while the one before ends: for nothing, for what its pipeline holds, and for twice and four times that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gpu_blocks.device import Contestant
from gpu_blocks.figures import figures, line
from gpu_blocks.matmuls import Problem, Weight, compile_job, fitted, label, spec_of
from gpu_blocks.session import Session, Wrong
from gpu_blocks.warm import Job
from qcompile.codegen.devices.triton import Tile, choose_tile
from qcompile.codegen.devices.triton import run as product
from qcompile.codegen.devices.triton_overlap import Overlap, overlapping
from qcompile.codegen.spec import KernelSpec

LENGTH = 8  # products in a row
SCHEME = "int4/g128:fp16"
NEVER = Overlap(early=False)
WAYS = {"one after the other": NEVER} | {f"early, ahead {times}": Overlap(ahead=times) for times in (0, 1, 2, 4)}


def run(session: Session) -> None:
    sizes = session.pick((4096, 6144, 8192), (4096,), (128,))
    configs = [{"scheme": SCHEME, "what": "chain", "n": n} for n in sizes]
    todo, spec = session.open(configs), spec_of(SCHEME)
    session.compile(job for config in todo for job in _jobs(session, spec, config["n"]))

    def answer(config: dict[str, Any]) -> None:
        n = config["n"]
        session.say(f"  {SCHEME} M=1 {n}x{n}, {LENGTH} in a row; the times are of one")
        weight = Weight(session.device, spec, n, n, least=3 * LENGTH)
        problem = Problem.of(weight, 1)
        for tile in tiles(session, spec, n):
            problem.kernel(tile)  # checked
        _measure(session, config, problem, tiles(session, spec, n))

    session.ask(configs, answer)


def tiles(session: Session, spec: KernelSpec, n: int) -> list[Tile]:
    """The shipped one, a deeper pipeline, and twice the blocks."""
    tuned = choose_tile(spec, (n,), n, 1, session.device.torch)
    more = [replace(tuned, stages=tuned.stages + 2), replace(tuned, splits=2 * tuned.splits)]
    return fitted(spec, [tuned, *session.pick(more, [], [])], n)


def _jobs(session: Session, spec: KernelSpec, n: int) -> list[Job]:
    ways = {(tile, way) for tile in tiles(session, spec, n) for way in WAYS.values()}
    return [partial(_overlapped, way, compile_job(spec, 1, n, n, tile)) for tile, way in ways]


def _overlapped(way: Overlap, job: Job, device: torch.device) -> object:
    with overlapping(way):
        return job(device)


def _measure(session: Session, config: dict[str, Any], problem: Problem, some: list[Tile]) -> None:
    device, weight, want = session.device, problem.weight, None
    names = {f"{label(tile)}, {name}": (tile, way) for tile in some for name, way in WAYS.items()}
    racers = [
        Contestant(name, _chain(problem, tile, way), max(1, len(weight.pool) // LENGTH), weight.bytes)
        for name, (tile, way) in names.items()
    ]
    us = device.race(racers)
    each = {name: None if time is None else time / LENGTH for name, time in us.items()}
    figured = {c.name: figures(session, c, each[c.name], None) for c in racers}
    for contestant in racers:
        (tile, way), name = names[contestant.name], contestant.name
        result = contestant.result()
        want = result if way == NEVER else want  # the first of each tile
        if want is None or not torch.equal(result, want):
            session.wrong(name, Wrong(f"{name}: another result than one after the other"))
        base, time = each[f"{label(tile)}, one after the other"], each[name]
        saved = f"{base - time:+.2f} us saved" if base and time and way != NEVER else ""
        session.say(line(name, figured[name], saved))
    best = min(each, key=lambda name: each[name] or 0.0)
    session.record(config, {"best": best, "contestants": figured})


def _chain(problem: Problem, tile: Tile, way: Overlap) -> Callable[[int], torch.Tensor]:
    """The i-th products in a row of the weights' copies."""
    weight, spec, n = problem.weight, problem.weight.spec, problem.weight.n

    def call(i: int) -> torch.Tensor:
        x = problem.x
        with overlapping(way):
            for step in range(LENGTH):
                parts = weight.pool[(i * LENGTH + step) % len(weight.pool)]
                x = product(spec, x, parts, [], [n], n, tile)
        return x

    return call
