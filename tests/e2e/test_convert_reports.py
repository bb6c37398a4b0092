"""What `convert` leaves alone, and that it says so."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile import QCError, QCWarning, Recipe, Rule, Scheme, convert, explain, load, save
from qcompile.backend import watching

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


class Mixed(nn.Module):
    """Matrices in modules that convert does not pack, and vectors, which nobody misses in a report."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.conv, self.norm = nn.Linear(16, 16), nn.Conv2d(3, 4, 3), nn.LayerNorm(16)
        self.fc.adapter = nn.Parameter(torch.randn(16, 2))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3))
        self.lstm, self.cell = nn.LSTM(4, 4), nn.GRUCell(4, 4)
        self.table, self.token = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(1, 1, 4))
        self.again, self.lazy = self.table, nn.LazyConv2d(4, 3)
        self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize("strict", [False, True])
def test_matrices_of_other_modules_are_listed(strict: bool) -> None:
    conv, rnn = "convolutions are not quantized yet", "recurrent layers are not quantized yet"
    want = {
        "table": "a Mixed is neither a linear nor an embedding of torch",
        "fc.adapter": "of a linear or an embedding only `weight` is packed",
        "conv.weight": conv,
        "normed.weight": conv,
        **dict.fromkeys(("lstm.weight_ih_l0", "lstm.weight_hh_l0", "cell.weight_ih", "cell.weight_hh"), rnn),
    }
    model = Mixed()
    report = convert(model, SCHEME, strict=strict)
    assert [item.path for item in report.weights] == ["fc.weight"]
    assert dict(report.kept) == want
    assert len(report.kept) == len(want)
    assert dict(convert(model, SCHEME).kept) == {**want, "fc.weight": f"packed already as {SCHEME}"}
    assert "no weight converted, 2 kept as they were" in str(convert(nn.LSTM(4, 4), SCHEME))


@pytest.mark.parametrize("part", ["dict", "linear"])
def test_a_users_module_may_be_called_parametrizations(part: str) -> None:
    inner = nn.Linear(32, 32)
    holder = nn.Module()
    holder.parametrizations = nn.ModuleDict({"q": inner}) if part == "dict" else inner
    paths = ["parametrizations.q.weight" if part == "dict" else "parametrizations.weight"]
    report = convert(holder, SCHEME)
    assert [item.path for item in report.weights] == paths
    assert [path for path, _ in convert(holder, SCHEME).kept] == paths


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


def test_what_the_backend_recipe_cannot_change_is_said() -> None:
    """A converted weight keeps its scheme; how activations are rounded is the backend's recipe's."""
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16)).eval(), torch.randn(2, 32)
    convert(model, "int4")
    assert not any(module.training for module in model.modules())
    found = explain(model, x, recipe="w8a8")
    kept, act = "uint4/g32:fp16+m", "int8/g32:fp32"
    assert [row.scheme for row in found] == [f"{kept} x {act}"] * 2
    (note,) = found.notes
    assert "2 of which recipe 'w8a8' does not ask for" in note
    assert f"0.weight is {kept}, not int8/g64:fp16" in note
    mixed = Recipe((Rule(None, path="2.*"), Rule(kept)), "mine")
    (note,) = explain(model, x, recipe=mixed).notes
    assert "1 of which recipe 'mine' does not ask for" in note
    assert f"2.weight is {kept}, not float" in note
    for agreeing in ("int4", "w4a8", "auto", Recipe((Rule(kept, min_sqnr=99.0), Rule(SCHEME)))):
        assert not [note for note in explain(model, x, recipe=agreeing).notes if "converted" in note]
    assert explain(nn.Linear(32, 32).eval(), x, recipe="w8a8").notes == ()


def test_a_rule_with_min_sqnr_is_the_one_that_packed_the_weight_or_is_passed_over() -> None:
    """Not the first one that might have: its activations would be rounded, and the right rule called unused."""
    model, x = nn.Sequential(nn.Linear(32, 16)).eval(), torch.randn(2, 32)
    recipe = Recipe((Rule("int4/g32", "int8/token", min_sqnr=99.0), Rule(SCHEME)), "mine")
    convert(model, recipe)
    found = explain(model, x, recipe=recipe)
    assert [row.scheme for row in found] == [str(SCHEME)]
    assert [rule for rule in found.unused_rules if str(SCHEME) in rule] == []


