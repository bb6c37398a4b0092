"""Pairs of weights (silu(gate) * up) in one kernel: what the largest shipped tiles become for two sums, in machine code."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton import TritonLowering
from qcompile.testing.compile_for import TARGETS
from tests.codegen.test_triton_code import BYTES_MMA, MMA, build, spec_of, tiles_of

FLOATS = [
    "int4/g128:fp16",
    "uint4/g32:fp16+m",
    "int8/axis0",
    "nf4/g64:fp16",
    "e3m2/axis0",
    "int3/g64:fp16",
    "int2/g256:fp16",
]
BYTES = [
    ("uint4/g128:fp16+z", "int8/token"),
    ("int8/axis0", "int8/token"),
    ("int3/axis0", "int8/token"),
    ("e4m3/axis0", "e4m3/token"),
    ("e4m3/b128x128:fp32", "e4m3/g128:fp32"),
    ("uint4/g128:fp16+z", "e4m3/g128:fp32"),
]


@pytest.mark.parametrize("target", [target for target in TARGETS if target != "sm_86"])  # what sm_89 has
@pytest.mark.parametrize(("scheme", "act"), [*((scheme, "") for scheme in FLOATS), *BYTES])
def test_pairs_on_every_target(scheme: str, act: str, target: str) -> None:
    spec = replace(spec_of(scheme, act), segments=2, epilogue="silu(a0)*a1")
    if not TritonLowering(architecture=target).supports(spec):
        assert BYTES_MMA[target][1] is None
        return
    wanted = BYTES_MMA[target]["e4m3" in act] if act else MMA[target]
    (report,) = build(spec, tiles_of(target, spec)[-1], target).values()
    assert report.fits, report
    # Two weights of 3 bits, 512 columns of each with eight scales, are what 255 registers just do not hold.
    edge = scheme == "int3/g64:fp16" and MMA[target] == "HMMA"
    assert report.spill_bytes <= (64 if edge else 0), report
    assert report.loop.widest_of("W0") == report.loop.widest_of("W1") == 16
    assert wanted is not None
    assert all(name.startswith(wanted) for name in report.loop.mma)


@pytest.mark.parametrize("scheme", ["binary/axis0", "binary/g64:fp16"])
def test_pairs_of_bits_fit_where_sums_have_512_columns(scheme: str) -> None:
    spec = replace(spec_of(scheme), segments=2, epilogue="silu(a0)*a1")
    (report,) = build(spec, tiles_of("sm_100", spec)[-1], "sm_100").values()
    assert report.fits, report


@pytest.mark.parametrize("target", ["", *TARGETS])
def test_pairs_in_fp32_have_no_kernel(target: str) -> None:
    """A thread has too few registers; two results of one kernel are combined behind it."""
    spec = replace(spec_of("int4/g128:fp16", dtype="f32"), segments=2, epilogue="silu(a0)*a1")
    assert "fp32" in TritonLowering(architecture=target).supports(spec).reason
    assert TritonLowering(architecture=target).supports(replace(spec, epilogue=""))
