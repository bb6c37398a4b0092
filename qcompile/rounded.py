"""A weight with learned scales as ordinary module state: a float parameter, and a parametrization that rounds it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

import qcompile.ir.ops  # noqa: F401  (registers the operators)
from qcompile.ir.estimators import estimator_of
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


def rounded_weight(module: nn.Module) -> tuple[torch.Tensor, RoundedWeight] | None:
    """The float weight of a module with learned scales, and what rounds it; `None` where there is no such weight."""
    held = parametrized(module).get("weight")
    if held is None or len(held) != 1 or not isinstance(held[0], RoundedWeight):
        return None
    original = held.original
    assert isinstance(original, torch.Tensor)
    return original, held[0]
