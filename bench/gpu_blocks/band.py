"""The dangerous band: 32 to 2048 rows, where bf16 has nothing to decode. Fused kernels, decoding once, and bf16.

Decoding once is the shipped way "vendor": our kernel decodes, the vendor's library multiplies. "At best" is a decode at copy
bandwidth.
"""

from __future__ import annotations

from typing import Any

import torch

from gpu_blocks import ceilings
from gpu_blocks.figures import figures, line
from gpu_blocks.matmuls import Problem, Weight, compile_job, fitted, float_layer, float_weights, kernels, spec_of
from gpu_blocks.session import Session
from qcompile.codegen.devices.triton import Tile

SCHEME = "int4/g128:fp16"
FLOOR = 0.98  # of bf16's speed, that no number of rows is to fall below
# (rows, columns, warps) of a tile
CUTS = ((32, 64, 4), (64, 64, 4), (64, 128, 8), (128, 64, 4), (128, 128, 8), (256, 128, 8), (128, 256, 8))
DECODED = Tile(way="vendor")
LEAST = 4  # copies of a weight: 8192 x 8192 fills any cache twice


def run(session: Session) -> None:
    rows = session.pick((32, 64, 128, 256, 512, 1024, 2048), (64, 256, 1024), (33,))
    n, k = session.pick((8192, 8192), (8192, 8192), (64, 256))
    configs = [{"scheme": SCHEME, "m": m, "n": n, "k": k} for m in rows]
    todo = session.open(configs)
    if not todo:
        return
    tried = dict.fromkeys(tile for config in todo for tile in (*tiles(session, config["m"], k), DECODED))
    session.compile(compile_job(spec_of(SCHEME), todo[0]["m"], n, k, tile) for tile in tried)
    device, operands = session.device, list[tuple[Weight, list[torch.Tensor]]]()

    def answer(config: dict[str, Any]) -> None:
        if not operands:
            made = Weight(device, spec_of(SCHEME), n, k, LEAST)
            operands.append((made, float_weights(device, n, k, torch.bfloat16, LEAST)))
        (weight, floats), m = operands[0], config["m"]
        session.say(f"  {SCHEME} M={m} {n}x{k}")
        problem = Problem.of(weight, m)
        found = kernels(session, problem, tiles(session, m, k))
        best = device.best([contestant for _, contestant in found.values()], session.pick(3, 2, 1))
        base = float_layer(problem.x, floats)
        decoded = [contestant for _, contestant in kernels(session, problem, [DECODED]).values()]
        racers = [base, *best, *decoded]
        us, flops = device.race(racers), 2.0 * m * n * k
        figured = {c.name: figures(session, c, us[c.name], us[base.name], flops) for c in racers}
        for contestant in racers:
            session.say(line(contestant.name, figured[contestant.name]))
        errors = {c.name: problem.error(c.result()) for c in best}  # after the clock has run
        errors |= {c.name: problem.error(c.result(), problem.rounded) for c in decoded}
        _verdict(session, config, figured, base.name, weight.bytes)
        right = bool(best and decoded) and max(errors.values()) <= 1
        session.record(config, {"contestants": figured, "errors": errors}, ok=right)

    session.ask(configs, answer)


def tiles(session: Session, m: int, k: int) -> list[Tile]:
    """Tiles for `m` rows: those that are not mostly empty, K split where there are few of them."""
    cuts = [cut for cut in CUTS if cut[0] <= max(32, m)]
    splits = (1, 2, 4) if m <= 256 else (1,)
    stages = session.pick((3, 4), (3,), (3,))
    asked = [Tile(r, c, 1, s, d, w) for r, c, w in session.pick(cuts, cuts, cuts[:1]) for d in stages for s in splits]
    return fitted(spec_of(SCHEME), asked, k)


def _verdict(session: Session, config: dict[str, Any], figured: dict[str, Any], base: str, size: int) -> None:
    """The best way for so many rows, and whether it falls below bf16."""
    bf16, copy = figured[base].get("us"), ceilings.copy_bandwidth(session)
    if bf16 is None or copy is None:
        return
    others = {name: found["us"] for name, found in figured.items() if name != base}
    at_best = bf16 + (size + 2.0 * config["n"] * config["k"]) / copy * 1e6
    name = min(others, key=lambda name: others[name])
    ratio = bf16 / others[name]
    session.say(
        f"    best: {name}, {ratio:.2f} x bf16{'' if ratio >= FLOOR else ', BELOW'}; decoded once at best {at_best:.1f} us"
    )
