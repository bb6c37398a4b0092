"""The ways people run models: modes, dtypes, shapes that change, graph breaks, threads, fast guards."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcompile.backend import watching
from qcompile.runtime.store import STORE
from tests.e2e.models import MLP, TinyLM
from tests.e2e.support import (
    RECIPE,
    compiled,
    decoded,
    encodes_during,
    fp32_step,
    noise_bound,
    planned,
)

STEP = fp32_step(96)


@pytest.fixture
def model() -> nn.Module:
    return TinyLM(layers=1).eval()


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 128, (2, 5))


def test_kernels_and_shapes_that_change(model: nn.Module, ids: Tensor) -> None:
    """The first new batch size compiles once more, for any size; nothing compiles after that."""
    plain, known = decoded(model), len(list(STORE))
    with torch.no_grad(), watching() as trace:
        run = compiled(model)
        for shape in [(2, 5), (3, 7), (4, 9), (5, 5), (2, 5), (7, 11)]:
            ids = torch.randint(0, 128, shape)
            assert (run(ids) - plain(ids)).abs().max() <= noise_bound(plain, ids, step=STEP), shape
        assert len(trace.contexts) == 2
    assert all(d.quantized for ctx in trace.contexts for d in ctx.plan if d.site.kind != "attention")
    # One table, q k v o gate up down: the second graph packed nothing again.
    assert len(list(STORE)) - known == 8


@pytest.mark.parametrize("how", ["dynamic", "mark_dynamic"])
def test_one_graph_for_every_size(model: nn.Module, how: str) -> None:
    # Dynamo takes sizes that are equal at first for one size, unless they are marked.
    shapes = [(4, 4) if how == "mark_dynamic" else (4, 7), (3, 6), (5, 5), (64, 2)]
    plain, first = decoded(model), torch.randint(0, 128, shapes[0])
    if how == "mark_dynamic":
        torch._dynamo.mark_dynamic(first, 0)
        torch._dynamo.mark_dynamic(first, 1)
    with torch.no_grad(), watching("reference") as trace:
        run = compiled(model, dynamic=True if how == "dynamic" else None)
        for shape in shapes:
            ids = first if shape == shapes[0] else torch.randint(0, 128, shape)
            assert (run(ids) - plain(ids)).abs().max() <= noise_bound(plain, ids, step=STEP), shape
    assert len(trace.contexts) == 1


def test_dynamic_kernels_have_no_guards_of_their_own() -> None:
    """Fusing compares shapes; that must not become a question about sizes that the user's calls have to answer."""
    model = MLP().eval()
    plain = decoded(model)
    with torch.no_grad(), watching() as trace:
        run = compiled(model, dynamic=True)
        for shape in [(4, 7, 64), (5, 5, 64), (96, 2, 64), (64, 64, 64)]:
            x = torch.randn(shape)
            assert (run(x) - plain(x)).abs().max() <= noise_bound(plain, x, step=STEP), shape
    assert len(trace.contexts) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_parameters_made_in_a_mode(mode: Callable[[], Any], ids: Tensor) -> None:
    with mode():
        model = TinyLM(layers=1).eval()
        plain = decoded(model)
        run = compiled(model)
        with watching("reference") as trace:
            got = run(ids)
            assert encodes_during(lambda: run(ids)) == 0
        assert all(d.quantized for d in trace.contexts[0].plan if d.site.kind != "attention")
        assert (got - plain(ids)).abs().max() <= noise_bound(plain, ids, step=STEP)


def test_normal_parameters_next_to_inference_ones() -> None:
    """Where one parameter has no version counter, those of the others still count."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    with torch.inference_mode():
        model[1].weight = nn.Parameter(torch.randn(32, 32), requires_grad=False)
    x = torch.randn(3, 32)
    with torch.no_grad(), watching("reference"):
        run = compiled(model)
        run(x)
        model[0].weight.mul_(2)
        assert encodes_during(lambda: run(x)) == 1
        assert torch.equal(run(x), planned(copy.deepcopy(model), x))


# A bf16 graph rounds to 8 bits: every Linear stands between at most four pointwise operations (norm, activation,
# product, residual), each half a unit of 2^-8.
HALF_STEPS = {torch.bfloat16: 4 * 2.0**-9, torch.float16: 4 * 2.0**-12}


@pytest.mark.parametrize("dtype", HALF_STEPS)
def test_half_precision_models(dtype: torch.dtype) -> None:
    model, x = MLP(bias=True).eval().to(dtype), torch.randn(3, 64).to(dtype)
    with torch.no_grad(), watching() as trace:
        got = compiled(model)(x)
    assert all(d.quantized for d in trace.contexts[0].plan)
    assert got.dtype == dtype
    plain = decoded(model).float()
    with torch.no_grad():
        want = plain(x.float())
    assert (got.float() - want).abs().max() <= noise_bound(plain, x.float(), step=HALF_STEPS[dtype])


class Inside(nn.Module):
    """Autocast for a part of the model only; both parts read the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.a(x)
        return y, self.b(x)


