"""The C++ kernel of scales: every bit is that of the plain-torch meaning, on every instruction set."""

from __future__ import annotations

import functools
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen import eager_fit
from qcompile.codegen.devices.cpu import ISAS, detect_isa
from qcompile.codegen.devices.cpu_fit import fit_text, why_no_kernel
from qcompile.codegen.eager_fit import Operator, equal, run, trial
from qcompile.compat import load_operator
from qcompile.errors import QCWarning
from qcompile.ir.estimators import chosen_qparams
from qcompile.ir.fit import by_halves
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.ops import reference_only
from qcompile.ir.scheme import Scheme

BEST = detect_isa()
RUNNABLE = ISAS[ISAS.index(BEST) :]
FIT = torch.ops.qcompile.fit_qparams
# All kinds of zeros, stored scales, signs, groups in registers and in memory, rows, and dtypes.
KERNELS = {
    "uint4/g32:fp16+m": ("mse", "f32"),
    "int4/g64:bf16": ("mse", "bf16"),
    "uint3/g16:fp32+z": ("mse", "f16"),
    "int8/axis0:fp32": ("mse", "f32"),
    "uint4/g48:fp16+z": ("minmax", "f32"),
    "uint2/axis0:bf16+m": ("minmax", "bf16"),
    "uint8/g128:fp16": ("mse", "f32"),
}


@functools.cache
def kernel(scheme: str, isa: str) -> Operator:
    fit, x = KERNELS[scheme]
    return cast("Operator", load_operator(fit_text(Scheme.parse(scheme), fit, x, isa)))


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(
        a.shape == b.shape and a.dtype == b.dtype and bool(equal(a, b).all()) for a, b in zip(got, want, strict=True)
    )


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("scheme", KERNELS if BEST else ())
def test_bits(scheme: str, isa: str) -> None:
    fit, x = KERNELS[scheme]
    operator = kernel(scheme, isa)
    assert trial((scheme, fit, OUT_DTYPES[x]), operator) == ""

    @settings(max_examples=25)
    @given(
        n=st.integers(1, 9), k=st.sampled_from([1, 15, 16, 31, 64, 100, 333]), seed=st.integers(0, 1 << 20),
        exponent=st.sampled_from([0, 0, -40, -126, 100]), tail=st.sampled_from([1.0, 5.0, 40.0]),
        bad=st.sampled_from([None, None, float("inf"), float("nan"), -float("inf"), -0.0]), threads=st.sampled_from([1, 2]),
    )  # fmt: skip
    def check(n: int, k: int, seed: int, exponent: int, tail: float, bad: float | None, threads: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(n, k, generator=generator) * 2.0**exponent
        w[:, ::17] *= tail
        if bad is not None:
            w[seed % n, seed % k] = bad
        w = w.to(OUT_DTYPES[x])
        assert same(run(operator, w, Scheme.parse(scheme)), chosen_qparams(w, scheme, fit))

    check()


@given(n=st.integers(1, 100))
def test_sums_by_halves(n: int) -> None:
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    bound = 2.0**-24 * (1 + max(4, (n - 1).bit_length())) * x.abs().double().sum(1)
    assert ((by_halves(x).double() - x.double().sum(1)).abs() <= bound).all()
    assert torch.equal(by_halves(torch.arange(n, dtype=torch.float32)), torch.tensor(n * (n - 1) / 2))


def test_built_when_it_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(eager_fit, "_OPERATORS", {})
    monkeypatch.setattr(eager_fit, "_SEEN", type(eager_fit._SEEN)())
    monkeypatch.setattr(eager_fit, "WORTH_BUILDING", 3000)
    monkeypatch.setattr(eager_fit, "load_operator", lambda text: (built.append(text), load_operator(text))[1])
    scheme, w = "uint4/g32:fp16+m", torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    want = chosen_qparams(w, scheme, "mse")
    for count in (0, 0, 1, 1):
        assert same(FIT(w, scheme, "mse"), want)
        assert len(built) == count
    with reference_only():
        monkeypatch.setattr(eager_fit, "_OPERATORS", {})
        assert same(FIT(w.repeat(4, 1), scheme, "mse"), chosen_qparams(w.repeat(4, 1), scheme, "mse"))
    assert len(built) == 1


def test_what_has_no_kernel_is_chosen_by_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_fit, "_OPERATORS", {})
    monkeypatch.setattr(eager_fit, "WORTH_BUILDING", 0)
    monkeypatch.setattr(eager_fit, "load_operator", None)
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for scheme in ("nf4/g64:fp16", "int4/g32:e8m0", "int8/tensor", "ternary/axis0"):
        fit = "minmax" if scheme == "int8/tensor" else "mse"
        assert why_no_kernel(Scheme.parse(scheme), fit)
        assert same(FIT(w, scheme, fit), chosen_qparams(w, scheme, fit))
    scheme = "int4/g32:fp16"
    for x in (w.double(), w[:, :0], w.unsqueeze(0)):
        assert same(FIT(x, scheme, "minmax"), chosen_qparams(x, scheme, "minmax"))


def test_a_kernel_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(x: Tensor, scale: Tensor, zero: Tensor) -> None:
        scale.fill_(2.0)

    monkeypatch.setattr(eager_fit, "_OPERATORS", {})
    monkeypatch.setattr(eager_fit, "WORTH_BUILDING", 0)
    monkeypatch.setattr(eager_fit, "load_operator", lambda text: twice)
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with pytest.warns(QCWarning, match="wrong"):
        assert same(FIT(w, "int4/g32:fp16", "mse"), chosen_qparams(w, "int4/g32:fp16", "mse"))
