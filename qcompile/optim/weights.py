"""Weights that are trained in 8 bits: codes and scales, and no float copy that stays.

`low_bit_weights(model)` replaces weights of linear layers by codes and scales of blocks. A forward pass decodes a weight, the
backward pass leaves its gradient in `codes.grad`, where torch looks for gradients, and a step of an optimizer of this package
reads the codes, computes in float32 and writes codes by stochastic rounding, with the scales of the new values: rounded to
nearest, steps below half a level would be lost. Between a step and the next forward pass there is no float tensor of a weight's
shape.

Integers cannot require a gradient, so `scales.requires_grad` says whether a weight is trained. `model.requires_grad_` sets it
with all others, it survives copies and conversions, and replicas count on it (see `replicas.py`).

After "Q-GaLore" (arXiv 2407.08296) with symmetric blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from qcompile import compat
from qcompile.errors import QCError
from qcompile.ir.state import Storage
from qcompile.optim.layout import NAMES, SMALL, SMALLEST_BLOCK, Layout
from qcompile.optim.replicas import average_later, syncing

_GRAD: Any = Tensor.grad  # the descriptor


class Scales(nn.Parameter):
    """The scales of a weight, float32. They get no gradient; `requires_grad` says whether the weight is trained.

    An optimizer's state of the weight is that of its scales: distributed checkpoints keep state of what requires a gradient.

    Attributes:
        low_bit: what makes a weight of the codes beside them.
    """

    low_bit: LowBitWeight


class Codes(nn.Parameter):
    """The codes of a weight, uint8, one for each element. `grad` has their shape and the weight's dtype.

    Attributes:
        low_bit: what makes a weight of them. scales: those beside them.
    """

    low_bit: LowBitWeight
    scales: Scales

    @property
    def grad(self) -> Tensor | None:
        """The gradient; while Dynamo looks at the codes there is none: its copy of them would take gradients of bytes alone."""
        return None if compat.is_tracing() else _GRAD.__get__(self)

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        _GRAD.__set__(self, value)

    @property
    def requires_grad(self) -> bool:
        """False, as of all integers: `scales.requires_grad` is the switch, and loops over parameters set both."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None: ...

    def requires_grad_(self, requires_grad: bool = True) -> Codes:
        """The codes, as they are."""
        return self


