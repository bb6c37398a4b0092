"""Optimizers in few bits: memory, schedules, random bits, what is refused; and that they optimize."""

from __future__ import annotations

import copy
import inspect
import math
from typing import Any

import pytest
import torch

from qcompile import optim
from qcompile.errors import QCError
from qcompile.ir import ops
from qcompile.ir.rounding import random_bits
from qcompile.ir.step import StepSpec
from qcompile.ir.stochastic_cast import stochastic_cast
from tests.optim.support import EVERY, gradients, ours, parameters, tensors_of, train

every = pytest.mark.parametrize("name", EVERY)
bits = pytest.mark.parametrize("bits", [8, 4])


@pytest.mark.parametrize(("bits", "limit"), [(8, 0.27), (4, 0.145)])
@pytest.mark.parametrize("row", [64, 192, 1024])
@pytest.mark.parametrize("name", ["adamw", "adam-max", "momentum", "lion"])
def test_bytes_of_state(name: str, row: int, bits: int, limit: float) -> None:
    """Of the live tensors, against the same optimizer with float32 state."""
    sizes = []
    for some in (bits, 32):
        params = [torch.nn.Parameter(torch.zeros(96, row)), torch.nn.Parameter(torch.zeros(4096 + row))]
        optimizer = ours(name, params, state_bits=some)
        train(optimizer, params, range(1))
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(optimizer).values()
        }
        sizes.append(sum(storages.values()))
    assert sizes[0] <= limit * sizes[1]


@every
def test_small_and_odd_tensors(name: str) -> None:
    params = parameters()
    optimizer = ours(name, params, state_bits=8)
    train(optimizer, params, range(2))
    for p in params:
        for key, t in optimizer.state[p].items():
            assert t.dtype == (torch.uint8 if key.endswith("codes") else torch.float32)
            assert key == "step" or key.endswith(("codes", "scales")) == (p.numel() >= 4096)
    assert all(not p.isnan().any() for p in params)


