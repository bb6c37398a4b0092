"""4-bit weights and one or sixteen rows: every tile worth trying, the best against bf16 and against peers.

The last lines are candidates for `codegen/tuning/triton.json`: for each number of rows the line whose times are the
nearest to the best ones, over all shapes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from statistics import median
from typing import Any

from gpu_blocks import peers
from gpu_blocks.figures import against, figures, line
from gpu_blocks.matmuls import Problem, Weight, compile_job, fitted, float_layer, float_weights, kernels, label, spec_of
from gpu_blocks.session import Session, Wrong
from gpu_blocks.warm import Job
from qcompile import compat
from qcompile.codegen.devices.triton import Tile, choose_tile, text_of
from qcompile.codegen.devices.triton_numbers import IntegerDecode
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import ceil_div

SHAPES = ((4096, 4096), (6144, 4096), (28672, 4096), (8192, 8192), (28672, 8192))  # (n, k)
ROWS = (1, 16)
SCHEME, PRESET = "int4/g128:fp16", "uint4/g32:fp16+m"
# Share of the copy bandwidth and ratio to bf16 that one row is to reach.
TARGETS = {
    (4096, 4096): (0.45, 2.2),
    (8192, 8192): (0.70, 3.0),
    (28672, 4096): (0.80, 3.2),
    (28672, 8192): (0.80, 3.2),
}
SLOWER = 1.10  # what sixteen rows may take, in units of one row's time


def run(session: Session) -> None:
    shapes = session.pick(SHAPES, (SHAPES[0], SHAPES[3], SHAPES[4]), ((64, 256),))
    configs = [{"scheme": SCHEME, "m": m, "n": n, "k": k} for n, k in shapes for m in ROWS]
    configs += [
        {"scheme": PRESET, "m": m, "n": n, "k": k} for n, k in session.pick(shapes[3:4], (), shapes) for m in ROWS
    ]
    todo = session.open(configs)
    session.compile(_jobs(session, todo))
    weights: dict[Any, Weight] = {}
    times: dict[Any, dict[Tile, float]] = {}

    def answer(config: dict[str, Any]) -> None:
        nonlocal weights
        key = (config["scheme"], config["n"], config["k"])
        if key not in weights:
            weights = {key: Weight(session.device, spec_of(config["scheme"]), config["n"], config["k"])}
        times[(*key, config["m"])] = _shape(session, config, weights[key])

    session.ask(configs, answer)
    with session.guarded({"what": "candidates for the table"}):
        _sixteen(session, times)
        _candidates(session, times)


def _jobs(session: Session, todo: list[dict[str, Any]]) -> Iterator[Job]:
    """One for each kernel: those of two shapes that are multiples of 16 are the same."""
    wanted: dict[tuple[str, int, Tile, IntegerDecode], tuple[int, int]] = {}
    for config in todo:
        scheme, m, n, k = config["scheme"], config["m"], config["n"], config["k"]
        spec = spec_of(scheme)
        (tuned,) = fitted(spec, [choose_tile(spec, (n,), k, m, session.device.torch)], k)
        for tile in (*tiles(session, spec, k), tuned):
            wanted[(scheme, m, tile, "subnormal")] = (n, k)
        wanted[(scheme, m, replace(tuned, columns=64), "magic")] = (n, k)
    for (s, m, tile, decode), size in wanted.items():
        yield compile_job(spec_of(s), m, *size, tile, decode)


def tiles(session: Session, spec: KernelSpec, k: int) -> list[Tile]:
    """What is tried: columns and warps, units, stages, splits of K."""
    few = ((64, 4), (128, 8))
    wide = few if str(spec.weight).startswith(PRESET) else ((64, 4), (128, 4), (128, 8), (256, 8))
    columns = session.pick(wide, few, ((64, 4), (32, 4)))
    stages = session.pick((3, 4, 6), (3, 5), (3,))
    splits = session.pick((1, 2, 4, 8), (1, 2, 4, 8), (1, 2))
    units = session.pick((1, 2), (1, 2), (1,))
    asked = [Tile(16, c, u, s, d, w) for c, w in columns for u in units for d in stages for s in splits]
    return fitted(spec, asked, k)


def _shape(session: Session, config: dict[str, Any], weight: Weight) -> dict[Tile, float]:
    """One shape: a glance at all tiles, then the best few, bf16 and peers interleaved."""
    m, n, k, spec, device = config["m"], config["n"], config["k"], weight.spec, session.device
    session.say(f"  {config['scheme']} M={m} {n}x{k}")
    problem = Problem.of(weight, m)
    found = kernels(session, problem, tiles(session, spec, k))
    magic = kernels(session, problem, [replace(problem.tuned(), columns=64)], "magic")
    tuned = problem.kernel(problem.tuned(), name="shipped tile")
    best = device.best([contestant for _, contestant in found.values()], session.pick(4, 2, 2))
    if not best:
        raise Wrong("no tile runs, or none is right")
    base = float_layer(problem.x, float_weights(device, n, k, OUT_DTYPES[spec.x]))
    others = peers.contestants(session, problem.x, n, k) if config["scheme"] == SCHEME else []
    racers = [base, *best, tuned, *(contestant for _, contestant in magic.values()), *others]
    us = device.race(racers)
    figured = {c.name: figures(session, c, us[c.name], us[base.name] if c is not base else None) for c in racers}
    checked = {c.name: problem.error(c.result()) for c in (*best, tuned)}
    fastest = min(best, key=lambda c: us[c.name] or 0.0)
    for contestant in racers:
        error = f"error {checked[contestant.name]:.2f} of its bound" if contestant.name in checked else ""
        session.say(line(contestant.name, figured[contestant.name], error))
    target = TARGETS.get((n, k)) if m == 1 and config["scheme"] == SCHEME else None
    if target and (said := against(figured[fastest.name], *target)):
        session.say(f"    best: {fastest.name}; {said}")
    session.record(
        config,
        {"best": fastest.name, "contestants": figured, "errors": checked, "tried": len(found)},
        ok=max(checked.values()) <= 1,
    )
    return {found[c.name][0]: us[c.name] or 0.0 for c in best}


def _sixteen(session: Session, times: dict[Any, dict[Tile, float]]) -> None:
    """Sixteen rows against one."""
    for key in [key for key in times if key[-1] == 1 and (*key[:-1], 16) in times]:
        one, many = min(times[key].values()), min(times[(*key[:-1], 16)].values())
        if one:
            verdict = "met" if many <= SLOWER * one else "MISSED"
            session.say(f"  {key[0]} {key[1]}x{key[2]}: 16 rows take {many / one:.2f} of one row's time, {verdict}")


def _candidates(session: Session, times: dict[Any, dict[Tile, float]]) -> None:
    """The line of the tuning table that is the nearest to the best time of all shapes."""
    processors = compat.gpu(session.device.torch)[1]
    for rows in ROWS:
        slowdown: dict[Tile, list[float]] = defaultdict(list)
        waves: dict[Tile, list[float]] = defaultdict(list)
        shapes = [key for key in times if key[-1] == rows and key[0] == SCHEME and any(times[key].values())]
        for key in shapes:
            by_shape = {
                replace(tile, splits=1): (time, tile.splits) for tile, time in sorted(times[key].items(), key=_slow)
            }
            for tile, (time, splits) in by_shape.items():
                slowdown[tile].append(time / min(times[key].values()))
                waves[tile].append(splits * ceil_div(key[1], tile.columns) / processors)
        whole = {tile: each for tile, each in slowdown.items() if each}
        if not whole:
            continue
        most = max(map(len, whole.values()))
        tile = min((t for t in whole if len(whole[t]) == most), key=lambda t: math.prod(whole[t]) ** (1 / most))
        depth = tile.units * text_of(spec_of(SCHEME)).layout.unit
        shape = {"rows_up_to": rows, "rows": tile.rows, "columns": tile.columns, "depth": depth, "stages": tile.stages}
        shape |= {"warps": tile.warps, "waves": max(1, round(median(waves[tile])))}
        session.say(f"  for triton.json, best or near it in {most} of {len(shapes)} shapes: {json.dumps(shape)}")
        session.say(f"    as a tile: {label(tile)}, {math.prod(whole[tile]) ** (1 / most):.3f} of the best time")


def _slow(item: tuple[Tile, float]) -> float:
    return -item[1]
