"""Recipes as data: order, matchers, JSON, presets."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qcompile.errors import QCError
from qcompile.ir.noise import ratio_db
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


@pytest.mark.parametrize("size", [2.0**73, 2.0**-80], ids=["large", "small"])
def test_sqnr_of_sizes_whose_squares_float32_cannot_hold(size: float) -> None:
    """A power of two scales codes and errors exactly (no product leaves float32), so the ratio is the same number."""
    weight, coarse = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), Scheme.parse("int2/g64:fp32")
    assert sqnr_db(weight * size, coarse) == pytest.approx(sqnr_db(weight, coarse), rel=1e-12)  # float64 logarithms
    recipe = Recipe((Rule(coarse, min_sqnr=30.0), Rule(INT8)))
    assert recipe.resolve(SITE, lambda: weight * size).rule == 1


def test_the_ratio_is_never_nan() -> None:
    one, bad = torch.ones(3, 4), torch.ones(3, 4)
    for value in (math.nan, math.inf):
        bad[1, 2] = value
        assert ratio_db(bad, one) == ratio_db(one, bad) == ratio_db(bad, bad) == -math.inf
    assert ratio_db(one, torch.zeros(3, 4)) == -math.inf
    assert ratio_db(torch.zeros(3, 4), torch.zeros(3, 4)) == ratio_db(torch.ones(0, 4), torch.ones(0, 4)) == math.inf
    table = torch.randn(3, 1 << 19, generator=torch.Generator().manual_seed(0))  # more than is widened at a time
    assert ratio_db(table * 1.5, table) == pytest.approx(10 * math.log10(4), rel=1e-6)  # 1.5 x is rounded to float32


def test_a_ratio_that_cannot_be_compared_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.plan.recipe.sqnr_db", lambda weight, scheme: math.nan)
    assert Recipe((Rule(INT4, min_sqnr=30.0), Rule(INT8))).resolve(SITE, lambda: torch.ones(1, 1)).rule == 1


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
    exact = Recipe((Rule(INT4, min_sqnr=math.inf), Rule(INT8)))
    assert Recipe.from_json(json.loads(json.dumps(exact.to_json(), allow_nan=False))) == exact
    assert "Infinity" not in exact.fingerprint()


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
        ({"version": 1, "rules": []}, "recipe.unknown", "Recipe.from_json({...})"),
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


RULE = {"weight": str(INT8)}
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "weight 5": ({"weight": 5}, "5"),
    "weight false": ({"weight": False}, "False"),
    "weight empty": ({"weight": ""}, "''"),
    "weight list": ({"weight": [str(INT8)]}, f"['{INT8}']"),
    "act without weight": ({"weight": None, "act": "int8/token"}, "int8/token"),
    "act 0": (RULE | {"act": 0}, "0"),
    "path 5": (RULE | {"path": 5}, "5"),
    "path null": (RULE | {"path": None}, "None"),
    "fit 3": (RULE | {"fit": 3}, "3"),
    "fit list": (RULE | {"fit": [1]}, "[1]"),
    "no kind": (RULE | {"kind": []}, "''"),
    "min_sqnr text": (RULE | {"min_sqnr": "a"}, "'a'"),
    "min_sqnr true": (RULE | {"min_sqnr": True}, "True"),
    "min_sqnr vast": (RULE | {"min_sqnr": 10**400}, "1000"),
    "min_weights text": (RULE | {"min_weights": "9"}, "'9'"),
    "min_weights broken": (RULE | {"min_weights": 0.5}, "0.5"),
    "min_weights below": (RULE | {"min_weights": -1}, "-1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_another_type_is_named(name: str, tmp_path: Path) -> None:
    """In a file with the file and the rule's place, in Python with the field; never read as something else."""
    rule, value = WRONG[name]
    field = next(key for key in reversed(rule))
    (tmp_path / "mine.json").write_text(json.dumps({"version": 1, "rules": [RULE, rule]}))
    with pytest.raises(QCError) as read:
        Recipe.of(tmp_path / "mine.json")
    assert read.value.where.startswith(f"{tmp_path / 'mine.json'}: rule 1")
    with pytest.raises(QCError) as made:
        Rule(**rule)  # type: ignore[arg-type]
    for error in (read.value, made.value):
        assert value in error.what
        assert field in str(error)
        assert error.next


