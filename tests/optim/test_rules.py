"""Steps with float32 state are those of torch.optim: bit for bit where torch does not contract, else within rounding errors."""

from __future__ import annotations

import inspect
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcompile import optim
from qcompile.ir.state import Storage
from qcompile.ir.step import StepSpec
from tests.optim.support import EVERY, STOCK, gradients, ours, parameters, stock

ROOT = Path(__file__).resolve().parents[2]
UNIT = 2.0**-24 * (1 + 2.0**-20)  # half a unit in the last place, and what the float64 of the comparison loses
SMALLEST = 2.0**-150  # half the smallest number


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs have FMA in every build of torch")
def test_bit_for_bit_where_torch_rounds_each_operation() -> None:
    env = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.exact"], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == list(STOCK), done.stderr[-2000:]


def bounded(spec: StepSpec, values: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Results of a step in float64 and how far float32 may be from them: each operation's error is that of its operands,
    magnified, and half a unit in the last place."""
    known: dict[str | float, tuple[Tensor, Tensor]] = {}
    for name, x in values.items():
        known[name] = (x, x.abs() * UNIT if name in spec.hyper else torch.zeros_like(x))

    def get(arg: str | float) -> tuple[Tensor, Tensor]:
        return known[arg] if isinstance(arg, str) else (torch.tensor(arg).double(), torch.tensor(0.0).double())

    for result, op, args in spec.operations:
        (x, dx), (y, dy) = get(args[0]), get(args[-1])
        match op:
            case "add" | "sub":
                z, dz = x + y if op == "add" else x - y, dx + dy
            case "mul":
                z, dz = x * y, x.abs() * dy + y.abs() * dx + dx * dy
            case "div":
                z = x / y
                dz = (dx + z.abs() * dy) / (y.abs() - dy).clamp(min=0)
            case "neg":
                z, dz = -x, dx
            case "sqrt":
                z = x.sqrt()
                dz = torch.where(x > 0, dx / z, dx.sqrt())
            case "maximum":
                z, dz = torch.maximum(x, y), torch.maximum(dx, dy)
            case "sign":
                z, dz = x.sign(), torch.where(x.abs() > dx, 0.0, 2.0).double()
            case _:
                raise AssertionError(op)
        known[result] = (z, dz + (z.abs() + dz) * UNIT + SMALLEST)
    return {name: get(value) for name, value in spec.results.items()}


@pytest.mark.parametrize("name", EVERY)
def test_within_the_rounding_errors_of_each_step(name: str) -> None:
    """From the same state, one step of float64 and one of float32, five times; and what the program says is what torch does."""
    params = parameters()
    one = ours(name, params, state_bits=32)
    for of in range(5):
        before = [p.detach().double() for p in params]
        wide = [torch.nn.Parameter(x.clone()) for x in before]
        gradients(params, of)
        saved = one.stock_state_dict()
        held = {i: {key: t.double() for key, t in values.items()} for i, values in saved["state"].items()}
        if name in STOCK:
            other = stock(name, wide)
            other.load_state_dict(saved)
            for w, p in zip(wide, params, strict=True):
                assert p.grad is not None
                w.grad = p.grad.double()
            other.step()
            after = other.state_dict()["state"]
        group = one.param_groups[0]
        rule = one.rule(group)
        spec = StepSpec.parse(rule.spec(Storage("f32"), Storage("f32"), (Storage("f32"),) * len(rule.moments)))
        numbers = {
            key: torch.tensor(x, dtype=torch.float64)
            for key, x in one.numbers(group, of + 1).items()
            if key in rule.hyper
        }
        one.step()
        for i, p in enumerate(params):
            assert p.grad is not None
            moments = {m.name: held[i][m.key] if held else torch.zeros_like(before[i]) for m in rule.moments}
            bound = bounded(spec, {"p": before[i], "g": p.grad.double(), **moments, **numbers})
            got = {"p": p.detach(), **{m.name: one.state[p][m.key] for m in rule.moments}}
            for key, (value, error) in bound.items():
                assert ((got[key].double() - value).abs() <= error).all(), (name, of, i, key)
            if name in STOCK:
                # The program is the optimizer. The bound is linear in the unit, which is 2**-29 of it in float64; a few more
                # operations, or others, would make it a few times that. Only the weight of the far end of a `lerp` was a
                # float32 number first, 1 - 0.9: that is off by 2**-25, half a unit of 0.9, 5 times 0.1 * 2**-24.
                factor = 5.5 if name == "adamw-far" else 2.0**-26
                theirs = {"p": wide[i].detach(), **{m.name: after[i][m.key] for m in rule.moments}}
                for key, x in theirs.items():
                    assert ((bound[key][0] - x).abs() <= bound[key][1] * factor).all(), (name, of, i, key)


def test_lion_is_that_of_the_paper() -> None:
    p = torch.nn.Parameter(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    q, m = p.detach().double(), torch.zeros(64, dtype=torch.float64)
    optimizer = optim.Lion([p], lr=2.0**-6, betas=(0.5, 0.75), weight_decay=0.25)
    for of in range(20):
        gradients([p], of)
        assert p.grad is not None
        g = p.grad.double()
        q = q - 2.0**-6 * (torch.sign(0.5 * m + 0.5 * g) + 0.25 * q)
        m = 0.75 * m + 0.25 * g
        optimizer.step()
    # Steps of 2**-6 at most 20 times 4 roundings of numbers below 8 away, unless a sign was decided by rounding.
    assert ((p.double() - q).abs() <= 80 * 8 * 2.0**-24).all()


def test_they_are_found_from_the_package() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import qcompile; print('optim' in dir(qcompile), qcompile.optim.SGD)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split()[0] == "True", done.stderr
    assert "qcompile.optim" in done.stdout


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_defaults_are_those_of_torch(name: str) -> None:
    mine, theirs = (inspect.signature(getattr(module, name)).parameters for module in (optim, torch.optim))
    shared = [key for key in theirs if key in mine]
    assert set(theirs) - set(mine) <= {"capturable", "differentiable", "decoupled_weight_decay"}
    assert {key: mine[key].default for key in shared} == {key: theirs[key].default for key in shared}
    positional = [key for key, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [key for key, p in mine.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert math.isclose(optim.AdamW([torch.zeros(1)]).param_groups[0]["weight_decay"], 0.01)
