"""Products of 16-bit floats over a weight that was decoded before, by the vendor's library."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton import Tile, run
from qcompile.codegen.devices.triton_bounds import expected
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.testing.interpret import interpret
from tests.codegen.products import SCHEMES, allowed, check, check_segments, spec_of, weight

VENDOR = Tile(way="vendor")


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    x=st.sampled_from(["f16", "bf16"]),
    m=st.integers(1, 20),
    n=st.integers(1, 70),
    k=st.integers(1, 70) | st.sampled_from([130, 600]),
    seed=st.integers(0, 9),
)
def test_product_with_a_decoded_weight(scheme: str, x: str, m: int, n: int, k: int, seed: int) -> None:
    spec = spec_of(scheme, x)
    parts = quantize(weight(n, k, seed), spec.weight)
    torch.manual_seed(seed)
    values = torch.randn(m, k + 3).to(OUT_DTYPES[x])[:, :k]
    check(spec, values, parts, n, k, VENDOR, rounded=True)


def test_the_end_of_a_product_with_a_decoded_weight() -> None:
    """Segments, extras and a pair give what the fused kernel gives, but for the roundings of the weight."""
    check_segments("int4/g128:fp16", "bf16", 19, VENDOR, rounded=True)
    n, k = 21, 260
    torch.manual_seed(1)
    x = torch.randn(19, k).bfloat16()
    paired = spec_of("int4/g128:fp16", "bf16", y="f32", segments=2, epilogue="maximum(a0,a1)")
    both = [part for seed in (0, 5) for part in quantize(weight(n, k, seed), paired.weight)]
    one, other = (expected(paired, x, both[i : i + 2], n, k, rounded=True) for i in (0, 2))
    y = run(paired, x, both, [], [n, n], k, VENDOR)
    want, bound = torch.maximum(one.value, other.value), torch.maximum(one.bound, other.bound)
    assert ((y.double() - want).abs() <= allowed(want, bound, "f32")).all()


SETTINGS = torch.backends.cuda.matmul
NAMES = {
    torch.float16: ("allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation"),
    torch.bfloat16: ("allow_bf16_reduced_precision_reduction",),
}


def said(dtype: torch.dtype) -> list[bool]:
    return [getattr(SETTINGS, name) for name in NAMES[dtype]]


@pytest.fixture
def allowing() -> Iterator[None]:
    """Short sums of both types are allowed: of parts of a sum they are by default."""
    names = [name for each in NAMES.values() for name in each]
    before = [getattr(SETTINGS, name) for name in names]
    for name in names:
        setattr(SETTINGS, name, True)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(SETTINGS, name, value)


@pytest.mark.usefixtures("allowing")
@pytest.mark.parametrize("x", ["f16", "bf16"])
def test_the_library_adds_in_fp32(x: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is allowed: bounds know of no sums in 16 bits. What was allowed is again, also after an error."""
    spec, dtype, made, seen = spec_of("int4/axis0", x), OUT_DTYPES[x], torch.mm, []

    def noted(*operands: Tensor, **more: object) -> Tensor:
        seen.append((said(dtype), more.get("out_dtype")))
        if "out" not in more:
            raise RuntimeError("too large")
        return made(*operands, **more)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "mm", noted)
    run(spec, torch.randn(3, 64).to(dtype), quantize(weight(16, 64, 0), spec.weight), [], [16], 64, VENDOR)
    assert seen.pop() == ([False] * len(NAMES[dtype]), None)
    assert said(dtype) == [True] * len(NAMES[dtype])
    on_a_gpu: Any = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
    with pytest.raises(RuntimeError, match="too large"):
        compat.mm_float32(on_a_gpu, on_a_gpu)
    assert seen == [([False] * len(NAMES[dtype]), torch.float32)]
    assert said(dtype) == [True] * len(NAMES[dtype])


@pytest.mark.usefixtures("allowing")
def test_what_a_user_forbids_stays_forbidden() -> None:
    a = torch.ones(2, 2, dtype=torch.bfloat16)
    for value in (False, (False, False)):  # the second: no split sums at all
        SETTINGS.allow_bf16_reduced_precision_reduction = value
        compat.mm_float32(a, a, out=torch.empty_like(a))
        found = SETTINGS.allow_bf16_reduced_precision_reduction, SETTINGS.allow_bf16_reduced_precision_reduction_split_k
        assert found == (False, value is False)


@pytest.mark.usefixtures("allowing")
def test_two_threads_that_multiply_restore_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting is of the process: a product in one thread ends while another one's begins."""
    dtype, made, seen = torch.bfloat16, torch.mm, []
    first, second = threading.Event(), threading.Event()

    def slow(*operands: Tensor, **more: Any) -> Tensor:
        if threading.current_thread() is one:
            first.set()
            second.wait(0.3)
        else:
            second.set()
            one.join(0.3)
        seen.append(said(dtype))
        return made(*operands, **more)

    def product() -> None:
        a = torch.ones(2, 2, dtype=dtype)
        compat.mm_float32(a, a, out=torch.empty_like(a))

    monkeypatch.setattr(torch, "mm", slow)
    one, other = threading.Thread(target=product), threading.Thread(target=product)
    one.start()
    assert first.wait(10)
    other.start()
    one.join()
    other.join()
    assert seen == [[False], [False]]
    assert said(dtype) == [True]
