"""8 bits x 8 bits, 4 bits x 8 bits, and many rows: ours against torch's vendor kernels, codes of x given or made on the way.

Ours have three ways: fused, or a decode of the whole weight and then our own kernel or the vendor's library. The best tile of
each races, decode included, so a run tells what a line of the shipped table should say. The vendor's int8 product is bare
int32, so its dequantization counts; its fp8 product takes scales, and is asked for with its fast sums and without.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_blocks.device import Contestant
from gpu_blocks.figures import figures, line
from gpu_blocks.matmuls import Problem, Weight, compile_job, fitted, float_layer, float_weights, label, spec_of
from gpu_blocks.session import Session, Wrong
from qcompile.codegen.devices.triton import Matmul, Tile, TritonLowering, quantize_input
from qcompile.codegen.devices.triton_decoded import ways
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import unpack_codes, unpack_scales

# (rows, columns, units, stages, warps) of fused kernels
CUTS = (
    (64, 128, 1, 3, 4),
    (128, 64, 2, 3, 4),
    (128, 128, 1, 4, 8),
    (128, 128, 2, 3, 8),
    (128, 256, 1, 3, 8),
    (128, 256, 2, 3, 8),
    (256, 128, 1, 3, 8),
    (256, 128, 2, 3, 8),
)
# (rows, columns, stages, warps) of our own after a decode, with descriptors and with pointers, and as one loop over all
OWN = (
    (128, 128, 4, 8),
    (256, 128, 3, 8),
    (256, 128, 4, 8),
    (128, 256, 3, 8),
    (64, 128, 4, 4),
    (128, 64, 4, 4),
)
LEAST = 4  # copies of a weight: 8192 x 8192 of them fill any cache
Given = tuple[torch.Tensor, ...]  # codes of x and scales


@dataclass(frozen=True)
class Pair:
    """A kind of product.

    Attributes:
        weight, act: schemes. vendor: gives the vendor's kernels by name, as functions of what `quantize_input` gives.
        against: the one that ours is compared with. targets: what ours is to reach, by the length of a side: times that
            one, codes given; times bf16, quantizing.
    """

    weight: str
    act: str
    vendor: Callable[[Weight], Mapping[str, Callable[..., torch.Tensor]]]
    against: str
    targets: Mapping[int, tuple[float, float]]


def run(session: Session) -> None:
    configs = []
    for pair in PAIRS.values():
        spec = spec_of(pair.weight, pair.act)
        # Where the vendor has nothing to compare with, the question is from how many rows on a decode pays.
        full = [(4096,) * 3, (8192,) * 3, (2048, 8192, 8192)] if pair.against else [(4096,) * 3, (1024, 8192, 8192)]
        shapes = session.pick(full, full[:1], [(4, 64, 64)])
        if verdict := TritonLowering().supports(spec):
            configs += [{"weight": pair.weight, "act": pair.act, "m": m, "n": n, "k": k} for m, n, k in shapes]
        else:
            session.say(f"  {pair.weight} x {pair.act}: {verdict.reason}")
    session.compile(
        compile_job(spec_of(weight, act), 4096, 4096, 4096, tile)
        for weight, act in dict.fromkeys((str(c["weight"]), str(c["act"])) for c in configs)
        for tile in tiles(session, weight, act)
    )
    session.ask(configs, partial(_shape, session))


def tiles(session: Session, weight: str, act: str) -> list[Tile]:
    """What is tried."""
    spec = spec_of(weight, act)
    cuts, owns = session.pick(CUTS, CUTS[2:6], CUTS[:1]), session.pick(OWN, OWN[:3], ((16, 32, 2, 8),))
    tried = [Tile(r, c, u, 1, s, w) for r, c, u, s, w in cuts]
    tried += [
        Tile(r, c, 1, 1, s, w, "own", 128, tma, flat)
        for r, c, s, w in owns
        for tma, flat in ((True, False), (True, True), (False, False))
    ]
    tried.append(Tile(way="vendor"))
    return fitted(spec, [tile for tile in tried if tile.way in ways(spec)], 4096)


def named(tile: Tile) -> str:
    """A tile in a few characters, with its way."""
    if tile.way == "vendor":
        return "ours decoded, vendor"
    if tile.way == "fused":
        return f"ours {label(tile)}"
    loads = ("descriptors" if tile.tma else "pointers") + (" flat" if tile.flat else "")
    return f"ours decoded, {tile.rows}x{tile.columns}x{tile.depth} stages{tile.stages} warps{tile.warps} {loads}"


def _shape(session: Session, config: dict[str, Any]) -> None:
    torch.compiler.reset()  # each question compiles the same few functions anew: Dynamo stops at eight of one
    m, n, k, device = config["m"], config["n"], config["k"], session.device
    pair, spec = PAIRS[config["weight"]], spec_of(config["weight"], config["act"])
    session.say(f"  {config['weight']} x {config['act']} {m}x{n}x{k}")
    weight = Weight(device, spec, n, k, LEAST)
    problem = Problem.of(weight, m)
    x, given = problem.x, quantize_input(problem.x, spec=spec)
    ours = _ours(session, problem, given, tiles(session, pair.weight, pair.act))
    if not ours:
        raise Wrong("no tile runs")
    winners = [device.best(found, 1)[0] for found in ours.values()]
    (best,) = device.best(winners, 1)
    encode = torch.compile(lambda x: quantize_input(x, spec=spec), dynamic=False)
    base = float_layer(x, float_weights(device, n, k, torch.bfloat16, LEAST))
    multiply, quantizing = best.call, "ours, quantizing x"
    vendor = _vendor(session, pair, problem, given)
    racers = [
        base,
        *winners,
        Contestant(quantizing, lambda i: (encode(x), multiply(i)), best.copies),
        Contestant("quantizing x", lambda i: encode(x)),
        *vendor,
    ]
    us, flops = device.race(racers), 2.0 * m * n * k
    figured = {
        c.name: figures(session, c, us[c.name], us[base.name], flops) for c in racers if c.name != "quantizing x"
    }
    alone = next(c for c in racers if c.name == "quantizing x")
    figured["quantizing x"] = figures(session, alone, us["quantizing x"], None)
    errors = {c.name: problem.error(c.result()) for c in (*winners, *vendor) if "alone" not in c.name}
    for contestant in racers:
        said = f"error {errors[contestant.name]:.2f} of its bound" if contestant.name in errors else ""
        session.say(line(contestant.name, figured[contestant.name], said))
    _verdict(session, pair, n if n == m else 0, us, best.name, base.name)
    found = {"best": best.name, "contestants": figured, "errors": errors}
    session.record(config, found, ok=all(errors[c.name] <= 1 for c in winners))


def _verdict(session: Session, pair: Pair, size: int, us: dict[str, float | None], best: str, base: str) -> None:
    mine, whole, theirs, float_ = (us.get(name) for name in (best, "ours, quantizing x", pair.against, base))
    if mine is None or whole is None or float_ is None:
        return
    target = pair.targets.get(size)
    said = f"    {float_ / whole:.2f} x bf16 with quantizing"
    if theirs is not None:
        said = f"    {theirs / mine:.2f} x {pair.against},{said[3:]}"
    if target is not None:
        met = float_ / whole >= target[1] and (theirs is None or theirs / mine >= target[0])
        said += f"; targets {target[0]:g} and {target[1]:g}: {'met' if met else 'MISSED'}"
    session.say(said)


def _ours(session: Session, problem: Problem, given: Given, tried: list[Tile]) -> dict[str, list[Contestant]]:
    """By way: generated kernels over given codes, each checked."""
    weight, spec, (m, k) = problem.weight, problem.weight.spec, problem.x.shape
    matmul, found = Matmul(spec), dict[str, list[Contestant]]()
    for tile in tried:

        def call(i: int, tile: Tile = tile) -> torch.Tensor:
            y = torch.empty(m, weight.n, dtype=OUT_DTYPES[spec.y], device=problem.x.device)
            matmul(*given, *weight.pool[i], y, m, k, given[0].stride(0), weight.n, weight.n, tile=tile)
            return y

        name = named(tile)
        try:
            problem.check(name, call(0))
        except Wrong as error:
            session.wrong(name, error)
            continue
        except Exception as error:
            session.refused(name, error)
            continue
        found.setdefault(tile.way, []).append(Contestant(name, call, len(weight.pool), weight.bytes))
    return found


def _vendor(session: Session, pair: Pair, problem: Problem, given: Given) -> list[Contestant]:
    """The vendor's kernels over the same codes, plain and after quantizing x."""
    x, spec, found = problem.x, problem.weight.spec, []
    for name, multiply in pair.vendor(problem.weight).items():
        calls = {name: partial(_called, torch.compile(multiply, dynamic=False), given[:2])}
        if "alone" not in name:
            whole = torch.compile(partial(_quantizing, multiply, spec), dynamic=False)
            calls[f"{name}, quantizing x"] = partial(_called, whole, (x,))
        for each, call in calls.items():
            try:
                call(0)
            except Exception as error:  # what a vendor's kernel refuses is a line, not a failure
                session.say(f"    {each}: {type(error).__name__}: {str(error).partition(chr(10))[0][:120]}")
                continue
            found.append(Contestant(each, call))
    return found


