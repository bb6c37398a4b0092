"""Options: what reaches the backend, what is refused and with which words, and what the caches see of it."""

from __future__ import annotations

import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile import compat
from qcompile.edits import Insertion, PassEdits
from qcompile.errors import QCError
from qcompile.options import Options


@dataclass(frozen=True)
class Named:
    name: str
    version: str = "1"
    stage: str = "dynamo"
    requires: Any = ()

    def run(self, gm: Any, ctx: Any) -> None: ...

    def wrap(self, inner: Any, ctx: Any) -> Any:
        return inner

    def fingerprint(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Idle:
    """A pass without any method that works, or with values in their places."""

    stage: str
    run: Any = None
    wrap: Any = None
    fingerprint: Any = str
    name: str = "idle"


def names(passes: list[Any]) -> list[str]:
    return [one.name for one in passes]


# -------------------------------------------------------------------------------------- what torch hands over
def seen(**settings: Any) -> list[dict[str, Any]]:
    """The keyword arguments that a backend gets from torch.compile for these settings."""
    calls: list[dict[str, Any]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any, **given: Any) -> Callable[..., Any]:
        calls.append(given)
        return gm.forward

    torch.compiler.reset()
    torch.compile(lambda x: x + 1, backend=backend, **settings)(torch.ones(2))
    return calls


@pytest.mark.parametrize("mode", [None, *compat.inductor_modes()])
def test_every_mode_of_torch_compile_parses(mode: str | None) -> None:
    (given,) = seen(mode=mode)
    assert dict(Options.parse(**given).inductor) == dict(compat.inductor_modes()[mode or "default"])


def test_options_of_torch_compile_parse() -> None:
    (given,) = seen(options={"recipe": "int4", "max-autotune": True, "triton.cudagraphs": False, "seed": 3})
    assert Options.parse(**given) == Options(
        recipe="int4", seed=3, inductor={"max_autotune": True, "triton.cudagraphs": False}
    )


def test_an_options_record_may_be_passed_as_options() -> None:
    (given,) = seen(options=Options(recipe="int8"))
    assert Options.parse(**given) == Options(recipe="int8")


def test_keywords_of_a_partial_are_options() -> None:
    assert functools.partial(Options.parse, recipe="int4")(options={"seed": 1}) == Options(recipe="int4", seed=1)
    with pytest.raises(QCError, match="both a keyword and a key"):
        Options.parse({"seed": 1}, seed=2)


def test_mode_is_a_key_of_options_and_a_named_setting_wins() -> None:
    parsed = Options.parse({"mode": "max-autotune", "triton.cudagraphs": False})
    assert parsed.inductor == {**compat.inductor_modes()["max-autotune"], "triton.cudagraphs": False}


def test_our_keys_and_inductors_do_not_meet() -> None:
    assert not set(compat.inductor_options()) & {*Options.__dataclass_fields__, "mode"}


# --------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"recipie": "int4"}, "options.unknown", "did you mean 'recipe'"),
        ({"max_autotun": True}, "options.unknown", "did you mean 'max_autotune'"),
        ({"triton.cudagraph": True}, "options.unknown", "did you mean 'triton.cudagraphs'"),
        ({"inductor": {"recipe": "int4"}}, "options.unknown", "recipe"),
        ({"inductor": 3}, "options.value", "mapping"),
        ({7: 3}, "options.unknown", "'7'"),
        ({"max_autotune": "yes"}, "options.value", "bool"),
        ({"mode": "max-autotun"}, "options.value", "did you mean 'max-autotune'"),
        ({"mode": 3}, "options.value", "max-autotune"),
        ({"recipe": None}, "options.value", "'none'"),
        ({"recipe": 4}, "options.value", "a preset"),
        ({"strict": 1}, "options.value", "True or False"),
        ({"verify": "no"}, "options.value", "True or False"),
        ({"policy": "sped"}, "options.value", "did you mean 'speed'"),
        ({"policy": ["speed"]}, "options.value", "one of"),
        ({"seed": -1}, "options.value", "2\\*\\*64"),
        ({"seed": 2**64}, "options.value", "2\\*\\*64"),
        ({"seed": True}, "options.value", "integer"),
        ({"seed": 1.0}, "options.value", "integer"),
        ({"dump": __file__}, "options.value", "this is a file"),
        ({"dump": ""}, "options.value", "a folder"),
        ({"dump": True}, "options.value", "a folder"),
        ({"passes": [("after", "merge", Named("mine"))]}, "options.value", "mapping"),
        ({"passes": {"inset": []}}, "options.unknown", "did you mean 'insert'"),
        ({"passes": {"insert": [("behind", "merge", Named("mine"))]}}, "options.value", "triple"),
        ({"passes": {"insert": [("after", "merge")]}}, "options.value", "triple"),
        ({"passes": {"insert": "merge"}}, "options.value", "list"),
        ({"passes": {"insert": [("after", "merge", Named)]}}, "options.value", "not a class"),
        ({"passes": {"insert": [("after", "merge", print)]}}, "options.value", "fingerprint"),
        ({"passes": {"insert": [("after", "merge", Named(""))]}}, "options.value", "non-empty"),
        ({"passes": {"drop": "merge"}}, "options.value", "list"),
        ({"passes": {"drop": [Named("merge")]}}, "options.value", "names"),
        ({"passes": {"replace": ["merge"]}}, "options.value", "mapping"),
        ({"passes": {"replace": {"merge": "other"}}}, "options.value", "fingerprint"),
        (
            {"passes": {"replace": {"merge": Named("a", stage="late")}}},
            "options.value",
            "one of: dynamo, post, compile",
        ),
        ({"passes": {"insert": [("after", "merge", Named("a", requires="b"))]}}, "options.value", "a tuple of names"),
        ({"passes": {"insert": [("after", "merge", Idle("compile", run=print))]}}, "options.value", "calls wrap"),
        ({"passes": {"insert": [("after", "merge", Idle("compile", wrap=3))]}}, "options.value", "calls wrap"),
        ({"passes": {"insert": [("after", "merge", Idle("post", wrap=print))]}}, "options.value", "calls run"),
        ({"passes": {"replace": {"merge": Idle("dynamo", run="x")}}}, "options.value", "calls run"),
        ({"passes": {"replace": {"merge": Idle("dynamo", print, fingerprint=5)}}}, "options.value", "fingerprint"),
        ({"dump": "~no-such-user/x"}, "options.value", "a folder that can be written to"),
        ({"dump": "a\0b"}, "options.value", "null byte"),
        ({"dump": "x" * 5000}, "options.value", "too long"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_option_is_named(options: dict[Any, Any], code: str, words: str) -> None:
    with pytest.raises(QCError, match=words) as caught:
        Options.parse(options)
    assert caught.value.code == code


@pytest.mark.parametrize("options", ["int4", [1]], ids=str)
def test_options_of_another_kind_are_refused(options: Any) -> None:
    with pytest.raises(QCError, match="mapping or an Options") as caught:
        Options.parse(options)
    assert caught.value.what == f"options cannot be {options!r}"
    assert "options[" not in caught.value.where


ARGUMENTS = [
    name for name, one in inspect.signature(qcompile.compile).parameters.items() if one.kind is one.KEYWORD_ONLY
]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_of_compile_is_no_option(name: str) -> None:
    for options in ({name: True}, {"inductor": {name: True}}):
        with pytest.raises(QCError, match=f"'{name}' is no option but an argument of qcompile.compile") as caught:
            Options.parse(options)
        assert f"qcompile.compile(model, {name}=True)" in caught.value.next
    with pytest.raises(QCError, match=f"did you mean '{name}'"):
        Options.parse({name + "s": True})


def test_help_and_docs_name_every_key() -> None:
    keys = [*Options.__dataclass_fields__, "mode"]
    page = (Path(__file__).resolve().parent.parent / "docs" / "start.md").read_text(encoding="utf-8")
    for key in keys:
        assert re.search(rf"^ +{key}  ", Options.__doc__ or "", re.M), f"help(qcompile.Options) lacks {key}"
        assert f"\n| `{key}` |" in page, f"docs/start.md lacks {key}"
    assert "fast_guards=True" in page


def test_the_record_checks_itself() -> None:
    with pytest.raises(QCError, match="did you mean 'memory'"):
        Options(policy="memry")  # type: ignore[arg-type]


def test_dump_becomes_a_path_and_need_not_exist(tmp_path: Path) -> None:
    assert Options.parse({"dump": str(tmp_path / "new")}).dump == tmp_path / "new"


def test_the_record_is_frozen_through_and_through() -> None:
    given = {"max_autotune": True}
    options = Options(inductor=given)
    given["max_autotune"] = False
    assert options.inductor == {"max_autotune": True}
    with pytest.raises(TypeError):
        options.inductor["max_autotune"] = False  # type: ignore[index]
    assert len({options, Options(inductor={"max_autotune": True})}) == 1


# -------------------------------------------------------------------------------------------- edits of passes
LIST = [Named("detect"), Named("merge"), Named("freeze")]


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (None, "detect merge freeze"),
        ({"insert": [("after", "merge", Named("a"))]}, "detect merge a freeze"),
        ({"insert": [("before", "detect", Named("a"))]}, "a detect merge freeze"),
        (
            {"insert": [("after", "merge", Named("a")), ("after", "merge", Named("b"))]},
            "detect merge a b freeze",
        ),
        ({"insert": [("after", "a", Named("b")), ("after", "merge", Named("a"))]}, "detect merge a b freeze"),
        ({"insert": [Insertion("before", "freeze", Named("a"))], "drop": ["merge"]}, "detect a freeze"),
        ({"insert": [("after", "merge", Named("a"))], "drop": ["merge"]}, "detect a freeze"),
        ({"replace": {"merge": Named("join")}}, "detect join freeze"),
        ({"replace": {"merge": Named("merge", "2")}}, "detect merge freeze"),
        (
            {"insert": [("before", "merge", Named("a"))], "replace": {"merge": Named("b")}},
            "detect a b freeze",
        ),
        ({"drop": ["detect", "merge", "freeze"]}, ""),
    ],
)
def test_edits(edits: dict[str, Any] | None, expected: str) -> None:
    assert names(PassEdits.parse(edits).apply(LIST)) == expected.split()


