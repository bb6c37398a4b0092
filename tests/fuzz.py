"""Look for wrong kernels and wrong passes as long as asked: `make fuzz SECONDS=600`. Every run tries other problems.

Kinds of problems take turns: next is the one that is furthest behind its share of the time. A turn is one round of `fuzz`
with a number of its own, which alone decides what is tried; so a failure is repeated by one turn of one kind.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from qcompile.backend import DEFAULT_PASSES
from qcompile.errors import QCError
from qcompile.testing.fuzz import fuzz
from qcompile.testing.graphs import models
from qcompile.testing.strategies import schemes

RECIPES = ("none", "int8/axis0:fp32", "int4/g32:fp16", "uint4/g32:fp16+z", "nf4/g32:fp16", "e4m3/axis0:fp32")
POINTWISE = ("linear", "gated", "point", "norm")  # what the late passes look at


def kernels(number: int) -> int:
    """Generated Triton kernels of random schemes, interpreted."""
    from hypothesis import strategies as st
    from torch import Tensor

    from qcompile.codegen.devices.triton import Tile, TritonLowering, run
    from qcompile.codegen.spec import KernelSpec
    from qcompile.ir.granularity import Nested, PerAxis, PerGroup, PerTensor
    from qcompile.ir.matmul import OUT_DTYPES
    from qcompile.ir.scheme import Scheme
    from qcompile.testing.interpret import interpret
    from qcompile.testing.problems import Problem, problems

    choices = [
        Tile(),
        Tile(units=2, columns=32),
        Tile(splits=3),
        Tile(rows=32, columns=16, units=4, splits=2, natural=False),
    ]
    groups = [PerGroup(size) for size in (16, 32, 48, 64, 128, 192, 256, 512)]
    nested = [
        Nested(group, outer) for group in groups[:5] for outer in (PerTensor(), PerAxis(0), PerGroup(4 * group.size))
    ]

    def supported(scheme: Scheme) -> bool:
        return bool(TritonLowering().supports(KernelSpec(scheme)))

    granularities = st.sampled_from([PerTensor(), PerAxis(0), *groups, *nested])
    found = schemes(granularities=granularities, packings=["mma16"], roundings=["nearest"])

    def kernel(problem: Problem) -> Tensor:
        tile = random.Random(f"{number} {problem}").choice(choices)  # the same one whenever the problem is tried again
        return run(problem.spec, problem.x, problem.parts, [], [problem.n], problem.k, tile)

    given = problems(found.filter(supported).map(str), tuple(OUT_DTYPES))
    with interpret():
        return fuzz(kernel, given, examples=50, start=number)


def products(number: int) -> int:
    """Matmuls of every kind on sums without a rounding, to the last bit: bytes by floats and by bytes, all ways and tiles."""
    import torch

    from qcompile.codegen.devices.triton import Tile, TritonLowering, packing, run
    from qcompile.codegen.devices.triton_decoded import ways
    from qcompile.codegen.spec import KernelSpec
    from qcompile.ir.formats import FORMATS
    from qcompile.ir.scheme import Scheme
    from qcompile.testing.exact_products import exact_product
    from qcompile.testing.interpret import interpret

    draw, tried = random.Random(number), 0
    acts = [
        "",
        "",
        "int8/token",
        "e4m3/token",
        "uint8/token:fp32+z",
        "int8/g256:fp32",
        "e4m3/g128:fp32",
        "int8/tensor:fp32",
    ]
    with interpret():
        while tried < 20:
            name, act = draw.choice(list(FORMATS)), draw.choice(acts)
            zero = draw.choice(["", "+z"]) if name.startswith("uint") else ""
            group = draw.choice([f"axis0:fp32{zero}", f"g{draw.choice([32, 64, 128, 256, 512])}:fp16{zero}"])
            activation = Scheme.parse(act) if act else None
            weight = Scheme.parse(f"{name}/{group}@{packing(activation)}")
            pair = {"segments": 2, "epilogue": "a0+a1"} if draw.random() < 0.3 else {}
            spec = KernelSpec(weight, activation, x=draw.choice(["f16", "bf16"]), y="f32", **pair)
            if not TritonLowering().supports(spec):
                continue
            m, n, k = draw.randint(1, 40), draw.randint(1, 80), draw.randint(2, 2048)
            rows, columns, units = draw.choice([16, 32, 64]), draw.choice([16, 32, 64]), draw.choice([1, 2, 4])
            way, natural = draw.choice(ways(spec)), draw.random() < 0.5
            tma, flat, depth = draw.random() < 0.5, draw.random() < 0.5, draw.choice([64, 128])
            tile = Tile(rows, columns, units, draw.randint(1, 4), 3, 4, way, depth, tma, flat, natural)
            told = f"round {number}, problem {tried}: {spec}, m={m} n={n} k={k}, {tile}"
            try:
                problem = exact_product(replace(spec, segments=1, epilogue=""), m, n, k, number)
            except QCError:  # some sizes leave no room
                continue
            parts = [*problem.parts] * spec.segments
            y = run(spec, problem.x, parts, [], [n] * spec.segments, k, tile)
            want = problem.want * spec.segments  # twice a number that is exact
            assert torch.equal(y, want), f"{told}: {int((y != want).sum())} of {y.numel()} elements are wrong"
            tried += 1
    return tried


def passes(stage: str) -> Callable[[int], int]:
    """The passes of a stage, one after the other, on random models; another recipe each time."""

    def look(number: int) -> int:
        kinds, choose = {"kinds": POINTWISE} if stage == "post" else {}, random.Random(number).choice
        options = {"recipe": choose(RECIPES), "policy": choose(["memory", "speed"])}
        some = [item for item in DEFAULT_PASSES if item.stage == stage]
        return fuzz(some, models(**kinds), examples=10, start=number, options=options)

    return look


def compiled(number: int) -> int:
    """Models compiled for this processor, every kernel compared with its reference."""
    some = [item for item in DEFAULT_PASSES if item.stage == "dynamo"]
    options = {"recipe": random.Random(number).choice(RECIPES[1:]), "policy": "memory"}
    return fuzz(some, models(), examples=3, start=number, options=options, compiled=True)


@dataclass(frozen=True)
class Kind:
    """What is looked at.

    Attributes:
        what: in words. share: of the time, that it gets. needs: a package without which there is none.
        look: one round of a number; how many were tried.
    """

    what: str
    share: float
    look: Callable[[int], int]
    needs: str = ""


KINDS = {
    "kernels": Kind("problems for kernels", 0.25, kernels, "triton"),
    "products": Kind("products without a rounding", 0.2, products, "triton"),
    "dynamo": Kind("models for the passes on Dynamo's graphs", 0.25, passes("dynamo")),
    "post": Kind("models for the passes on functional graphs", 0.15, passes("post")),
    "compiled": Kind("models compiled with every kernel verified", 0.15, compiled),
}


def main(arguments: Sequence[str] | None = None, kinds: Mapping[str, Kind] = KINDS) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0, help="no turn begins later")
    parser.add_argument(
        "--seed", type=int, default=random.randrange(2**30), help="number of the first round of each kind"
    )
    parser.add_argument("--only", choices=list(kinds), help="one kind: one turn of it at least")
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}, {chosen.seconds:.0f} seconds", flush=True)
    asked = {name: kind for name, kind in kinds.items() if chosen.only in (None, name)}
    there = [name for name, kind in asked.items() if not kind.needs or importlib.util.find_spec(kind.needs)]
    tried, turns, spent = dict.fromkeys(asked, 0), dict.fromkeys(asked, 0), dict.fromkeys(asked, 0.0)
    began = time.monotonic()
    while there and (time.monotonic() - began < chosen.seconds or (chosen.only and not turns[chosen.only])):
        name = min(there, key=lambda name: spent[name] / asked[name].share)
        number, start = chosen.seed + turns[name], time.monotonic()
        try:
            tried[name] += asked[name].look(number)
        except Exception:
            print(f"repeat it: python tests/fuzz.py --only {name} --seed {number} --seconds 0", flush=True)
            raise
        turns[name] += 1
        spent[name] += time.monotonic() - start
    for name, kind in asked.items():
        if tried[name]:
            print(f"{tried[name]} {kind.what} in {spent[name]:.0f} seconds, nothing wrong")
        elif name in there:
            print(f"no {kind.what}: the time was over before its first turn, give it more with --seconds")
        else:
            print(f"no {kind.what}: {kind.needs} is not installed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
