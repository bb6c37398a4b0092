"""Weights that change after the compile: the next call equals a fresh compile bit for bit, and compiles nothing."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile.backend import watching
from qcompile.errors import QCError, QCWarning
from qcompile.runtime.store import STORE
from tests.e2e.models import TinyLM
from tests.e2e.support import RECIPE, compiled, encodes_during, planned

# Torch up to 2.11 compiles no second graph when `.data` gets another shape, with any backend.
OLD_GUARDS = torch.torch_version.TorchVersion(torch.__version__) < (2, 12)
Change = Callable[[nn.Module], object]


def _q(model: nn.Module) -> nn.Linear:
    found: nn.Linear = model.layers[0][0].q  # type: ignore[union-attr,index]
    return found


def _fresh_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor * 1.5 for name, tensor in model.state_dict().items()}


def _copy(model: nn.Module) -> None:
    _q(model).weight.copy_(torch.randn(64, 64))


def _bias(model: nn.Module) -> None:
    _q(model).bias.mul_(3)


def _data(model: nn.Module) -> None:
    _q(model).weight.data = torch.randn(64, 64)


def _data_twice(model: nn.Module) -> None:
    # The second tensor often gets the memory of the first: its address alone says nothing.
    for _ in range(8):
        _q(model).weight.data = _q(model).weight.data * 1.1


def _replaced(model: nn.Module) -> None:
    for _ in range(8):
        _q(model).weight = nn.Parameter(torch.randn(64, 64))


def _behind_the_back(model: nn.Module) -> None:
    _q(model).weight.data.copy_(torch.randn(64, 64))
    assert qcompile.refresh(model) > 0


def _through_numpy(model: nn.Module) -> None:
    _q(model).weight.detach().numpy()[:] = 0.5
    assert qcompile.refresh(_q(model).weight) == 1


def _step(make: Callable[..., torch.optim.Optimizer], **settings: object) -> Change:
    def step(model: nn.Module) -> None:
        optimizer = make([_q(model).weight], lr=0.1, **settings)
        for _ in range(2):
            _q(model).weight.grad = torch.ones(64, 64)
            optimizer.step()

    return step


ALL = 9 + 2
CHANGES: dict[str, tuple[Change, int]] = {  # the change, and how many weights or constants it makes stale
    "copy_": (_copy, 1),
    "merged bias": (_bias, 1),
    "load_state_dict": (lambda m: m.load_state_dict(_fresh_state(m)), ALL),
    "assign": (lambda m: m.load_state_dict(_fresh_state(m), assign=True), ALL),
    "data": (_data, 1),
    "data, many times": (_data_twice, 1),
    "another parameter": (_replaced, 1),
    "behind the back": (_behind_the_back, ALL),
    "through numpy": (_through_numpy, 1),
    "sgd": (_step(torch.optim.SGD), 1),
    "sgd fused": (_step(torch.optim.SGD, fused=True), 1),
    "adam": (_step(torch.optim.Adam), 1),
    "adam fused": (_step(torch.optim.Adam, fused=True), 1),
    "adamw foreach": (_step(torch.optim.AdamW, foreach=True), 1),
}


def tiny() -> nn.Module:
    """Nine weights, q/k/v and gate/up merged with joined biases. (Untied: `assign=True` would untie a table, and that
    changes what Dynamo has to guard.)"""
    return TinyLM(layers=1, bias=True, tied=False).eval()


def apply(change: Change, model: nn.Module) -> None:
    with torch.no_grad():
        change(model)


@pytest.mark.parametrize("name", CHANGES)
def test_next_call_equals_a_fresh_compile(name: str) -> None:
    change, stale = CHANGES[name]
    model, ids = tiny(), torch.randint(0, 128, (2, 5))
    with torch.no_grad(), watching("reference") as trace:
        run = compiled(model)
        before = run(ids)
        apply(change, model)
        results: list[Tensor] = []
        assert encodes_during(lambda: results.append(run(ids))) == stale
        assert encodes_during(lambda: results.append(run(ids))) == 0
    assert len(trace.contexts) == 1
    assert not torch.equal(results[0], before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], planned(copy.deepcopy(model), ids))


def test_kernels_see_the_change() -> None:
    """The same with generated code, one change after the other."""
    model, ids = tiny(), torch.randint(0, 128, (2, 5))
    results = []
    with torch.no_grad(), watching() as trace:
        run = compiled(model)
        last = run(ids)
        for change, _ in CHANGES.values():
            apply(change, model)
            results.append((run(ids), copy.deepcopy(model.state_dict())))
            assert not torch.equal(results[-1][0], last)
            last = results[-1][0]
    assert len(trace.contexts) == 1
    torch._dynamo.reset()
    twin = tiny()
    twin.load_state_dict(results[-1][1])
    with torch.no_grad():
        fresh = compiled(twin)
        # Every state through one more compile, which the tests above show to follow its weights.
        for result, state in results[::-1]:
            twin.load_state_dict(state)
            assert torch.equal(fresh(ids), result)


def test_only_the_optimizers_own_weights_are_encoded() -> None:
    model, other = tiny(), nn.Linear(8, 8)
    ids = torch.randint(0, 128, (2, 5))
    with torch.no_grad(), watching("reference"):
        run = compiled(model)
        run(ids)
    other(torch.randn(2, 8)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    with torch.no_grad():
        assert encodes_during(lambda: run(ids)) == 0


def test_a_bad_weight_is_an_error_until_it_is_mended() -> None:
    model, ids = tiny(), torch.randint(0, 128, (2, 5))
    with torch.no_grad(), watching("reference"):
        run = compiled(model)
        want = run(ids)
        good = _q(model).weight.clone()
        _q(model).weight[3, 4] = float("nan")
        for _ in range(2):
            with pytest.raises(QCError, match=r"layers\.0\.0\.q\.weight: index \[3, 4\]"):
                run(ids)
        _q(model).weight.copy_(good)
        assert torch.equal(run(ids), want)


@pytest.mark.skipif(OLD_GUARDS, reason="this Dynamo does not look at a parameter's shape again")
def test_another_shape_or_dtype_compiles_again() -> None:
    model, x = nn.Linear(32, 16), torch.randn(2, 32)
    with torch.no_grad(), watching("reference") as trace:
        run = compiled(model)
        run(x)
        model.weight.data, model.bias.data = torch.randn(24, 32), torch.randn(24)
        assert torch.equal(run(x), planned(copy.deepcopy(model), x))
        run = compiled(model)
        run(x)
        model.to(torch.bfloat16)
        assert torch.equal(run(x.bfloat16()), planned(copy.deepcopy(model), x.bfloat16()))
    assert len(trace.contexts) >= 3


@pytest.mark.skipif(OLD_GUARDS, reason="this Dynamo does not look at a parameter's strides again")
def test_other_strides_and_back() -> None:
    """One graph for each kind of strides; both write to one packed copy."""
    model, x = nn.Linear(32, 32).eval(), torch.randn(2, 32)
    turned = copy.deepcopy(model)
    turned.weight.data = turned.weight.data.t()
    wanted = [planned(net, x) for net in (model, turned)]
    with torch.no_grad(), watching("reference") as trace:
        run = compiled(model)
        for want in wanted * 2:
            assert torch.equal(run(x), want)
            model.weight.data = model.weight.data.t()
    assert len(trace.contexts) == 2


def test_writes_that_torch_does_not_count_are_announced() -> None:
    with torch.inference_mode():
        model, x = nn.Linear(32, 16).eval(), torch.randn(2, 32)
        with watching("reference"):
            run = compiled(model)
            with pytest.warns(QCWarning, match=r"weight was made under torch\.inference_mode.*qcompile\.refresh"):
                run(x)
            model.load_state_dict(_fresh_state(model))
            qcompile.refresh(model)
            after = run(x)
        assert torch.equal(after, planned(copy.deepcopy(model), x))


def test_a_scheme_chosen_for_other_values_is_announced() -> None:
    """The same code, decided for weights that 4 bits hold exactly, meets others."""
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64, bias=False).eval(), torch.randn(2, 64)
    usual = model.weight.detach().clone()
    with torch.no_grad(), watching("reference") as trace:
        model.weight.copy_((usual > 0).float())
        run = compiled(model, "auto")
        with warnings.catch_warnings():
            warnings.simplefilter("error", QCWarning)
            run(x)
        model.weight.copy_(usual)
        with pytest.warns(QCWarning, match=r"weight: uint4.* keeps only 2\d\.\d dB .* asks for 30.*compile again"):
            run(x)
    assert len(trace.contexts) == 1


@pytest.mark.parametrize("kind", ["reference", "compiled"])
def test_nothing_keeps_a_dead_model(kind: str) -> None:
    """Neither its parameters nor its packed weights."""
    model, x = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)).eval(), torch.randn(2, 32)
    gc.collect()
    known = len(list(STORE))
    with torch.no_grad(), watching(kind) as trace:  # type: ignore[arg-type]
        run = compiled(model)
        run(x)
        assert len(list(STORE)) == known + 2
        old = weakref.ref(model[0].weight)
        trace.contexts.clear()
        model[0].weight = nn.Parameter(torch.randn(16, 32))
        run(x)
    gc.collect()
    assert old() is None, "a replaced parameter lives on"
    assert len(list(STORE)) == known + 2
    packed = [weakref.ref(part) for entry in list(STORE)[-2:] for part in entry.parts]
    del run, model
    gc.collect()
    assert len(list(STORE)) == known
    # ... and Dynamo still has the code.
    assert [ref() for ref in packed] == [None] * 4


def test_convert_gives_the_compiled_copy_back() -> None:
    model, x = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)).eval(), torch.randn(2, 32)
    with torch.no_grad():
        known = {id(entry) for entry in STORE}
        run = compiled(model)
        run(x)
        packed = [weakref.ref(part) for entry in STORE if id(entry) not in known for part in entry.parts]
        assert len(packed) == 4
        qcompile.convert(model, RECIPE)
        gc.collect()
        assert [ref() for ref in packed] == [None] * 4
        assert run(x).shape == (2, 16)


def test_gradients_do_not_keep_a_dead_model() -> None:
    """A graph with a backward part of its own."""
    model, x = nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 16)).requires_grad_(False), torch.randn(2, 32)
    known = {id(entry) for entry in STORE}
    run = compiled(model)
    run(x.requires_grad_()).sum().backward()
    parts = [part for entry in STORE if id(entry) not in known for part in entry.parts]
    held = [weakref.ref(item) for item in (*model.parameters(), *parts)]
    assert len(held) == 8
    del model, run, parts
    gc.collect()
    assert not [ref() for ref in held if ref() is not None]
