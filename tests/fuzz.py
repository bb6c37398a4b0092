"""Look for wrong kernels and wrong passes as long as asked: `make fuzz SECONDS=600`. Every run tries other problems."""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from collections.abc import Callable

from qcompile.backend import DEFAULT_PASSES
from qcompile.testing.fuzz import fuzz
from qcompile.testing.graphs import models
from qcompile.testing.strategies import schemes

RECIPES = ("none", "int8/axis0:fp32", "int4/g32:fp16", "uint4/g32:fp16+z", "nf4/g32:fp16", "e4m3/axis0:fp32")
POINTWISE = ("linear", "gated", "point", "norm")  # what the late passes look at


def kernels(seconds: float, seed: int) -> int:
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
    tiles = random.Random(seed)

    def kernel(problem: Problem) -> Tensor:
        return run(problem.spec, problem.x, problem.parts, [], [problem.n], problem.k, tiles.choice(choices))

    given = problems(found.filter(supported).map(str), tuple(OUT_DTYPES))
    with interpret():
        return fuzz(kernel, given, examples=50, seconds=seconds, start=seed)


def passes(stage: str) -> Callable[[float, int], int]:
    """The passes of a stage, one after the other, on random models; another recipe each time."""

    def look(seconds: float, seed: int) -> int:
        kinds = {"kinds": POINTWISE} if stage == "post" else {}
        rounds, tried, began = random.Random(seed), 0, time.monotonic()
        while not tried or time.monotonic() - began < seconds:
            options = {"recipe": rounds.choice(RECIPES), "policy": rounds.choice(["memory", "speed"])}
            some = [item for item in DEFAULT_PASSES if item.stage == stage]
            tried += fuzz(some, models(**kinds), examples=10, start=rounds.randrange(2**30), options=options)
        return tried

    return look


def compiled(seconds: float, seed: int) -> int:
    """Models compiled for this processor, every kernel compared with its reference."""
    some = [item for item in DEFAULT_PASSES if item.stage == "dynamo"]
    options = {"recipe": random.Random(seed).choice(RECIPES[1:]), "policy": "memory"}
    return fuzz(some, models(), examples=3, seconds=seconds, start=seed, options=options, compiled=True)


# What is looked at, and the share of the time that it gets.
PARTS: dict[str, tuple[Callable[[float, int], int], float]] = {
    "problems for kernels": (kernels, 0.4),
    "models for the passes on Dynamo's graphs": (passes("dynamo"), 0.3),
    "models for the passes on functional graphs": (passes("post"), 0.15),
    "models compiled with every kernel verified": (compiled, 0.15),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**30), help="number of the first round")
    chosen = parser.parse_args()
    print(f"seed {chosen.seed}, {chosen.seconds:.0f} seconds", flush=True)
    for what, (look, share) in PARTS.items():
        if look is kernels and importlib.util.find_spec("triton") is None:
            print(f"no {what}: triton is not installed", flush=True)
            continue
        began = time.monotonic()
        tried = look(share * chosen.seconds, chosen.seed)
        print(f"{tried} {what} in {time.monotonic() - began:.0f} seconds, nothing wrong", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
