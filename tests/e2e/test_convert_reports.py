"""What `convert` leaves alone, and that it says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile import QCError, QCWarning, Recipe, Rule, Scheme, convert, explain, load, save

SCHEME = Scheme.parse("int8/axis0:fp32")


class Head(nn.Module):
    """Multiplies with somebody else's table."""

    def __init__(self, table: nn.Parameter) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.table.t()


def test_what_is_tied_stays_tied() -> None:
    embed = nn.Embedding(64, 32)
    model = nn.ModuleDict({"embed": embed, "head": Head(embed.weight), "fc": nn.Linear(32, 32)})
    report = convert(model, "int8")
    assert [item.path for item in report.weights] == ["fc.weight"]
    ((path, reason),) = report.kept
    assert path == "embed.weight"
    assert reason.startswith("head.table is the same parameter")
    assert model["head"].table is embed.weight
    with pytest.raises(QCError, match=r"head\.table") as caught:
        convert(model, "int8", strict=True)
    assert (caught.value.code, caught.value.where) == ("convert.strict", "embed.weight")


def test_a_weight_held_outside_keeps_its_flag() -> None:
    """Somebody may train it elsewhere."""
    model = nn.Sequential(nn.Linear(32, 16))
    weight = model[0].weight
    convert(model, "int8")
    assert weight.requires_grad
    assert weight.is_leaf


def odd() -> nn.Module:
    new, old = nn.utils.parametrizations.weight_norm, nn.utils.weight_norm
    with pytest.warns(FutureWarning):
        made = old(nn.Linear(16, 16))
    return nn.Sequential(new(nn.Linear(16, 16)), made, nn.MultiheadAttention(16, 2), nn.Linear(16, 16))


def test_weights_that_are_no_plain_parameters_are_listed() -> None:
    model = odd()
    report = convert(model, "int8")
    assert [item.path for item in report.weights] == ["2.out_proj.weight", "3.weight"]
    assert [path for path, _ in report.kept] == ["0.weight", "1.weight", "2.in_proj_weight"]
    assert all("parametrization" in reason or "MultiheadAttention" in reason for _, reason in report.kept)
    x = torch.randn(3, 16)
    assert model[2](x, x, x)[0].shape == (3, 16)
    for path, _ in report.kept:
        with pytest.raises(QCError) as caught:
            convert(odd(), Recipe((Rule(SCHEME, path=path),)), strict=True)
        assert (caught.value.code, caught.value.where) == ("convert.strict", path)
    rules = [Rule(None, path=path) for path, _ in report.kept]
    assert len(convert(odd(), Recipe((*rules, Rule(SCHEME))), strict=True).weights) == 2
    again = convert(model, "int8")
    assert not again.weights
    packed = tuple((item.path, f"packed already as {item.scheme}") for item in report.weights)
    assert sorted(again.kept) == sorted(packed + report.kept)


def test_compiled_models_are_what_they_wrap(tmp_path: Path) -> None:
    model = torch.compile(nn.Sequential(nn.Linear(32, 16)), backend="qcompile")
    report = convert(model, "int8")
    assert [item.path for item in report.weights] == ["0.weight"]
    save(model, tmp_path)
    other = torch.compile(nn.Sequential(nn.Linear(32, 16)), backend="qcompile")
    assert load(other, tmp_path) is other
    x = torch.randn(2, 32)
    assert torch.equal(other._orig_mod(x), model._orig_mod(x))


def test_rules_name_packed_weights_by_their_path() -> None:
    """Not by the place where torch keeps the buffers."""
    model, x = nn.Sequential(nn.Linear(32, 16)), torch.randn(2, 32)
    convert(model, SCHEME)
    recipe = Recipe((Rule(SCHEME, Scheme.parse("int8/token"), path="0.weight"),))
    report = explain(model, x, recipe=recipe)
    assert [(row.path, row.scheme) for row in report] == [("0.weight", f"{SCHEME} x int8/token:fp32")]
    assert not report.unused_rules


def test_a_weight_beyond_its_scales_is_named() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    model[0].weight.data *= 1e8
    with pytest.warns(QCWarning, match=r"0\.weight: the weight is larger or smaller"):
        convert(model, "int4/g32:fp16")


def test_a_bad_weight_leaves_the_whole_model_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16), nn.Linear(16, 8))
    with torch.no_grad():
        model[2].weight[3, 5] = float("nan")
    with pytest.raises(QCError, match=r"2\.weight"):
        convert(model, SCHEME)
    assert all(isinstance(layer.weight, nn.Parameter) for layer in model)
    with torch.no_grad():
        model[2].weight[3, 5] = 0.0
    assert [item.path for item in convert(model, SCHEME).weights] == ["0.weight", "1.weight", "2.weight"]
