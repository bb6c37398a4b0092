"""Estimators: their gradients are the published formulas, and values are the codec's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qcompile.ir.ops  # noqa: F401  (registers the operators)
from qcompile import QCError
from qcompile.ir import estimators
from qcompile.ir.codec import choose_qparams, decode, encode
from qcompile.ir.estimators import ESTIMATORS, Estimate, Estimator, reach, register, spans
from qcompile.ir.scheme import Scheme

fake_quant, choose = torch.ops.qcompile.fake_quant, torch.ops.qcompile.choose_qparams
FORMULAS = ("ste", "lsq", "pact")


def problem(scheme: str, shape: tuple[int, int] = (6, 72)) -> tuple[Tensor, Tensor, Tensor]:
    """x with values far outside of the range of the steps, steps as the scheme has them, and a gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    what = Scheme.parse(scheme)
    step = choose_qparams(x, what).scale.float() * (0.3 + 0.5 * torch.rand(1, generator=generator))
    return x, step, torch.randn(shape, generator=generator)


def gradients(name: str, scheme: str, x: Tensor, step: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Gradients of x and of what is learned, as the operator gives them."""
    leaf = x.clone().requires_grad_()
    learned = [step.clone().requires_grad_()] if ESTIMATORS[name].learned else []
    scales = [] if learned else [step.to(Scheme.parse(scheme).scale.format.dtype)]
    fake_quant(leaf, scales, learned, scheme, name, "mse").backward(g)
    return leaf.grad, *(t.grad for t in learned)


def formula(name: str, scheme: str, x: Tensor, step: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """The same as the papers write it, in float64, group by group."""
    what, k = Scheme.parse(scheme), x.shape[1]
    top, size = what.format.max, what.group_size(k)
    dx, learned = torch.empty_like(x, dtype=torch.float64), torch.empty_like(step, dtype=torch.float64)
    for row in range(x.shape[0]):
        for i in range(what.groups(k)):
            part = slice(i * size, (i + 1) * size)
            v, grad = x[row, part].double(), g[row, part].double()
            s = float(step[row, i] / top if name == "pact" else step[row, i])
            s = float(torch.tensor(s).to(what.scale.format.dtype))
            y = v / s
            if name == "pact":
                out = v.abs() >= float(step[row, i])
                learned[row, i] = (grad * v.sign())[out].sum()
            else:
                out = y.abs() >= top if name == "lsq" else y.abs() > top + 0.5
                level = y.round().clamp(-top, top)
                slope = torch.where(out, level, level - y)
                learned[row, i] = (grad * slope).sum() / (len(v) * top) ** 0.5
            dx[row, part] = torch.where(out, 0.0, grad)
    return (dx,) if name == "ste" else (dx, learned)


@pytest.mark.parametrize("scheme", ["int4/g32:fp32", "int8/axis0:fp32", "int3/g16:fp16", "int2/g72:bf16"])
@pytest.mark.parametrize("name", FORMULAS)
def test_gradients_are_the_published_ones(name: str, scheme: str) -> None:
    x, step, g = problem(scheme)
    step = step * Scheme.parse(scheme).format.max if name == "pact" else step
    for ours, theirs in zip(gradients(name, scheme, x, step, g), formula(name, scheme, x, step, g), strict=True):
        # Sums of at most 72 terms in float32: below 72 roundings of the largest partial sum.
        bound = 72 * 2.0**-23 * (1 + float(theirs.abs().max()) + 72 * 0.5)
        assert (ours.double() - theirs).abs().max() <= bound, name


@pytest.mark.parametrize("name", FORMULAS)
def test_without_its_mask_an_estimator_is_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: here is what it would see."""
    scheme = "int4/g32:fp32"
    x, step, g = problem(scheme)
    step = step * 7 if name == "pact" else step
    right = gradients(name, scheme, x, step, g)
    for mask in ("inside", "between"):
        monkeypatch.setattr(Estimate, mask, property(lambda at: torch.ones_like(at.x, dtype=torch.bool)))
    if name == "pact":
        monkeypatch.setattr(estimators, "spread", lambda s, cell, shape: torch.full(tuple(shape), 1e30))
    wrong = gradients(name, scheme, x, step, g)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(right, wrong, strict=True))