@pytest.mark.parametrize(
    ("edits", "code", "words"),
    [
        ({"insert": [("after", "marge", Named("a"))]}, "passes.unknown", "did you mean 'merge'"),
        ({"insert": [("after", "b", Named("a")), ("after", "a", Named("b"))]}, "passes.unknown", "'b'"),
        ({"replace": {"frieze": Named("a")}}, "passes.unknown", "did you mean 'freeze'"),
        ({"drop": ["detekt"]}, "passes.unknown", "did you mean 'detect'"),
        ({"insert": [("after", "merge", Named("merge"))]}, "passes.duplicate", "'merge'"),
        ({"replace": {"merge": Named("freeze")}}, "passes.duplicate", "'freeze'"),
    ],
)
def test_edits_that_do_not_fit_the_list(edits: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(QCError, match=words) as caught:
        PassEdits.parse(edits).apply(LIST)
    assert caught.value.code == code


# ----------------------------------------------------------------------------------------------- fingerprints
def test_every_setting_that_changes_code_changes_the_fingerprint() -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"recipe": "int8"},
        {"recipe": Named("mine")},
        {"recipe": Named("mine", "2")},
        {"strict": True},
        {"policy": "memory"},
        {"verify": True},
        {"seed": 1},
        {"max_autotune": True},
        {"max_autotune": False},
        {"passes": {"drop": ["merge"]}},
        {"passes": {"insert": [("after", "merge", Named("a"))]}},
        {"passes": {"insert": [("after", "merge", Named("a", "2"))]}},
        {"passes": {"insert": [("before", "merge", Named("a"))]}},
        {"passes": {"replace": {"merge": Named("a")}}},
    ]
    prints = [Options.parse(variant).fingerprint() for variant in variants]
    assert len(set(prints)) == len(variants)


