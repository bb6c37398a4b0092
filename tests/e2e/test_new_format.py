"""One entry in the table of formats is all that a new number format takes: everything else reads its fields."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qcompile.backend import fingerprint
from qcompile.codegen.devices import cpu, cpu_bounds
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import decode, encode, quantize
from qcompile.ir.formats import FORMATS, Format
from qcompile.ir.packing import pack_codes, unpack_codes
from qcompile.ir.qparams import QParams
from qcompile.ir.scheme import PACKINGS, Scheme
from tests.e2e.support import compiled, decoded, fp32_step, noise_bound
from tests.passes.graphs import context, dynamo_graph

ENTRY = Format("e2m2", "float", 5, exponent=2, mantissa=2)


@pytest.fixture(autouse=True)
def entry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, ENTRY.name, ENTRY)


def test_reference_and_packing() -> None:
    """Levels by the definition of the fields; every level is kept; every layout gives the codes back."""
    magnitudes = [(1 + f / 4) * 2.0 ** (e - 1) if e else f / 4 for e in range(4) for f in range(4)]
    assert list(ENTRY.values) == [*magnitudes, *(-v for v in magnitudes)]
    levels, one = ENTRY.levels(), QParams(torch.ones(1, 1))
    scheme = Scheme.parse("e2m2/tensor:fp32")
    codes = encode(levels.reshape(1, -1), scheme, one)
    assert torch.equal(decode(codes, scheme, one), levels.reshape(1, -1))
    everything = torch.arange(32, dtype=torch.uint8).repeat(20, 5)
    for packing in PACKINGS:
        assert torch.equal(unpack_codes(pack_codes(everything, 5, packing), 5, 20, 160, packing), everything)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(m=st.integers(1, 20), n=st.integers(1, 40), k=st.integers(1, 200), seed=st.integers(0, 9))
def test_cpu_kernel(m: int, n: int, k: int, seed: int) -> None:
    torch.manual_seed(seed)
    spec = KernelSpec(Scheme.parse("e2m2/g32:fp16"))
    x, parts = torch.randn(m, k), quantize(torch.randn(n, k), spec.weight)
    want = cpu_bounds.expected(spec, x, parts, n, k)
    assert ((cpu.run(spec, x, parts, [], n, k) - want.value).abs() <= want.bound).all()


def test_compiled() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(96, 40), nn.GELU(), nn.Linear(40, 24)).eval(), torch.randn(7, 96)
    exact = decoded(model, "e2m2/g32:fp16")
    with torch.no_grad():
        error = (compiled(model, "e2m2/g32:fp16")(x) - exact(x)).abs().max()
    assert 0 < error <= noise_bound(exact, x, step=fp32_step(96))


def test_triton_kernel() -> None:
    pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")
    from qcompile.codegen.devices.triton import run
    from qcompile.testing.fuzz import fuzz
    from qcompile.testing.interpret import interpret
    from qcompile.testing.problems import Problem, problems

    def kernel(problem: Problem) -> Tensor:
        return run(problem.spec, problem.x, problem.parts, [], [problem.n], problem.k)

    torch.manual_seed(0)
    model, x = nn.Linear(300, 24).bfloat16().eval(), torch.randn(7, 300).bfloat16()
    with interpret(), torch.no_grad():
        fuzz(kernel, problems(st.sampled_from(["e2m2/axis0@mma16", "e2m2/g32:fp16@mma16"])), examples=10)
        out = compiled(model, "e2m2/axis0")(x)
    exact = decoded(model.double(), "e2m2/axis0")
    # The decoded weight is exact in 16 bits; the sum is rounded to bf16 once, and its bias added before that.
    want = exact(x.double())
    assert ((out.double() - want).abs() <= 2.0**-8 * want.abs() + noise_bound(exact, x, step=308 * 2.0**-23)).all()


def test_an_entry_is_part_of_the_key_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry more, of another meaning or none, is another key: in another process the name may mean something else."""
    ctx = context(*dynamo_graph(lambda x: x + 1, torch.ones(3)), recipe="e2m2/g32:fp16")
    keys = {fingerprint((), ctx)}
    monkeypatch.setitem(FORMATS._entries, ENTRY.name, replace(ENTRY, exponent=3, mantissa=1))
    keys.add(fingerprint((), ctx))
    monkeypatch.delitem(FORMATS._entries, ENTRY.name)
    keys.add(fingerprint((), ctx))
    assert len(keys) == 3
