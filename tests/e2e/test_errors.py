"""Bad input: one `QCError` with a place and a next step, raised as itself and not wrapped by Dynamo."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import QCError, QCWarning, Recipe, Rule, explain, load, refresh, save
from qcompile.backend import watching
from qcompile.conversion import convert
from tests.e2e.support import compiled, decoded, fp32_step, noise_bound


def model(k: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(k, 16), nn.ReLU(), nn.Linear(16, 8)).eval()


def with_nan() -> nn.Module:
    bad = model()
    bad[2].weight.data[3, 4] = float("nan")
    return bad


class Integers(nn.Module):
    """A lookup table of integers and a product with it."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(64).reshape(8, 8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w)


X = torch.randn(2, 64)
ERRORS: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, Any], str, list[str]]] = {
    "preset": (model, X, {"recipe": "itn4"}, "recipe.unknown", ["itn4", "did you mean 'int4'?"]),
    "format": (model, X, {"recipe": "itn4/g32:fp16"}, "scheme.unknown-format", ["itn4", "'int4'"]),
    "granularity": (model, X, {"recipe": "int4/k32:fp16"}, "scheme.unknown-granularity", ["k32", "did you mean 'g32'?"]),
    "file": (model, X, {"recipe": "missing.json"}, "recipe.file", ["missing.json"]),
    "option": (model, X, {"stritc": True}, "options.unknown", ["stritc", "did you mean 'strict'?"]),
    "pass": (model, X, {"passes": {"drop": ["mergee"]}}, "passes.unknown", ["did you mean 'merge'?"]),
    "ragged": (
        lambda: model(40), torch.randn(2, 40), {"recipe": "int4/g32:fp16", "strict": True}, "scheme.ragged",
        ["0.weight", "K=40", "g32", "give each row one scale (axis0)"],
    ),
    "ragged, with a better group": (
        model, X, {"recipe": "int4/g48:fp16", "strict": True}, "scheme.ragged", ["0.weight", "K=64", "(such as g32)"],
    ),
    "float64": (
        lambda: model().double(), X.double(), {"recipe": "int8", "strict": True}, "site.refused", ["model.float()"],
    ),
    "nan": (with_nan, X, {"recipe": "int8"}, "codec.nonfinite-weight", ["2.weight", "[3, 4]", "nan"]),
    "nan, measured": (with_nan, X, {"recipe": "auto"}, "codec.nonfinite-weight", ["2.weight", "[3, 4]"]),
    "integers": (
        Integers, torch.ones(2, 8, dtype=torch.int64), {"recipe": "int8", "strict": True}, "site.refused",
        ["w", "int64"],
    ),
    "no kernel": (model, X, {"recipe": "int8/axis1:fp32", "strict": True}, "kernel.none", ["0.weight", "axis1"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str) -> None:
    make, x, options, code, texts = ERRORS[name]
    torch.manual_seed(0)
    options = {"recipe": "int8", **options}
    with torch.no_grad(), pytest.raises(QCError) as caught:
        compiled(make(), **options)(x)
    assert type(caught.value) is QCError
    assert caught.value.code == code, str(caught.value)
    for text in texts:
        assert text in str(caught.value)
    assert caught.value.next or caught.value.why, "neither a reason nor a next step"
    # `explain` plans the same way, so it raises the same.
    recipe = options.pop("recipe")
    with pytest.raises(QCError) as again:
        explain(make(), x, recipe=recipe, options=options)
    assert again.value.code == code


def test_convert_raises_the_same() -> None:
    with pytest.raises(QCError, match=r"2\.weight: index \[3, 4\]"):
        convert(with_nan(), "auto")
    with pytest.raises(QCError, match=r"K=40") as caught:
        convert(model(40), "int4", strict=True)
    assert (caught.value.code, caught.value.where) == ("scheme.ragged", "0.weight")
    assert len(convert(model(40), "int4").weights) == 2


def test_integers_run_as_they_are_when_not_strict() -> None:
    x = torch.arange(16).reshape(2, 8)
    with torch.no_grad(), watching("reference") as trace:
        assert torch.equal(compiled(Integers())(x), Integers()(x))
    assert [d.reason for d in trace.contexts[0].plan] == ["the weight has dtype torch.int64"]


def test_what_a_rule_keeps_float_is_no_error_of_strict() -> None:
    x, keeps = torch.arange(16).reshape(2, 8), Recipe((Rule(None, path="w"), Rule("int8/axis0")))
    assert not explain(Integers(), x, recipe=keeps, options={"strict": True}).rows[0].quantized


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning for the whole process, the reference operators, the right result."""
    from qcompile import backend, compat

    monkeypatch.setattr(compat, "cpp_compiler", lambda: None)
    backend._warn_no_compiler.cache_clear()
    net = model()
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = compiled(net)
        got = run(X)
        compiled(model(32))(torch.randn(2, 32))
    assert [w.category for w in caught if "compiler" in str(w.message)] == [QCWarning]
    plain = decoded(net)
    assert (got - plain(X)).abs().max() <= noise_bound(plain, X, step=fp32_step(64))


def test_a_recipe_file_that_is_none(tmp_path: Path) -> None:
    from qcompile import Recipe

    for text in (
        "[]",
        "3",
        '{"version": 1}',
        '{"version": 9, "rules": []}',
        "{",
        '{"version": 1, "rules": [{"wieght": 0}]}',
    ):
        file = tmp_path / "recipe.json"
        file.write_text(text)
        with pytest.raises(QCError) as caught:
            Recipe.of(file)
        assert caught.value.code in ("recipe.version", "recipe.file", "recipe.rule"), text


def test_a_mended_weight_runs_and_other_modules_never_noticed() -> None:
    """Modules of one kind share compiled code: what is wrong with the values of one is no property of that code."""
    bad, good = with_nan(), model()

    def call(net: nn.Module, x: Tensor) -> Tensor:
        return net(x)

    with torch.no_grad(), watching("reference") as trace:
        run = compiled(call, "auto")
        for _ in range(2):
            with pytest.raises(QCError, match=r"2\.weight: index \[3, 4\]"):
                run(bad, X)
        assert torch.equal(run(good, X), run(good, X))
        bad[2].weight[3, 4] = 0.5
        want = decoded(bad, "int8/g64:fp16")
        assert (run(bad, X) - want(X)).abs().max() <= noise_bound(want, X, step=fp32_step(64))
    assert len(trace.contexts) == 1


@pytest.mark.parametrize("options", [{"recipe": "int8"}, {"recipe": "itn4"}])
def test_an_error_does_not_keep_the_model(options: dict[str, Any]) -> None:
    bad, x = with_nan(), torch.randn(2, 64)
    with torch.no_grad():
        run = compiled(bad, **options)
        for _ in range(2):
            with pytest.raises(QCError) as caught:
                run(x)
            assert caught.value.__cause__ is None or options["recipe"] == "int8"
    held = [weakref.ref(item) for item in (*bad.parameters(), x)]
    del bad, run, x, caught
    gc.collect()
    assert [ref() for ref in held] == [None] * 5


def test_a_function_has_no_weights() -> None:
    net = model()
    for call in (refresh, convert, lambda target: save(target, "never"), lambda target: load(target, "never")):
        with pytest.raises(QCError, match="function has no parameters") as caught:
            call(lambda x: net(x))  # type: ignore[arg-type, return-value]
        assert caught.value.code == "model.none"
    for target in (net, torch.compile(net), net[0].weight):
        assert refresh(target) == 0


def test_options_are_keywords_of_compile() -> None:
    with pytest.raises(QCError, match="keywords"):
        qcompile.compile(nn.Linear(4, 4), options={"recipe": "int8"})


def test_a_recipe_that_no_kernel_serves_says_so() -> None:
    model = nn.Linear(96, 32).eval()
    with torch.no_grad(), pytest.warns(QCWarning, match="quantizes no matmul"):
        torch.compile(model, backend="qcompile", options={"recipe": "int4/g48"})(torch.randn(2, 96))
