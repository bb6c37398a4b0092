"""Recipes as data: order, matchers, JSON, presets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcompile.errors import QCError
from qcompile.ir.scheme import Scheme
from qcompile.plan.plan import Decision, Plan
from qcompile.plan.recipe import PRESETS, Recipe, Rule, sqnr_db
from qcompile.plan.site import Site

INT8, INT4, ACT = (Scheme.parse(s) for s in ("int8/axis0:fp32", "uint4/g32:fp16+m", "int8/token:fp32"))
SITE = Site(0, "linear", "layers.3.mlp.up.weight", "model.py:12", 96, 64, 5, 2 * 96 * 64 * 5, "float32")


def test_first_match_wins() -> None:
    recipe = Recipe(
        (
            Rule(None, path="*.down.weight"),
            Rule(INT4, ACT, path="layers.3.*"),
            Rule(INT8, kind=("head",)),
            Rule(INT8, min_weights=96 * 64),
            Rule(INT4),
        )
    )
    cases = {
        1: SITE,
        0: replace(SITE, path="layers.3.mlp.down.weight"),
        2: replace(SITE, path="lm_head.weight", kind="head"),
        3: replace(SITE, path="layers.4.mlp.up.weight"),
        4: replace(SITE, path="layers.4.mlp.up.weight", k=63),
    }
    for rule, site in cases.items():
        choice = recipe.resolve(site)
        assert (choice.rule, choice.weight) == (rule, recipe.rules[rule].weight)
    assert recipe.resolve(cases[0]).reason == "rule 0 keeps it float"
    assert recipe.unused([recipe.resolve(cases[0]), recipe.resolve(cases[4])]) == list(recipe.rules[1:4])


def test_no_match_stays_float_with_a_reason() -> None:
    choice = Recipe((Rule(INT4, path="other.*"),), "mine").resolve(SITE)
    assert (choice.weight, choice.rule) == (None, -1)
    assert "'mine'" in choice.reason


def test_lookups_have_no_activation_scheme() -> None:
    recipe = Recipe((Rule(INT8, ACT),))
    assert recipe.resolve(SITE).act == ACT
    assert recipe.resolve(replace(SITE, kind="embedding")).act is None


def test_min_sqnr_looks_at_the_weight() -> None:
    recipe = Recipe((Rule(INT4, min_sqnr=30.0), Rule(INT8)))
    generator = torch.Generator().manual_seed(0)
    gaussian = torch.randn(96, 64, generator=generator)
    grid = torch.randint(0, 16, (96, 64), generator=generator).float()  # exact in four bits with a minimum
    assert sqnr_db(gaussian, INT4) < 30 < sqnr_db(gaussian, INT8)
    passed = recipe.resolve(SITE, lambda: gaussian)
    assert (passed.rule, passed.weight) == (1, INT8)
    assert "30" in passed.reason
    assert recipe.resolve(SITE, lambda: grid).rule == 0


def test_sqnr() -> None:
    assert sqnr_db(torch.ones(4, 32), INT8) == math.inf
    assert sqnr_db(torch.zeros(4, 32), INT8) == math.inf
    w = torch.randn(64, 64, dtype=torch.float64)
    # Uniform noise of one step, s = absmax / 127: 10 log10(12 * mean w^2 / mean s^2), rows of a Gaussian about 42 dB;
    # rounding is uniform to within the spread of 4096 samples: 10 log10(1 +- 4 * sqrt(0.8 / 4096)) = +- 0.25 dB.
    step = w.abs().amax(1) / 127
    want = 10 * math.log10(12 * float(w.square().mean() / step.square().mean()))
    assert abs(sqnr_db(w.float(), INT8) - want) < 0.25


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_data(name: str, tmp_path: Path) -> None:
    recipe = Recipe.of(name)
    assert recipe.name == name
    assert Recipe.from_json(json.loads(json.dumps(recipe.to_json()))) == recipe
    file = tmp_path / f"{name}.json"
    file.write_text(json.dumps(recipe.to_json()))
    for spelling in (file, str(file)):
        assert Recipe.of(spelling) == recipe
        assert Recipe.of(spelling).fingerprint() == recipe.fingerprint()


def test_every_field_survives_json() -> None:
    rule = Rule(INT4, ACT, "a.*", ("linear", "bmm"), 1000, 25.0, "mse")
    assert rule.to_json() == {
        "weight": str(INT4), "act": str(ACT), "path": "a.*", "kind": ["linear", "bmm"], "min_weights": 1000,
        "min_sqnr": 25.0, "fit": "mse",
    }  # fmt: skip
    assert Rule.from_json(rule.to_json()) == rule
    assert Rule.from_json({"weight": None}) == Rule(None)
    assert Recipe((rule,)).fingerprint() != Recipe((replace(rule, min_sqnr=26.0),)).fingerprint()


def test_spellings() -> None:
    assert Recipe.of(str(INT4)).rules == (Rule(INT4),)
    assert Recipe.of(INT4).rules == (Rule(INT4),)
    assert Recipe.of(f"{INT4} {ACT}").rules == (Rule(INT4, ACT),)
    recipe = Recipe((Rule(INT4),))
    assert Recipe.of(recipe) is recipe


@pytest.mark.parametrize(
    ("value", "code", "text"),
    [
        ("int44", "recipe.unknown", "did you mean 'int4'?"),
        (3.5, "recipe.unknown", "float"),
        (f"{INT4} {ACT} {ACT}", "recipe.unknown", "more than two"),
        ("int8/axis0:fp33", "scheme", "fp33"),
    ],
)
def test_refused(value: object, code: str, text: str) -> None:
    with pytest.raises(QCError) as caught:
        Recipe.of(value)
    assert caught.value.code.startswith(code)
    assert text in str(caught.value)


def test_rules_are_checked() -> None:
    with pytest.raises(QCError, match="did you mean 'linear'"):
        Rule(INT4, kind=("liner",))
    with pytest.raises(QCError, match="did you mean 'weight'"):
        Rule.from_json({"wieght": "int4/g32:fp16"})
    with pytest.raises(QCError, match="did you mean 'mse'"):
        Rule(INT4, fit="msse")
    with pytest.raises(QCError, match="one scale per row or per group"):
        Rule(Scheme.parse("int8/tensor"), fit="mse")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("liner", ["unknown kind 'liner'; did you mean 'linear'?"]),
        (["linear", "haed"], ["did you mean 'head'?"]),
        ("conv", ["no rule can match sites of kind 'conv'", "they stay float"]),
        (3, ["unknown kind 3"]),
    ],
)
def test_kinds_that_no_rule_can_match(kind: object, words: list[str]) -> None:
    with pytest.raises(QCError) as caught:
        Rule.from_json({"weight": None, "kind": kind})
    assert (caught.value.code, caught.value.next) == ("recipe.kind", "use linear, head, bmm, embedding")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_one_kind_in_a_file_may_be_a_string() -> None:
    assert Rule.from_json({"weight": str(INT8), "kind": "head"}) == Rule(INT8, kind=("head",))


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ('{"version": 1, "rules": [', "recipe.file", ["is not a JSON file", "line 1 column"]),
        ("{'version': 1}", "recipe.file", ["is not a JSON file"]),
        ('{"version": 1, "rules": [], "nmae": "x"}', "recipe.file", ["unknown key 'nmae'", "did you mean 'name'?"]),
        ('{"version": 1, "rules": ["int8"]}', "recipe.rule", ["a rule cannot be a JSON str"]),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, code: str, words: list[str]) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(QCError) as caught:
        Recipe.of(tmp_path / "mine.json")
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "check the path" not in caught.value.next


def test_coverage_counts_flops() -> None:
    plan = Plan({i: Decision(replace(SITE, index=i, flops=flops)) for i, flops in enumerate((300, 100, 0))})
    assert plan.coverage == 0
    plan.update(0, weight=INT8)
    assert plan.coverage == 0.75
    plan.keep_float(0, "why")
    assert (plan.coverage, plan.decisions[0].reason) == (0, "why")
    assert Plan().coverage == 1.0


PATHS = ["model.layers.0.self_attn.q_proj.weight", "model.layers.10.self_attn.q_proj.weight", "head.weight", ""]


@pytest.mark.parametrize(
    ("glob", "said"),
    [
        ("model.layrs.*", "did you mean 'model.layers'?"),
        ("*.q_prj.weight", "did you mean '*.q_proj.weight'?"),
        ("model.layers.*.slef_attn.*", "did you mean 'model.layers.0.self_attn'?"),
        ("head", "did you mean 'head.*'?"),  # a module's own name, which no weight has
        ("q_proj", "did you mean '*.q_proj.*'?"),
        ("layers.0.self_attn.q_proj.weight", "did you mean '*.layers.0.self_attn.q_proj.weight'?"),
        ("head.*", "its path fits 'head.weight'"),  # the glob is right, so it gets no correction
        ("vision.tower.*", ""),
        ("out.weight", ""),  # nothing but "weight" is alike
        ("*.weigth", ""),
        ("slef_attn", "did you mean '*.self_attn.*'?"),
        ("haed.weight", "did you mean 'head.weight'?"),
        ("*", ""),
    ],
)
def test_the_hint_of_a_rule_that_selected_nothing(glob: str, said: str) -> None:
    hint = Rule(INT8, path=glob, kind="linear").hint(PATHS)
    assert said in hint if said else hint == ""
    assert Rule(INT8, path="typo").hint([]) == ""


def test_the_hint_for_a_head_that_has_no_path_of_its_own() -> None:
    assert "match it with kind='head'" in Rule(INT8, path="lm_head*").hint(["embed.weight", "layers.0.fc.weight"])
    assert "did you mean 'lm_head.weight'?" in Rule(INT8, path="lm_haed.weight").hint(["lm_head.weight"])


def test_what_a_recipe_asks_of_a_weight_that_is_gone() -> None:
    sure, maybe, float_ = Rule(INT8), Rule(INT4, min_sqnr=30.0), Rule(None)
    assert Recipe((maybe, sure, float_)).asks(SITE) == (INT4, INT8)
    assert Recipe((maybe,)).asks(SITE) == (INT4, None)
    assert Recipe((float_, sure)).asks(SITE) == (None,)
    assert Recipe((replace(sure, path="other.*"),)).asks(SITE) == (None,)


def test_rules_take_spellings() -> None:
    assert Rule(str(INT4), str(ACT), kind="head") == Rule(INT4, ACT, kind=("head",))  # type: ignore[arg-type]


@pytest.mark.parametrize("act", ["int8/g32", "uint8/token", "int8/axis0", "e4m3/token", "uint8/token:fp32+z"])
def test_activations_that_nothing_can_round_to(act: str) -> None:
    with pytest.raises(QCError, match="int8/token, or int8/g32:fp32"):
        Recipe.of(f"int8/g64 {act}")
