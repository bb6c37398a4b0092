"""`verify=True`: what is compared, what it says about the rest, and that nothing stays behind."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import nn

from qcompile import QCWarning
from qcompile.backend import watching
from tests.e2e.support import compiled


def test_calls_are_counted_and_nothing_is_kept() -> None:
    model, x = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16)).eval(), torch.randn(2, 32)
    with torch.no_grad(), watching() as trace, warnings.catch_warnings():
        warnings.simplefilter("error", QCWarning)
        run = compiled(model, verify=True)
        run(x)
    (note,) = [note for ctx in trace.contexts for note in ctx.plan.notes if "verify" in note]
    assert note.startswith("verify compared 2 of 2 calls")
    trace.contexts.clear()
    held = [weakref.ref(item) for item in (*model.parameters(), x)]
    del model, run, x
    gc.collect()
    assert [ref() for ref in held] == [None] * 5


@pytest.mark.parametrize(
    ("model", "x", "options"),
    [
        (nn.Embedding(16, 32), torch.arange(4), {}),
        (nn.Embedding(16, 32), torch.arange(4), {"recipe": "e4m3/axis0"}),  # their levels are a constant of the graph
        (nn.Embedding(16, 32), torch.arange(4), {"recipe": "nf4/g32:fp16"}),
        (nn.Linear(32, 16), torch.randn(2, 32), {"recipe": "int8/axis1:fp32", "policy": "memory"}),
    ],
    ids=["lookup", "lookup of floats", "lookup in a table of levels", "no kernel"],
)
def test_nothing_to_compare_is_said(model: nn.Module, x: torch.Tensor, options: dict[str, str]) -> None:
    with torch.no_grad(), pytest.warns(QCWarning, match="compared 0 of 1 calls"):
        compiled(model.eval(), verify=True, **options)(x)


def test_a_model_that_stays_float_leaves_nothing_to_verify() -> None:
    """Except where nothing was asked: no rules, or a graph without sites."""
    conv, relu = nn.Conv2d(4, 4, 3).eval(), nn.ReLU().eval()
    with torch.no_grad():
        with pytest.warns(QCWarning, match="compared 0 of 0 calls .* every site stayed float"):
            compiled(conv, verify=True)(torch.randn(1, 4, 8, 8))
        with warnings.catch_warnings():
            warnings.simplefilter("error", QCWarning)
            compiled(conv, "none", verify=True)(torch.randn(1, 4, 8, 8))
            compiled(relu, verify=True)(torch.randn(2, 8))


def test_what_is_verified_is_what_runs() -> None:
    """A graph that comes from a cache on disk has kernels that nobody compares."""
    import torch._inductor.config as inductor
    from torch._dynamo.utils import counters

    model, x = nn.Linear(32, 16).eval(), torch.randn(2, 32)
    found = []
    for options in ({}, {}, {"verify": True}):
        torch.compiler.reset()
        counters.clear()
        with torch.no_grad(), inductor.patch(fx_graph_cache=True):
            compiled(model, **options)(x)
        kinds = ("fxgraph_cache_hit", "fxgraph_cache_miss")
        found.append([counters["inductor"][kind] for kind in kinds] + [counters["aot_autograd"]["autograd_cache_hit"]])
    assert sum(found[1][::2]) > 0  # a cache knows the graph
    assert found[2] == [0, 0, 0]
