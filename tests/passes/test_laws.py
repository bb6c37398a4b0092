"""Our own passes keep the laws of passes on random models; and what that found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile.backend import DEFAULT_PASSES, watching
from qcompile.passes.detect.canonicalize import Canonicalize
from qcompile.testing.fuzz import fuzz
from qcompile.testing.graphs import Layer, Model, models
from qcompile.testing.rewrites import Laws, check_model
from tests.passes.graphs import context, dynamo_graph, run

DYNAMO = [item for item in DEFAULT_PASSES if item.stage == "dynamo"]
POST = [item for item in DEFAULT_PASSES if item.stage == "post"]
RECIPES = {"int8": "int8/axis0:fp32", "groups": "uint4/g32:fp16+z"}


@pytest.mark.parametrize("recipe", RECIPES)
def test_early_passes(recipe: str) -> None:
    fuzz(DYNAMO, models(), examples=10, options={"recipe": RECIPES[recipe], "policy": "memory"})


def test_late_passes() -> None:
    fuzz(POST, models(("linear", "gated", "point", "norm")), examples=6, options={"recipe": RECIPES["int8"]})


# ---------------------------------------------------------------------------------------------------- what was found
def test_a_weight_for_each_of_no_rows() -> None:
    """Canonicalize failed: a weight expanded over an empty batch has no first member."""
    weight = nn.Parameter(torch.randn(4, 5))

    def call(x: Tensor) -> Tensor:
        return torch.bmm(x, weight.expand(x.shape[0], 4, 5)) + torch.baddbmm(weight[:1], x, weight.expand(0, 4, 5))

    gm, inputs = dynamo_graph(call, torch.randn(0, 3, 4))
    before = str(gm.graph)
    assert run([Canonicalize()], gm, context(gm, inputs, verify=True)) == before


class OneQuery(nn.Module):
    """Attention of the last position, four heads sharing each key and value."""

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        keys = k[:, :, None].expand(k.shape[0], 1, 4, k.shape[2], 8).reshape(k.shape[0], 4, k.shape[2], 8)
        return F.scaled_dot_product_attention(q[:, :, -1:], keys, keys)


def test_grouped_queries_of_any_batch() -> None:
    """The batch's symbol stood in the graph itself, which nothing but a tracer could run."""
    model, q, k = OneQuery(), torch.randn(3, 4, 5, 8), torch.randn(3, 1, 5, 8)
    torch._dynamo.reset()
    for dynamic in (True, False):
        with torch.no_grad(), watching("reference"):
            compiled = torch.compile(model, backend="qcompile", dynamic=dynamic, options={"recipe": "none"})
            for size in (3, 6):
                a, b = q[:1].expand(size, -1, -1, -1), k[:1].expand(size, -1, -1, -1)
                torch.testing.assert_close(compiled(a, b), model(a, b))
        torch._dynamo.reset()


def test_the_law_found_it() -> None:
    layer = Layer("attention", (2, 0, 0, 5))
    check_model(DYNAMO, Model((layer,), batch=3, dynamic=True), Laws())
