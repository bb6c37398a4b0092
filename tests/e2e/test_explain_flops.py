"""FLOPs are those of the calls that ran: every operator, every shape, and whatever form a contraction has."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import qcompile
from qcompile import QCError
from qcompile.backend import DEFAULT_PASSES
from tests.passes.graphs import context, dynamo_graph, run


class Beside(nn.Module):
    """A linear layer, and something else that contracts."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(64, 64), function
        self.other = nn.Parameter(torch.randn(64, 64))
        self.register_buffer("held", torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.linear(x))


def counted(model: nn.Module, *args: Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    return counter.get_total_flops()


# Forms that no rewrite knows: (what it computes, share of it that is quantized where the linear layer is).
FORMS: dict[str, tuple[Callable[..., Tensor], float]] = {
    "einsum, dots in both": (lambda m, x: torch.einsum("...ij,...kj->...ik", x, x), 2 / 3),
    "einsum of three": (lambda m, x: torch.einsum("ij,jk,kl->il", x, m.held, m.held), 1 / 3),
    "einsum of three, implicit": (lambda m, x: torch.einsum("ij,kj,kl", x, x, x), 1 / 2),
    "einsum of numbers": (lambda m, x: torch.einsum(x, [0, 1], m.held, [1, 2]), 1 / 2),
    "multi_dot": (lambda m, x: torch.linalg.multi_dot([x, m.held, m.held]), 1 / 3),
    "convolution": (lambda m, x: torch.convolution(x[None], m.held[:, :32, None], None, [1], [0], [1], False, [0], 1), 1 / 2),
    "transposed": (lambda m, x: F.conv_transpose1d(x[None], m.held[:32, :, None].expand(-1, -1, 3)), 1 / 4),
    "vmap": (lambda m, x: torch.vmap(lambda y: y @ m.held)(x), 1 / 2),
    "attention of plain weights": (
        lambda m, x: F.multi_head_attention_forward(
            x[:, None], x[:, None], x[:, None], 64, 4, m.held.repeat(3, 1), None, None, None, False, 0.0, m.held, None
        )[0],
        1 / 6,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_every_form_counts(name: str) -> None:
    function, share = FORMS[name]
    model, x = Beside(function).eval(), torch.randn(32, 64)
    found = qcompile.explain(model, x, recipe="int8")
    assert sum(row.flops for row in found.rows) == counted(model, x)
    assert found.coverage == pytest.approx(share)
    (row,) = [row for row in found.rows if not row.quantized]
    assert row.reason


WEIGHTS: dict[str, Callable[..., Tensor]] = {
    "dots in both": lambda m, x: torch.einsum("...ij,...jk->...ik", x.view(2, 16, 64), m.other.expand(2, 64, 64)),
    "three": lambda m, x: torch.einsum("ij,jk,kl->il", x, m.other, x.t()),
    "inside vmap": lambda m, x: torch.vmap(lambda y: y @ m.other)(x),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_strict_refuses_forms_that_stay_float(name: str) -> None:
    model, x = Beside(WEIGHTS[name]).eval(), torch.randn(32, 64)
    with pytest.raises(QCError) as caught, torch.no_grad():
        torch.compile(model, backend="qcompile", options={"recipe": "int8", "strict": True})(x)
    assert (caught.value.code, caught.value.where) == ("site.refused", "other")


@pytest.mark.parametrize("operand", ["held", "expanded"])
def test_strict_refuses_a_product_with_a_buffer_inside_a_transform(operand: str) -> None:
    def product(m: Any, x: Tensor) -> Tensor:
        if operand == "held":
            return torch.vmap(lambda y: y @ m.held)(x)
        return torch.vmap(lambda y, b: y @ b.t(), in_dims=(None, 0))(x, m.held[None])

    with pytest.raises(QCError) as caught, torch.no_grad():
        torch.compile(Beside(product).eval(), backend="qcompile", options={"recipe": "int8", "strict": True})(
            torch.randn(32, 64)
        )
    assert (caught.value.code, caught.value.where) == ("site.refused", "held")


SAME: dict[str, Callable[..., Tensor]] = {
    "dots in both": lambda m, x: torch.einsum("...ij,...jk->...ik", x, m.other),
    "numbers": lambda m, x: torch.einsum(x, [0, 1], m.other, [1, 2], [0, 2]),
    "numbers and dots": lambda m, x: torch.einsum(x, [..., 1], m.other, [1, 2], [..., 2]),
}


@pytest.mark.parametrize("name", SAME)
def test_einsums_that_are_a_linear(name: str) -> None:
    model, x = Beside(SAME[name]).eval(), torch.randn(32, 64)
    found = qcompile.explain(model, x, recipe="int8")
    assert found.coverage == 1.0
    assert sum(row.flops for row in found.rows) == counted(model, x)
    gm, inputs = dynamo_graph(model, x)
    text = run([item for item in DEFAULT_PASSES if item.name == "canonicalize"], gm, context(gm, inputs))
    assert "einsum" not in text
    torch.testing.assert_close(gm(*inputs)[0], model(x))


class Steps(nn.Module):
    """One layer behind a graph break, for every length; and a product that stays float, for the last."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("held", torch.randn(64, 64))

    def step(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        torch._dynamo.graph_break()
        return y.relu()

    def forward(self, *xs: Tensor) -> Tensor:
        return sum((self.step(x).sum() for x in xs), (xs[-1] @ self.held).sum())


def test_one_graph_of_all_sizes() -> None:
    """Dynamo compiles the second length for every other one."""
    model, xs = Steps().eval(), [torch.randn(rows, 64) for rows in (2, 3, 1000)]
    found = qcompile.explain(model, *xs, recipe="int8")
    assert sum(row.flops for row in found.rows) == counted(model, *xs)
    assert found.coverage == pytest.approx(1005 / 2005)
    assert [row.calls for row in found.rows if row.kind == "linear"] == [1, 2]


def test_no_weight_outlives_its_model() -> None:
    """A weak reference to the model would not see it: Dynamo keeps what served a graph, which had the parameters."""
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).eval()
    alive = [weakref.ref(parameter) for parameter in model.parameters()]
    qcompile.explain(model, torch.randn(4, 64), recipe="int8")
    with pytest.raises(QCError):
        qcompile.explain(model, torch.randn(4, 64), recipe="int8/g48", options={"strict": True})
    del model
    gc.collect()
    assert not any(reference() is not None for reference in alive)
