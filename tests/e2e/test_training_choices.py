"""What a recipe chose by the values of a weight when its training began: it is trained further and deployed in that."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import torch
from torch import Tensor, nn

from qcompile import convert, trained_recipe
from qcompile.backend import watching
from qcompile.plan.recipe import Recipe, Rule
from tests.e2e.support import compiled, fp32_step


def on_a_grid(weight: Tensor) -> Tensor:
    """Values that 4 bits with a minimum hold exactly, in groups of 32."""
    values = torch.randint(-7, 9, weight.shape) / 8
    values[:, ::32], values[:, 1::32] = -7 / 8, 1.0  # both ends in every group
    return values


def test_the_scheme_stays_the_one_of_training() -> None:
    """4 bits keep 30 dB of a weight on a grid, and not of what training makes of it."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(4, 64)
    with torch.no_grad():
        model[0].weight.copy_(on_a_grid(model[0].weight))
    recipe = Recipe((Rule("uint4/g32:fp16+m", min_sqnr=30.0), Rule("int8/g64")), "by noise")
    run = compiled(model, recipe, policy="memory")
    with watching("reference") as trace:
        run(x).sum().backward()
        with torch.no_grad():
            model[0].weight.add_(torch.randn(32, 64) * 0.1)
            run(x)
            torch._dynamo.reset()
            fresh = compiled(nn.Sequential(copy.deepcopy(model[0])), recipe, policy="memory")
            fresh(x)
    trained, deployed, other = (next(iter(ctx.plan)) for ctx in trace.contexts)
    assert (trained.weight.format.name, trained.trained) == ("uint4", True)
    assert (deployed.weight.format.name, deployed.reason) == ("uint4", "as it was trained")
    assert str(other.weight).startswith("int8/g64")

    # Another graph of the same model, and giving up its weights, too.
    torch._dynamo.reset()
    run = compiled(model, recipe, policy="memory", dynamic=False)
    with watching("reference") as trace:
        run(x[:3]).sum().backward()
    (again,) = trace.contexts[0].plan
    assert (again.weight, again.trained) == (trained.weight, True)
    with torch.no_grad():
        want, largest = run(x), x.abs().max() * model[0].weight.abs().sum(1).max()
        (item,) = convert(model, recipe).weights
        assert item.scheme.startswith("uint4/g32:fp16+m")
        assert (model(x) - want).abs().max() <= largest * fp32_step(64)


def test_what_was_trained_as_float_stays_float() -> None:
    """4 bits keep less than 30 dB when training begins, and all of what it ends with."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32, bias=False)), torch.randn(4, 64)
    recipe = Recipe((Rule("uint4/g32:fp16+m", min_sqnr=30.0),), "by noise")
    run = compiled(model, recipe, policy="memory")
    with watching("reference") as trace:
        run(x).sum().backward()
        with torch.no_grad():
            model[0].weight.copy_(on_a_grid(model[0].weight))
            run(x)
            torch._dynamo.reset()
            other = nn.Sequential(copy.deepcopy(model[0]))
            compiled(other, recipe, policy="memory")(x)
    _, kept, packed = (next(iter(ctx.plan)) for ctx in trace.contexts)
    assert (packed.weight.format.name, kept.weight, kept.reason) == ("uint4", None, "float, as it was trained")
    assert trained_recipe(other, recipe) == recipe
    report = convert(model, recipe)
    assert (report.weights, report.kept) == ((), (("0.weight", "float, as it was trained"),))


def test_choices_of_training_in_another_process() -> None:
    """A copy stands for the other process: pins are of the parameters that were trained."""
    torch.manual_seed(0)
    model, x = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))), torch.randn(4, 64)
    with torch.no_grad():
        model[0].weight.copy_(on_a_grid(model[0].weight))
    noisy = Rule("uint4/g32:fp16+m", min_sqnr=30.0)
    eight = Rule("int8/g64:fp16", path="[23].*")
    recipe = Recipe((replace(noisy, path="[013].*"), eight))
    with watching("reference"):
        compiled(model, recipe, policy="memory")(x).sum().backward()
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(on_a_grid(layer.weight) if layer is not model[0] else torch.randn(64, 64))
    fixed = trained_recipe(model, recipe)
    assert [(rule.path, str(rule.weight)[:5]) for rule in fixed.rules[:-2]] == [
        ("0.weight", "uint4"), ("1.weight", "None"), ("3.weight", "int8/")
    ]  # fmt: skip
    assert (fixed.rules[-2:], fixed.name) == (recipe.rules, "custom, as trained")
    again = Recipe.from_json(json.loads(json.dumps(fixed.to_json())))
    other = copy.deepcopy(model)
    assert [item.scheme[:5] for item in convert(other, again).weights] == ["uint4", "int8/", "int8/"]
    assert [item.scheme[:5] for item in convert(copy.deepcopy(model), recipe).weights] == ["uint4", "int8/", "uint4"]
    assert [item.scheme[:5] for item in convert(model, recipe).weights] == ["uint4", "int8/", "int8/"]
