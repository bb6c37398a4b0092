"""What `bench/gpu.py` measures: one module per block, and the parts that they share.

A block is a module with `run(session)`. To add one, write the module and a line of `BLOCKS`; numbers are those of
the plan, whose order is that of the answers' worth. Budgets of those without training, and of those with, stay within `TOTAL`
each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# "full" is for a GPU, "quick" asks the same with fewer variants, "tiny" is what the interpreter can run.
Size = Literal["full", "quick", "tiny"]
TOTAL = {"full": 530.0, "quick": 170.0, "tiny": 600.0}  # seconds for everything, starts of processes included


@dataclass(frozen=True)
class Block:
    """A question to the device.

    Attributes:
        number: in the plan. module: of this package. title: what is printed above its lines.
        seconds: its budget on a GPU. quick: the same for "quick". training: asked for by itself, with --training.
    """

    number: int
    module: str
    title: str
    seconds: float
    quick: float
    training: bool = False

    def budget(self, size: Size) -> float:
        """Seconds after which it takes up nothing new."""
        return {"full": self.seconds, "quick": self.quick, "tiny": TOTAL["tiny"]}[size]


BLOCKS = (
    Block(0, "ceilings", "ceilings: bandwidth, bf16 matmul, launch; versions and interfaces", 20, 10),
    Block(1, "subnormals", "are subnormal operands exact on the tensor cores?", 25, 8),
    Block(2, "correctness", "every kind of kernel, by real launches", 50, 22),
    Block(3, "weight4", "4-bit weights, few rows: which tile", 95, 32),
    Block(4, "chain", "products in a row: what an early begin is worth (PDL)", 20, 5),
    Block(5, "band", "4-bit weights, 32 to 2048 rows: fused, decoded once, bf16", 50, 14),
    Block(6, "eight", "8 bits x 8 bits, many rows, with and without quantizing", 55, 14),
    Block(7, "formats", "other formats, few rows", 35, 12),
    Block(8, "streams", "kernels that read and write once: rotations, quantizing, stochastic rounding", 30, 8),
    Block(9, "kv", "decode attention over a low-bit cache", 25, 8),
    Block(10, "models", "whole models: decode and prefill against compiled bf16", 120, 28),
    Block(11, "optimizers", "optimizer steps: low-bit state, stochastic rounding", 120, 40, training=True),
    Block(12, "training", "training steps: products of 8-bit codes, roundings", 400, 120, training=True),
)

__all__ = ["BLOCKS", "TOTAL", "Block", "Size"]
