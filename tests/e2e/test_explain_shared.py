"""One graph that runs for many layers is counted as often as it runs, with the weights of each of them."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile import QCWarning, Recipe, Rule, convert, explain
from qcompile.backend import watching
from qcompile.ir.codec import dequantize, quantize
from qcompile.runtime.store import STORE
from tests.e2e.support import RECIPE, compiled

INT4 = "uint4/g32:fp16+m"


class Block(nn.Module):
    """Two linears that become one matmul with joined biases."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x).relu() + self.b(x).sum()


class Stack(nn.Module):
    """Equal blocks, with a graph break after each; `times` goes through all of them."""

    def __init__(self, blocks: int = 3, times: int = 1) -> None:
        super().__init__()
        self.blocks, self.times = nn.ModuleList(Block() for _ in range(blocks)), times
        self.last = nn.Parameter(torch.randn(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        for block in [*self.blocks] * self.times:
            x = block(x)
            torch._dynamo.graph_break()
        return self.out(x)

    @torch.compiler.disable
    def out(self, x: Tensor) -> Tensor:
        return x @ self.last


@pytest.mark.parametrize("times", [1, 2])
def test_bytes_and_flops_of_every_layer_that_a_graph_serves(times: int) -> None:
    model, x = Stack(times=times).eval(), torch.randn(4, 64)
    known = list(STORE)
    found = explain(model, x, recipe=RECIPE)
    assert not [entry for entry in STORE if entry not in known]
    assert found.graphs == 1
    linears = [row for row in found if row.kind == "linear"]
    assert [row.path for row in linears] == [f"blocks.{i}.{name}.weight" for i in range(3) for name in "ab"]
    assert [(row.flops, row.calls) for row in linears] == [
        (times * 2 * 4 * 64 * n, times) for _ in range(3) for n in (64, 32)
    ]
    quantized = times * 3 * 2 * 4 * 64 * (64 + 32)
    assert found.coverage == quantized / (quantized + 2 * 4 * 64 * 64)
    assert found.bytes_before == 3 * 4 * 64 * (64 + 32)
    with torch.no_grad(), watching("reference"):
        compiled(model)(x)
        held = [entry for entry in STORE if entry not in known]
        assert found.bytes_after == sum(entry.nbytes for entry in held)  # the joined biases too
        assert explain(model, x, recipe=RECIPE).rows[:-1] == found.rows[:-1]  # the last one tells what Dynamo said


def test_layers_that_share_their_weights_are_counted_once() -> None:
    model = Stack().eval()
    model.blocks[1].a.weight = model.blocks[2].a.weight = model.blocks[0].a.weight
    rows = [row for row in explain(model, torch.randn(4, 64), recipe=RECIPE) if row.path.endswith("a.weight")]
    assert [(row.path, row.calls, row.bytes_before) for row in rows] == [("blocks.0.a.weight", 3, 4 * 64 * 64)]


def test_converted_layers_behind_a_break() -> None:
    model = Stack().eval()
    convert(model, RECIPE)
    found = explain(model, torch.randn(4, 64), recipe=RECIPE)
    rows = [row for row in found if row.quantized]
    assert [row.path for row in rows] == [f"blocks.{i}.{name}.weight" for i in range(3) for name in "ab"]
    # A byte for each weight, and a scale of four for each row.
    assert sum(row.bytes_after for row in rows) == 3 * (64 + 32) * (64 + 4)


class Pipeline:
    """No module: it has one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def run(self, x: Tensor) -> Any:
        return self.model(x)

    __call__ = run


@pytest.mark.parametrize(
    ("call", "prefix"),
    [
        (lambda model: model.forward, ""),
        (lambda model: lambda x: model(x), ""),
        (lambda model: partial(lambda model, x: model(x), model), ""),
        (lambda model: Pipeline(model).run, "model."),
        (lambda model: Pipeline(model), "model."),
    ],
)
def test_paths_of_what_is_no_module(call: Any, prefix: str) -> None:
    found = explain(call(Stack(blocks=2).eval()), torch.randn(4, 64), recipe=RECIPE)
    assert [row.path for row in found if row.kind == "linear"] == [
        f"{prefix}blocks.{i}.{name}.weight" for i in range(2) for name in "ab"
    ]


def test_a_rule_with_the_models_path_is_told_the_frames() -> None:
    recipe = Recipe((Rule(None, path="blocks.1.*"), Rule(RECIPE)))
    with pytest.warns(QCWarning, match="matched no site"):
        found = explain(Stack().eval(), torch.randn(4, 64), recipe=recipe)
    assert "'blocks.1.a.weight' is 'a.weight' there" in found.notes[0]


def _coarse_and_fine() -> nn.Module:
    """The first block lies on a 4-bit grid, the others do not."""
    torch.manual_seed(0)
    model = Stack().eval()
    with torch.no_grad():
        for layer in (model.blocks[0].a, model.blocks[0].b):
            n, k = layer.weight.shape
            layer.weight.copy_(dequantize(quantize(layer.weight, INT4, fit="mse"), INT4, n, k))
    return model


def test_a_scheme_that_was_chosen_for_another_layer_is_shown() -> None:
    model, x = _coarse_and_fine(), torch.randn(4, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QCWarning)  # no code was compiled: there is nothing to warn of
        found = explain(model, x, recipe="auto")
    rows = [row for row in found if row.kind == "linear"]
    assert {row.scheme for row in rows} == {INT4}
    assert [(row.sqnr or 0) > 30 for row in rows] == [True, True, False, False, False, False]
    (note,) = (note for note in found.notes if "keep less" in note)
    assert note.startswith(f"4 weights keep less than the recipe asks for (blocks.1.a.weight: {INT4} keeps 2")
    assert "without min_sqnr" in note


def test_the_warning_comes_again_with_every_compile_and_its_advice_helps() -> None:
    model, x = _coarse_and_fine(), torch.randn(4, 64)

    def warned(recipe: Any) -> list[str]:
        torch._dynamo.reset()
        with warnings.catch_warnings(record=True) as seen, torch.no_grad(), watching("reference"):
            warnings.simplefilter("always")
            run = compiled(model, recipe)
            run(x)
            run(x)
        return [str(w.message) for w in seen if issubclass(w.category, QCWarning) and "keeps only" in str(w.message)]

    first, second = warned("auto"), warned("auto")
    assert len(first) == len(second) == 4  # two weights of two blocks, once in each compile
    assert all("a reset changes nothing" in text and "rule without min_sqnr" in text for text in first)
    assert warned(Recipe((Rule(INT4, fit="mse"),))) == []


def test_one_graph_for_one_layer_says_nothing_new() -> None:
    model = nn.Sequential(Block(), Block()).eval()
    broken = Stack(blocks=2).eval()
    broken.blocks.load_state_dict(copy.deepcopy(model.state_dict()))
    whole, parts = (
        [(row.shape, row.bytes_before, row.bytes_after, row.sqnr) for row in explain(m, torch.randn(4, 64), recipe=RECIPE)
         if row.kind == "linear"]
        for m in (model, broken)
    )  # fmt: skip
    assert whole == parts
