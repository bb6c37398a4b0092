"""What the tests of optimizers share: optimizers with their settings, and problems to run them on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile import optim

# name -> (class, settings): what torch.optim has under the same name.
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "adamw": ("AdamW", {"lr": 3e-3}),
    "adamw-plain": ("AdamW", {"lr": 1e-2, "weight_decay": 0.0, "eps": 1e-6, "betas": (0.8, 0.95)}),
    "adamw-far": ("AdamW", {"lr": 1e-2, "betas": (0.1, 0.9)}),  # Tensor.lerp computes from the other end
    "adam": ("Adam", {"lr": 1e-2, "weight_decay": 0.1}),
    "adam-decoupled": ("Adam", {"lr": 1e-2, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    "adam-max": ("Adam", {"lr": 1e-2, "amsgrad": True, "maximize": True}),
    "adam-none": ("Adam", {"lr": 1e-2, "betas": (0.0, 0.999)}),
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd-decay": ("SGD", {"lr": 0.1, "weight_decay": 0.01, "maximize": True}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
}
EVERY = {**STOCK, "lion": ("Lion", {"lr": 1e-3, "weight_decay": 0.1})}
SHAPES = ((40, 128), (5000,), (7, 600), (30,), ())


def ours(name: str, params: Any, **more: Any) -> optim.LowBitOptimizer:
    """The optimizer of that name of this package."""
    cls, settings = EVERY[name]
    made: optim.LowBitOptimizer = getattr(optim, cls)(params, **{**settings, **more})
    return made


def stock(name: str, params: Any, **more: Any) -> torch.optim.Optimizer:
    """The optimizer of that name of torch."""
    cls, settings = STOCK[name]
    made: torch.optim.Optimizer = getattr(torch.optim, cls)(params, **{**settings, **more})
    return made


def parameters(dtype: torch.dtype = torch.float32, of: int = 0) -> list[torch.nn.Parameter]:
    """A matrix whose rows are blocks, a vector, a matrix whose rows are not, and small ones."""
    generator = torch.Generator().manual_seed(of)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(params: list[torch.nn.Parameter], of: int) -> None:
    """Set gradients of many sizes: those of number `of`."""
    generator = torch.Generator().manual_seed(1000 + of)
    for p in params:
        size = 10.0 ** torch.randint(-3, 2, p.shape, generator=generator)
        p.grad = (torch.randn(p.shape, generator=generator) * size).to(p.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[torch.nn.Parameter], steps: range) -> None:
    """Steps with the gradients of these numbers."""
    for of in steps:
        gradients(params, of)
        optimizer.step()


def tensors_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the state, by parameter and key."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{key}": t for index, values in state.items() for key, t in values.items()}
