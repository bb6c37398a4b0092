"""Training under the backend: what is rounded in a step is what evaluation packs, and gradients are the estimator's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from qcompile import QCError, convert, learned_scales, prepare
from qcompile.backend import watching
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.fit import why_unfit
from qcompile.ir.scheme import Scheme
from qcompile.plan.recipe import Recipe, Rule
from qcompile.runtime.store import STORE
from tests.e2e.models import MLP
from tests.e2e.support import compiled

# The first four also as a transposed product and as tables; all as a linear.
SCHEMES = (
    "int8/g64:fp16",
    "uint4/g32:fp16+m",
    "e2m1/g16:e4m3/tensor:fp32",
    "int8/b16x16:fp32",
    "uint4/g32:bf16+m",
    "uint4/g128:fp16+z",
    "int4/axis0:fp32",
    "int3/g32:fp16",
    "int2/g32:fp16",
    "uint2/g16:fp16+m",
    "int6/tensor:fp32",
    "nf4/g64:fp16",
    "ternary/g32:fp16",
    "binary/axis0:fp32",
    "e4m3/axis0:fp32",
    "e3m2/g32:fp16",
    "e2m1/g32:e8m0",
    "int4/g32:int8/axis0:fp16",
)
OTHERS = 4
K, N = 72, 24  # no multiple of most groups


class Zoo(nn.Module):
    """Linears, transposed products (HF's Conv1D), tables and heads that share them. What it returns is what the graph
    reads as weights: products with the identity are exact."""

    def __init__(self) -> None:
        super().__init__()

        def weights(count: int, shape: tuple[int, int]) -> nn.ParameterList:
            return nn.ParameterList(torch.randn(shape) * 0.1 for _ in range(count))

        self.linear, self.conv1d = weights(len(SCHEMES), (N, K)), weights(OTHERS, (K, N))
        self.table = weights(OTHERS, (N, K))

    def forward(self, eye: Tensor, ids: Tensor) -> list[Tensor]:
        linear = [F.linear(eye, w).T for w in self.linear]
        conv1d = [(eye @ w).T for w in self.conv1d]
        tables = [F.embedding(ids, w) for w in self.table]
        return linear + conv1d + tables + [F.linear(eye, w).T for w in self.table]


def zoo_recipe() -> Recipe:
    rules = []
    for i, text in enumerate(SCHEMES):
        scheme = Scheme.parse(text)
        fit = "minmax" if i % 2 or why_unfit("mse", scheme) else "mse"
        rules += [Rule(scheme, path=f"*.{i}", fit=fit)]
    return Recipe(tuple(rules), "zoo")


def test_evaluation_packs_what_training_saw() -> None:
    torch.manual_seed(0)
    model, eye, ids = Zoo(), torch.eye(K), torch.arange(N)
    run = compiled(model, zoo_recipe(), policy="memory")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sum(y.square().sum() for y in run(eye, ids)).backward()
    optimizer.step()
    seen = [y.detach() for y in run(eye, ids)]
    with torch.no_grad(), watching("reference") as trace:
        run(eye, ids)
    (ctx,) = trace.contexts
    packed = {(d.site.path, d.site.kind): d for d in ctx.plan}
    assert len(packed) == len(SCHEMES) + 3 * OTHERS
    assert all(d.quantized for d in ctx.plan)
    names = [f"linear.{i}" for i in range(len(SCHEMES))]
    names += [f"{kind}.{i}" for kind in ("conv1d", "table", "table") for i in range(OTHERS)]
    kinds = ["linear"] * (len(SCHEMES) + OTHERS) + ["embedding"] * OTHERS + ["head"] * OTHERS
    entries = {(e.expression.where, str(e.scheme)): e for e in STORE}
    for name, kind, weight in zip(names, kinds, seen, strict=True):
        decision = packed[name, kind]
        entry = entries[name, str(decision.weight)]
        assert torch.equal(entry.decoded(), weight), (name, kind, str(decision.weight))
        # and that is no accident of float weights: the values are those of the codec
        float_weight = model.get_parameter(name).detach()
        float_weight = float_weight.T if "conv1d" in name else float_weight
        assert not torch.equal(weight, float_weight)
        parts = quantize(float_weight, decision.weight, fit=decision.fit)
        assert torch.equal(dequantize(parts, decision.weight, N, K), weight)


def test_gradients_are_the_estimators() -> None:
    """Against the same step spelled out with torch: weights replaced by their rounded values, masked gradients."""
    torch.manual_seed(0)
    model, x = MLP(bias=True), torch.randn(6, 64, requires_grad=True)
    plain, scheme = copy.deepcopy(model), "int4/g32:fp16"  # a scheme that clips nothing: the mask is all ones
    compiled(model, scheme, policy="memory")(x).square().sum().backward()
    for module in plain.modules():
        if isinstance(module, nn.Linear):
            w = module.weight.detach()
            module.weight.data.copy_(dequantize(quantize(w, scheme), scheme, *w.shape))
    leaf = x.detach().double().requires_grad_()
    plain.double()(leaf).square().sum().backward()
    # Two layers deep, sums of at most 96 products, forward and backward: below 4 * 96 roundings of the largest terms.
    bound = 4 * 96 * 2.0**-24
    for ours, theirs in zip((x, *model.parameters()), (leaf, *plain.parameters()), strict=True):
        assert (ours.grad.double() - theirs.grad).abs().max() <= bound * 96 * theirs.grad.abs().max()


def saved_shapes(run: Callable[[], Tensor], parameters: set[int]) -> list[tuple[int, ...]]:
    """Shapes of the floating-point tensors that a forward pass keeps for its backward pass, but for parameters."""
    found: list[tuple[int, ...]] = []

    def keep(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.data_ptr() not in parameters:
            found.append(tuple(t.shape))
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return found


@pytest.mark.parametrize("recipe", ["int4", "w8a8"])
def test_rounded_weights_are_not_kept(recipe: str) -> None:
    torch.manual_seed(0)
    model, x = MLP(k=64, h=96), torch.randn(7, 64, requires_grad=True)
    run = compiled(model, recipe, policy="memory")
    shapes = saved_shapes(lambda: run(x), {p.data_ptr() for p in model.parameters()})
    assert shapes  # activations are kept
    assert not {(64, 96), (96, 64)} & set(shapes), shapes


class Blocks(nn.Module):
    def __init__(self, wrap: bool) -> None:
        super().__init__()
        self.blocks, self.wrap = nn.ModuleList(MLP(bias=True) for _ in range(2)), wrap

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.wrap else block(x)
        return x


def test_checkpoints_are_rounded_too_and_keep_only_what_they_are_given() -> None:
    torch.manual_seed(0)
    one, x = Blocks(wrap=True), torch.randn(5, 64)
    two = Blocks(wrap=False)
    two.load_state_dict(one.state_dict())
    results = []
    for model in (one, two):
        torch._dynamo.reset()
        run = compiled(model, "int4", policy="memory")
        with watching() as trace:
            y = run(x)
        y.square().sum().backward()
        assert [d.trained for d in trace.contexts[0].plan] == [True] * 6
        shapes = saved_shapes(lambda run=run: run(x), {p.data_ptr() for p in model.parameters()})  # type: ignore[misc]
        results.append((y, [p.grad for p in model.parameters()], shapes))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        # the same sums, maybe fused in another order
        assert (a - b).abs().max() <= 96 * 2.0**-23 * b.abs().max() * 8
    inner = [shape for shape in results[0][2] if shape == (5, 96)]
    assert not inner, results[0][2]
    assert [shape for shape in results[1][2] if shape == (5, 96)]


@pytest.mark.parametrize("case", ["autocast", "accumulate", "frozen", "break"])
def test_training_as_it_is_done(case: str) -> None:
    """Each of these gives the gradients of the plain-torch meaning of the same graph."""
    torch.manual_seed(0)
    model, xs = Cases(case), torch.randn(2, 5, 64)
    if case == "frozen":
        model.first.requires_grad_(False)

    def grads(mode: Any) -> list[Tensor]:
        torch._dynamo.reset()
        model.zero_grad()
        with watching(mode) as trace:
            run = compiled(model, "int4", policy="memory")
            for x in xs[: 2 if case == "accumulate" else 1]:
                with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
                    y = run(x)
                y.float().square().sum().backward()
        trained = [d.trained for ctx in trace.contexts for d in ctx.plan]
        assert trained == ([False] * 3 + [True] * 3 if case == "frozen" else [True] * 6)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        return [p.grad for p in model.parameters() if p.grad is not None]

    ours, reference = grads("compiled"), grads("reference")
    # Gradients of norm 1. bf16 products (8 bits) or fp32 sums of 96 terms, four layers deep.
    bound = 16 * 2.0**-8 if case == "autocast" else 4096 * 2.0**-24
    for a, b in zip(ours, reference, strict=True):
        assert (a - b).abs().max() <= bound


class Cases(nn.Module):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.first, self.second, self.case = MLP(bias=True), MLP(bias=True), case

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.case == "break":
            torch._dynamo.graph_break()
        return self.second(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(48, 64), MLP(bias=True)
        self.head = nn.Linear(64, 48, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.table(ids)))


@pytest.mark.parametrize(("scheme", "estimator"), [("int4/g32:fp16", "lsq"), ("int3/axis0:fp32", "pact")])
def test_learned_scales(scheme: str, estimator: str) -> None:
    """They get the gradients of the plain-torch meaning, move with the optimizer, and evaluation packs with them."""
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 48, (3, 5))
    report = prepare(model, scheme, estimator=estimator)
    assert len(report.weights) == 5
    ours = {name for name, _ in model.named_parameters() if "original" not in name and "parametrizations" in name}
    assert len(ours) == 4
    assert learned_scales(model).keys() == ours
    grads = []
    for mode in ("reference", "compiled"):
        torch._dynamo.reset()
        model.zero_grad()
        with watching(mode) as trace:
            compiled(model, scheme, policy="memory")(ids).square().sum().backward()
        assert all(d.trained and d.reason == "prepared" for d in trace.contexts[0].plan)
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        # Sums of up to 96 products in other orders, four layers deep.
        assert (a - b).abs().max() <= 4 * 96 * 2.0**-23 * (b.abs().max() + 1) * 8
    run = compiled(model, scheme, policy="memory")
    torch.optim.AdamW(model.parameters(), lr=0.01).step()
    with torch.no_grad(), watching("reference") as trace:
        y = run(ids)
    assert all(d.packable and d.packed for d in trace.contexts[0].plan)
    weights = [m.parametrizations.weight for m in model.modules() if hasattr(m, "parametrizations")]
    entries = [e for e in STORE if e.encoding.estimator == estimator]
    decoded = [entry.decoded() for entry in entries]
    for held in weights:
        assert any(torch.equal(held(), d) for d in decoded)
    with torch.no_grad():
        assert torch.equal(y, model(ids))  # eager: the parametrization itself


def test_prepared_weights_are_converted_as_they_are() -> None:
    torch.manual_seed(0)
    model, ids = Tied(), torch.randint(0, 48, (3, 5))
    prepare(model, "int4/g32:fp16")
    for name, parameter in model.named_parameters():
        if name.endswith("step"):
            parameter.data *= 0.7  # no scale that anybody would choose
    with torch.no_grad():
        want = model(ids)
    report = convert(model, "int8")
    assert {item.scheme for item in report.weights} == {"int4/g32:fp16"}
    assert [name for name, _ in model.named_parameters() if "weight" in name] == []
    with torch.no_grad():
        assert torch.equal(model(ids), want)


def test_learned_scales_need_prepare() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    recipe = Recipe((Rule("int4/g32:fp16", estimator="lsq"),), "learned")
    with pytest.raises(QCError, match=r"'lsq' learns a step[^$]*0\.weight[^$]*qcompile\.prepare"):
        compiled(model, recipe, policy="memory")(torch.randn(2, 32))
    prepare(model, recipe)
    torch._dynamo.reset()
    with watching("reference"):
        compiled(model, recipe, policy="memory")(torch.randn(2, 32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("recipe", "estimator", "words"),
    [
        ("uint4/g32:fp16+m", "lsq", "scales of uint4/g32:fp16.m cannot be learned[^$]*0.weight[^$]*minimum"),
        ("int4/g32:fp16", "ste", "'ste' learns nothing"),
        ("int4/g32:fp16", "lsqq", "unknown estimator"),
        ("e2m1/g16:e4m3/tensor:fp32", "lsq", "nested"),
    ],
)
def test_what_cannot_be_prepared(recipe: str, estimator: str, words: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(QCError, match=words):
        prepare(model, recipe, estimator=estimator)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
