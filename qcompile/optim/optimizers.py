"""The optimizers of this package: constructors as torch.optim has them, defaults too, and three more settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from qcompile.errors import QCError
from qcompile.optim.base import LowBitOptimizer, check_number
from qcompile.optim.rules import (
    BUFFER,
    FIRST,
    LARGEST,
    SECOND,
    Group,
    adam,
    adam_numbers,
    lion,
    lion_numbers,
    sgd,
    sgd_numbers,
)

Number = float | Tensor


class Adam(LowBitOptimizer):
    """`torch.optim.Adam` with moments in 8 or 4 bits.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as there.
        foreach, fused: accepted, and change nothing: a step is always one fused call for all parameters of a kind.
        capturable, differentiable: must be False.
        state_bits, rounding, seed: see `LowBitOptimizer`.

    Raises:
        QCError: "optim.value" for a number out of range, and what `LowBitOptimizer` raises.
    """

    rule = staticmethod(adam)
    numbers = staticmethod(adam_numbers)
    moments = (FIRST, SECOND, LARGEST)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        state_bits: int | Mapping[str, str] = 8,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
        }
        defaults |= {"maximize": maximize, "foreach": foreach, "fused": fused}
        defaults |= {"capturable": capturable, "differentiable": differentiable}
        defaults |= {"decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, defaults, state_bits=state_bits, rounding=rounding, seed=seed)

    def _check(self, group: Group) -> None:
        super()._check(group)
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, group[name], 0.0)
        for i, beta in enumerate(group["betas"]):
            check_number(f"betas[{i}]", beta, 0.0, 1.0)


class AdamW(Adam):
    """`torch.optim.AdamW` with moments in 8 or 4 bits: Adam, whose weight decay does not pass through the moments."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-3,
        betas: tuple[Number, Number] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        state_bits: int | Mapping[str, str] = 8,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            state_bits=state_bits,
            rounding=rounding,
            seed=seed,
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group["decoupled_weight_decay"] = True  # whatever the checkpoint is of, as in torch


class SGD(LowBitOptimizer):
    """`torch.optim.SGD` with its momentum in 8 or 4 bits.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as there.
        foreach, fused: accepted, and change nothing: a step is always one fused call for all parameters of a kind.
        differentiable: must be False.
        state_bits, rounding, seed: see `LowBitOptimizer`.

    Raises:
        QCError: "optim.value", and what `LowBitOptimizer` raises.
    """

    rule = staticmethod(sgd)
    numbers = staticmethod(sgd_numbers)
    moments = (BUFFER,)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        state_bits: int | Mapping[str, str] = 8,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
        }
        defaults |= {"nesterov": nesterov, "maximize": maximize, "foreach": foreach, "fused": fused}
        defaults["differentiable"] = differentiable
        super().__init__(params, defaults, state_bits=state_bits, rounding=rounding, seed=seed)

    def _check(self, group: Group) -> None:
        super()._check(group)
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, group[name], 0.0)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise QCError("optim.value", "nesterov without momentum, or with dampening", why="it is defined for these")

    def _stock(self, state: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in state.items() if key != "step"}


class Lion(LowBitOptimizer):
    """Lion (arXiv 2302.06675): steps of one size, in the direction of the sign of an average; state in 8 or 4 bits.

    Args:
        params, maximize: as in torch.optim.
        lr, betas, weight_decay: as in the paper; weight decay is decoupled.
        state_bits, rounding, seed: see `LowBitOptimizer`.

    Raises:
        QCError: "optim.value", and what `LowBitOptimizer` raises.
    """

    rule = staticmethod(lion)
    numbers = staticmethod(lion_numbers)
    moments = (FIRST,)

    def __init__(
        self,
        params: Iterable[Any],
        lr: Number = 1e-4,
        betas: tuple[Number, Number] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        state_bits: int | Mapping[str, str] = 8,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults, state_bits=state_bits, rounding=rounding, seed=seed)

    def _check(self, group: Group) -> None:
        super()._check(group)
        for name in ("lr", "weight_decay"):
            check_number(name, group[name], 0.0)
        for i, beta in enumerate(group["betas"]):
            check_number(f"betas[{i}]", beta, 0.0, 1.0)
