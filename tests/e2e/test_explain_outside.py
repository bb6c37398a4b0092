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


W, CUBE = torch.ones(64, 64), torch.ones(4, 64, 64)


def _flex(x: Tensor) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    q = x.view(1, 1, 8, 64)
    return flex_attention(q, q, q)


def _jagged(x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([x, x[:4]], layout=torch.jagged)
    return nn.functional.linear(rows, W).values()


class Wrapped(torch.Tensor):
    """An ordinary tensor type with a dispatch of its own."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))


# For eight rows of 64; two for each product, as the ledger counts the same inside of a graph.
CONTRACTIONS = {
    "mv": (lambda x: W @ x[0], 2 * 64 * 64),
    "addmv": (lambda x: torch.addmv(x[1], W, x[0]), 2 * 64 * 64),
    "linear of a vector": (lambda x: nn.functional.linear(x[0], W), 2 * 64 * 64),
    "dot": (lambda x: x[0].dot(x[1]), 2 * 64),
    "vdot": (lambda x: torch.vdot(x[0], x[1]), 2 * 64),
    "bilinear": (lambda x: nn.functional.bilinear(x, x, CUBE), 2 * 8 * 4 * 64 * 64),
    "addbmm": (lambda x: torch.addbmm(W, x.view(8, 64, 1), x.view(8, 1, 64)), 2 * 8 * 64 * 64),
    "sparse csr": (lambda x: torch.sparse.mm(torch.eye(8).to_sparse_csr(), x), 2 * 8 * 64),
    "sparse coo": (lambda x: torch.eye(8).to_sparse() @ x, 2 * 8 * 64),
    "cond": (lambda x: torch.cond(x.sum() > 1e9, lambda x: x @ W @ W, lambda x: x @ W, (x,)), 2 * 8 * 64 * 64),
    "flex": (_flex, 4 * 8 * 8 * 64),
    "jagged": (_jagged, 2 * 12 * 64 * 64),
    "subclass": (lambda x: Wrapped(x) @ W, 2 * 8 * 64 * 64),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch: sparse and nested tensors are in beta, flex is unfused
def test_every_contraction_outside_counts(name: str) -> None:
    tail, flops = CONTRACTIONS[name]
    found = explain(Outside(Call(tail)).eval(), torch.randn(8, 64), recipe=RECIPE)
    assert [(row.kind, row.flops) for row in found] == [("linear", 2 * 8 * 64 * 64), ("eager", flops)]
    assert not any("not counted" in note for note in found.notes)


class Call(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def test_an_operator_of_somebody_else_that_reads_a_weight_outside_is_named() -> None:
    with torch.library._scoped_library("qcompileoutside", "FRAGMENT") as library:
        library.define("twice(Tensor x, Tensor w) -> Tensor")
        library.impl("twice", lambda x, w: 2 * (x @ w), "CompositeExplicitAutograd")
        w = nn.Parameter(torch.randn(64, 64))
        tail = Call(lambda x: torch.ops.qcompileoutside.twice(x, w))
        found = explain(Outside(tail).eval(), torch.randn(8, 64), recipe=RECIPE)
        quiet = explain(Outside(Call(lambda x: torch.ops.qcompileoutside.twice(x, W))).eval(), torch.randn(8, 64))
    (note,) = (note for note in found.notes if "not counted" in note)
    assert "qcompileoutside.twice" in note
    assert not any("not counted" in note for note in quiet.notes)
