"""Modes that change inside a graph, and graphs inside a graph, as users call them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.backend import watching
from tests.e2e.support import compiled


class Partly(nn.Module):
    """The second layer is trained whatever the caller says, the third never."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x).detach()
        with torch.enable_grad():
            loss = self.b(y).square().sum()
        with torch.no_grad():
            return loss, self.c(y)


@pytest.mark.parametrize("outside", [False, True])
def test_every_site_is_judged_by_its_region(outside: bool) -> None:
    model, x = Partly(), torch.randn(3, 16)
    with torch.set_grad_enabled(outside), watching("reference") as trace:
        loss, _ = compiled(model)(x)
    assert {d.site.path: d.trained for d in trace.contexts[0].plan} == {
        "a.weight": outside, "b.weight": True, "c.weight": False,
    }  # fmt: skip
    assert all(d.quantized for d in trace.contexts[0].plan)
    loss.backward()
    assert model.b.weight.grad is not None
    assert model.b.bias.grad is not None
    assert model.b.weight.grad.abs().max() > 0


def test_a_table_that_renormalizes_itself_is_no_weight_elsewhere() -> None:
    w = nn.Parameter(torch.randn(16, 8) * 5)

    def f(ids: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.embedding(ids, w, max_norm=1.0), F.linear(x, w)

    x, before = torch.randn(2, 8), w.detach().clone()
    with torch.no_grad(), watching("reference"):
        _, y = compiled(f)(torch.arange(16), x)
    assert not torch.equal(w, before)
    assert torch.equal(y, F.linear(x, w))


def halve(g: Tensor, p: Tensor) -> None:
    p.mul_(0.5)


def test_an_operator_that_writes_to_its_second_operand() -> None:
    with torch.library._scoped_library("qcompiletest", "FRAGMENT") as library:
        library.define("halve_into(Tensor g, Tensor(a!) p) -> ()")
        library.impl("halve_into", halve, "CompositeExplicitAutograd")
        w, v = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))

        def f(x: Tensor) -> Any:
            torch.ops.qcompiletest.halve_into(x, w)
            y = x + 1
            first = F.linear(y, v)
            torch.ops.qcompiletest.halve_into(x, y)
            return F.linear(x, w), first, F.linear(y, v)

        x = torch.randn(3, 16)
        half = w.detach() * 0.5
        with torch.no_grad(), watching("reference") as trace:
            y, first, second = compiled(f)(x)
    assert torch.equal(y, F.linear(x, half))
    assert {d.group for d in trace.contexts[0].plan} == {-1}
    assert torch.equal(second, first / 2)  # a power of two rounds nothing


def test_names_of_somebody_else() -> None:
    def linear(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w) * 7

    torch.compiler.allow_in_graph(linear)
    w, x = nn.Parameter(torch.randn(16, 16)), torch.randn(3, 16)
    with torch.no_grad(), watching("reference") as trace:
        assert torch.equal(compiled(lambda x: linear(x, w))(x), linear(x, w))
    assert [d.site.kind for d in trace.contexts[0].plan] == ["other"]
