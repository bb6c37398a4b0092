"""CPU kernels against the exact product, over formats, shapes, strides, dtypes and instruction sets.

Every bound is computed by `qcompile.codegen.devices.cpu_bounds` from the kernel's own arithmetic. One kernel
is built per (spec, instruction set) and then meets many shapes, since a build takes seconds and a call takes
microseconds.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qcompile.codegen.devices.cpu import ISAS, CpuLowering, detect_isa, run
from qcompile.codegen.devices.cpu_bounds import expected
from qcompile.codegen.spec import LONG_K, KernelSpec
from qcompile.compat import load_cpp_kernel
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import MatmulSpec, quantize_rows, reference_qmm
from qcompile.ir.packing import pack_codes, pack_scales, unpack_codes
from qcompile.ir.scheme import Scheme

RUNNABLE = ISAS[ISAS.index(detect_isa()) :]  # what this machine can run, the best one first


def spec_of(weight: str, act: str = "", **more: object) -> KernelSpec:
    return KernelSpec(Scheme.parse(weight), Scheme.parse(act) if act else None, **more)  # type: ignore[arg-type]


# Every arithmetic, zero and scale form, and every plane split at least once.
SPECS = [
    spec_of("int4/g32:fp16"),
    spec_of("int8/axis0"),
    spec_of("uint4/g64:fp16+m"),
    spec_of("uint5/axis0:fp32+z"),
    spec_of("nf4/g64:fp16"),
    spec_of("e4m3/axis0"),
    spec_of("int4/g32:fp16", "int8/token"),
    spec_of("int8/axis0", "int8/token"),
    spec_of("uint4/g64:fp16+z", "int8/token"),
    spec_of("uint3/g96:bf16+m", "int8/token"),
    spec_of("e2m1/g32:e8m0", "int8/token"),
    spec_of("int8/g64:fp16", "int8/g32:fp32"),
    spec_of("uint5/axis0:fp32+z", "int8/g64:fp32"),
    spec_of("uint4/g32:fp16+m", "int8/g32:fp32"),
]
# Formats that share the code paths above: the best instruction set is enough.
MORE_SPECS = [
    spec_of("ternary/tensor"),
    spec_of("binary/axis0", "int8/token"),
    spec_of("int6/g64:fp16"),
    spec_of("uint7/g128:pow2", "int4/token"),
    spec_of("uint8/axis0:fp32+m", "int8/token"),
    spec_of("uint2/g32:fp16+z"),
    spec_of("e3m2/g32:e8m0"),
    spec_of("e2m3/tensor", "int8/token"),
    spec_of("e5m2/axis0"),
    spec_of("nf4/axis0", "int8/g96:fp32"),
    spec_of("uint4/g192:fp16+z", "int4/g96:fp32"),
]
FEW_FIT = ("int6/g64:fp16", "int7/g64:fp16")
# The portable fragments have one kind of sum, so half of the specs reach all of their code.
CASES = [(s, isa) for s in SPECS for isa in RUNNABLE if isa != "portable"]
CASES += [(s, "portable") for s in SPECS[::2]] + [(s, RUNNABLE[0]) for s in MORE_SPECS]
# AVX2 sums 16-bit pairs for as long as they fit: how long depends on the bits of the codes, and on the digits.
CASES += [(spec_of(w, a), "avx2") for w in FEW_FIT for a in ("", "int8/token") if "avx2" in RUNNABLE]
CASES = list(dict.fromkeys(CASES))
IDS = [f"{isa}-{s}".replace(" ", "_") for s, isa in CASES]


@pytest.fixture(scope="module", autouse=True)
def built(request: pytest.FixtureRequest) -> None:
    """Build what the selected tests need with all cores; each test then finds its kernel in the code cache."""
    wanted = set()
    for item in request.session.items:
        params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if item.path == request.path and {"spec", "isa"} <= params.keys():
            wanted.add((params["spec"], params["isa"]))

    def build(case: tuple[KernelSpec, str]) -> None:
        kernel = CpuLowering(case[1]).emit(case[0])
        load_cpp_kernel(kernel.argtypes, kernel.source)

    with ThreadPoolExecutor() as pool:
        list(pool.map(build, wanted))


def weight(n: int, k: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) + 0.3 * torch.randn(n, 1, generator=generator)


@pytest.mark.parametrize(("spec", "isa"), CASES, ids=IDS)
# too_slow: the first example builds the kernel
@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    m=st.one_of(st.integers(0, 9), st.integers(10, 40)),
    n=st.integers(1, 50),
    k=st.one_of(st.integers(1, 70), st.integers(90, 300), st.just(1100)),
    exponent=st.sampled_from([0, 0, -60, 50]),
    pad=st.integers(0, 3),
    seed=st.integers(0, 9),
)
def test_product(spec: KernelSpec, isa: str, m: int, n: int, k: int, exponent: int, pad: int, seed: int) -> None:
    torch.manual_seed(seed)
    parts = quantize(weight(n, k, seed), spec.weight)
    x = torch.randn(m, k + pad)[:, :k] * 2.0**exponent
    if m > 2:
        x[m // 2] = 0
    y = run(spec, x, parts, [], n, k, isa)
    want = expected(spec, x, parts, n, k)
    assert y.shape == (m, n)
    assert ((y - want.value).abs() <= want.bound).all()
    if m > 2:
        assert (y[m // 2] == 0).all()


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ties_of_short_activations_round_as_the_reference_does(dtype: torch.dtype, isa: str) -> None:
    """Half of a row's largest value is 63.5 steps: one rounding more in the factor decides the other way."""
    spec = spec_of(
        "int8/axis0", "int8/token", x={torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    )
    top = 1 + torch.arange(128) / 128  # every bf16 mantissa
    x = torch.stack((top, top / 2, -top / 2, top / 4), 1).to(dtype)
    parts = quantize(weight(16, 4, 1), spec.weight)
    want = expected(spec, x, parts, 16, 4)
    assert ((run(spec, x, parts, [], 16, 4, isa) - want.value).abs() <= want.bound).all()


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("spec", [SPECS[4], SPECS[6], SPECS[-2]], ids=str)
def test_many_rows(spec: KernelSpec, isa: str) -> None:
    """More rows than one stripe; the first of them also as rows of their own."""
    x, parts = torch.randn(1001, 100), quantize(weight(40, 100, 2), spec.weight)
    want, y = expected(spec, x, parts, 40, 100), run(spec, x, parts, [], 40, 100, isa)
    assert ((y - want.value).abs() <= want.bound).all()


def test_rows_beyond_the_scratch_memory() -> None:
    """Quantized rows are kept in pieces of 32 MB: a prompt that needs several."""
    spec = spec_of("int4/g32:fp16")
    x, parts = torch.randn(6000, 4096), quantize(weight(16, 4096, 3), spec.weight)
    want = expected(spec, x, parts, 16, 4096)
    assert ((run(spec, x, parts, [], 16, 4096) - want.value).abs() <= want.bound).all()


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("weight_scheme", ["int8/axis0", "uint5/axis0:fp32+z", "int4/tensor"])
def test_int8_sums_are_exact(weight_scheme: str, isa: str) -> None:
    """With one fp32 scale per row of the weight, the result is the integer sum and two roundings: bit for
    bit."""
    spec = spec_of(weight_scheme, "int8/token")
    for m, n, k in ((1, 20, 31), (5, 33, 2100), (27, 16, 260)):
        torch.manual_seed(m)
        x, parts = torch.randn(m, k), quantize(weight(n, k, 1), spec.weight)
        q, s = quantize_rows(x, spec.act)  # type: ignore[arg-type]
        codes = unpack_codes(parts[0], spec.weight.format.bits, n, k).long()
        zero = parts[2].reshape(-1, 1)[:n].long() if len(parts) > 2 else spec.weight.format.offset
        count = q.long() @ (codes - zero).T
        want = (count.float() * parts[1].reshape(1, -1)[:, :n]) * s
        assert torch.equal(run(spec, x, parts, [], n, k, isa), want)


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("act", ["", "int8/token", "int8/g32:fp32"])
def test_extreme_codes_do_not_saturate(act: str, isa: str) -> None:
    """Largest codes against largest activations: where 16-bit sums would overflow or 8-bit products
    saturate."""
    for name in ("int4/g32:fp16", "int8/axis0", *(FEW_FIT if isa == "avx2" else ())):
        spec = spec_of(name, act)
        bits, n, k = spec.weight.format.bits, 16, 512
        for code in (0, 2**bits - 1):
            codes = torch.full((n, k), code, dtype=torch.uint8)
            scale = torch.ones(n, -(-k // spec.weight.group_size(k)), dtype=spec.weight.scale.format.dtype)
            parts = [pack_codes(codes, bits), pack_scales(scale)]
            for x in (torch.full((3, k), 3.0), torch.full((20, k), -3.0)):
                want = expected(spec, x, parts, n, k)
                assert ((run(spec, x, parts, [], n, k, isa) - want.value).abs() <= want.bound).all()


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("act", ["int8/token", "int8/g512:fp32"])
def test_a_long_k_does_not_overflow(act: str, isa: str) -> None:
    """Largest codes and activations beyond the K where their int32 sum would overflow."""
    n, k = 16, 2 * LONG_K + 70
    what = MatmulSpec(Scheme.parse("uint8/axis0:fp32+z"), (n,), k, Scheme.parse(act))
    spec = KernelSpec.of(what, "f32", "f32")
    parts = [pack_codes(torch.full((n, k), 255, dtype=torch.uint8), 8)]
    parts += [pack_scales(torch.ones(n, 1)), pack_scales(torch.zeros(n, 1, dtype=torch.uint8))]
    for m in (1, 14):
        x = torch.full((m, k), 2.0)
        want = expected(spec, x, parts, n, k)
        assert 255.0 * 127 * k > 2**31
        assert ((run(spec, x, parts, [], n, k, isa) - want.value).abs() <= want.bound).all()


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("spec", [SPECS[0], SPECS[4], SPECS[6], SPECS[-1]], ids=str)
def test_a_bad_row_is_nan_and_others_are_untouched(spec: KernelSpec, isa: str) -> None:
    for m in (6, 20):
        x, parts = torch.randn(m, 100), quantize(weight(24, 100, 0), spec.weight)
        clean = run(spec, x, parts, [], 24, 100, isa)
        x[1, 99], x[3, 0], x[4, 40] = float("nan"), float("inf"), -float("inf")
        y = run(spec, x, parts, [], 24, 100, isa)
        bad = torch.zeros(m, dtype=torch.bool)
        bad[[1, 3, 4]] = True
        assert y[bad].isnan().all()
        assert torch.equal(y[~bad], clean[~bad])


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("act", ["int8/token", "int8/g64:fp32"])
def test_subnormal_rows_follow_the_reference(act: str, isa: str) -> None:
    """absmax so small that 127 / absmax overflows: the reference clamps the codes to -127, 0 and 127, or the scale."""
    spec = MatmulSpec(Scheme.parse("int8/axis0"), (16,), 64, Scheme.parse(act))
    x = torch.zeros(2, 64)
    x[0, 3], x[0, 5], x[1, 7] = 2.0**-140, -(2.0**-149), 1.0
    parts = quantize(torch.full((16, 64), 2.0**100), spec.weight)
    y = run(KernelSpec.of(spec, "f32", "f32"), x, parts, [], 16, 64, isa)
    assert torch.equal(y, reference_qmm(x, parts, [], spec))
    assert (y[0] == 0).all() or y[0].isfinite().all()


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
def test_segments_extras_and_dtypes(dtype: str, isa: str) -> None:
    """Merged segments (their boundary inside a vector), both kinds of extras, 16-bit x, y and extras."""
    torch_dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[dtype]
    unit = {"bf16": 2.0**-8, "f16": 2.0**-11}[dtype]
    n, k = (21, 40), 130
    what = MatmulSpec(Scheme.parse("int4/g64:fp16"), n, k, None, "acc*0.5+e0-e1", ("row", "mat"))
    for m in (1, 4, 19):
        x = torch.randn(m, k).to(torch_dtype)
        parts = [quantize(weight(size, k, i), what.weight) for i, size in enumerate(n)]
        extras = [torch.randn(sum(n)), torch.randn(m, sum(n) + 3).to(torch_dtype)[:, : sum(n)]]
        spec = KernelSpec.of(what, x.dtype, torch_dtype, [e.dtype for e in extras])
        y = run(spec, x, [p for part in parts for p in part], extras, n, k, isa)
        each = [expected(spec, x, part, size, k) for part, size in zip(parts, n, strict=True)]
        acc, bound = torch.cat([e.value for e in each], 1), torch.cat([e.bound for e in each], 1)
        want = acc * 0.5 + extras[0].double() - extras[1].double()
        size = acc.abs() + extras[0].abs() + extras[1].double().abs()
        assert y.dtype == torch_dtype
        # the sums' bound, three roundings to fp32 of the epilogue, one to the result's dtype (2^-25: half's
        # subnormals)
        allowed = bound + 3 * 2.0**-24 * (size + bound)
        assert ((y.double() - want).abs() <= allowed + unit * (want.abs() + allowed) + 2.0**-25).all()


@pytest.mark.parametrize("isa", RUNNABLE)
def test_pair_epilogue(isa: str) -> None:
    """silu(a0) * a1: |silu'| < 1.1, so the error is at most 1.1 |a1| b0 + |silu(a0)| b1 + 1.1 b0 b1 and
    roundings."""
    what = MatmulSpec(Scheme.parse("int8/axis0"), (37, 37), 96, Scheme.parse("int8/token"), "silu(a0)*a1+e0", ("mat",))
    for m in (1, 3, 26):
        x, extra = torch.randn(m, 96), torch.randn(m, 37)
        parts = [quantize(weight(37, 96, i), what.weight) for i in (3, 4)]
        spec = KernelSpec.of(what, x.dtype, x.dtype, [extra.dtype])
        y = run(spec, x, [p for part in parts for p in part], [extra], 37, 96, isa)
        a, b = (expected(spec, x, part, 37, 96) for part in parts)
        silu = torch.nn.functional.silu(a.value)
        want = silu * b.value + extra
        error = 1.1 * b.value.abs() * a.bound + silu.abs() * b.bound + 1.1 * a.bound * b.bound
        # silu is good to 4 units (3 of the sigmoid, 1 of the product); then one product and one sum
        roundings = 6 * 2.0**-23 * (silu * b.value).abs() + 2.0**-23 * want.abs()
        assert ((y - want).abs() <= error + roundings + 1e-37).all()


@pytest.mark.parametrize(
    ("weight_scheme", "act", "word"),
    [
        ("int4/g16:fp16", "", "multiple of 32"),
        ("int4/b32x32", "", "b32x32"),
        ("int4/axis1", "", "axis1"),
        ("e2m1/g16:e4m3/tensor:fp32", "", "g16/tensor"),
        ("int4/g32:fp16@rows", "", "rows"),
        ("int4/g32:fp16", "uint8/token:fp32+z", "activation"),
        ("int4/g32:fp16", "e4m3/token", "activation"),
        ("int4/g32:fp16", "int8/g64:fp32", "divide"),
        ("int4/axis0", "int8/g16:fp32", "activation"),
        ("int4/axis0", "int8/g32:fp16", "activation"),
        ("int4/axis0", "int8/token~floor", "activation"),
        ("uint8/g131072:fp32", "int8/token", "overflow"),
    ],
)
def test_refusals_have_a_reason(weight_scheme: str, act: str, word: str) -> None:
    verdict = CpuLowering("portable").supports(spec_of(weight_scheme, act))
    assert not verdict
    assert word in verdict.reason
