"""Updates that users write: whatever operations they are made of, parameters are computed in float32 and rounded once, and what
reads a parameter behind its update reads what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.backend import watching
from qcompile.errors import QCError, QCWarning
from qcompile.plan.recipe import PRESETS, Recipe
from qcompile.runtime.updates import STEPS
from tests.e2e.steps import assert_rounded, bits_of, compiled, gradients, parameters


class Own(torch.optim.Optimizer):
    """One function for every parameter; `results` are of its last call."""

    def __init__(self, params: Any, update: Callable[[Tensor, dict[str, Tensor]], Any]) -> None:
        super().__init__(params, {})
        self.update = update

    @torch.no_grad()
    def step(self) -> list[Any]:  # type: ignore[override]
        return [self.update(p, self.state[p]) for p in self.param_groups[0]["params"]]


def _zeros(p: Tensor, state: dict[str, Tensor]) -> Any:
    if "m" not in state:
        state["m"] = torch.zeros(p.shape, dtype=p.dtype)
    state["m"].lerp_(p.grad, 0.25)
    p.sub_(state["m"], alpha=0.01)


def _cast_operand(p: Tensor, state: dict[str, Tensor]) -> Any:
    g = (p.grad * 4).to(torch.bfloat16)  # exact, as the cast is
    p.view(-1).lerp_(g.view(-1), 0.01)


def _copy(p: Tensor, state: dict[str, Tensor]) -> Any:
    new = p.float() - p.grad.float() * 0.01
    p.copy_(new.to(p.dtype))


def _copies(p: Tensor, state: dict[str, Tensor]) -> Any:
    new = torch._foreach_sub([p.float()], [p.grad.float() * 0.01])
    torch._foreach_copy_([p], [n.to(p.dtype) for n in new])


def _data(p: Tensor, state: dict[str, Tensor]) -> Any:
    p.data = (p - p.grad * 0.01).to(torch.bfloat16)


EXACT: dict[str, tuple[Callable[..., Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "a factory that names the type": (_zeros, lambda p, g: p - 0.01 * (0.25 * g)),
    "a cast that meets float32": (_cast_operand, lambda p, g: p + 0.01 * (4 * g - p)),
    "a cast before the copy": (_copy, lambda p, g: p - 0.01 * g),
    "casts before copies of a list": (_copies, lambda p, g: p - 0.01 * g),
    "new data": (_data, lambda p, g: p - 0.01 * g),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_names_a_type_is_float32_until_it_is_stored(name: str, graphs: list[Any]) -> None:
    update, exact = EXACT[name]
    params = parameters((torch.bfloat16, torch.bfloat16))
    opt = Own(params, update)
    gradients(params, 1)
    before = [p.detach().float() for p in params]
    compiled(opt.step)()
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert_rounded(p.detach(), exact(old, p.grad.float()), old, bits_of(p, 7, 1, i))
    for state in opt.state.values():
        assert all(t.dtype == torch.bfloat16 for t in state.values())


def test_behind_its_update_a_parameter_is_what_is_stored(graphs: list[Any]) -> None:
    def update(p: Tensor, state: dict[str, Tensor]) -> Any:
        early, piece = p.detach(), p.chunk(2)[1]
        p.sub_(p.grad * 0.01)
        state["average"] = early * 0.5
        return early, piece, p.view(-1), p.clone(), p.float().sum(), piece.double()

    params = parameters((torch.bfloat16, torch.bfloat16))
    opt = Own(params, update)
    gradients(params, 1)
    before = [p.detach().float() for p in params]
    results = compiled(opt.step)()
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        assert_rounded(p.detach(), old - 0.01 * p.grad.float(), old, bits_of(p, 7, 1, i))
        early, piece, flat, copy, total, last = results[i]
        assert torch.equal(opt.state[p]["average"], p.detach() * 0.5)
        assert torch.equal(early, p)
        assert torch.equal(flat, p.detach().view(-1))
        assert torch.equal(copy, p)
        assert torch.equal(total, p.detach().float().sum())
        assert torch.equal(last, p.detach().chunk(2)[1].double())
        assert piece.dtype == torch.bfloat16
        for view in (early, piece, flat):
            assert view.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()
        assert copy.untyped_storage().data_ptr() != p.untyped_storage().data_ptr()


def test_parameters_that_are_slices_of_one_buffer(graphs: list[Any]) -> None:
    flat = torch.randn(24, generator=torch.Generator().manual_seed(1)).bfloat16()
    params = [nn.Parameter(flat[:8]), nn.Parameter(flat[8:])]
    opt = Own(params, lambda p, state: p.data.view(-1).sub_(p.grad * 0.01))
    gradients(params, 1)
    old = [p.detach().float() for p in params]
    compiled(opt.step)()
    for i, p in enumerate(params):
        assert_rounded(p.detach(), old[i] - 0.01 * p.grad.float(), old[i], bits_of(p, 7, 1, i))


def _data_of_another_shape(p: Tensor, other: Tensor) -> None:
    p.data = torch.cat([p.data, other[:2]])


def _data_from_outside(p: Tensor, other: Tensor) -> None:
    p.data = other.view(p.shape)


@pytest.mark.parametrize("update", [_data_of_another_shape, _data_from_outside])
def test_data_that_cannot_be_written_into_the_parameter(update: Callable[..., None], graphs: list[Any]) -> None:
    p, other = nn.Parameter(torch.ones(8, 8).bfloat16()), torch.ones(8, 8).bfloat16()
    with torch.no_grad(), pytest.raises(QCError, match=r"updates\.data"):
        compiled(update)(p, other)


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "transposed"])
def test_generated_code_of_other_strides(form: torch.memory_format) -> None:
    # Inductor chooses the strides of what it computes, and a step takes elements in their order.
    value = torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(0)).bfloat16().to(memory_format=form)
    p = nn.Parameter(value.clone() if form is torch.channels_last else value.clone().transpose(0, 1))
    p.grad = torch.ones_like(p) / 3
    strides, old = p.stride(), p.detach().float()
    twin = nn.Parameter(old.clone())
    twin.grad = p.grad.float()
    torch.optim.AdamW([twin], lr=0.01).step()
    compiled(torch.optim.AdamW([p], lr=0.01).step)()
    assert p.stride() == strides
    assert not p.is_contiguous()
    assert_rounded(p.detach(), twin.detach(), old, bits_of(p, 7, 1, 0), True)


def test_generated_code_of_an_update_through_a_view() -> None:
    def update(p: Tensor, g: Tensor) -> None:
        p.t().add_(g.t(), alpha=0.01)

    p, g = parameters((torch.bfloat16,))[0], torch.ones(7, 5).bfloat16()
    old = p.detach().float()
    with torch.no_grad():
        compiled(update)(p, g)
    assert_rounded(p.detach(), old + 0.01, old, bits_of(p, 7, 1, 0))


def test_steps_that_round_nothing_use_nothing_up(graphs: list[Any]) -> None:
    for i in range(9):  # they share the code of the step, which Dynamo would compile 8 times
        wide = nn.Parameter(torch.ones(3 + i))
        wide.grad = torch.ones_like(wide)
        compiled(torch.optim.SGD([wide], lr=0.1).step)()
    p = nn.Parameter(torch.ones(64).bfloat16())
    p.grad = torch.ones_like(p)
    opt = torch.optim.SGD([p], lr=2.0**-9)
    compiled(opt.step)()
    assert int(opt.param_groups[0][STEPS]) == 1


def test_however_often_a_step_is_another_one_it_is_rounded(graphs: list[Any]) -> None:
    # Steps of one class share their code, which Dynamo compiles 8 times and then runs as it is.
    params = [nn.Parameter(torch.ones(64, 3 + i).bfloat16()) for i in range(10)]
    steps = []
    for p in params:
        p.grad = torch.ones_like(p)
        opt = torch.optim.SGD([p], lr=2.0**-9)  # half the spacing below 1
        steps.append((compiled(opt.step), opt))
    for step, _ in steps[:8]:
        step()
    with pytest.warns(QCWarning, match="compiled 8 times"):
        steps[8][0]()
    steps[9][0]()
    for p, (_, opt) in zip(params, steps, strict=True):
        assert int(opt.param_groups[0][STEPS]) == 1
        assert 0 < float((p != 1).float().mean()) < 1  # to nearest, all would stay or all would move


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_a_group_may_come_later(name: str, graphs: list[Any]) -> None:
    params = parameters((torch.bfloat16, torch.bfloat16))
    opt = getattr(torch.optim, name)(params[:1], lr=0.1, **({"momentum": 0.9} if name == "SGD" else {}))
    step = compiled(opt.step)
    gradients(params, 1)
    step()
    opt.add_param_group({"params": params[1:], "lr": 0.2})
    old = params[1].detach().clone()
    step()
    assert int(opt.param_groups[0][STEPS]) == 2
    assert not torch.equal(params[1], old)


def test_explain_says_when_nothing_is_rounded() -> None:
    p = nn.Parameter(torch.ones(8).bfloat16())
    p.grad = torch.ones_like(p)
    fused, plain = torch.optim.SGD([p], lr=0.1, fused=True), torch.optim.SGD([p], lr=0.1)
    assert any("nothing is rounded stochastically" in note for note in qcompile.explain(fused.step, recipe="sr").notes)
    with pytest.raises(QCError, match=r"explain\.updates"):
        qcompile.explain(fused.step, options={"recipe": "sr", "strict": True})
    found = qcompile.explain(plain.step, options={"recipe": "sr", "strict": True})
    assert STEPS not in plain.param_groups[0]
    assert any("rounded stochastically" in note for note in found.notes)


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