@pytest.mark.parametrize("real", [False, True], ids=["reference", "kernels"])
def test_autocast_inside(real: bool) -> None:
    model, x = Inside().eval(), torch.randn(3, 64)
    plain = decoded(model)
    with torch.no_grad(), watching("compiled" if real else "reference"):
        half, full = compiled(model)(x)
        want_half, want_full = plain(x)
    assert (half.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    assert (full - want_full).abs().max() <= noise_bound(plain.b, x, step=STEP)
    # x and the result are rounded to bf16 here; there the weight is too.
    step = 3 * 2.0**-9
    assert (half.float() - want_half.float()).abs().max() <= 2 * noise_bound(plain.a, x, step=step)


def test_autocast_outside() -> None:
    model, x = MLP().eval(), torch.randn(3, 64)
    plain = decoded(model)
    with torch.no_grad(), watching("reference"):
        run = compiled(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = run(x)
        assert got.dtype == torch.float32  # the residual is
        assert (got - plain(x)).abs().max() <= noise_bound(plain, x, step=HALF_STEPS[torch.bfloat16])
        assert (run(x) - plain(x)).abs().max() <= noise_bound(plain, x, step=STEP)


class Broken(nn.Module):
    """Two graphs around a break; the second reads a weight of the first again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).relu()
        torch._dynamo.graph_break()
        return self.a(self.b(y))


def test_graph_break() -> None:
    model, x = Broken().eval(), torch.randn(3, 64)
    plain, known = decoded(model), len(list(STORE))
    with torch.no_grad(), watching("reference") as trace:
        got = compiled(model)(x)
        assert (got - plain(x)).abs().max() <= noise_bound(plain, x, step=STEP)
    assert len(trace.contexts) == 2
    assert len(list(STORE)) - known == 2


def in_threads(calls: list[Callable[[], Tensor]]) -> list[Tensor]:
    """Run the calls at the same time, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)
    gate = threading.Barrier(len(calls))

    def work(index: int) -> None:
        gate.wait()
        try:
            results[index] = calls[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def test_threads_share_one_graph_between_modules() -> None:
    """Modules of one class share compiled code: a call must get the weights of its own module."""
    models = [nn.Linear(64, 48, bias=False).eval() for _ in range(2)]
    x = torch.randn(3, 64)

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    with torch.no_grad(), watching() as trace:
        run = compiled(call)
        want = [run(model, x) for model in models]
        assert not torch.equal(*want)
        assert len(trace.contexts) == 1, "the modules do not share a graph: this test shows nothing"

    def many(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.stack([run(model, x) for _ in range(200)])

    results = in_threads([lambda m=model: many(m) for model in models])  # type: ignore[misc]
    for one, result in zip(want, results, strict=True):
        assert (result == one).all()


def test_first_calls_from_two_threads(model: nn.Module, ids: Tensor) -> None:
    want = planned(model, ids)
    known = len(list(STORE))

    def call() -> Tensor:
        with torch.no_grad(), watching("reference"):
            return run(ids)

    run = compiled(model)
    for got in in_threads([call, call]):
        assert torch.equal(got, want)
    assert len(list(STORE)) == known


def test_switching_between_modules_encodes_nothing() -> None:
    models = [nn.Linear(32, 32).eval() for _ in range(3)]
    x = torch.randn(2, 32)

    def call(layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    with torch.no_grad(), watching("reference") as trace:
        run = compiled(call)
        first = [run(model, x) for model in models]
        assert encodes_during(lambda: [run(model, x) for model in models]) == 0
        for model, want in zip(models, first, strict=True):
            assert torch.equal(run(model, x), want)
        assert len(trace.contexts) == 1


def test_deepcopy_is_another_model(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad(), watching("reference"):
        run = compiled(model)
        before = run(ids)
        twin = copy.deepcopy(model)
        assert torch.equal(compiled(twin)(ids), before)
        twin.head.weight.mul_(2)
        assert torch.equal(run(ids), before)
        assert not torch.equal(compiled(twin)(ids), before)


def test_fast_guards(model: nn.Module, ids: Tensor) -> None:
    import qcompile

    want = planned(model, ids)
    with torch.no_grad(), watching("reference") as trace:
        run = qcompile.compile(model, fast_guards=True, recipe=RECIPE)
        assert torch.equal(run(ids), want)
        run(torch.randint(0, 128, (2, 6)))
    assert len(trace.contexts) == 2
