"""Roundings that a model does itself, as ordinary module state: a weight with learned scales, and an input with scales that do
not depend on the call, which were observed or are learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import nn

import qcompile.ir.ops  # noqa: F401  (registers the operators)
from qcompile.errors import QCError
from qcompile.ir.estimators import estimator_of
from qcompile.ir.observed import no_lines
from qcompile.ir.qparams import QParams
from qcompile.ir.scheme import Scheme
from qcompile.packed import parametrized


class RoundedWeight(nn.Module):
    """The parametrization: a float weight, rounded with learned scales. Its parameters are those of the estimator, one
    value for each scale (float32; LSQ: `step`).

    Attributes:
        scheme: canonical spelling.
        estimator: name of the estimator.
        transposed: the module keeps its weight as `[k, n]` (HF `Conv1D`).
    """

    def __init__(self, scheme: str, estimator: str, learned: Sequence[torch.Tensor], transposed: bool = False) -> None:
        super().__init__()
        self.scheme, self.estimator, self.transposed = scheme, estimator, transposed
        for name, value in zip(estimator_of(estimator).learned, learned, strict=True):
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        rows = weight.t() if self.transposed else weight
        rounded: torch.Tensor = torch.ops.qcompile.fake_quant(
            rows, [], self.learned, self.scheme, self.estimator, "minmax"
        )
        return rounded.t() if self.transposed else rounded

    @property
    def learned(self) -> list[torch.Tensor]:
        """The learned tensors, in the order of the estimator."""
        return [getattr(self, name) for name in estimator_of(self.estimator).learned]

    @torch.no_grad()
    def scales(self) -> QParams:
        """The scales of the weight's rows, as they are stored."""
        return estimator_of(self.estimator).learned_qparams(Scheme.parse(self.scheme), self.learned, 2)

    def extra_repr(self) -> str:
        return f"{self.scheme}, {self.estimator}" + (", transposed" if self.transposed else "")


class RoundedInput(nn.Module):
    """Rounds what a module is called with by one scale (static quantization). It is the module's child `input_rounding`.

    Observed: `range` (float32 `[2]`: least, most) is a moving average of the ranges seen in training; the first call sets it.
    Learned: the parameters of an estimator (float32 `[1]`), which the optimizer holds.

    Attributes:
        scheme: canonical spelling, of one scale for the whole tensor.
        estimator: "ste" for an observed scale, or the name of one that learns.
        momentum: share of a new range in the average.
    """

    range: torch.Tensor
    calls: torch.Tensor

    def __init__(self, scheme: str, momentum: float = 0.01) -> None:
        super().__init__()
        self.scheme, self.estimator, self.momentum = scheme, "ste", momentum
        # Compiled code cannot raise: where nothing was observed, its results are NaN and not some numbers.
        self.register_buffer("range", torch.full((2,), torch.nan))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        # Of use between a forward and its backward pass of this process: no state, and nothing for replicas to share.
        self.lines = no_lines()

    def learn(self, estimator: str) -> None:
        """Make the observed scale a parameter. Raises `QCError` ("train.examples") where nothing was observed."""
        if not int(self.calls):
            raise QCError(
                "train.examples",
                f"estimator {estimator!r} has nothing to begin with",
                why="no example has reached this input",
                next="pass inputs=[...] to prepare: what the model is called with, such as a few batches",
            )
        how, scale = estimator_of(estimator), self._scales(self.range, 1)[0].to(torch.float32)
        for name, value in zip(how.learned, how.start(Scheme.parse(self.scheme), scale), strict=True):
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.estimator = estimator

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> RoundedInput:
        """`model.to(torch.bfloat16)` and its like move the range and leave it float32: in 16 bits an average that moves by a
        hundredth of a difference stands still."""
        held = [t for t in self._buffers.values() if t is not None and t.dtype == torch.float32]

        def keep(t: torch.Tensor) -> torch.Tensor:
            return fn(t.view(torch.int32)).view(torch.float32) if any(t is h for h in held) else fn(t)

        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        return self

    def observe(self, x: torch.Tensor) -> torch.Tensor:
        """Take the range of x into the average, once: not where a checkpoint computes a forward pass again.

        Returns:
            `[2]`: the range to round x by, which is the same in both.
        """
        if not x.numel():
            return self.range
        new = torch.stack(torch.aminmax(x.detach())).to(torch.float32)
        if self.lines.device != x.device:
            self.lines = no_lines().to(x.device)
        used: torch.Tensor = torch.ops.qcompile.observe_(new, self.range, self.calls, self.lines, self.momentum)
        return used

    def _scales(self, range: torch.Tensor, ndim: int) -> list[torch.Tensor]:
        """Scale and zero point of a range, for a tensor of so many dimensions."""
        chosen = torch.ops.qcompile.choose_qparams(range.view(1, 2), self.scheme, "minmax")
        return [t.reshape([1] * ndim) for t in chosen]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        how = estimator_of(self.estimator)
        if how.learned:
            learned = [getattr(self, name).reshape([1] * x.dim()) for name in how.learned]
            scales: list[torch.Tensor] = []
        else:
            range = self.range
            if self.training:
                range = self.observe(x)
            elif not torch.compiler.is_compiling() and x.device.type != "meta" and not int(self.calls):
                raise QCError(
                    "train.unobserved",
                    f"there is no range for {self.scheme} yet",
                    why="nothing has come to this input in training",
                    next="train first, or pass inputs=[...] to prepare: what the model is called with",
                )
            learned, scales = [], self._scales(range, x.dim())
        # "static": the scale was not chosen from x, so x may lie outside of its range.
        result: torch.Tensor = torch.ops.qcompile.fake_quant(x, scales, learned, self.scheme, self.estimator, "static")
        return result

    def extra_repr(self) -> str:
        return f"{self.scheme}, {'observed' if self.estimator == 'ste' else self.estimator}"


def _round_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The hook in front of a module's `forward`."""
    rounding = cast("RoundedInput", module.input_rounding)
    if args:
        return (rounding(args[0]), *args[1:]), kwargs
    name = next(iter(kwargs))  # a linear has one input, whatever it is called
    return args, {**kwargs, name: rounding(kwargs[name])}


def attach_input(module: nn.Module, rounding: RoundedInput) -> None:
    """Round what a module is called with."""
    module.add_module("input_rounding", rounding)
    module.register_forward_pre_hook(_round_input, with_kwargs=True)


def detach_input(module: nn.Module) -> None:
    """Undo `attach_input`."""
    del module.input_rounding
    for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _round_input]:
        del module._forward_pre_hooks[key]
        module._forward_pre_hooks_with_kwargs.pop(key, None)


def rounded_inputs(model: nn.Module) -> list[tuple[str, nn.Module, RoundedInput]]:
    """Every input with a static scale: (path of its module, the module, what rounds it)."""
    found = [(path, m, m._modules.get("input_rounding")) for path, m in model.named_modules()]
    return [(path, m, rounding) for path, m, rounding in found if isinstance(rounding, RoundedInput)]


def has_rounded_input(module: nn.Module) -> bool:
    return isinstance(module._modules.get("input_rounding"), RoundedInput)


def rounded_weight(module: nn.Module) -> tuple[torch.Tensor, RoundedWeight] | None:
    """The float weight of a module with learned scales, and what rounds it; `None` where there is no such weight."""
    held = parametrized(module).get("weight")
    if held is None or len(held) != 1 or not isinstance(held[0], RoundedWeight):
        return None
    original = held.original
    assert isinstance(original, torch.Tensor)
    return original, held[0]
