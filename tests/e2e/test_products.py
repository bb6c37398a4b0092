"""Training with products of 8-bit codes: the compiled step, what it keeps, and what evaluation runs afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from qcompile import QCError, QCWarning, explain, prepare
from qcompile.backend import watching
from qcompile.plan.recipe import Recipe, Rule
from tests.e2e.models import MLP
from tests.e2e.support import FLOAT, compiled

RECIPE = "int8-train"


def trained(run: Any, model: nn.Module, x: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
    """The result and all gradients."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        y = run(leaf)
    y.float().square().mean().backward()
    return [y.detach(), leaf.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_compiled_step_is_the_operators(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model, x = MLP(bias=True), torch.randn(3, 5, 64)
    results = []
    for mode in ("compiled", "reference"):
        torch._dynamo.reset()
        with watching(mode) as trace:
            results.append(trained(compiled(model, RECIPE), model, x, dtype))
        assert [d.kernel for d in trace.contexts[0].plan if d.quantized] == ["low_bit_mm"] * 3
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        # A code on the edge between two may fall to either side: one step of 127 of a row, through two more layers.
        assert (ours - theirs).float().norm() <= 3 / 127 * theirs.float().norm()
        if dtype is None:
            assert (ours - theirs).abs().median() <= 64 * FLOAT * theirs.abs().max()


def test_codes_are_kept_and_products_are_of_codes() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)), torch.randn(16, 64, requires_grad=True)
    run = compiled(model, RECIPE)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        _, code = run_and_get_code(lambda: run(x).sum().backward())
    known = {p.data_ptr() for p in model.parameters()}
    large = {(t.dtype, tuple(t.shape)) for t in kept if t.numel() >= 16 * 64 and t.data_ptr() not in known}
    assert (torch.int8, (16, 64)) in large
    assert not {(torch.float32, shape) for shape in ((64, 96), (96, 64))} & large
    called = [line for text in code for line in text.split("def call(")[-1].splitlines()]
    assert sum("low_bit_mm" in line for line in called) >= 6
    assert not any("extern_kernels." in line and "mm(" in line for line in called)


def test_evaluation_runs_what_was_trained() -> None:
    torch.manual_seed(0)
    model, x = MLP(bias=True), torch.randn(9, 64)
    run = compiled(model, RECIPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    counters.clear()
    for _ in range(3):
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
    y = run(x).detach()
    with torch.no_grad(), watching() as trace:
        deployed = run(x)
    assert [d.kernel.startswith("cpu") for d in trace.contexts[0].plan if d.quantized] == [True] * 3
    # The same codes; a code on an edge moves one activation by a step.
    assert (y - deployed).norm() <= 3 / 127 * y.norm()
    assert (y - deployed).abs().median() <= 64 * FLOAT * y.abs().max()


def test_frozen_layers_and_reports() -> None:
    torch.manual_seed(0)
    model, x = MLP(bias=True), torch.randn(9, 64)
    report = explain(model.eval(), x, recipe=RECIPE)
    assert {row.scheme for row in report.rows} - {"float"} == {"int8/axis0:fp32 x int8/token:fp32"}
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    first.weight.requires_grad_(False)
    with watching() as trace:
        compiled(model.train(), RECIPE)(x).sum().backward()
    assert sorted(d.kernel == "low_bit_mm" for d in trace.contexts[0].plan if d.quantized) == [False, True, True]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"weight": None, "grad": "int8/token"}, "stays float"),
        ({"weight": "int8/axis0", "grad": "int8/token"}, "not rounded"),
        ({"weight": "int8/g64", "act": "int8/token", "grad": "int8/token"}, "single"),
        ({"weight": "int8/axis0", "act": "int8/token", "grad": "int8/token", "estimator": "lsq"}, "learns"),
    ],
)
def test_rules_that_no_products_have(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(QCError, match=rf"(?s)recipe\.grad.*{words}"):
        Rule(**fields)


def test_rules_in_files() -> None:
    rule = Rule("int8/axis0", act="int8/token", grad="int8/token~stochastic")
    assert Rule.from_json(rule.to_json()) == rule
    assert rule.to_json()["grad"] == "int8/token:fp32~stochastic"


def test_learned_scales_have_no_products() -> None:
    model = nn.Sequential(nn.Linear(64, 96))
    prepare(model, "int8/axis0")
    recipe = Recipe((Rule("int8/axis0", act="int8/token", grad="int8/token"),))
    with pytest.raises(QCError, match=r"train\.products"):
        compiled(model, recipe)(torch.randn(4, 64))


def test_floats_of_eight_bits() -> None:
    """The step of the graph is that of the formulas, with policy="memory" also where no kernel pays."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96, bias=False)), torch.randn(5, 64)
    with watching("reference") as trace:
        y, dx, dw = trained(compiled(model, "fp8-train", policy="memory"), model, x)
    (decision,) = trace.contexts[0].plan
    assert (decision.kernel, str(decision.grad)) == ("low_bit_mm", "e5m2/token:fp32")
    weight, leaf = (t.detach().clone().requires_grad_() for t in (model[0].weight, x))
    schemes = ("e4m3/axis0:fp32", "e4m3/token:fp32", "e5m2/token:fp32")
    scales = torch.ops.qcompile.choose_qparams(weight, schemes[0], "minmax")
    want = torch.ops.qcompile.quantized_linear(leaf, weight, scales, *schemes, "ste", "minmax", torch.float32)
    want.square().mean().backward()
    assert all(torch.equal(ours, theirs) for ours, theirs in ((y, want), (dx, leaf.grad), (dw, weight.grad)))


def test_floats_without_a_kernel_stay_float_and_say_so() -> None:
    model = nn.Sequential(nn.Linear(64, 96))
    with watching("reference") as trace, pytest.warns(QCWarning, match="no fast kernel for e4m3"):
        compiled(model, "fp8-train")(torch.randn(4, 64)).sum().backward()
    (decision,) = trace.contexts[0].plan
    assert (decision.weight, decision.packed) == (None, False)
    assert "policy='memory' packs it anyway" in decision.reason
