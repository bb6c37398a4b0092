"""Stochastic rounding of stock optimizers: every written parameter is the rounding of torch's own float32 step.

Most tests run the graph that Inductor would get, with torch's operators: what they ask is what the passes made. The last
ones compile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.backend import watching
from qcompile.ir.stochastic_cast import stochastic_cast
from qcompile.runtime.updates import STEPS
from tests.e2e.steps import KINDS, OPTIMIZERS, assert_rounded, bits_of, compiled, gradients, parameters, wide


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_parameter_is_the_rounded_float32_step(name: str, foreach: bool, graphs: list[Any]) -> None:
    make, settings = OPTIMIZERS[name]
    params = parameters()
    opt = make(params, foreach=foreach, **settings)
    step = compiled(opt.step)
    for number in range(1, 4):
        gradients(params, number)
        twin, exact = wide(opt)
        twin.step()
        before = [p.detach().float() for p in params]
        step()
        for i, (p, want, old) in enumerate(zip(params, exact, before, strict=True)):
            if p.dtype == torch.float32:
                torch.testing.assert_close(p, want, rtol=1e-5, atol=1e-6)
            else:
                assert_rounded(p.detach(), want.detach(), old, bits_of(p, 7, number, i), "adam" in name)
    for p in params:
        for key, value in opt.state[p].items():
            stock = next(iter(wide_state(make, settings, p, foreach).values()))[key]
            assert value.dtype == stock.dtype, key


def wide_state(make: Any, settings: dict[str, Any], p: Tensor, foreach: bool) -> Any:
    """The state that the optimizer makes by itself."""
    q = nn.Parameter(p.detach().clone())
    q.grad = torch.ones_like(q)
    opt = make([q], foreach=foreach, **settings)
    opt.step()
    opt.step()
    return opt.state


def test_exact_steps_have_equal_bits(graphs: list[Any]) -> None:
    # Every number is a small multiple of a power of two: float32 rounds nothing, so nothing is left to the order.
    params = [nn.Parameter(torch.arange(-40, 40).to(torch.bfloat16) / 8), nn.Parameter(torch.ones(24).half())]
    opt = torch.optim.SGD(params, lr=2.0**-7, momentum=0.5)
    step = compiled(opt.step)
    momenta = [torch.zeros(p.shape) for p in params]
    for number in range(1, 6):
        gradients(params, number)
        for p in params:
            p.grad = (p.grad * 4).round().to(p.dtype)
        old = [p.detach().float() for p in params]
        step()
        for i, p in enumerate(params):
            moment = 0.5 * momenta[i] + p.grad.float()
            exact = old[i] - 2.0**-7 * moment
            momenta[i] = moment.to(p.dtype).float()  # state is written as torch writes it, behind the update
            assert torch.equal(p.detach(), stochastic_cast(exact, p.dtype, bits_of(p, 7, number, i)))


def test_right_on_average(graphs: list[Any]) -> None:
    # A bf16 step below half a spacing: rounding to nearest would never move. n elements take s steps of q spacings each with
    # chance q; the mean is within 5 standard deviations, sqrt(s q (1 - q) / n) spacings (chance of a failure: 1e-6).
    n, steps, q = 4096, 16, 5 / 64
    p = nn.Parameter(torch.ones(n, dtype=torch.bfloat16))
    p.grad = torch.full((n,), -1.0, dtype=torch.bfloat16)
    opt = torch.optim.SGD([p], lr=q * 2.0**-7)
    step = compiled(opt.step)
    for _ in range(steps):
        step()
    moved = (p.detach().double() - 1).mean() * 2**7
    assert abs(float(moved) - steps * q) <= 5 * math.sqrt(steps * q * (1 - q) / n)
    assert float(p.detach().max()) > float(p.detach().min())


def run(seed: int, count: int = 3, foreach: bool = False) -> list[Tensor]:
    torch._dynamo.reset()
    params = parameters()
    opt = torch.optim.AdamW(params, lr=0.01, foreach=foreach)
    step = compiled(opt.step, seed)
    for number in range(count):
        gradients(params, number)
        step()
    return [p.detach() for p in params]


def test_a_seed_is_a_run(graphs: list[Any]) -> None:
    first, again, loop, other = run(1), run(1), run(1, foreach=True), run(2**64 - 1)
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first[:2], loop[:2]))
    assert not torch.equal(first[0], other[0])
    assert torch.equal(first[2], other[2])  # float32: nothing random


@pytest.mark.parametrize("loaded", ["before compiling", "after compiling"])
def test_a_resumed_run_draws_what_it_would_have_drawn(loaded: str, graphs: list[Any]) -> None:
    def start(values: Sequence[Tensor]) -> tuple[list[nn.Parameter], Any]:
        params = [nn.Parameter(v.clone()) for v in values]
        return params, torch.optim.SGD(params, lr=0.01, momentum=0.9)

    params, opt = start(parameters())
    step = compiled(opt.step)
    for number in range(5):
        if number == 2:
            saved, values = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
        gradients(params, number)
        step()
    torch._dynamo.reset()
    again, other = start(values)
    step = compiled(other.step)
    if loaded == "after compiling":
        gradients(again, 9)
        step()
        with torch.no_grad():
            for p, value in zip(again, values, strict=True):
                p.copy_(value)
    other.load_state_dict(saved)
    assert int(other.param_groups[0][STEPS]) == 2
    for number in range(2, 5):
        gradients(again, number)
        step()
    assert all(map(torch.equal, params, again))


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_schedule_compiles_nothing(name: str, foreach: bool, tensor: bool, graphs: list[Any]) -> None:
    if tensor and foreach:
        pytest.skip("torch refuses a tensor for the learning rate of lists")
    make, _ = OPTIMIZERS[name]
    params = parameters(KINDS[:2])
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": torch.tensor(0.02) if tensor else 0.02}]
    opt = make(groups, lr=torch.tensor(0.01) if tensor else 0.01, foreach=foreach)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 1 / (1 + epoch))
    step = compiled(opt.step)
    for number in range(200 if name == "adamw" and not foreach else 10):
        gradients(params, number)
        step()
        schedule.step()
    assert len(graphs) == 1


def test_the_step_of_a_group_follows_its_learning_rate(graphs: list[Any]) -> None:
    params = parameters(KINDS[:2])
    opt = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.5}], lr=0.01)
    step = compiled(opt.step)
    for number, lr in enumerate((0.01, 0.0, 0.03), 1):
        for group in opt.param_groups:
            group["lr"] = lr
        gradients(params, number)
        twin, exact = wide(opt)
        twin.step()
        before = [p.detach().float() for p in params]
        step()
        for i, (p, want, old) in enumerate(zip(params, exact, before, strict=True)):
            assert_rounded(p.detach(), want.detach(), old, bits_of(p, 7, number, i), True)
            assert lr or torch.equal(p.detach().float(), old)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lion"])
def test_elementwise_updates_are_one_operator(name: str, graphs: list[Any]) -> None:
    make, settings = OPTIMIZERS[name]
    params = [nn.Parameter(torch.randn(8).bfloat16()) for _ in range(3)]
    opt = make(params, **settings)
    with watching() as trace:
        step = compiled(opt.step)
        for number in range(2):
            gradients(params, number)
            step()
    calls = [node for node in graphs[-1].graph.nodes if node.target is torch.ops.qcompile.step_.default]
    assert len(calls) == 1
    assert " x=f32 " not in calls[0].args[-1]
    assert not [node for node in graphs[-1].graph.nodes if node.target is torch.ops.qcompile.rounded.default]
    notes = trace.contexts[-1].plan.notes
    assert "updates: parameters 0-2: bfloat16, updated in float32, rounded stochastically" in notes
    assert any(note.startswith("steps: parameters 0-2: step_ a0=bf16~ ") for note in notes)


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
def test_generated_code(foreach: bool) -> None:
    params = parameters()
    opt = torch.optim.AdamW(params, lr=0.01, foreach=foreach)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    step = torch.compile(opt.step, backend="qcompile", options={"recipe": "sr", "seed": 7})
    for number in range(1, 4):
        gradients(params, number)
        twin, exact = wide(opt)
        twin.step()
        before = [p.detach().float() for p in params]
        step()
        schedule.step()
        for i, (p, want, old) in enumerate(zip(params[:2], exact, before, strict=False)):
            assert_rounded(p.detach(), want.detach(), old, bits_of(p, 7, number, i), True)


def test_generated_code_of_what_is_not_elementwise() -> None:
    params = parameters(KINDS[:2])
    opt = torch.optim.Adadelta(params, lr=0.5)
    step = torch.compile(opt.step, backend="qcompile", options={"recipe": "sr", "seed": 7})
    gradients(params, 1)
    twin, exact = wide(opt)
    twin.step()
    before = [p.detach().float() for p in params]
    step()
    for i, (p, want, old) in enumerate(zip(params, exact, before, strict=True)):
        assert_rounded(p.detach(), want.detach(), old, bits_of(p, 7, 1, i))
