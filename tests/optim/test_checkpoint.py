"""Checkpoints: resumed runs are the run, bit for bit; state goes to torch.optim and comes from there."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile import optim
from qcompile.errors import QCError
from qcompile.ir.state import Storage
from tests.ir.support import same
from tests.optim.support import STOCK, ours, parameters, stock, tensors_of, train

NAMES = ("adamw", "adam-max", "momentum", "lion", "sgd")
SETTINGS = [(name, dtype, bits) for name in NAMES for dtype, bits in ((torch.bfloat16, 8), (torch.float32, 4))]


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("name", "dtype", "bits"), SETTINGS)
def test_resumed_is_never_stopped(name: str, dtype: torch.dtype, bits: int) -> None:
    params, half = parameters(dtype), parameters(dtype)
    one, first = ours(name, params, state_bits=bits), ours(name, half, state_bits=bits, seed=5)
    one.param_groups[0]["seed"] = 5
    train(one, params, range(6))
    train(first, half, range(3))
    state, rest = through_a_file(first.state_dict()), [torch.nn.Parameter(p.detach().clone()) for p in half]
    second = ours(name, rest, state_bits=bits)
    second.load_state_dict(state)
    train(first, half, range(3, 4))  # what was loaded is not what is still used there
    train(second, rest, range(3, 6))
    assert all(map(same, (p.detach() for p in params), (p.detach() for p in rest)))
    assert tensors_of(one).keys() == tensors_of(second).keys()
    assert all(map(same, tensors_of(one).values(), tensors_of(second).values()))


@pytest.mark.parametrize("bits", [32, 8, 4])
@pytest.mark.parametrize("name", [name for name in STOCK if not name.startswith("adamw-")])
def test_from_torch_and_back(name: str, bits: int) -> None:
    """Moments come out as they went in, rounded once by each block; numbers of steps and settings exactly."""
    params = parameters()
    theirs = stock(name, params, lr=0.123)
    train(theirs, params, range(3))
    mine = ours(name, params, state_bits=bits)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert mine.param_groups[0]["lr"] == 0.123
    assert mine.param_groups[0]["state_bits"] == bits
    assert mine.param_groups[0]["seed"] == 0
    back = through_a_file(mine.stock_state_dict())
    again = stock(name, params)
    again.load_state_dict(back)
    assert set(again.param_groups[0]) == set(theirs.param_groups[0])
    for p in params:
        for key, was in theirs.state[p].items():
            if was is None:
                continue
            got = again.state[p][key]
            assert got.dtype == torch.float32
            if key == "step" or bits == 32 or p.numel() < 4096:
                assert torch.equal(got, was)
            else:
                # Half the largest distance of levels: of the dynamic maps 2**-7 and 2**-3 wide (0.225), of the linear 2**-4.
                largest = was.abs().max()
                assert ((got - was).abs() <= largest * {8: 2.0**-7, 4: 0.1125}[bits] * 1.001).all()
                assert not torch.equal(got, was)
    train(mine, params, range(3, 5))
    train(again, params, range(5, 6))
    mine.load_state_dict(back)  # and what was written is read
    train(mine, params, range(6, 7))


def test_first_step_after_a_stock_momentum() -> None:
    """A buffer from torch is past its first step, which alone takes the gradient without dampening."""
    results = []
    for make in (stock, ours):
        params = parameters()
        first = stock("momentum", params)
        train(first, params, range(2))
        then = make("momentum", params, **({"state_bits": 32} if make is ours else {}))
        then.load_state_dict(first.state_dict())
        train(then, params, range(2, 4))
        results.append(params)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
    empty = ours("momentum", parameters())
    empty.load_state_dict(stock("momentum", parameters()).state_dict())
    assert not empty.state


@pytest.mark.parametrize(("old", "new"), [(8, 4), (4, 8), (8, 32), (32, 4), (8, {"exp_avg": "int8/g64"})])
def test_other_bits_are_encoded_again(old: Any, new: Any) -> None:
    params = parameters()
    first, second = ours("adamw", params, state_bits=old), ours("adamw", params, state_bits=new)
    train(first, params, range(2))
    second.load_state_dict(first.state_dict())
    assert second.param_groups[0]["state_bits"] == new
    want = first.stock_state_dict()["state"]
    for index, values in second.stock_state_dict()["state"].items():
        for key, t in values.items():
            storage = Storage.parse(new.get(key, "f32")) if isinstance(new, dict) else None
            widest = 1 / 127 if storage and not storage.plain else 0.225 if new == 4 else 0.0 if new != 8 else 2.0**-6
            assert ((t - want[index][key]).abs() <= want[index][key].abs().max() * widest / 2 * 1.001).all()
    train(second, params, range(2, 4))


def test_checkpoints_that_do_not_fit() -> None:
    params = parameters()
    optimizer = ours("adamw", params)
    train(optimizer, params, range(1))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="doesn't match the size"):
        ours("adamw", params[:2]).load_state_dict(state)
    with pytest.raises(QCError, match=r"optim\.checkpoint"):
        ours("adamw", [params[1], params[0], *params[2:]]).load_state_dict(state)
    other = stock("adamw", params)
    train(other, params, range(1))
    with pytest.raises(QCError, match=r"optim\.checkpoint"):
        ours("adamw", [params[1], params[0], *params[2:]]).load_state_dict(other.state_dict())


def test_hooks_of_torch_still_run() -> None:
    params = parameters()
    optimizer = ours("adamw", params)
    train(optimizer, params, range(1))
    seen: list[Tensor] = []
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["exp_avg_codes"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert len(seen) == 1
    assert isinstance(optimizer, optim.LowBitOptimizer)
