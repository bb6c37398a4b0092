"""The model that `make train` trains, after real steps: evaluation runs the codes that training saw."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress

from qcompile.backend import watching
from qcompile.ir import estimators
from qcompile.ir.codec import decode
from qcompile.plan.recipe import Recipe, Rule
from qcompile.runtime.store import STORE
from tests.e2e.support import DIGITS, FLOAT, compiled, noise_bound

pytest.importorskip("transformers", reason="the model is one of transformers'")

EXAMPLE = Path(__file__).resolve().parents[2] / "bench" / "training" / "shakespeare.py"
SCHEMES = {
    "*embed_tokens.weight": "int8/axis0:fp32",
    "*lm_head.weight": "int8/axis0:fp32",
    "*self_attn.[qk]_proj.weight": "int4/axis0:fp32",
    "*self_attn.[vo]_proj.weight": "uint4/g32:fp16+m",
    "*gate_proj.weight": "int2/g32:fp16",
    "*up_proj.weight": "int2/g32:fp16",
    "*down_proj.weight": "nf4/g64:fp16",
}
STEPS = 50


class Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(input_ids=ids).logits
        return found


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("training_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["training_example"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["training_example"]


def test_after_real_steps_evaluation_runs_the_codes_of_training(
    tmp_path: Path, example: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = example.Study(example.QUICK, example.Corpus(), tmp_path, Progress(disable=True))
    model = example.llama(example.QUICK, study.corpus.vocabulary)
    recipe = Recipe(tuple(Rule(text, path=path) for path, text in SCHEMES.items()), "many")
    run = compiled(model, recipe, policy="memory")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = study.train("", run, optimizer.step, optimizer, STEPS, 0, 1e-3)
    assert losses[-1] < losses[0] - 0.5

    ids = study.corpus.unseen(2)[:, :-1]
    with torch.no_grad():
        logits = run(input_ids=ids).logits
    packed = {e.expression.where.removesuffix(".weight"): e for e in STORE if e.scheme is not None}
    linears = {name: m for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))}
    assert set(packed) == set(linears)
    assert len(linears) == 2 + 7 * example.QUICK.layers

    torch._dynamo.reset()
    rounded = []
    monkeypatch.setattr(estimators, "decode", lambda *args: rounded.append(decode(*args)) or rounded[-1])
    with watching("reference"):
        compiled(model, recipe, policy="memory")(input_ids=ids)
    monkeypatch.undo()
    rounded = [each for each in rounded if type(each) is torch.Tensor]  # not the fakes of the trace
    assert len(rounded) == len(linears)
    for name, module in linears.items():
        values = packed[name].decoded()
        seen = values[ids.flatten()] if "embed" in name else values  # a table's rows are rounded after the lookup
        assert any(torch.equal(seen, each) for each in rounded), name
        assert not torch.equal(values, module.weight), name
        module.weight.data.copy_(values)
    # Kernels read an activation as 16-bit integers. What sums in float32 add: `2 K` roundings in each product.
    exact = Logits(model.double())(ids)
    bound = noise_bound(Logits(model), ids, step=DIGITS)
    largest = 2 * max(m.weight.shape[1] for m in linears.values()) * FLOAT * float(exact.abs().max())
    assert (logits - exact).abs().max() <= bound + largest * len(linears)