@pytest.mark.parametrize("how", ["compiled", "explained"])
def test_warnings_stand_at_the_users_line(how: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 16)).eval(), torch.randn(2, 32)
    recipe = Recipe((Rule(None, path="1.weight"), Rule("int8/g32")), "mine")
    convert(model, SCHEME)
    compiled = torch.compile(model, backend="qcompile", options={"recipe": recipe})
    with torch.no_grad(), watching("reference"), pytest.warns(QCWarning) as caught:
        explain(model, x, recipe=recipe) if how == "explained" else compiled(x)
    ours = [warning for warning in caught if warning.category is QCWarning]
    assert [warning.filename for warning in ours] == [__file__] * 2
    assert "0.weight is int8/axis0:fp32, not int8/g32:fp16" in str(ours[0].message)
    assert "did you mean '0.weight'?" in str(ours[1].message)


def test_a_rule_that_matches_nothing_is_told_the_nearest_name() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(32, 16), "head": nn.Linear(16, 16)})
    recipe = Recipe((Rule("int4/g32", path="encodr.*"), Rule(SCHEME)), "mine")
    with pytest.warns(
        QCWarning, match=r"rule path='encodr\.\*' matched no weight .*did you mean 'encoder'\?"
    ) as caught:
        report = convert(model, recipe)
    assert [warning.filename for warning in caught] == [__file__]
    assert report.notes == (str(caught[0].message),)
    assert f"note: {report.notes[0]}" in str(report)
    with warnings.catch_warnings(action="error"):  # what is packed already was matched the first time
        assert convert(model, Recipe((Rule(SCHEME, path="encoder.*"),))).notes == ()


def test_a_packed_weight_of_the_model_itself_has_a_path() -> None:
    model = nn.Linear(32, 16)
    convert(model, SCHEME)
    assert convert(model, SCHEME).kept == (("weight", f"packed already as {SCHEME}"),)


def test_a_report_prints_as_a_table() -> None:
    embed, head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    head.weight = embed.weight
    model = nn.ModuleDict({"embed": embed, "head": head, "fc": nn.Linear(32, 32)})
    report = convert(model, Recipe((Rule(None, path="fc.*"), Rule(SCHEME))))
    text = str(report)
    assert repr(report) == text
    assert "\x1b" not in text
    assert "2 weights converted, 8.19 kB -> 2.30 kB, 1 kept as they were" in text
    line = {path: next(row for row in text.splitlines() if path in row) for path in ("embed.w", "head.w", "fc.w")}
    assert "int8/axis0:fp32" in line["embed.w"]
    assert "8.19 -> 2.30" in line["embed.w"]
    assert "shared" in line["head.w"]
    assert "rule 0 keeps it float" in line["fc.w"]
    assert "no weight converted, 0 kept" in str(convert(nn.ReLU(), SCHEME))


def test_saving_a_model_without_packed_weights_is_said(tmp_path: Path) -> None:
    model, other = nn.Linear(32, 16), nn.Linear(32, 16)
    with pytest.warns(QCWarning, match=r"saved in float\. Call qcompile\.convert") as caught:
        save(model, tmp_path)
    assert [warning.filename for warning in caught] == [__file__]
    assert torch.equal(load(other, tmp_path).weight, model.weight)
    convert(model, SCHEME)
    with warnings.catch_warnings(action="error"):
        save(model, tmp_path)


def test_a_weight_beyond_its_scales_is_named() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    model[0].weight.data *= 1e8
    with pytest.warns(QCWarning, match=r"0\.weight: the weight is larger or smaller") as caught:
        convert(model, "int4/g32:fp16")
    assert [warning.filename for warning in caught] == [__file__]


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


def test_names_are_no_markup() -> None:
    model = nn.ModuleDict({"a[/b]": nn.Linear(64, 64)})
    assert "a[/b].weight" in str(convert(model, "int8"))
    assert "a[/b].weight" in str(convert(model, "int8"))  # now under "kept"


def test_names_in_the_ledger_are_no_markup() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("[/b]", nn.Linear(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = getattr(self, "[/b]")(x)
            return y

    assert "[/b" in str(explain(Odd().eval(), torch.randn(2, 64), recipe="int8"))
