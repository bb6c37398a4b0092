"""The public property tests find bugs in kernels: three of them, put into a generated kernel's text."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import Pass, PassContext, QCError
from qcompile.codegen.devices.triton import Tile, run, text_of
from qcompile.ir.scheme import Scheme
from qcompile.testing.fuzz import fuzz
from qcompile.testing.graphs import models
from qcompile.testing.interpret import interpret
from qcompile.testing.problems import Problem, problems

WEIGHT = "uint4/g32:fp16+z@mma16"
# What is wrong, in the words of the kernel's text: the generated piece, and the bug in its place.
BUGS = {
    "swapped nibbles": ("& 0xf000f)", "& 0xf000f0)"),
    "wrong zero point": ("- z, DT)", "+ z, DT)"),
    "no mask at the end of K": (", mask=k < K, other=0.0)", ")"),
}


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


def kernel(*changes: tuple[str, str]) -> Callable[[Problem], Tensor]:
    def call(problem: Problem) -> Tensor:
        text = text_of(problem.spec)
        for old, new in changes:
            old, new = old.encode().decode("unicode_escape"), new.encode().decode("unicode_escape")
            assert old in text.source
            text = replace(text, source=text.source.replace(old, new))
        return run(problem.spec, problem.x, problem.parts, [], [problem.n], problem.k, Tile(), text)

    return call


def test_a_right_kernel_passes() -> None:
    assert fuzz(kernel(), problems(WEIGHT), examples=15) >= 15


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(bug: str) -> None:
    with pytest.raises(AssertionError, match="allowed are") as caught:
        fuzz(kernel(BUGS[bug]), problems(WEIGHT), examples=30, start=1)
    first, second, third = str(caught.value).splitlines()
    assert first == "found in round 1: fuzz(..., start=1) finds it again"
    assert second.startswith(f"problem {WEIGHT} ")
    assert third.startswith("y[")
    assert not getattr(caught.value, "__notes__", [])  # nothing behind what is wrong


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("no room"), "no room"),
        (AssertionError(), ""),
        (QCError("some.code", "no room", next="make some"), "no room [some.code]\n  next: make some"),
    ],
)
def test_what_a_kernel_raises_comes_behind_its_problem(error: Exception, text: str) -> None:
    def raising(problem: Problem) -> Tensor:
        raise error

    with pytest.raises(type(error)) as caught:
        fuzz(raising, problems("int8/axis0@rows"), examples=2)
    first, second, *rest = str(caught.value).splitlines()
    assert first == "found in round 0: fuzz(..., start=0) finds it again"
    assert second.startswith("problem int8/axis0:fp32@rows ")
    assert "\n".join(rest) == text


def test_an_error_with_a_text_of_its_own_has_the_problem_as_a_note() -> None:
    def raising(problem: Problem) -> Tensor:
        raise KeyError("tile")

    with pytest.raises(KeyError, match="tile") as caught:
        fuzz(raising, problems("int8/axis0@rows"), examples=2)
    assert caught.value.args == ("tile",)
    assert any("problem int8/axis0:fp32@rows " in note for note in caught.value.__notes__)


def test_more_rounds_are_other_problems() -> None:
    seen: list[str] = []

    def note(problem: Problem) -> Tensor:
        seen.append(f"{problem} {float(problem.x.nansum())}")
        return (problem.x.double() @ problem.weight.double().T).to(problem.x.dtype)

    assert fuzz(note, problems("int8/axis0@rows"), examples=5, seconds=1e-9) == len(seen)
    first = set(seen)
    seen.clear()
    fuzz(note, problems("int8/axis0@rows"), examples=5)
    assert set(seen) == first
    fuzz(note, problems("int8/axis0@rows"), examples=5, start=1)
    assert set(seen) != first


def test_wrong_shapes_and_types_are_named() -> None:
    with pytest.raises(AssertionError, match="shape"):
        fuzz(lambda problem: problem.empty()[:, :0], problems("int8/axis0@rows"), examples=2)
    with pytest.raises(AssertionError, match="dtype"):
        fuzz(lambda problem: problem.empty().to(torch.float64), problems("int8/axis0@rows"), examples=2)
    with pytest.raises(AssertionError, match="exactly"):
        fuzz(lambda problem: problem.empty(), problems("int8/axis0@rows"), examples=2)


class Nothing(Pass):
    """Does nothing."""

    name = "nothing"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        pass


def test_a_store_without_a_mask_is_found() -> None:
    def writes_beside(problem: Problem) -> Tensor:
        y = problem.empty()
        y.copy_(problem.x.float() @ problem.weight.T)
        y.as_strided((1,), (1,), y.storage_offset() + y.numel() + 5).zero_()
        return y

    with pytest.raises(AssertionError, match=r"wrote to y\[\d+\] of \d+ elements") as caught:
        fuzz(writes_beside, problems("int8/axis0@rows", "f32", max_n=4, max_k=8), examples=3)
    place, size = map(int, re.findall(r"y\[(\d+)\] of (\d+)", str(caught.value))[0])
    assert place == size + 5


MISUSES = {
    "swapped": (lambda: fuzz(problems("int4/g32:fp16@rows"), print), "swap the two"),  # type: ignore[call-overload]
    "a spelling": (lambda: fuzz(print, "int4/g32:fp16@rows"), "problems"),  # type: ignore[call-overload]
    "no examples": (lambda: fuzz(print, problems("int4/g32:fp16@rows"), examples=0), "examples=0"),
    "a typo": (lambda: fuzz(print, problems("int4/g32:fp16@rows"), exampels=2), "did you mean 'examples'"),  # type: ignore[call-overload]
    "a place": (lambda: fuzz(print, models(), place="merge"), r"place=\('after', 'merge'\)"),  # type: ignore[call-overload]
    "like": (lambda: fuzz(print, models(), like="x"), "like='x' is no pass"),  # type: ignore[call-overload]
    "two schemes": (lambda: problems("int8/axis0@rows int8/token"), "two schemes"),
    "a scheme": (lambda: problems("int4/h32"), "int4/h32"),
    "a dtype": (lambda: problems("int4/g32:fp16@rows", x=torch.int8), "torch.int8"),
    "a size": (lambda: problems("int4/g32:fp16@rows", max_m=0), "max_m=0"),
    "a layer": (lambda: models("linaer"), "did you mean 'linear'"),
    "no layers": (lambda: models(max_layers=0), "max_layers=0"),
    "no dtypes": (lambda: models(dtypes=[]), r"dtypes=\[\]"),
    "no types": (lambda: problems("int4/g32:fp16@rows", x=[]), "names no dtype"),
    "a scheme itself": (lambda: problems(Scheme.parse("int4/g32:fp16@rows")), "give a spelling"),  # type: ignore[arg-type]
    "half a size": (lambda: problems("int4/g32:fp16@rows", max_m=2.5), "max_m=2.5"),  # type: ignore[arg-type]
    "for ever": (lambda: fuzz(print, problems("int4/g32:fp16@rows"), seconds=math.nan), "seconds=nan"),
    "a time": (lambda: fuzz(print, problems("int4/g32:fp16@rows"), seconds="3"), "seconds='3'"),  # type: ignore[call-overload]
    "no round": (lambda: fuzz(print, problems("int4/g32:fp16@rows"), start=2**31), "start=2147483648"),
    "a side": (lambda: fuzz(Nothing(), models(), place=("afterr", "merge")), "'before', 'merge'"),  # type: ignore[call-overload]
    "an anchor": (lambda: fuzz(Nothing(), models(), place=("after", "merg")), "did you mean 'merge'"),
    "a recipe": (lambda: fuzz(Nothing(), models(), options={"recipe": "imt4"}), "did you mean 'int4'"),
    "an option": (lambda: fuzz(Nothing(), models(), options={"recip": "int4"}), "did you mean 'recipe'"),
    "options": (lambda: fuzz(Nothing(), models(), options="int4"), "must be a mapping"),  # type: ignore[call-overload]
    "a truth": (lambda: fuzz(Nothing(), models(), function="no"), "function='no'"),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("name", MISUSES)
def test_misuse_is_refused_before_the_first_round(name: str) -> None:
    call, told = MISUSES[name]
    with pytest.raises(QCError) as caught:
        call()
    assert re.search(told, str(caught.value))
    assert "found in round" not in str(caught.value)