def test_a_rule_that_keeps_sites_float_says_so(tmp_path: Path) -> None:
    """A rule whose weight was forgotten would silently do the opposite of what it was written for."""
    assert Rule.from_json({"weight": None, "path": "a.*"}) == Rule(None, path="a.*")
    (tmp_path / "mine.json").write_text(json.dumps({"version": 1, "rules": [RULE, {"path": "a.*"}]}))
    with pytest.raises(QCError, match="a rule has no key 'weight'") as caught:
        Recipe.of(tmp_path / "mine.json")
    assert (caught.value.code, caught.value.where) == ("recipe.rule", f"{tmp_path / 'mine.json'}: rule 1")
    assert "null" in caught.value.next


def test_numbers_of_other_types_are_the_same_rule() -> None:
    same = Rule(INT8, min_weights=1000, min_sqnr=30.0)
    made = Rule(INT8, kind=list(same.kind), min_weights=1e3, min_sqnr=30)  # type: ignore[arg-type]
    assert (made, hash(made), made.to_json()) == (same, hash(same), same.to_json())
    kinds = {"linear", "head", "bmm"}
    assert Rule(INT8, kind=kinds).kind == ("bmm", "head", "linear")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rules", "name", "said"),
    [
        (Rule(INT8), "x", "rules cannot be Rule("),
        ((Rule(INT8), "int8/g64"), "x", "a rule cannot be 'int8/g64'"),
        ((), None, "the name of a recipe cannot be None"),
    ],
)
def test_a_recipe_made_of_something_else(rules: object, name: object, said: str) -> None:
    with pytest.raises(QCError) as caught:
        Recipe(rules, name)  # type: ignore[arg-type]
    assert said in caught.value.what
    assert caught.value.next


def test_one_kind_in_a_file_may_be_a_string() -> None:
    assert Rule.from_json({"weight": str(INT8), "kind": "head"}) == Rule(INT8, kind=("head",))


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ('{"version": 1, "rules": [', "recipe.file", ["is not a JSON file", "line 1 column"]),
        ("{'version': 1}", "recipe.file", ["is not a JSON file"]),
        ('{"version": 1, "rules": [], "nmae": "x"}', "recipe.file", ["unknown key 'nmae'", "did you mean 'name'?"]),
        ('{"version": 1, "rules": ["int8"]}', "recipe.rule", ["a rule cannot be a JSON str", "rule 0"]),
        ('{"version": true, "rules": []}', "recipe.version", ["version True"]),
        ('{"version": 1, "name": null, "rules": []}', "recipe.name", ["cannot be None"]),
        ('{"version": 1, "rules": [{"weight": null, "min_sqnr": NaN}]}', "recipe.file", ["NaN is no number"]),
        ('{"version": 1, "rules": ' + "[" * 100_000, "recipe.file", ["is not a JSON file", "recursion"]),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, code: str, words: list[str]) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(QCError) as caught:
        Recipe.of(tmp_path / "mine.json")
    assert caught.value.code == code
    assert all(word in str(caught.value) for word in (*words, str(tmp_path / "mine.json"))), str(caught.value)
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


@pytest.mark.parametrize("act", ["int8/g32", "uint8/token", "int8/axis0", "nf4/token", "uint8/g32:fp32+z"])
def test_activations_that_nothing_can_round_to(act: str) -> None:
    with pytest.raises(QCError, match=r"int8/token, uint8/token:fp32\+z, int8/g32:fp32"):
        Recipe.of(f"int8/g64 {act}")