class LowBitWeight(nn.Module):
    """What makes a weight of codes and scales.

    Attributes:
        shape: of the weight. dtype: of what forward passes see. storage: of its codes.
    """

    def __init__(self, shape: torch.Size, dtype: torch.dtype, storage: Storage) -> None:
        super().__init__()
        self.shape, self.dtype, self.storage = tuple(shape), dtype, storage

    @property
    def layout(self) -> Layout:
        """The layout of the weight."""
        return Layout(self.shape, self.shape)

    def forward(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight. Where gradients are computed and the weight is trained, its gradient goes to `codes.grad`.

        Raises:
            QCError: "optim.sharding" for codes, to be trained, that are not the parameter of the module; "optim.replicas".
        """
        if torch.is_grad_enabled() and scales.requires_grad:
            trained: Tensor = self._trained(codes, scales)
            return trained
        with torch.no_grad():
            return self.read(codes, scales)

    def read(self, codes: Tensor, scales: Tensor) -> Tensor:
        """The weight, a tensor of its own."""
        n = torch.Size(self.shape).numel()
        return self.storage.read([codes.reshape(-1), scales.reshape(-1)], n).to(self.dtype).reshape(self.shape)

    # A backward pass that leaves something behind is nothing that a compiler traces.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _trained(self, codes: Tensor, scales: Tensor) -> Tensor:
        if not isinstance(codes, Codes):
            raise QCError(
                "optim.sharding",
                f"the codes of a weight {list(self.shape)} are not the parameter that low_bit_weights made",
                why="fully_shard and DataParallel compute with copies, whose gradients the parameter would not see",
                next="use DistributedDataParallel, or keep these weights in float; or freeze them by requires_grad_(False)",
            )
        weight: Tensor = _Trained.apply(scales, codes, self, syncing())  # type: ignore[no-untyped-call]
        return weight

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and scales of a weight, rounded to nearest."""
        parts = self.storage.written(weight.detach().reshape(-1).to(torch.float32))
        codes, scales = (
            t.reshape(shape) for t, shape in zip(parts, self.layout.part_shapes(self.storage), strict=True)
        )
        return codes, scales


class _Trained(torch.autograd.Function):
    """Decode. The graph hangs on the scales, to which nothing flows; no float weight is kept but by whom it is given to."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, codes: Codes, low_bit: LowBitWeight, ddp: Any) -> Tensor:
        ctx.codes, ctx.ddp, ctx.again = codes, ddp, compat.within_backward()
        return low_bit.read(codes, scales)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        if ctx.again and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise QCError(
                "optim.replicas",
                "a weight in few bits was computed again inside of a backward pass of several processes",
                why="which replica it belongs to is known in the forward pass alone",
                next="checkpoint with use_reentrant=False",
            )
        codes, grad = ctx.codes, grad.reshape(ctx.codes.shape)
        if codes.grad is None:  # a copy: autograd may hand the same tensor, or one element for all, to others
            codes.grad = grad.clone(memory_format=torch.contiguous_format)
        else:
            codes.grad += grad
        if ctx.ddp is not None:
            average_later(ctx.ddp, codes)
        return None, None, None, None


class _Originals(parametrize.ParametrizationList):
    """Codes and scales in their module, which stay what they are where torch makes parameters anew.

    That is where a state dict is assigned, where a module is copied, and in some conversions.
    """

    original0: Codes
    original1: Scales

    def link(self) -> None:
        """Make parameters codes and scales that know each other."""
        codes, scales = self.original0, self.original1
        codes.__class__, scales.__class__ = Codes, Scales
        codes.low_bit = scales.low_bit = self[0]  # type: ignore[assignment]
        codes.scales = scales
        compat.hold_any_gradient(codes)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Originals:
        """Move as torch does. `to(dtype)` sets the dtype that forward passes see; scales stay float32."""
        low_bit: LowBitWeight = self[0]  # type: ignore[assignment]
        dtype = fn(torch.empty(0, dtype=low_bit.dtype, device=self.original1.device)).dtype
        if dtype not in NAMES:
            raise QCError(
                "optim.dtype",
                f"weights in few bits cannot be seen as {dtype}",
                next="use torch.float32, torch.bfloat16 or torch.float16",
            )

        def moved(t: Tensor) -> Tensor:
            made = fn(t)
            return (
                made if made.dtype == t.dtype else t.to(made.device)
            ).detach()  # no parameter is made of one of ours

        # A parameter that torch makes anew could not take the gradient before it is linked.
        grad, self.original0.grad = self.original0.grad, None
        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        self.link()
        low_bit.dtype = dtype
        if grad is not None:
            with torch.no_grad():
                self.original0.grad = fn(grad)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.link()  # load_state_dict(assign=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.link()  # copy.deepcopy


def low_bit_weights(
    model: nn.Module,
    storage: str = "int8/g256",
    select: Callable[[str, nn.Module], bool] = lambda name, module: isinstance(module, nn.Linear),
) -> list[str]:
    """Replace weights by codes and scales, in place; before the optimizer is made, which takes `model.parameters()`.

    Weights of fewer than 4096 elements, and weights that several modules share, stay as they are.

    Args:
        model: any module.
        storage: 8-bit integers in blocks; blocks are halved, down to 64 elements, until they divide a weight's rows.
        select: of the name of a module and the module, whether its `weight` is replaced.

    Returns:
        Names of the modules whose weight was replaced.

    Raises:
        QCError: "optim.weights" for a storage that is none of signed 8-bit integers; "optim.sharding" for a weight that is
            sharded already.
    """
    wanted = Storage.parse(storage)
    if wanted.name != "int8":
        raise QCError(
            "optim.weights",
            f"weights cannot be trained as {storage}",
            why="they are rounded stochastically, which is defined for integers, have both signs, and each has a code to "
            "itself, which holds its gradient",
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
        if hasattr(weight, "placements"):
            raise QCError(
                "optim.sharding",
                "a sharded weight cannot be replaced by codes",
                where=name,
                why="the gradients of codes are not scattered",
                next="leave it out by select, or use DistributedDataParallel",
            )
        row, block = weight[0].numel(), wanted.block
        while block > SMALLEST_BLOCK and row % block:
            block //= 2
        kept = replace(wanted, block=wanted.block if row % block else block)
        decode = LowBitWeight(weight.shape, weight.dtype, kept)
        trained = weight.requires_grad
        weight.requires_grad_(False)  # parametrize would have the codes require one
        parametrize.register_parametrization(module, "weight", decode, unsafe=True)
        originals = module.parametrizations["weight"]
        originals.__class__ = _Originals
        originals.link()
        originals.original1.requires_grad_(trained)
        replaced.append(name)
    return replaced