@every
@bits
def test_a_schedule_makes_no_new_text(name: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 steps, with learning rates, momenta and weight decay of their own: as many texts as after the first."""
    seen: set[str] = set()
    monkeypatch.setattr(optim.base._Call, "run", lambda self, spec: seen.add(spec))
    params = parameters(torch.bfloat16)
    optimizer = ours(name, params, state_bits=bits)
    for i in range(200):
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(0.1 / (i + 1)) if i % 2 else 0.1 / (i + 1)
            group["weight_decay"] = i / 1000 if i > 1 else 0.0
            if "betas" in group and name != "adamw-far":
                group["betas"] = (0.9 - i / 1000, 0.99 - i / 1000)
            if group.get("momentum"):
                group["momentum"] = 0.9 - i / 1000
        train(optimizer, params, range(i, i + 1))
        assert len(seen) <= 3  # state in blocks of rows, in blocks of 256 or 128, in float32
    assert all(str(StepSpec.parse(text)) == text for text in seen)


def test_compiled_steps_do_not_compile_again() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    params, same = parameters(), parameters()
    optimizer, other = ours("adamw", params), ours("adamw", same)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=20)
    reference = torch.optim.lr_scheduler.LinearLR(other, total_iters=20)
    step = torch.compile(optimizer.step, backend=backend)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for of in range(20):
            gradients(params, of)
            gradients(same, of)
            step()
            other.step()
            schedule.step()
            reference.step()
    assert not graphs
    assert all(torch.equal(a, b) for a, b in zip(params, same, strict=True))


def test_random_bits_are_of_the_seed_the_step_and_the_place() -> None:
    """What step 3 of parameter 1 makes of a bf16 tensor is what `stochastic_cast` makes of the float32 result."""
    params = [
        torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.ones(70, 80, dtype=torch.bfloat16)),
    ]
    optimizer = optim.SGD([{"params": params[:1]}, {"params": params[1:]}], lr=2.0**-13, seed=77)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.step()
    before = params[1].detach().float()
    optimizer.step()
    want = stochastic_cast(before - 2.0**-13, torch.bfloat16, random_bits(5600, 77, 0, (3, 1)).reshape(70, 80))
    assert torch.equal(params[1], want)


def test_small_steps_arrive_by_stochastic_rounding() -> None:
    """Each step is 2**-6 of a spacing: rounded to nearest nothing moves, else the mean does, within four deviations."""
    n, steps, spacing = 20_000, 16, 2.0**-7
    moved = {}
    for rounding in ("nearest", "stochastic"):
        p = torch.nn.Parameter(torch.full((n,), 1.5, dtype=torch.bfloat16))
        optimizer = optim.SGD([p], lr=spacing * 2.0**-6, rounding=rounding)
        for _ in range(steps):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[rounding] = (1.5 - p.detach().double()).mean().item() / spacing
    assert moved["nearest"] == 0
    # A sum of n * steps choices that are 1 with the probability 2**-6.
    deviation = math.sqrt(steps * 2.0**-6 * (1 - 2.0**-6) / n)
    assert abs(moved["stochastic"] - steps * 2.0**-6) <= 4 * deviation


@bits
def test_no_jump_where_a_second_moment_is_small(bits: int) -> None:
    """An element that once had a small gradient, in a block with a large one: with a level 0 its step would be m / eps."""
    p = torch.nn.Parameter(torch.zeros(64, 256))
    optimizer = optim.Adam([p], lr=1e-3, state_bits=bits)
    for i in range(30):
        p.grad = torch.zeros_like(p)
        p.grad[:, 0] = 1.0
        p.grad[:, 1] = 1e-4 if i == 0 else 0.0
        before = p.detach().clone()
        optimizer.step()
        # Adam's own bound: (1 - b1) / sqrt(1 - b2) steps of lr, and 1 for steady gradients.
        assert (p - before).abs().max() <= 1e-3 * 0.1 / math.sqrt(0.001) * 1.01


@every
@bits
def test_they_optimize(name: str, bits: int) -> None:
    """A quadratic, down to a tenth of its value at least where float32 state gets to a hundredth."""
    generator = torch.Generator().manual_seed(3)
    target, sizes = torch.randn(64, 128, generator=generator), torch.rand(128, generator=generator) + 0.5
    values = []
    for some in (32, bits):
        p = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = ours(name, [p], state_bits=some, lr=0.08, weight_decay=0.0)
        sign = -1 if optimizer.param_groups[0]["maximize"] else 1
        for i in range(150):
            optimizer.param_groups[0]["lr"] = 0.08 * (1 - i / 150)
            p.grad = sign * (p.detach() - target) * sizes
            optimizer.step()
        values.append(((p.detach() - target).square() * sizes).sum().item() / (target.square() * sizes).sum().item())
    assert values[0] < 0.01
    assert values[1] < 0.1


def test_strides_do_not_matter() -> None:
    values = torch.randn(64, 8, 12, 12, generator=torch.Generator().manual_seed(0))
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        p = torch.nn.Parameter(values.bfloat16().to(memory_format=memory))
        optimizer = ours("adamw", [p])
        for of in range(3):
            generator = torch.Generator().manual_seed(of)
            p.grad = torch.randn(p.shape, generator=generator).bfloat16().to(memory_format=memory)
            optimizer.step()
        results.append(p.detach())
        assert p.is_contiguous(memory_format=memory)
    assert torch.equal(*results)


def test_parameters_without_gradients_wait() -> None:
    params = parameters()
    optimizer = ours("adamw", params)
    gradients(params, 0)
    params[0].grad = None
    before = [p.detach().clone() for p in params]
    optimizer.step()
    assert torch.equal(params[0], before[0])
    assert params[0] not in optimizer.state
    gradients(params, 1)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [1, 2, 2, 2, 2]
    alone = parameters()
    late = ours("adamw", alone[:1])
    gradients(alone, 1)
    late.step()
    assert torch.equal(alone[0], params[0])  # each parameter counts its own steps


def test_groups_and_closures() -> None:
    params = parameters()
    optimizer = optim.AdamW([{"params": params[:1], "lr": 1.0, "state_bits": 4}, {"params": params[1:]}], lr=1e-3)
    gradients(params, 0)
    calls = []
    loss = optimizer.step(lambda: calls.append(torch.is_grad_enabled()) or 3.0)  # type: ignore[func-returns-value]
    assert (loss, calls) == (3.0, [True])
    assert optimizer.state[params[0]]["exp_avg_codes"].shape == (40, 64)
    assert optimizer.state[params[2]]["exp_avg_codes"].shape == (4200,)
    again = copy.deepcopy(optimizer)
    assert len(again.state) == len(optimizer.state)


def test_storages_by_name() -> None:
    params = parameters()
    optimizer = optim.AdamW(params, state_bits={"exp_avg": "int8/g128"})
    train(optimizer, params, range(2))
    assert optimizer.state[params[0]]["exp_avg_scales"].shape == (40, 1)
    assert optimizer.state[params[0]]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"state_bits": 2}, "optim.state-bits"),
        ({"state_bits": "8"}, "optim.state-bits"),
        ({"state_bits": True}, "optim.state-bits"),
        ({"state_bits": {"momentum": "dyn8/g256"}}, "optim.state-bits"),
        ({"state_bits": {"exp_avg": "int8/g256~"}}, "optim.state-bits"),
        ({"state_bits": {"exp_avg": "dyn8"}}, "step.storage"),
        ({"rounding": "up"}, "optim.rounding"),
        ({"lr": -1.0}, "optim.value"),
        ({"betas": (0.9, 1.0)}, "optim.value"),
        ({"betas": (-0.1, 0.9)}, "optim.value"),
        ({"eps": math.nan}, "optim.value"),
        ({"weight_decay": -1}, "optim.value"),
        ({"capturable": True}, "optim.capturable"),
        ({"differentiable": True}, "optim.differentiable"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], code: str) -> None:
    optimizer = optim.AdamW(parameters())
    for make in (
        lambda: optim.AdamW(parameters(), **settings),
        lambda: optimizer.add_param_group({"params": parameters(), **settings}),
    ):
        with pytest.raises(QCError) as caught:
            make()
        assert caught.value.code == code
    assert len(optimizer.param_groups) == 1
    with pytest.raises(QCError, match=r"optim\.value"):
        optim.SGD(parameters(), nesterov=True)
    with pytest.raises(QCError, match=r"optim\.value"):
        optim.Lion(parameters(), betas=(0.9, 2.0))
    with pytest.raises(QCError, match=r"optim\.differentiable"):
        optim.SGD(parameters(), differentiable=True)


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD"])
def test_arguments_are_those_of_torch(name: str) -> None:
    """By name, order and default; those that say how torch computes change nothing."""
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    mine = inspect.signature(getattr(optim, name)).parameters
    assert theirs.keys() == mine.keys() - {"state_bits", "rounding", "seed"}
    positional = [key for key, p in theirs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(mine)[: len(positional)] == positional
    assert all(mine[key].default == p.default and mine[key].kind == p.kind for key, p in theirs.items())
    results = []
    for some in ({}, {"foreach": True}, {"fused": True}, {"foreach": False, "fused": False}):
        params = parameters(torch.bfloat16)
        train(getattr(optim, name)(params, **some), params, range(2))
        results.append(params)
    assert all(torch.equal(p, q) for other in results[1:] for p, q in zip(results[0], other, strict=True))


@every
def test_maximize_steps_against_the_negated_gradient(name: str) -> None:
    results = []
    for maximize in (False, True):
        params = parameters()
        optimizer = ours(name, params, maximize=maximize)
        for of in range(3):
            gradients(params, of)
            for p in params:
                p.grad = -p.grad if maximize else p.grad
            optimizer.step()
        results.append(params)
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_a_checkpoint_does_not_ask_for_what_cannot_be() -> None:
    """`capturable` of a saved group is how the other optimizer computed, and not part of what it found."""
    p = torch.nn.Parameter(torch.ones(5))
    p.grad = torch.ones(5)
    theirs = torch.optim.AdamW([p])
    theirs.step()
    saved = theirs.state_dict()
    saved["param_groups"][0]["capturable"] = True
    optimizer = optim.AdamW([p])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["capturable"] is False
    optimizer.step()
    assert int(optimizer.state[p]["step"]) == 2


def test_optimizers_of_one_seed_draw_the_same_bits() -> None:
    """Parameter i of each rounds as parameter i of the other, unless their seeds differ."""
    moved = []
    for seed in (0, 0, 1):
        p = torch.nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
        p.grad = torch.ones_like(p)
        optim.SGD([p], lr=2.0**-9, seed=seed).step()
        moved.append(p.detach())
    assert torch.equal(moved[0], moved[1])
    assert not torch.equal(moved[0], moved[2])


def test_tensors_that_are_refused() -> None:
    with pytest.raises(QCError, match=r"optim\.dtype"):
        optim.AdamW([torch.zeros(3, dtype=torch.float64)])
    p = torch.nn.Parameter(torch.zeros(4, 3))
    optimizer = optim.AdamW([p])
    p.grad = torch.ones(4, 3).to_sparse()
    with pytest.raises(QCError, match=r"optim\.grad"):
        optimizer.step()


def test_state_of_a_grad_scaler() -> None:
    p = torch.nn.Parameter(torch.ones(5))
    optimizer, scaler = optim.SGD([p], lr=0.5), torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale((2 * p).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.tolist() == [0.0] * 5
    p.grad = torch.full((5,), math.inf)
    scaler.step(optimizer)  # skipped
    assert p.tolist() == [0.0] * 5


def test_every_step_has_a_plain_meaning() -> None:
    """Inside `reference_only` no kernel runs, and the bytes are the same."""
    results = []
    for plain in (False, True):
        params = parameters(torch.bfloat16)
        optimizer = ours("adamw", params)
        if plain:
            with ops.reference_only():
                train(optimizer, params, range(3))
        else:
            train(optimizer, params, range(3))
        results.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_step_that_is_refused_changes_nothing() -> None:
    params = parameters()
    optimizer = ours("adamw", params)
    gradients(params, 0)
    optimizer.step()
    before = [t.clone() for p in params for t in (p.detach(), *optimizer.state[p].values())]

    def unchanged(code: str) -> None:
        with pytest.raises(QCError) as caught:
            optimizer.step()
        assert caught.value.code == code
        after = [t for p in params for t in (p.detach(), *optimizer.state[p].values())]
        assert all(map(torch.equal, before, after))

    kept = params[-1].grad
    params[-1].grad = torch.zeros_like(params[-1]).to_sparse()
    unchanged("optim.grad")
    params[-1].grad = kept
    bits = optimizer.param_groups[0]["state_bits"]
    optimizer.param_groups[0]["state_bits"] = 4 if bits == 8 else 8
    unchanged("optim.state-bits")
    mixed = ours("adamw", params, state_bits={"exp_avg": "dyn8/g256", "exp_avg_sq": "udyn8/g256"})
    mixed.step()
    mixed.param_groups[0]["state_bits"]["exp_avg"] = "f32"  # in place
    with pytest.raises(QCError, match=r"optim\.state-bits"):
        mixed.step()
