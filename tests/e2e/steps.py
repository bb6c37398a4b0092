"""Optimizers to round, their float32 twins, and what a rounded step may be."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qcompile.ir.rounding import random_bits
from qcompile.ir.stochastic_cast import stochastic_cast
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
