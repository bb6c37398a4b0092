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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile.backend import watching
from qcompile.plan.recipe import Recipe, Rule
from qcompile.runtime.store import STORE
from tests.e2e.support import DIGITS, FLOAT, compiled, noise_bound

pytest.importorskip("transformers", reason="the model is one of transformers'")

EXAMPLE = Path(__file__).resolve().parents[2] / "bench" / "training" / "shakespeare.py"
SCHEMES = {
    "*embed_tokens.weight": "int8/axis0:fp32",
    "*q_proj.weight": "int4/axis0:fp32",
    "*k_proj.weight": "uint4/g32:fp16+m",
    "*v_proj.weight": "int3/g32:fp16",
    "*o_proj.weight": "nf4/g64:fp16",
    "*gate_proj.weight": "e2m1/g16:e4m3/tensor:fp32",
    "*up_proj.weight": "int2/g32:fp16",
    "*down_proj.weight": "int8/g64:fp16",
    "*lm_head.weight": "uint4/g128:fp16+z",
}
STEPS = 50


class Rounded(TorchDispatchMode):
    """The values that a run in plain torch puts in the place of each weight."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.qcompile.fake_quant.default:
            self.found[args[0].data_ptr()] = out.detach()
        return out


@pytest.fixture(scope="module")
def example() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("training_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["training_example"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["training_example"]


def test_after_real_steps_evaluation_runs_the_codes_of_training(tmp_path: Path, example: Any) -> None:
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
    with watching("reference"), Rounded() as seen:
        compiled(model, recipe, policy="memory")(input_ids=ids)
    rows = ids.unique()
    for name, module in linears.items():
        values = packed[name].decoded()
        if "embed" in name:  # rounded after the lookup
            assert torch.equal(values[ids.flatten()], next(v for v in seen.found.values() if len(v) == ids.numel()))
            assert not torch.equal(values[rows], module.weight[rows])
        else:
            assert torch.equal(values, seen.found[module.weight.data_ptr()]), name
            assert not torch.equal(values, module.weight), name
        module.weight.data.copy_(values)
    # Kernels read an activation as 16-bit integers. What sums in float32 add: `2 K` roundings in each product.
    exact = model.double()(input_ids=ids).logits
    bound = noise_bound(model, ids, step=DIGITS)
    largest = 2 * max(m.weight.shape[1] for m in linears.values()) * FLOAT * float(exact.abs().max())
    assert (logits - exact).abs().max() <= bound + largest * len(linears)
