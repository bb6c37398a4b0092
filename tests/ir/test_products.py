"""Products of 8-bit codes in training: exact sums, the published formulas, and gradients that are right on average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qcompile.ir.ops  # noqa: F401  (registers the operators)
from qcompile import QCError
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.estimators import chosen_qparams
from qcompile.ir.products import LONGEST, why_no_products
from qcompile.ir.scheme import Scheme

MM, LINEAR = torch.ops.qcompile.low_bit_mm, torch.ops.qcompile.quantized_linear
W, A, G = "int8/axis0:fp32", "int8/token:fp32", "int8/token:fp32"
T, N, K = 7, 24, 40
ULP = 2.0**-24


@given(
    m=st.integers(0, 9), k=st.integers(0, 40), n=st.integers(0, 9), seed=st.integers(0, 99),
    turned=st.tuples(st.booleans(), st.booleans()),
)  # fmt: skip
def test_sums_of_integers_are_exact(m: int, k: int, n: int, seed: int, turned: tuple[bool, bool]) -> None:
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape[::-1] if t else shape for shape, t in zip(((m, k), (k, n)), turned, strict=True)]
    a, b = (torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8) for shape in shapes)
    a, b = a.t() if turned[0] else a, b.t() if turned[1] else b
    got = MM(a, b)
    assert got.dtype == torch.int32
    assert torch.equal(got.double(), a.double() @ b.double())


def test_floats_of_eight_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 32, generator=generator).to(torch.float8_e5m2)
    b = torch.randn(32, 6, generator=generator).to(torch.float8_e4m3fn)
    exact = a.double() @ b.double()
    assert MM(a, b).dtype == torch.float32
    assert ((MM(a, b) - exact).abs() <= 32 * ULP * (a.double().abs() @ b.double().abs())).all()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int8)),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 2, dtype=torch.uint8)),
        (torch.zeros(3, dtype=torch.int8), torch.zeros(3, 2, dtype=torch.int8)),
        (torch.zeros(1, LONGEST + 1, dtype=torch.int8), torch.zeros(LONGEST + 1, 1, dtype=torch.int8)),
    ],
)
def test_operands_that_do_not_fit(a: Tensor, b: Tensor) -> None:
    with pytest.raises(QCError, match=r"products\.operands"):
        MM(a, b)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in ((T, K), (N, K), (T, N)))  # type: ignore[return-value]


def step(
    x: Tensor, w: Tensor, g: Tensor, grad: str = G, fit: str = "minmax", scheme: str = W, act: str = A
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    scales = torch.ops.qcompile.choose_qparams(w, scheme, fit)
    y = LINEAR(x, w, scales, scheme, act, grad, "ste", fit, torch.float32)
    y.backward(g)
    assert x.grad is not None
    assert w.grad is not None
    return y.detach(), x.grad, w.grad


def rounded(x: Tensor, scheme: str) -> Tensor:
    """What rows decode to, exactly: codes times scales in float64."""
    what = Scheme.parse(scheme)
    top = what.format.max
    peak = x.double().abs().amax(1, keepdim=True)
    levels = (x.double() * top / peak).nan_to_num(0.0)
    if what.format.kind == "int":
        return levels.round() * peak / top
    return (
        levels.float().to({"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}[what.format.name]).double()
        * peak
        / top
    )


@pytest.mark.parametrize(
    ("scheme", "act", "grad"),
    [(W, A, G), ("int4/axis0:fp16", A, "int8/token:fp32"), ("e4m3/axis0:fp32", "e4m3/token:fp32", "e5m2/token:fp32")],
)
def test_all_three_products(scheme: str, act: str, grad: str) -> None:
    """Against the formulas in float64. Values that lie on the edge between two codes may be rounded either way, in one
    precision and in another; these are not."""
    x, w, g = drawn()
    y, dx, dw = step(x, w, g, grad, "minmax", scheme, act)
    weight = dequantize(quantize(w, scheme), scheme, N, K).double()
    scale = chosen_qparams(w, scheme, "minmax")[0].double()
    xs = x.double().abs().amax(1, keepdim=True) / Scheme.parse(act).format.max
    want_dx = rounded(g * scale.t(), grad) @ (weight / scale)
    want_dw = rounded((g * xs).t(), grad) @ (rounded(x, act) / xs)
    terms = max(T, N, K) + 4  # roundings of a sum of floats, of scales and of the products with them
    for got, want, size in (
        (y, rounded(x, act) @ weight.t(), x.abs().double() @ weight.abs().t()),
        (dx, want_dx, want_dx.abs().amax(1, keepdim=True) * N),
        (dw, want_dw, want_dw.abs().amax(1, keepdim=True) * T),
    ):
        assert ((got.double() - want).abs() <= terms * ULP * size).all()


def test_clipped_weights_get_no_gradient() -> None:
    x, w, g = drawn()
    w[:, 0] = 12.0
    (scale,) = chosen_qparams(w, "int3/axis0:fp32", "mse")
    clipped = (w / scale).abs() > 3.5  # of the levels -4 .. 3, those from -3.5 are reached from -4.5 on
    _, _, dw = step(x, w, g, fit="mse", scheme="int3/axis0:fp32")
    _, _, whole = step(x, w, g, fit="minmax", scheme="int3/axis0:fp32")
    assert clipped[:, 0].any()
    assert (dw[clipped & (w > 0)] == 0).all()
    assert (dw[~clipped] != 0).all()
    assert (whole != 0).all()


def test_stochastic_gradients_are_right_on_average() -> None:
    """Nearest rounding is not: some of its errors are far beyond the bound."""
    torch.manual_seed(0)
    x, w, g = drawn()
    draws = [step(x, w, g, G + "~stochastic") for _ in range(400)]
    weight, inputs = dequantize(quantize(w, W), W, N, K).double(), rounded(x, A)
    nearest = step(x, w, g)
    for index, exact, spread, factors in (
        (1, g.double() @ weight, g.double().abs().amax(1, keepdim=True), weight),
        (2, g.double().t() @ inputs, g.double().t().abs().amax(1, keepdim=True), inputs),
    ):
        mean = torch.stack([draw[index] for draw in draws]).double().mean(0)
        # Each code is off by a variance of at most 1/4; its step is below the row's largest g (times the largest scale) / 127.
        biggest = factors.abs().amax(1)
        deviation = 0.5 * spread * biggest.norm() / 127 / math.sqrt(len(draws))
        assert ((mean - exact).abs() <= 6 * deviation).all()
        assert ((nearest[index].double() - exact).abs() > 6 * deviation / math.sqrt(len(draws))).any()
    assert not torch.equal(draws[0][1], draws[1][1])
    torch.manual_seed(0)
    assert torch.equal(step(x, w, g, G + "~stochastic")[1], draws[0][1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("grad", [G, G + "~stochastic"])
def test_gradients_that_overflowed_are_seen(bad: float, grad: str) -> None:
    """Whoever scales losses looks for them."""
    x, w, g = drawn()
    g[3, 5] = bad
    _, dx, dw = step(x, w, g, grad)
    assert dx[3].isnan().all()
    assert dw[5].isnan().all()
    assert dx[[0, 1, 2, 4, 5, 6]].isfinite().all()
    assert dw[:5].isfinite().all()


def test_dtypes_and_leading_dimensions() -> None:
    x, w, g = drawn()
    scales = torch.ops.qcompile.choose_qparams(w, W, "minmax")
    want = LINEAR(x, w, scales, W, A, G, "ste", "minmax", torch.float32)
    assert torch.equal(LINEAR(x.view(1, T, K), w, scales, W, A, G, "ste", "minmax", torch.float32), want.view(1, T, N))
    half, leaf = x.bfloat16().requires_grad_(), w.bfloat16().requires_grad_()
    y = LINEAR(
        half, leaf, torch.ops.qcompile.choose_qparams(leaf, W, "minmax"), W, A, G, "ste", "minmax", torch.bfloat16
    )
    y.backward(g.bfloat16())
    assert {t.dtype for t in (y, half.grad, leaf.grad) if t is not None} == {torch.bfloat16}
    assert LINEAR(x[:0], w, scales, W, A, G, "ste", "minmax", torch.float32).shape == (0, N)


REFUSED: dict[str, tuple[Any, ...]] = {
    "not rounded": (W, None, G),
    "no single floating-point scale": ("int8/g8:fp32", A, G),
    "weights in uint8": ("uint8/axis0:fp32+m", A, G),
    "are not rounded to nearest": (W + "~stochastic", A, G),
    "activations in int8/g8": (W, "int8/g8:fp32", G),
    "gradients in int8/tensor": (W, A, "int8/tensor:fp32"),
    "all signed integers": (W, A, "e5m2/token:fp32"),
    "floats are rounded": ("e4m3/axis0:fp32", "e4m3/token:fp32", "e5m2/token:fp32~stochastic"),
}


@pytest.mark.parametrize("words", REFUSED)
def test_schemes_without_such_products(words: str) -> None:
    schemes = [Scheme.parse(text) if text else None for text in REFUSED[words]]
    assert words in why_no_products(*schemes)  # type: ignore[arg-type]
    x, w, _ = drawn()
    if schemes[1] is not None:
        with pytest.raises(QCError, match=r"products\.scheme"):
            LINEAR(x, w, [torch.ones(N, 1)], *REFUSED[words], "ste", "minmax", torch.float32)


def test_more_tokens_than_one_sum_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the weight, in pieces of 48 tokens: integers below 2**24, so that all sums are exact."""
    grads = []
    for longest in (LONGEST, 48):
        monkeypatch.setattr("qcompile.ir.products.LONGEST", longest)
        torch.manual_seed(0)
        x, w = torch.randn(200, K), torch.randn(N, K, requires_grad=True)
        LINEAR(x, w, chosen_qparams(w, W, "minmax"), W, A, G, "ste", "minmax", torch.float32).square().sum().backward()
        grads.append(w.grad)
    assert torch.equal(*grads)


def test_no_tokens() -> None:
    x, w = torch.randn(0, K, requires_grad=True), torch.randn(N, K, requires_grad=True)
    y = LINEAR(x, w, chosen_qparams(w, W, "minmax"), W, A, G, "ste", "minmax", torch.float32)
    y.sum().backward()
    assert y.shape == (0, N)
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))
