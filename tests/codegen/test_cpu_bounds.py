"""The derived bounds where arithmetic is at its worst: next to zero, and without multiply-add instructions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from qcompile.codegen.devices import cpu
from qcompile.codegen.devices.cpu import ISAS, detect_isa, run
from qcompile.codegen.devices.cpu_bounds import expected
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import quantize
from qcompile.ir.scheme import Scheme

RUNNABLE = ISAS[ISAS.index(detect_isa()) :]
# Sums that wait for a scale and sums that do not, zero points, minimums, scales of x for a row, a group and none.
SCHEMES = [
    ("int4/g32:fp16", ""),
    ("uint5/axis0:fp32+z", ""),
    ("uint4/g64:fp16+m", ""),
    ("nf4/g64:fp16", ""),
    ("e2m1/g32:e8m0", "int8/token"),
    ("int8/g64:fp16", "int8/g32:fp32"),
    ("uint4/g64:fp16+z", "int8/token"),
]


@contextmanager
def flushing(flush: bool) -> Iterator[None]:
    """Subnormal numbers count as zero in this thread, where the processor can do that."""
    if not torch.set_flush_denormal(flush):
        pytest.skip("this processor does not flush subnormal numbers")
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize(("weight", "act"), SCHEMES, ids=str)
def test_results_next_to_zero(weight: str, act: str, flush: bool, isa: str) -> None:
    """Results, factors and sums below the normal numbers, from small x, small weights and both."""
    spec, (n, k) = KernelSpec(Scheme.parse(weight), Scheme.parse(act) if act else None), (20, 100)
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(n, k, generator=generator), torch.randn(14, k, generator=generator)
    for of_w, of_x in [
        (0, -126),
        (0, -133),
        (0, -145),
        (-14, -110),
        (-10, -118),
        (-20, -126),
        (12, -140),
        (0, -100),
        (-14, 0),
    ]:
        parts = quantize(w * 2.0**of_w, spec.weight)
        for m in (1, 3, 14):
            some = x[:m] * 2.0**of_x
            want = expected(spec, some, parts, n, k)
            with flushing(flush):  # one thread does so little
                y = run(spec, some, parts, [], n, k, isa)
            assert ((y.double() - want.value).abs() <= want.bound).all(), (of_w, of_x, m)


def test_at_ordinary_sizes_the_bound_is_that_of_relative_errors() -> None:
    """What is added for numbers next to zero is not seen among others."""
    spec, (n, k) = KernelSpec(Scheme.parse("int8/g64:fp16"), Scheme.parse("int8/g32:fp32")), (20, 4096)
    parts, x = quantize(torch.randn(n, k), spec.weight), torch.randn(2, k)
    bounds = [expected(spec, x * scale, parts, n, k).bound / scale for scale in (1.0, 2.0**40)]
    assert torch.allclose(*bounds, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("weight", "act"), SCHEMES[1::2], ids=str)
def test_portable_kernels_without_multiply_add(weight: str, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without the instruction rounds products before it adds them."""
    build = cpu.load_cpp_kernel
    monkeypatch.setattr(cpu, "load_cpp_kernel", lambda types, text: build(types, f"#undef __FMA__\n{text}"))
    spec = KernelSpec(Scheme.parse(weight), Scheme.parse(act) if act else None)
    for m, n, k in ((1, 20, 70), (4, 33, 300), (19, 16, 1100)):
        parts, x = quantize(torch.randn(n, k), spec.weight), torch.randn(m, k)
        want = expected(spec, x, parts, n, k)
        assert ((run(spec, x, parts, [], n, k, "portable") - want.value).abs() <= want.bound).all()
