"""Generated Triton kernels on sums of thousands of terms, to the last bit: a bound on roundings would hide a wrong weight."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton import run
from qcompile.codegen.devices.triton_decoded import ways
from qcompile.codegen.tuning.triton import Tile
from qcompile.errors import QCError
from qcompile.ir.packing import pack_codes, unpack_codes
from qcompile.testing.exact_products import exact_product
from qcompile.testing.interpret import interpret
from tests.codegen.products import BYTES, SCHEMES, TILES, spec_of

K = 8190  # no tile, group or unit divides it
# A third of the formats with each way that scales meet them, and every kind of scale, zero and nesting.
CASES = [(scheme, "") for scheme in SCHEMES[::3] + SCHEMES[-14:]] + BYTES[::7] + BYTES[-26::3]
SHORT = {
    "int8/g64:fp32",
    "int8/g128:fp32",
}  # a scale for each few columns: its largest code leaves room for fewer of them
OTHER = [
    ("int4/g128:fp16", "", Tile(way="vendor")),
    ("uint4/g32:fp16+m", "", Tile(way="vendor")),
    ("int8/axis0", "int8/token", Tile(way="vendor")),
    ("e4m3/axis0", "e4m3/token", Tile(way="vendor")),
    ("uint4/axis0:fp32+z", "int8/token", Tile(32, 32, 1, 1, 3, 4, "own", 128, True, False)),
    ("int8/axis0", "int8/token", Tile(16, 32, 1, 1, 3, 4, "own", 64, False, True)),
    ("int4/g128:fp16", "int8/token", Tile(16, 32, 1, 1, 3, 4, "own", 128, True, True)),
    ("e4m3/b128x128:fp32", "e4m3/g128:fp32", Tile(32, 16, 1, 1, 3, 4, "own", 128, False, False)),
]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


@pytest.mark.parametrize(("scheme", "act"), dict.fromkeys(CASES))
def test_long_sums(scheme: str, act: str) -> None:
    number = CASES.index((scheme, act))
    spec, k = spec_of(scheme, ("bf16", "f16")[number % 2], act=act, y="f32"), K // 4 if act in SHORT else K
    problem = exact_product(spec, 4, 20, k, number)
    assert (problem.x != 0).sum() >= 4 * 32
    assert torch.equal(run(spec, problem.x, problem.parts, [], [20], k, TILES[number % len(TILES)]), problem.want)


@pytest.mark.parametrize(("scheme", "act", "tile"), OTHER)
def test_long_sums_of_decoded_weights(scheme: str, act: str, tile: Tile) -> None:
    spec = spec_of(scheme, "bf16", act=act, y="f32")
    assert tile.way in ways(spec)
    problem = exact_product(spec, 33, 20, K)
    assert torch.equal(run(spec, problem.x, problem.parts, [], [20], K, tile), problem.want)


def test_one_wrong_weight_is_seen() -> None:
    """One of 8190 codes, off by one."""
    spec = spec_of("uint4/g32:fp16+m", "f16", y="f32")
    problem = exact_product(spec, 4, 20, K)
    codes = unpack_codes(problem.parts[0], 4, 20, K, "mma16")
    column = int(problem.x[0].nonzero()[-1])
    codes[7, column] ^= 1
    y = run(spec, problem.x, (pack_codes(codes, 4, "mma16"), *problem.parts[1:]), [], [20], K)
    assert torch.equal(y == problem.want, (torch.arange(20) != 7) | (problem.x[:, column : column + 1] == 0))


def test_where_no_product_is_exact() -> None:
    """Each of 128 groups of x has a 127, and scales of the weight differ by up to 8."""
    with pytest.raises(QCError, match="too many digits"):
        exact_product(spec_of("int8/g64:fp16", "bf16", act="int8/g64:fp32"), 2, 5, K)
