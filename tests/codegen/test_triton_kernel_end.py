"""What Triton kernels do with their sums: segments, extras, epilogues, values that are not finite; in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton import Tile, run
from qcompile.ir.codec import quantize
from qcompile.ir.packing import pack_codes, pack_scales
from qcompile.testing.interpret import interpret
from tests.codegen.products import DTYPES, TILES, check_pair, check_segments, spec_of, weight


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_segments_and_extras(dtype: str, tile: Tile) -> None:
    check_segments("int4/g128:fp16", dtype, 19, tile)


@pytest.mark.parametrize("tile", TILES[1:], ids=str)
def test_pair_epilogue(tile: Tile) -> None:
    check_pair("uint4/g32:fp16+m", "f32", 18, tile)


EPILOGUES = {
    "exp(acc)": torch.exp,
    "log(abs(acc)+1)": lambda v: (v.abs() + 1).log(),
    "tanh(acc)": torch.tanh,
    "erf(acc)": torch.erf,
    "sigmoid(acc)": torch.sigmoid,
    "relu(acc)": torch.relu,
    "silu(acc)": torch.nn.functional.silu,
    "-acc*0.5": lambda v: -v * 0.5,
    "sqrt(abs(acc))": lambda v: v.abs().sqrt(),
    "rsqrt(acc*acc+1)": lambda v: (v * v + 1).rsqrt(),
    "maximum(acc,1.5)/3": lambda v: v.clamp_min(1.5) / 3,
    "minimum(acc,0.5)-2": lambda v: v.clamp_max(0.5) - 2,
}


@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_epilogues(epilogue: str) -> None:
    """Sums of small integers are exact, so what is left are the functions: at most three operations, each within 4 units of
    fp32 of its value; exp and erf multiply an error of their argument by no more than the value and 1.2."""
    spec = spec_of("int4/axis0", "f16", y="f32", epilogue=epilogue)
    k = 128
    codes = torch.randint(0, 16, (16, k), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    parts = [pack_codes(codes, 4, "mma16"), pack_scales(torch.full((16, 1), 0.125), "mma16")]
    x = torch.zeros(3, k, dtype=torch.float16)
    x[:, :8] = torch.tensor([[1.0], [-0.5], [0.25]])
    acc = x.double() @ ((codes.double() - 8) * 0.125).T
    got, want = run(spec, x, parts, [], [16], k, Tile()).double(), EPILOGUES[epilogue](acc)
    assert ((got - want).abs() <= 12 * 2.0**-23 * (want.abs() + 1e-3)).all()


@pytest.mark.parametrize("name", ["relu(acc)", "maximum(acc,e0)", "minimum(acc,e0)"])
def test_nan_goes_through(name: str) -> None:
    spec = spec_of("int4/axis0", "f16", epilogue=name, extras=(("row", "f32"),) if "e0" in name else ())
    parts = quantize(weight(16, 64, 0), spec.weight)
    x = torch.ones(2, 64, dtype=torch.float16)
    x[0, 3] = float("nan")
    y = run(spec, x, parts, [torch.zeros(16)] if "e0" in name else [], [16], 64, Tile())
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("scheme", ["int4/axis0", "uint4/g32:fp16+m", "int8/g64:fp16", "nf4/g64:fp16"])
def test_a_bad_row_is_not_finite_and_others_are_untouched(scheme: str) -> None:
    spec = spec_of(scheme, "bf16")
    parts = quantize(weight(24, 200, 0), spec.weight)
    x = torch.randn(6, 200).bfloat16()
    clean = run(spec, x, parts, [], [24], 200, Tile())
    x[1, 99], x[3, 0], x[4, 40] = float("nan"), float("inf"), -float("inf")
    y = run(spec, x, parts, [], [24], 200, Tile())
    bad = torch.tensor([False, True, False, True, True, False])
    assert not y[bad].isfinite().any()
    assert torch.equal(y[~bad], clean[~bad])
