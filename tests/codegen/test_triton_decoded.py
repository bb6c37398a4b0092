"""Products of 16-bit floats over a weight that was decoded before, by the vendor's library."""

from __future__ import annotations

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
NAMES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction", "allow_fp16_accumulation")


def said() -> list[bool]:
    return [getattr(SETTINGS, name) for name in NAMES]


@pytest.fixture
def allowing() -> Iterator[None]:
    """Short sums of both types are allowed: of parts of a sum they are by default."""
    before = said()
    for name in NAMES:
        setattr(SETTINGS, name, True)
    yield
    for name, value in zip(NAMES, before, strict=True):
        setattr(SETTINGS, name, value)


@pytest.mark.usefixtures("allowing")
def test_sums_in_fp32_for_a_while() -> None:
    """What was allowed is again, also after an error; what a user forbids stays forbidden."""
    with pytest.raises(RuntimeError, match="too large"), compat.float32_sums():  # noqa: PT012
        assert said() == [False] * 3
        raise RuntimeError("too large")
    assert said() == [True] * 3
    SETTINGS.allow_bf16_reduced_precision_reduction = (False, False)  # no split sums at all
    with compat.float32_sums():
        pass
    assert not SETTINGS.allow_bf16_reduced_precision_reduction_split_k


@pytest.mark.usefixtures("allowing")
def test_products_leave_the_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled functions of other threads are guarded by them. fp16 whose sums are allowed in fp16 has no other result."""
    made, seen = torch.mm, []

    def noted(*operands: Tensor, **more: Any) -> Tensor:
        seen.append((said(), more.pop("out_dtype", None)))
        return made(*operands, **more) if isinstance(operands[0], Tensor) else torch.zeros(2, 2)

    monkeypatch.setattr(torch, "mm", noted)
    spec = spec_of("int4/axis0", "f16")
    run(spec, torch.randn(3, 64).half(), quantize(weight(16, 64, 0), spec.weight), [], [16], 64, VENDOR)
    for dtype in (torch.float16, torch.bfloat16):
        there: Any = SimpleNamespace(dtype=dtype, device=torch.device("cuda"))
        assert compat.mm_float32(there, there).dtype == torch.float32
    assert seen == [([True] * 3, None), ([True] * 3, None), ([True] * 3, torch.float32)]
