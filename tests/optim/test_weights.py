"""Weights in 8 bits without a float master: no float copy stays, steps arrive on average, training works and resumes."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from qcompile import optim
from qcompile.errors import QCError
from qcompile.ir.state import Storage
from qcompile.optim.weights import low_bit_weights


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 320), nn.ReLU(), nn.Linear(320, 96), nn.ReLU(), nn.Linear(96, 8))


def loss_of(net: nn.Module, of: int) -> Tensor:
    generator = torch.Generator().manual_seed(of)
    x = torch.randn(128, 64, generator=generator)
    return (net(x) - x[:, :8].sin()).square().mean()


def test_no_float_tensor_of_a_weight_stays() -> None:
    net = model()
    assert low_bit_weights(net) == ["0", "2"]  # the last has 768 elements
    optimizer = optim.AdamW(net.parameters())
    for of in range(2):
        loss = loss_of(net, of)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        del loss
    sizes = {320 * 64, 320 * 96}
    gc.collect()
    alive = [
        t
        for t in gc.get_objects()
        if issubclass(type(t), Tensor)
        and not issubclass(type(t), FakeTensor)  # what compiled graphs of other tests keep, without numbers
        and t.is_floating_point()
        and t.numel() in sizes
    ]
    assert not alive
    codes = net[0].parametrizations.weight.original0
    assert (codes.dtype, codes.shape) == (torch.uint8, (320, 64))
    assert codes.scales.shape == (320, 1)


def test_the_forward_pass_sees_the_codes() -> None:
    net, was = model(), model()
    low_bit_weights(net)
    decode, codes = net[2].parametrizations.weight[0], net[2].parametrizations.weight.original0
    assert codes.low_bit is decode
    assert decode.storage == Storage("int8", 64)  # 320 is five times 64
    step = codes.scales.repeat_interleave(64, 1)
    assert ((net[2].weight - was[2].weight).abs() <= step * 0.5001).all()
    with torch.no_grad():
        assert not net[2].weight.requires_grad
    loss_of(net, 0).backward()
    once = codes.grad.clone()
    loss_of(net, 0).backward()
    assert torch.equal(codes.grad, 2 * once)  # gradients add up
    with torch.no_grad():
        for low, float_layer in zip(net, was, strict=True):
            if isinstance(low, nn.Linear):
                float_layer.weight.copy_(low.weight)
    loss_of(was, 0).backward()
    assert torch.equal(once, was[2].weight.grad)
    optim.SGD(net.parameters()).zero_grad()
    assert codes.grad is None


def test_steps_arrive_on_average() -> None:
    """0.004 of a level, 100 times over 20000 codes: 0.4 levels within four deviations; nothing when rounded to nearest."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        layer = nn.Linear(256, 80)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(256.0) % 64 - 32)
            layer.weight[:, 0] = 127.0  # which has no gradient: the scale of each block stays 1
        low_bit_weights(layer)
        codes = layer.parametrizations.weight.original0
        optimizer = optim.SGD([codes, codes.scales], lr=0.004, rounding=rounding)
        before = layer.weight.detach()[:, 1:].clone()
        for _ in range(100):
            codes.grad = -torch.ones(80, 256)
            codes.grad[:, 0] = 0.0
            optimizer.step()
        moved[rounding] = (layer.weight.detach()[:, 1:] - before).double().mean().item()
    assert moved["nearest"] == 0
    deviation = math.sqrt(100 * 0.004 * 0.996 / (80 * 255))
    assert abs(moved["stochastic"] - 0.4) <= 4 * deviation + 100 * 2.0**-17  # chances are multiples of 2**-16


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion"])
def test_they_train_and_resume(name: str) -> None:
    def made(net: nn.Module) -> optim.LowBitOptimizer:
        low_bit_weights(net)
        rates = {"AdamW": 1e-2, "SGD": 0.4, "Lion": 2e-3}
        optimizer: optim.LowBitOptimizer = getattr(optim, name)(net.parameters(), lr=rates[name])
        return optimizer

    def train(net: nn.Module, optimizer: optim.LowBitOptimizer, steps: range) -> None:
        for of in steps:
            optimizer.zero_grad()
            loss_of(net, of).backward()
            optimizer.step()

    net, again = model(), model()
    one, two = made(net), made(again)
    first = loss_of(net, 1000).item()
    train(net, one, range(30))
    again.load_state_dict(net.state_dict())
    two.load_state_dict(one.state_dict())
    train(net, one, range(30, 60))
    train(again, two, range(30, 60))
    assert loss_of(net, 1000).item() < 0.5 * first
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True))


def test_what_stays_as_it_is() -> None:
    tied = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    tied[1].weight = tied[0].weight
    assert low_bit_weights(tied) == []
    conv = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Linear(64, 64))
    assert low_bit_weights(conv, select=lambda name, module: isinstance(module, nn.Conv2d)) == ["0"]
    assert conv[0](torch.ones(1, 64, 3, 3)).shape == (1, 64, 1, 1)
    for storage in ("dyn8/g256", "bf16", "uint8/g256"):
        with pytest.raises(QCError, match=r"optim\.weights"):
            low_bit_weights(model(), storage)
    with pytest.raises(QCError, match=r"optim\.dtype"):
        optim.AdamW([torch.zeros(4, dtype=torch.uint8)])