def test_the_gradient_of_a_step_is_the_slope_of_the_surrogate() -> None:
    """s clip(x / s) + s c with c, what rounding added, held: its central difference is exact but for float64's rounding."""
    scheme = "int4/axis0:fp32"
    x, step, g = problem(scheme, (3, 40))
    _, ours = gradients("lsq", scheme, x, step, g)
    x64, s64 = x.double(), step.double()
    y = (x64 / s64).clamp(-7, 7)
    added = y.round() - y

    def surrogate(s: Tensor) -> Tensor:
        return (g.double() * (s * ((x64 / s).clamp(-7, 7) + added))).sum(1, keepdim=True)

    h = 1e-6
    slope = (surrogate(s64 + h) - surrogate(s64 - h)) / (2 * h)
    want = slope / (40 * 7) ** 0.5
    assert (ours.double() - want).abs().max() <= 40 * 2.0**-23 * 40 * 7


@pytest.mark.parametrize(
    ("scheme", "fit"),
    [
        ("int4/g32:fp16", "minmax"),
        ("uint4/g32:fp16+m", "mse"),
        ("uint4/g32:fp16+z", "minmax"),
        ("int8/token:fp32", "minmax"),
        ("e4m3/token:fp32", "minmax"),
        ("e2m1/g16:e4m3/tensor:fp32", "minmax"),
        ("nf4/g64:fp16", "minmax"),
        ("binary/axis0:fp32", "minmax"),
    ],
)
def test_values_are_the_codecs(scheme: str, fit: str) -> None:
    x, _, _ = problem(scheme, (5, 70))
    what = Scheme.parse(scheme)
    scales = choose(x, scheme, fit)
    y = fake_quant(x, scales, [], scheme, "ste", fit)
    qparams = estimators.unpack_qparams(scales, what, 2)
    if fit == "minmax":
        assert all(
            torch.equal(a, b) for a, b in zip(scales, estimators.pack_qparams(choose_qparams(x, what)), strict=True)
        )
    assert torch.equal(y, decode(encode(x, what, qparams), what, qparams))
    assert fake_quant(x.bfloat16(), choose(x.bfloat16(), scheme, fit), [], scheme, "ste", fit).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "scheme", ["int8/g64:bf16", "int4/axis0:fp32", "e4m3/token:fp32", "nf4/g64:fp16", "int2/g32:fp16"]
)
def test_what_spans_never_clips(scheme: str) -> None:
    what = Scheme.parse(scheme)
    assert spans(what, "minmax")
    assert not spans(what, "mse")
    low, high = reach(what.format)
    for seed in range(50):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed)) ** 3
        y = x / choose_qparams(x, what).scale.float().repeat_interleave(64 // choose_qparams(x, what).scale.shape[1], 1)
        assert float(y.min()) >= low
        assert float(y.max()) <= high


@pytest.mark.parametrize(
    "scheme", ["e2m1/g32:e8m0", "uint8/tensor:fp32", "ternary/g32:fp16", "int8/g32:e4m3/tensor:fp32"]
)
def test_what_may_clip_has_a_mask(scheme: str) -> None:
    assert not spans(Scheme.parse(scheme), "minmax")


class Doubled(Estimator):
    name = "doubled"

    def backward(self, grad: Tensor, at: Estimate) -> tuple[Tensor, ...]:
        return (2 * grad,)


class Other(Doubled):
    pass


def test_an_estimator_of_ones_own() -> None:
    register(Doubled())
    try:
        x, step, g = problem("int4/g32:fp32")
        assert torch.equal(gradients("doubled", "int4/g32:fp32", x, step, g)[0], 2 * g)
        with pytest.raises(QCError, match="cannot be called 'doubled'"):
            register(Other())
    finally:
        del ESTIMATORS["doubled"]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: fake_quant(x, [], [], "int4/axis0:fp32", "lsqq", "minmax"), "unknown estimator 'lsqq'.*lsq"),
        (lambda x: fake_quant(x, [], [], "int4/axis0:fp32", "lsq", "minmax"), "lsq got 0 learned tensors"),
        (lambda x: fake_quant(x, [], [], "int4/axis0:fp32", "ste", "minmax"), "ste got 0 learned tensors"),
    ],
)
def test_wrong_operands(call: Callable[[Tensor], Tensor], words: str) -> None:
    with pytest.raises(QCError, match=words):
        call(torch.randn(2, 8))


def test_a_step_stays_positive() -> None:
    """A step that the optimizer drove below zero rounds with the smallest scale instead of turning the weight around."""
    x = torch.randn(2, 8)
    y = fake_quant(x, [], [torch.full((2, 1), -0.5)], "int4/axis0:fp32", "lsq", "minmax")
    assert y.abs().max() <= 7 * 2.0**-126
