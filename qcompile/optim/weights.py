"""Weights that are trained in 8 bits: codes and scales, and no float copy that stays.

`low_bit_weights(model)` replaces weights of linear layers by codes and scales of blocks. A forward pass decodes a weight, the
backward pass leaves its gradient beside it, and a step of an optimizer of this package reads the codes, computes in float32 and
writes codes by stochastic rounding, with the scales of the new values: rounded to nearest, steps below half a level would be
lost. Between a step and the next forward pass there is no float tensor of a weight's shape.

After "Q-GaLore" (arXiv 2407.08296) with symmetric blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qcompile.errors import QCError
from qcompile.ir.state import Storage
from qcompile.optim.layout import NAMES, SMALL, SMALLEST_BLOCK, Layout


class LowBitWeight(nn.Module):
    """What makes a weight of codes and scales, and keeps its gradient for the optimizer.

    Attributes:
        shape: of the weight. dtype: of what forward passes see. storage: of its codes.
        grad: sum of the gradients of the weight since the last `zero_grad`, or None.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, storage: Storage) -> None:
        super().__init__()
        self.shape, self.dtype, self.storage = tuple(shape), dtype, storage
        self.grad: Tensor | None = None

    @property
    def layout(self) -> Layout:
        """The layout of the weight."""
        return Layout(self.shape, self.shape)

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight, with a gradient of its own where gradients are computed."""
        with torch.no_grad():
            n = torch.Size(self.shape).numel()
            weight = self.storage.read([codes.reshape(-1), scales.reshape(-1)], n).to(self.dtype).reshape(self.shape)
        if torch.is_grad_enabled():
            weight.requires_grad_()
            weight.register_post_accumulate_grad_hook(self._keep)
        return weight

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a weight, rounded to nearest."""
        parts = self.storage.written(weight.detach().reshape(-1).to(torch.float32))
        codes, scales = (
            t.reshape(shape) for t, shape in zip(parts, self.layout.part_shapes(self.storage), strict=True)
        )
        return codes, scales

    def _keep(self, weight: Tensor) -> None:
        grad, weight.grad = weight.grad, None
        self.grad = grad if self.grad is None or grad is None else self.grad + grad


def low_bit_of(p: Tensor) -> LowBitWeight | None:
    """What makes a weight of the codes `p`; None for other parameters."""
    found = getattr(p, "qcompile_weight", None)
    return found[0] if found else None


def scales_of(p: Tensor) -> Tensor:
    """The scales of the codes `p`."""
    scales: Tensor = p.qcompile_weight[1]  # type: ignore[attr-defined]
    return scales


def low_bit_weights(
    model: nn.Module,
    storage: str = "int8/g256",
    select: Callable[[str, nn.Module], bool] = lambda name, module: isinstance(module, nn.Linear),
) -> list[str]:
    """Replace weights by codes and scales, in place; before the optimizer is made, which takes `model.parameters()`.

    Weights of fewer than 4096 elements, and weights that several modules share, stay as they are.

    Args:
        model: any module.
        storage: integers in blocks; blocks are halved, down to 64 elements, until they divide a weight's rows.
        select: of the name of a module and the module, whether its `weight` is replaced.

    Returns:
        Names of the modules whose weight was replaced.

    Raises:
        QCError: "optim.weights" for a storage that is none of integers.
    """
    wanted = Storage.parse(storage)
    if wanted.plain or wanted.format.kind != "int" or not wanted.format.signed:
        raise QCError(
            "optim.weights",
            f"weights cannot be trained as {storage}",
            why="they are rounded stochastically, which is defined for integers, and have both signs",
            next="write int8/g256",
        )
    wanted = replace(wanted, stochastic=False)
    uses = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    replaced = []
    for name, module in list(model.named_modules()):
        weight = module._parameters.get("weight")
        if weight is None or not select(name, module) or weight.numel() < SMALL or uses[id(weight)] > 1:
            continue
        if weight.dtype not in NAMES or weight.dim() < 2:
            continue
        row, block = weight[0].numel(), wanted.block
        while block > SMALLEST_BLOCK and row % block:
            block //= 2
        kept = replace(wanted, block=wanted.block if row % block else block)
        decode = LowBitWeight(weight.shape, weight.dtype, kept)
        weight.requires_grad_(False)  # integers have no gradient
        parametrize.register_parametrization(module, "weight", decode, unsafe=True)
        originals = module.parametrizations["weight"]
        originals.original0.qcompile_weight = (decode, originals.original1)
        replaced.append(name)
    return replaced
