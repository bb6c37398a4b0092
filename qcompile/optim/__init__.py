"""Optimizers with state in 8 or 4 bits and stochastic rounding of 16-bit parameters: names and defaults of torch.optim."""

from __future__ import annotations

from qcompile.ir import ops  # noqa: F401  (registers torch.ops.qcompile.step_)
from qcompile.optim.base import LowBitOptimizer
from qcompile.optim.optimizers import SGD, Adam, AdamW, Lion
from qcompile.optim.weights import LowBitWeight, low_bit_weights

__all__ = ["SGD", "Adam", "AdamW", "Lion", "LowBitOptimizer", "LowBitWeight", "low_bit_weights"]
