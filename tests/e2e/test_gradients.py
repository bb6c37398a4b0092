"""While autograd records: trained weights stay parameters, gradients flow through packed weights and into biases."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile import QCWarning
from qcompile.backend import watching
from tests.e2e.models import MLP
from tests.e2e.support import FLOAT, compiled, decoded, fp32_step, noise_bound

STEP = fp32_step(96)


def test_weights_that_may_be_trained_stay_parameters() -> None:
    """They are rounded to what the store would pack, in the graph, and nothing is said of it but in the ledger."""
    model, x = MLP(), torch.randn(3, 64)
    with watching("reference") as trace, warnings.catch_warnings(action="error", category=QCWarning):
        y = compiled(model)(x)
    assert torch.equal(y, decoded(model)(x))
    assert all(d.trained and d.packed and d.entry is None for d in trace.contexts[0].plan)
    assert not trace.contexts[0].packed
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("real", [False, True], ids=["reference", "kernels"])
def test_gradient_through_frozen_weights(real: bool) -> None:
    model = MLP(bias=True).requires_grad_(False)
    plain, x = decoded(model), torch.randn(3, 64)
    with watching("compiled" if real else "reference") as trace:
        moved = x.clone().requires_grad_()
        y = compiled(model)(moved)
        y.square().sum().backward()
    assert all(d.quantized for d in trace.contexts[0].plan)
    leaf = x.clone().double().requires_grad_()
    plain.double()(leaf).square().sum().backward()

    class Gradient(nn.Module):
        """dX as a function of x, whose own sensitivity bounds the error of dX."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = plain

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                leaf = x.clone().requires_grad_()
                return torch.autograd.grad(self.inner(leaf).square().sum(), leaf)[0]

    # The backward multiplies by each weight once more: as many roundings again.
    bound = 2 * noise_bound(Gradient(), x, step=STEP)
    assert (moved.grad.double() - leaf.grad).abs().max() <= bound


class Biases(nn.Module):
    """Frozen weights, trained biases, one input: the biases are no constants."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16), nn.Linear(32, 16)
        self.a.weight.requires_grad_(False)
        self.b.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
def test_trained_biases_of_frozen_weights(context: Callable[[], Any]) -> None:
    model, x = Biases(), torch.randn(3, 32)
    with context(), watching("reference") as trace:
        y = compiled(model)(x)
    plan = trace.contexts[0].plan
    assert all(d.quantized for d in plan)
    if context is torch.no_grad:
        assert [d.group for d in plan] == [0, 0]
        return
    y.sum().backward()
    plain = decoded(model)
    plain(x).sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            other = plain.get_parameter(name)
            # a sum over three rows of products of 32 terms, in another order
            size = float(other.grad.abs().max()) + 3 * 32 * 3
            assert (parameter.grad - other.grad).abs().max() <= 2 * 40 * FLOAT * size, name