def test_a_dump_folder_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QCError, match=r"option 'dump' cannot be .*sub") as caught:
        Options.parse({"dump": tmp_path / "file" / "sub"})
    assert caught.value.code == "options.value"
    assert "Not a directory" in caught.value.why


def test_dump_and_the_order_of_keys_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    one = Options.parse({"max_autotune": True, "triton.cudagraphs": False, "dump": tmp_path})
    two = Options.parse({"triton.cudagraphs": False, "max_autotune": True})
    assert one.fingerprint() == two.fingerprint()


def test_a_recipe_file_counts_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "recipe.json"
    prints = []
    for text in ("{}", "{} "):
        file.write_text(text, encoding="utf-8")
        prints.append(Options(recipe=str(file)).fingerprint())
    assert prints[0] != prints[1]


def test_a_value_without_identity_is_refused() -> None:
    with pytest.raises(QCError, match="fingerprint") as caught:
        Options(recipe=object()).fingerprint()
    assert caught.value.code == "options.fingerprint"


def test_the_fingerprint_is_equal_in_another_process() -> None:
    """Hash seeds differ between processes; a fingerprint built on `hash` or on a set's order would too."""
    text = "Options.parse({'recipe': 'int4', 'max_autotune': True, 'passes': {'drop': ['b']}}).fingerprint()"
    code = f"from qcompile.options import Options; print({text})"
    here = eval(text)
    there = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "1"}, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == here
