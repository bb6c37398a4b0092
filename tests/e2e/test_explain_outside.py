"""What runs outside of every graph is counted, whatever operators it runs, and refused by `strict`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile import QCError, explain
from tests.e2e.support import RECIPE


class Outside(nn.Module):
    """A linear in a graph, `tail` in none."""

    def __init__(self, tail: nn.Module) -> None:
        super().__init__()
        self.first, self.tail = nn.Linear(64, 64), tail

    @torch.compiler.disable
    def after(self, x: Tensor) -> Any:
        return self.tail(x, x, x) if isinstance(self.tail, nn.MultiheadAttention) else self.tail(x)

    def forward(self, x: Tensor) -> Any:
        return self.after(self.first(x))


# FLOPs for ten rows of 64: the four projections of attention, the two matrices of a feed-forward of 128, the four gates
# of an LSTM for its input and its state.
ROWS = 2 * 10
FUSED = {
    "attention": (nn.MultiheadAttention(64, 4, batch_first=True), ROWS * 4 * 64 * 64),
    "encoder": (nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), ROWS * (4 * 64 * 64 + 2 * 64 * 128)),
    "lstm": (nn.LSTM(64, 64, batch_first=True), ROWS * 2 * 4 * 64 * 64),
}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("inference", [False, True])
def test_fused_operators_outside_of_every_graph_count(name: str, inference: bool) -> None:
    tail, flops = FUSED[name]
    with torch.inference_mode(inference):
        found = explain(Outside(tail).eval(), torch.randn(2, 5, 64), recipe=RECIPE)
    assert [(row.kind, row.flops) for row in found] == [("linear", ROWS * 64 * 64), ("eager", flops)]
    assert found.coverage == ROWS * 64 * 64 / (ROWS * 64 * 64 + flops)


def test_attention_outside_of_every_graph_counts_as_inside() -> None:
    q = torch.randn(1, 2, 8, 16)

    def attend(q: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, q, q)

    disabled = torch.compiler.disable(attend)
    inside, outside = (explain(f, q, recipe=RECIPE) for f in (attend, lambda q: disabled(q)))
    assert (inside.rows[0].kind, outside.rows[0].kind) == ("attention", "eager")
    assert inside.rows[0].flops == outside.rows[0].flops == 4 * 2 * 8 * 8 * 16


def test_an_unknown_operator_in_a_graph_hides_nothing_outside() -> None:
    """Attention in the graph, a smaller matmul outside."""

    class Model(Outside):
        def __init__(self) -> None:
            super().__init__(nn.Linear(64, 128))
            self.mix = nn.MultiheadAttention(64, 4, batch_first=True)

        def forward(self, x: Tensor) -> Any:
            y = self.first(x)
            return self.after(self.mix(y, y, y)[0])

    found = explain(Model().eval(), torch.randn(2, 5, 64), recipe=RECIPE)
    assert (found.rows[-1].kind, found.rows[-1].flops) == ("eager", ROWS * 64 * 128)


@pytest.mark.parametrize("strict", [False, True])
def test_strict_refuses_contractions_outside_of_every_graph(strict: bool) -> None:
    class Recurrent(Outside):
        def forward(self, x: Tensor) -> Any:
            return self.tail(self.first(x))

    model, x = Recurrent(nn.LSTM(64, 64)).eval(), torch.randn(5, 2, 64)
    if not strict:
        assert [row.kind for row in explain(model, x, recipe=RECIPE)] == ["eager"]
        return
    with pytest.raises(QCError, match="outside of every graph") as caught:
        explain(model, x, recipe=RECIPE, options={"strict": True})
    assert caught.value.code == "explain.eager"
    assert "LSTM" in caught.value.why


def test_strict_minds_no_graph_break_without_contractions() -> None:
    found = explain(Outside(nn.ReLU()).eval(), torch.randn(2, 64), recipe=RECIPE, options={"strict": True})
    assert (found.coverage, [row.kind for row in found]) == (1.0, ["linear"])
