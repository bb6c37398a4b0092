"""Gradients of codes where torch looks for them: clipped, scaled, summed up, forgotten; codes that are moved and copied."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qcompile import optim
from qcompile.errors import QCError
from qcompile.optim.weights import low_bit_weights

both = pytest.mark.parametrize("foreach", [False, True])


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64))
    low_bit_weights(net)
    return net


def as_float(net: nn.Module) -> nn.Sequential:
    """The same function of float weights, whose gradients are torch's own."""
    twin = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64))
    with torch.no_grad():
        for low, plain in zip(net.children(), twin, strict=True):
            if isinstance(plain, nn.Linear):
                plain.weight.copy_(low.weight)
                plain.bias.copy_(low.bias)
    return twin


def codes_of(net: nn.Module) -> list[Any]:
    return [p for p in net.parameters() if p.dtype == torch.uint8]


def backward(net: Callable[[Tensor], Tensor], of: int = 0) -> None:
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(of))
    net(x).square().mean().backward()


def same_gradients(net: nn.Module, twin: nn.Sequential) -> bool:
    low = [p.grad for p in net.parameters() if p.grad is not None]
    plain = [p.grad for layer in (twin[0], twin[2]) for p in (layer.bias, layer.weight)]
    return len(low) == len(plain) == 4 and all(
        torch.equal(a.reshape(b.shape), b) for a, b in zip(low, plain, strict=True)
    )


@both
def test_clipping_and_forgetting(foreach: bool) -> None:
    net = model()
    twin = as_float(net)
    for of in range(2):  # gradients add up
        backward(net, of)
        backward(twin, of)
    assert same_gradients(net, twin)
    # In the order of the parameters of `net`: norms of norms are sums in order.
    ordered = [p for layer in (twin[0], twin[2]) for p in (layer.bias, layer.weight)]
    norms = [nn.utils.clip_grad_norm_(params, 1e-3, foreach=foreach) for params in (list(net.parameters()), ordered)]
    assert torch.equal(*norms)
    assert norms[0] > 1e-3
    assert same_gradients(net, twin)
    nn.utils.clip_grad_value_(net.parameters(), 1e-6, foreach=foreach)
    assert all(codes.grad.abs().max() == torch.tensor(1e-6) for codes in codes_of(net))
    optimizer = optim.AdamW(net.parameters(), foreach=foreach)
    for zeroed in (net, optimizer):
        backward(net)
        zeroed.zero_grad(set_to_none=False)
        assert all(codes.grad.count_nonzero() == 0 for codes in codes_of(net))
        backward(net)
        zeroed.zero_grad()
        assert all(codes.grad is None for codes in codes_of(net))


