"""What each optimizer computes, as data: names of its state, a program, and the numbers that a step needs.

The order of operations is the one of `torch.optim` (its `_single_tensor_*` functions), so that float32 state gives the numbers
that torch gives, wherever torch rounds every operation by itself: its kernels contract some to FMA where the CPU has it, and
their square root may be off by one unit in the last place.

Lion: "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qcompile.ir.state import Storage
from qcompile.ir.step import StepSpec

Group = Mapping[str, Any]


@dataclass(frozen=True)
class Moment:
    """One tensor of state: its name in the program, its key in `state_dict`, and whether it may be negative."""

    name: str
    key: str
    signed: bool


FIRST, SECOND, LARGEST = (
    Moment("m", "exp_avg", True),
    Moment("v", "exp_avg_sq", False),
    Moment("x", "max_exp_avg_sq", False),
)
BUFFER = Moment("m", "momentum_buffer", True)


@dataclass(frozen=True)
class Rule:
    """One optimizer, its switches set.

    Attributes:
        moments: its state, in the order of operands, after the parameter p and the gradient g.
        program: see `ir/step.py`.
        hyper: the numbers that the program reads, of those that `numbers` has.
    """

    moments: tuple[Moment, ...]
    program: str
    hyper: tuple[str, ...]

    @lru_cache(maxsize=1024)  # noqa: B019  (rules are a handful of values, and each step of each parameter asks)
    def spec(self, p: Storage, g: Storage, moments: tuple[Storage, ...]) -> str:
        """The text of the step of parameters and gradients so stored, and of moments in the order of `self.moments`."""
        named = zip((moment.name for moment in self.moments), moments, strict=True)
        return str(StepSpec((("p", p), ("g", g), *named), self.hyper, self.program))


def _rule(moments: tuple[Moment, ...], *lines: str, hyper: str) -> Rule:
    program = ";".join(line for line in lines if line)
    return Rule(moments, program, tuple(hyper.split()))


@lru_cache(maxsize=64)
def _adam(decoupled: bool, amsgrad: bool, maximize: bool, near: bool) -> Rule:
    return _rule(
        (FIRST, SECOND, LARGEST) if amsgrad else (FIRST, SECOND),
        "d=-g" if maximize else "d=g",
        "p=p*keep" if decoupled else "d=d+decay*p",
        # Tensor.lerp: from the end that is nearer, so that a weight of 1 gives d itself.
        "m=m+w1*(d-m)" if near else "m=d-(d-m)*u1",
        "v=v*b2+w2*d*d",
        "x=maximum(x,v)" if amsgrad else "",
        f"p=p-size*m/(sqrt({'x' if amsgrad else 'v'})/root+eps)",
        hyper=f"{'keep' if decoupled else 'decay'} {'w1' if near else 'u1'} b2 w2 size root eps",
    )


def adam(group: Group) -> Rule:
    """Adam, and AdamW where the group has `decoupled_weight_decay`."""
    near = abs(_float32(1 - float(group["betas"][0]))) < 0.5
    return _adam(group["decoupled_weight_decay"], group["amsgrad"], group["maximize"], near)


def adam_numbers(group: Group, step: int) -> dict[str, float]:
    """Numbers of Adam's step number `step`, counted from 1."""
    lr, decay, (b1, b2) = float(group["lr"]), float(group["weight_decay"]), map(float, group["betas"])
    return {
        "keep": 1 - lr * decay,
        "decay": decay,
        "w1": 1 - b1,
        "u1": 1 - _float32(1 - b1),
        "b2": b2,
        "w2": 1 - b2,
        "size": lr / (1 - b1**step),
        "root": (1 - b2**step) ** 0.5,
        "eps": float(group["eps"]),
    }


@lru_cache(maxsize=64)
def _sgd(momentum: bool, nesterov: bool, maximize: bool) -> Rule:
    return _rule(
        (BUFFER,) if momentum else (),
        "d=-g+decay*p" if maximize else "d=g+decay*p",
        "m=m*mu+w*d" if momentum else "",
        "d=d+mu*m" if nesterov else "",
        f"p=p-lr*{'m' if momentum and not nesterov else 'd'}",
        hyper="decay mu w lr" if momentum else "decay lr",
    )


def sgd(group: Group) -> Rule:
    """Stochastic gradient descent, with momentum where the group has some."""
    momentum = float(group["momentum"]) != 0
    return _sgd(momentum, momentum and group["nesterov"], group["maximize"])


def sgd_numbers(group: Group, step: int) -> dict[str, float]:
    """Numbers of a step of gradient descent. The first one takes the gradient as it is: no dampening."""
    return {
        "decay": float(group["weight_decay"]),
        "mu": float(group["momentum"]),
        "w": 1 - float(group["dampening"]) if step > 1 else 1.0,
        "lr": float(group["lr"]),
    }


@lru_cache(maxsize=2)
def _lion(maximize: bool) -> Rule:
    return _rule(
        (FIRST,),
        "d=-g" if maximize else "d=g",
        "p=p*keep",
        "p=p-lr*sign(m*b1+w1*d)",
        "m=m*b2+w2*d",
        hyper="keep b1 w1 lr b2 w2",
    )


def lion(group: Group) -> Rule:
    """Lion: the sign of an average, whose memory is a slower one."""
    return _lion(group["maximize"])


def lion_numbers(group: Group, step: int) -> dict[str, float]:
    """Numbers of a step of Lion."""
    lr, (b1, b2) = float(group["lr"]), map(float, group["betas"])
    keep = 1 - lr * float(group["weight_decay"])
    return {"keep": keep, "b1": b1, "w1": 1 - b1, "lr": lr, "b2": b2, "w2": 1 - b2}


def _float32(number: float) -> float:
    return ctypes.c_float(number).value
