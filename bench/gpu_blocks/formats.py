"""Other formats than 4-bit integers, one and sixteen rows: the shipped tile and two others, against bf16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from gpu_blocks.figures import figures, line
from gpu_blocks.matmuls import Problem, Weight, compile_job, fitted, float_layer, float_weights, kernels, label, spec_of
from gpu_blocks.session import Session, Wrong
from qcompile.codegen.devices.triton import Tile, choose_tile
from qcompile.codegen.spec import KernelSpec

# Schemes, and how much faster than bf16 one row of 28672 x 8192 is to be.
SCHEMES = {
    "int8/axis0": 1.8,
    "e4m3/axis0": 1.8,
    "e3m2/axis0": 2.3,
    "int3/axis0": None,
    "int2/g256:fp16": 5.0,
    "nf4/g64:fp16": 2.2,
}
ROWS = (1, 16)


def run(session: Session) -> None:
    schemes = session.pick(list(SCHEMES), list(SCHEMES), list(SCHEMES)[1:])
    shapes = session.pick(((8192, 8192), (28672, 8192)), ((28672, 8192),), ((64, 512),))
    rows = session.pick(ROWS, ROWS[:1], ROWS[:1])
    configs = [{"scheme": s, "m": m, "n": n, "k": k} for n, k in shapes for s in schemes for m in rows]
    todo = session.open(configs)
    session.compile(
        compile_job(spec_of(c["scheme"]), c["m"], c["n"], c["k"], tile)
        for c in todo
        for tile in tiles(session, spec_of(c["scheme"]), c["m"], c["n"], c["k"])
    )
    floats: dict[Any, list[torch.Tensor]] = {}
    weights: dict[Any, Weight] = {}

    def answer(config: dict[str, Any]) -> None:
        nonlocal floats, weights
        scheme, n, k = config["scheme"], config["n"], config["k"]
        if (n, k) not in floats:
            floats = {(n, k): float_weights(session.device, n, k, torch.bfloat16)}
        if (scheme, n, k) not in weights:
            weights = {(scheme, n, k): Weight(session.device, spec_of(scheme), n, k)}
        _format(session, config, weights[(scheme, n, k)], floats[(n, k)])

    session.ask(configs, answer)


def tiles(session: Session, spec: KernelSpec, m: int, n: int, k: int) -> list[Tile]:
    """The shipped one, one with twice the columns, one with another depth."""
    first = choose_tile(spec, (n,), k, m, session.device.torch)
    others = [replace(first, columns=128, warps=8), replace(first, stages=5, splits=2 * first.splits)]
    return fitted(spec, [first, *session.pick(others, others[:1], others[:1])], k)


def _format(session: Session, config: dict[str, Any], weight: Weight, floats: list[torch.Tensor]) -> None:
    m, n, k = config["m"], config["n"], config["k"]
    problem = Problem.of(weight, m)
    found = kernels(session, problem, tiles(session, weight.spec, m, n, k))
    base = float_layer(problem.x, floats)
    racers = [base, *(contestant for _, contestant in found.values())]
    us = session.device.race(racers)
    figured = {c.name: figures(session, c, us[c.name], us[base.name]) for c in racers}
    if not found:
        raise Wrong(f"{config}: no tile runs, or none is right")
    best = min(found, key=lambda name: us[name] or 0.0)
    error = problem.error(found[best][1].result())
    note = f"{label(found[best][0])}; error {error:.2f} of its bound"
    target = SCHEMES[config["scheme"]] if m == 1 and (n, k) == (28672, 8192) else None
    if target and us[best]:
        note += f"; target {target:g} x: {'met' if figured[best]['speedup'] >= target else 'MISSED'}"
    session.say(line(f"{config['scheme']} M={m} {n}x{k}", figured[best], note))
    session.record(config, {"best": best, "contestants": figured, "error": error}, ok=error <= 1)