@both
def test_scaled_losses(foreach: bool) -> None:
    """A scale of 2**8 leaves the step as it is; an overflow leaves it out."""
    net = model()
    plain = copy.deepcopy(net)
    optimizer = optim.AdamW(net.parameters(), foreach=foreach)
    other = optim.AdamW(plain.parameters(), foreach=foreach)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x = torch.randn(16, 64)
    scaler.scale(net(x).square().mean()).backward()
    plain(x).square().mean().backward()
    scaler.unscale_(optimizer)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(codes_of(net), codes_of(plain), strict=True))
    scaler.step(optimizer)
    scaler.update()
    other.step()
    assert all(map(torch.equal, net.state_dict().values(), plain.state_dict().values()))
    # Only codes overflow: those of the first layer, whose bias has a gradient of its own.
    optimizer.zero_grad()
    scaler.scale(net(x).square().mean()).backward()
    codes_of(net)[0].grad[3, 5] = torch.inf
    before = copy.deepcopy(net.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(map(torch.equal, net.state_dict().values(), before.values()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool) -> None:
    net = model()
    twin = as_float(net)
    x = torch.randn(16, 64, requires_grad=True)
    for some in (net, twin):
        checkpoint(some, x, use_reentrant=reentrant).square().mean().backward()
    assert same_gradients(net, twin)


def test_autocast() -> None:
    net = model()
    twin = as_float(net)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            backward(net)
            backward(twin)
    assert same_gradients(net, twin)


def test_a_gradient_is_nobody_elses() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    low_bit_weights(net)
    (net[0].weight + net[1].weight).sum().backward()  # one element for all, of both
    first, second = codes_of(net)
    first.grad[0, 0] = 5.0
    assert first.grad.sum() == 64 * 64 + 4
    assert second.grad.sum() == 64 * 64


@pytest.mark.parametrize("by", ["method", "attribute"])
def test_frozen(by: str) -> None:
    def switch(module: nn.Module, on: bool) -> None:
        if by == "method":
            module.requires_grad_(on)
        else:
            for p in module.parameters():
                p.requires_grad = on

    net = model()
    switch(net[0], False)
    optimizer = optim.AdamW(net.parameters())
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        backward(net)
        optimizer.step()
    changed = {name for name, t in net.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"2.bias", "2.parametrizations.weight.original0", "2.parametrizations.weight.original1"}
    assert codes_of(net)[0].grad is None
    switch(net, True)
    backward(net)
    assert all(codes.grad is not None for codes in codes_of(net))
    switch(net, False)
    assert not net(torch.ones(64)).requires_grad
    was = nn.Sequential(nn.Linear(64, 80)).requires_grad_(False)
    low_bit_weights(was)
    assert not was(torch.ones(64)).requires_grad  # frozen before, frozen after


def test_scales_do_not_come_alone() -> None:
    net = model()
    with pytest.raises(QCError, match=r"optim\.weights"):
        optim.AdamW([p for p in net.parameters() if p.requires_grad])
    floats = [p for p in net.parameters() if p.is_floating_point()]
    optimizer = optim.AdamW([{"params": floats, "lr": 1e-2}, {"params": codes_of(net)}])  # in any order
    with pytest.raises(QCError, match=r"optim\.weights"):
        optimizer.add_param_group({"params": [codes_of(model())[0].scales]})
    assert len(optimizer.param_groups) == 2
    with pytest.raises(QCError, match=r"optim\.weights"):
        optim.AdamW(codes_of(net))
    optim.AdamW([p for p in net.requires_grad_(False).parameters() if p.is_floating_point()])


def trains(net: nn.Module) -> bool:
    optimizer = optim.AdamW(net.parameters())
    before = [codes.detach().clone() for codes in codes_of(net)]
    backward(lambda x: net(x.to(net[0].bias.dtype)).float())
    optimizer.step()
    return len(before) == 2 and not any(map(torch.equal, before, codes_of(net)))


def test_assigned_and_copied() -> None:
    net, other = model(), model()
    saved = {name: t.clone() for name, t in net.state_dict().items()}
    other[0].requires_grad_(False)
    other.load_state_dict(copy.deepcopy(saved), assign=True)
    backward(other)
    assert [codes.grad is None for codes in codes_of(other)] == [True, False]  # what was frozen is
    other.requires_grad_(True)
    assert trains(other)
    assert all(torch.equal(t, saved[name]) for name, t in net.state_dict().items())
    backward(net)
    twin = copy.deepcopy(net)
    assert trains(twin)
    assert all(torch.equal(t, saved[name]) for name, t in net.state_dict().items())


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
@pytest.mark.parametrize("steps", [0, 2])
def test_distributed_checkpoints_keep_state(steps: int) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    net, again = model(), model()
    one, two = optim.AdamW(net.parameters()), optim.AdamW(again.parameters())
    for of in range(steps):
        backward(net, of)
        one.step()
        one.zero_grad()
    again.load_state_dict(net.state_dict())
    set_optimizer_state_dict(again, two, copy.deepcopy(get_optimizer_state_dict(net, one)))
    for some, optimizer in ((net, one), (again, two)):
        backward(some, 9)
        optimizer.step()
    assert all(map(torch.equal, net.state_dict().values(), again.state_dict().values()))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("swap", [False, True])
def test_moved(overwrite: bool, swap: bool) -> None:
    net = model()
    x = torch.randn(4, 64)
    was, scales = net(x).detach(), codes_of(net)[0].scales.detach().clone()
    backward(net)
    kept = codes_of(net)[0].grad.clone()
    before = (
        torch.__future__.get_overwrite_module_params_on_conversion(),
        torch.__future__.get_swap_module_params_on_conversion(),
    )
    try:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        torch.__future__.set_swap_module_params_on_conversion(swap)
        net.to("cpu")
        assert torch.equal(net(x), was)
        net.bfloat16()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before[0])
        torch.__future__.set_swap_module_params_on_conversion(before[1])
    codes = codes_of(net)[0]
    assert torch.equal(codes.grad, kept.bfloat16())
    assert codes.scales.dtype == torch.float32
    assert torch.equal(codes.scales, scales)
    assert net[0].weight.dtype == torch.bfloat16
    net.zero_grad()
    backward(lambda x: net(x.bfloat16()).float())
    assert codes.grad is not None
    assert codes.grad.dtype == torch.bfloat16
    assert trains(net)


def test_meta_and_what_cannot_be() -> None:
    net = model()
    saved = net.state_dict()
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(64, 80), nn.ReLU(), nn.Linear(80, 64))
        low_bit_weights(empty)
    empty.to_empty(device="cpu").load_state_dict(saved)
    assert trains(empty)
    before = {name: t.clone() for name, t in model()[0].state_dict().items()}
    layer = model()[0]
    with pytest.raises(QCError, match=r"optim\.dtype"):
        layer.double()
    assert all(t.dtype == before[name].dtype and torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    with pytest.raises(QCError, match=r"optim\.weights"):
        low_bit_weights(nn.Linear(64, 64), "int4/g64")  # two to a byte: no place for a gradient
    # Copies of the parameters, as fully_shard and DataParallel compute with.
    copies = {
        name: nn.Parameter(p.detach().clone(), p.requires_grad) if p.is_floating_point() else p.detach().clone()
        for name, p in net.named_parameters()
    }
    with pytest.raises(QCError, match=r"optim\.sharding"):
        torch.func.functional_call(net, copies, (torch.ones(64),))


def test_compiled() -> None:
    net = model()
    twin = copy.deepcopy(net)
    run = torch.compile(net, backend="eager")
    backward(run)
    backward(twin)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(codes_of(net), codes_of(twin), strict=True))
    torch._dynamo.reset()
    with torch.no_grad():  # while there are gradients, of another type than their parameter
        whole = torch.compile(net, backend="eager", fullgraph=True)  # evaluation stays one graph
        assert torch.equal(whole(torch.ones(64)), net(torch.ones(64)))


def test_gradients_follow_their_weight_to_another_type() -> None:
    net = model().half()
    net(torch.ones(2, 64).half()).sum().backward()
    net.float()
    assert {p.grad.dtype for p in net.parameters() if p.grad is not None} == {torch.float32}
