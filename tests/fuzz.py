"""Look for wrong kernels as long as asked: `make fuzz SECONDS=600`. Every run tries other problems."""

from __future__ import annotations

import argparse
import random
import sys
import time

from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen.devices.triton import Tile, TritonLowering, run
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.granularity import Nested, PerAxis, PerGroup, PerTensor
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.scheme import Scheme
from qcompile.testing.fuzz import fuzz
from qcompile.testing.interpret import interpret
from qcompile.testing.problems import Problem, problems
from qcompile.testing.strategies import schemes

TILES = [Tile(), Tile(units=2, columns=32), Tile(splits=3), Tile(rows=32, columns=16, units=4, splits=2)]


GROUPS = [PerGroup(size) for size in (16, 32, 48, 64, 128, 192, 256, 512)]
NESTED = [Nested(group, outer) for group in GROUPS[:5] for outer in (PerTensor(), PerAxis(0), PerGroup(4 * group.size))]


def supported(scheme: Scheme) -> bool:
    return bool(TritonLowering().supports(KernelSpec(scheme)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=random.randrange(2**30), help="number of the first round")
    chosen = parser.parse_args()
    granularities = st.sampled_from([PerTensor(), PerAxis(0), *GROUPS, *NESTED])
    found = schemes(granularities=granularities, packings=["mma16"], roundings=["nearest"])
    spellings = found.filter(supported).map(str)
    tiles = random.Random(chosen.seed)

    def kernel(problem: Problem) -> Tensor:
        return run(problem.spec, problem.x, problem.parts, [], [problem.n], problem.k, tiles.choice(TILES))

    print(f"seed {chosen.seed}, {chosen.seconds:.0f} seconds", flush=True)
    began = time.monotonic()
    with interpret():
        tried = fuzz(
            kernel, problems(spellings, tuple(OUT_DTYPES)), examples=50, seconds=chosen.seconds, start=chosen.seed
        )
    print(f"{tried} problems in {time.monotonic() - began:.0f} seconds, every result within its bound")
    return 0


if __name__ == "__main__":
    sys.exit(main())
