"""Stochastic rounding of stock optimizers: every written parameter is the rounding of torch's own float32 step.

Most tests run the graph that Inductor would get, with torch's operators: what they ask is what the passes made. The last
ones compile.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile import compat
from qcompile.backend import watching
from qcompile.errors import QCError
from qcompile.ir.rounding import random_bits
from qcompile.ir.stochastic_cast import stochastic_cast
from qcompile.plan.recipe import PRESETS, Recipe
from qcompile.runtime.updates import STEPS


class Lion(torch.optim.Optimizer):
    """A user's own (arXiv 2302.06675)."""

    def __init__(self, params: Any, lr: float = 1e-2, foreach: bool = False) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "weight_decay": 0.1})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                m = state["exp_avg"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(m * b1 + p.grad * (1 - b1)), alpha=-group["lr"])
                m.mul_(b2).add_(p.grad, alpha=1 - b2)


optim = torch.optim
OPTIMIZERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True}),
    "adam": (optim.Adam, {"lr": 0.01, "weight_decay": 0.01, "amsgrad": True}),
    "adamw": (optim.AdamW, {"lr": 0.01}),
    "nadam": (optim.NAdam, {"lr": 0.01}),
    "radam": (optim.RAdam, {"lr": 0.01}),
    "adagrad": (optim.Adagrad, {"lr": 0.01}),
    "rmsprop": (optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "adadelta": (optim.Adadelta, {"lr": 0.5}),
    "adamax": (optim.Adamax, {"lr": 0.01}),
    "lion": (Lion, {}),
}
KINDS = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((7, 5), (11,), (3, 2))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No code is generated: what Inductor would compile runs as it is. The graphs are collected."""
    found: list[Any] = []

    def inner(gm: Any, inputs: Sequence[Any], **settings: Any) -> Callable[[list[Any]], Any]:
        found.append(gm)

        def call(args: list[Any]) -> Any:
            return list(gm.forward(*args))

        call._boxed_call = True  # type: ignore[attr-defined]
        return call

    monkeypatch.setattr(compat, "inner_compile", lambda: inner)
    return found


def parameters(kinds: Sequence[torch.dtype] = KINDS) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for shape, dtype in zip(SHAPES, kinds, strict=False)
    ]


def gradients(params: Sequence[Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def compiled(step: Callable[..., Any], seed: int = 7, **options: Any) -> Callable[..., Any]:
    passes = {"drop": ["outline"]}
    return torch.compile(step, backend="qcompile", options={"recipe": "sr", "seed": seed, "passes": passes, **options})


def wide(opt: torch.optim.Optimizer) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """The optimizer in float32: its parameters, gradients and state are exact copies."""
    twin = copy.deepcopy(opt)
    params = []
    for group in twin.param_groups:
        group.pop(STEPS, None)
        for i, p in enumerate(group["params"]):
            new = nn.Parameter(p.detach().float())
            state = twin.state.pop(p, None)
            if state is not None:
                twin.state[new] = {
                    k: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in state.items()
                }
            group["params"][i] = new
            params.append(new)
    originals = [p for group in opt.param_groups for p in group["params"]]
    for new, p in zip(params, originals, strict=True):
        new.grad = None if p.grad is None else p.grad.float()
    return twin, params


def bits_of(p: Tensor, seed: int, step: int, number: int) -> Tensor:
    return random_bits(p.numel(), seed, 0, (step, number)).view(p.shape)


def assert_rounded(p: Tensor, exact: Tensor, before: Tensor, bits: Tensor, corrected: bool = False) -> None:
    """`p` is `exact` with these bits, but for what another order of float32 operations may do before.

    A step is a sum of the parameter, at most scaled by weight decay, and of an update: 4 roundings, each an error
    of 2**-24 of what it gives. The update has fewer than 32 operations in either order. A bias correction 1 - b**t,
    which compiled optimizers compute in float32, is off by three errors of 2**-24 of 1, and no smaller than 1 - 0.999. Rounding
    with fixed bits never decreases, so the rounded ends of that interval enclose the result.
    """
    error = 2.0**-24 * (4 * (exact.abs() + before.abs()) + (64 + 3000 * corrected) * (exact - before).abs())
    low, high = (stochastic_cast(end, p.dtype, bits).double() for end in (exact - error, exact + error))
    assert bool(((low <= p.double()) & (p.double() <= high)).all())
    assert float((low != high).double().mean()) <= 0.3  # so the bits were really asked, for most elements


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


def test_what_is_not_elementwise_is_rounded_behind(graphs: list[Any]) -> None:
    class Normed(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad / (p.grad.norm() + 1) * torch.tanh(p))

    p = nn.Parameter(torch.randn(4, 6).bfloat16().t())  # no parameter's elements need to lie in their order
    p.grad = torch.randn(6, 4).bfloat16()
    opt = Normed([p], {})
    old, g = p.detach().float(), p.grad.float()
    with watching() as trace:
        compiled(opt.step)()
    exact = old - g / (g.norm() + 1) * torch.tanh(old)
    assert_rounded(p.detach(), exact, old, bits_of(p, 7, 1, 0))
    assert any("computed apart from their rounding, as" in note for note in trace.contexts[-1].plan.notes)


def test_what_has_no_16_bits_stays_as_it_is(graphs: list[Any]) -> None:
    params = [nn.Parameter(torch.randn(5))]
    opt = torch.optim.SGD(params, lr=0.1)
    gradients(params, 0)
    want = params[0].detach() - 0.1 * params[0].grad
    with watching() as trace:
        compiled(opt.step)()
    assert torch.allclose(params[0], want)
    assert STEPS not in opt.param_groups[0]
    assert any("nothing is rounded" in note for note in trace.contexts[-1].plan.notes)


def test_tensors_that_are_no_parameters(graphs: list[Any]) -> None:
    p = torch.ones(4096, dtype=torch.bfloat16, requires_grad=True)
    opt = torch.optim.SGD([p], lr=2.0**-10)  # a quarter of the spacing below 1
    step = compiled(opt.step)
    p.grad = torch.ones_like(p)
    step()
    share = float((p.detach() != 1).float().mean())
    assert abs(share - 0.25) <= 5 * (0.25 * 0.75 / 4096) ** 0.5
    assert int(opt.param_groups[0]["rounding_steps"]) == 1


def test_a_function_that_updates(graphs: list[Any]) -> None:
    p = nn.Parameter(torch.randn(9).bfloat16())

    def update(p: Tensor, g: Tensor) -> None:
        with torch.no_grad():
            p.data.sub_(g * 0.01)

    step = compiled(update)
    for number in (1, 2):
        old, g = p.detach().float(), torch.randn(9).bfloat16()
        step(p, g)
        assert_rounded(p.detach(), old - 0.01 * g.float(), old, bits_of(p, 7, number, 0))


def test_a_model_is_left_alone(graphs: list[Any]) -> None:
    model, x = nn.Linear(4, 4).bfloat16(), torch.randn(2, 4).bfloat16()
    with torch.no_grad():
        assert torch.equal(compiled(model)(x), model(x))


def test_refusals() -> None:
    for value in ("stochastc", 3, None):
        with pytest.raises(QCError) as caught:
            Recipe((), "mine", value)  # type: ignore[arg-type]
        assert caught.value.code == "recipe.updates"
    assert Recipe.from_json(PRESETS["sr"].to_json()) == PRESETS["sr"]
    assert PRESETS["sr"].fingerprint() != PRESETS["none"].fingerprint()


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