def _called(function: Callable[..., torch.Tensor], operands: Given, i: int) -> torch.Tensor:
    return function(*operands)


def _quantizing(multiply: Callable[..., torch.Tensor], spec: KernelSpec, x: torch.Tensor) -> torch.Tensor:
    return multiply(*quantize_input(x, spec=spec)[:2])


def _int_mm(weight: Weight) -> Mapping[str, Callable[..., torch.Tensor]]:
    codes = unpack_codes(weight.parts[0], 8, weight.n, weight.k, weight.spec.weight.packing)
    columns = (codes.to(torch.int16) - 128).to(torch.int8).t()  # [k, n], columns dense: what the library wants
    scale = unpack_scales(weight.parts[1], weight.n).reshape(1, weight.n).float()
    out = OUT_DTYPES[weight.spec.y]
    return {
        "_int_mm alone": lambda q, s: torch._int_mm(q, columns),
        "_int_mm, dequantized": lambda q, s: (torch._int_mm(q, columns).float() * s.reshape(-1, 1) * scale).to(out),
    }


def _scaled_mm(weight: Weight) -> Mapping[str, Callable[..., torch.Tensor]]:
    codes = unpack_codes(weight.parts[0], 8, weight.n, weight.k, weight.spec.weight.packing)
    columns = codes.view(torch.float8_e4m3fn).t()
    scale = unpack_scales(weight.parts[1], weight.n).reshape(1, weight.n).float().contiguous()
    out = OUT_DTYPES[weight.spec.y]

    def multiply(fast: bool) -> Callable[..., torch.Tensor]:
        return lambda q, s: torch._scaled_mm(
            q, columns, scale_a=s.reshape(-1, 1), scale_b=scale, out_dtype=out, use_fast_accum=fast
        )

    return {"_scaled_mm": multiply(False), "_scaled_mm, fast sums": multiply(True)}


def _none(weight: Weight) -> Mapping[str, Callable[..., torch.Tensor]]:
    return {}


PAIRS = {
    pair.weight: pair
    for pair in (
        Pair("int8/axis0", "int8/token", _int_mm, "_int_mm, dequantized", {4096: (1.1, 1.0), 8192: (1.1, 1.0)}),
        Pair("e4m3/axis0", "e4m3/token", _scaled_mm, "_scaled_mm", {4096: (0.9, 1.35), 8192: (0.9, 1.45)}),
        Pair("uint4/axis0:fp32+z", "int8/token", _none, "", {}),
        Pair("uint4/g128:fp16+z", "int8/token", _none, "", {}),
        Pair("e4m3/b128x128:fp32", "e4m3/g128:fp32", _none, "", {}),
    )
}
