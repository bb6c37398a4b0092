"""How an optimizer's tensors are stored: plain floats, or codes with one scale per block.

A *storage* is what a `StepSpec` says of a tensor, `f32`, `bf16~` or `dyn8/g256`. It tells which tensors hold it, and how
they become float32 and are written back. Everything here is said of the flattened tensor, so that a kernel needs no shape.

**Plain**, `f32 bf16 f16`: one tensor, written to nearest even, or stochastically where a `~` follows (`stochastic_cast`).

**Blocks**, `FORMAT/gSIZE`: two tensors for `n` elements. *codes*, uint8 `[n]`, or for 4 bits `[ceil(n / 2)]`, element `i`
in the lower half of byte `i div 2` when it is even; the half that no element uses is 0. *scales*, float32
`[ceil(n / SIZE)]`. Each block of SIZE elements (the last may be shorter) is written so, operation by operation in float32:

    a     = max |x|                             NaN when any x is
    scale = a / format.max
    NaN   when a is NaN or infinite; 0 when scale < 2**-126, the smallest normal number
    y     = x * (1 / scale)                     0 when scale is 0 or NaN
    code  = the nearest level to y, a tie as `elements.encode_element` says; with `~`, y rounded stochastically (integers)

and read as `level[code] * scale`. So a block with a NaN or an infinity is NaN from then on: nothing hides it.

Integers round to even, `clamp(rint(y), low, max)`; every other format has its nearest level by comparison alone: `code` is
how many of `boundaries(format)` y has reached, `y >= boundary`.

The maps, after "8-bit Optimizers via Block-wise Quantization" (arXiv 2110.02861) and "Memory Efficient Optimizers with 4-bit
States" (2309.01507):

| name | levels | for |
|---|---|---|
| `dyn8` `dyn4` | dynamic: decades, each of twice as many levels as the one below; 0 and 1 | first moments, momentum |
| `udyn8` | the same without a sign, and 55e-9 for the level 0 | second moments |
| `ulin4` | 1/16, 2/16, ... 1 | second moments |
| `int8 uint8 int4 uint4` | linear, with 0 | `int8~`: weights |

Second moments have no level 0: an update divides by their root, and a moment that is rounded to 0 under a first moment that
is not makes it jump. Rounded up to the smallest level it makes the update small.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.errors import QCError, suggest
from qcompile.ir.elements import decode_element, encode_element, float32_towards, thresholds
from qcompile.ir.formats import FORMATS, TINY, Format, Registry
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import Part, ceil_div
from qcompile.ir.stochastic_cast import stochastic_cast

PLAIN = OUT_DTYPES
BLOCK_SIZES = tuple(1 << power for power in range(4, 12))


def _dynamic(bits: int, signed: bool) -> tuple[float, ...]:
    """Levels of the dynamic map: in each of `bits - 1` decades below 1 the middles of equal intervals, and 1.

    The map with a sign has 2**i of them in decade i and their negatives; the one without twice as many. It has a 0; in the
    one without a sign the middle of the next decade stands there.
    """
    decades, levels = bits - 1, []
    for i in range(decades):
        count, unit = 1 << (i + (not signed)), 10.0 ** (i - decades + 1)
        ends = [0.1 + 0.9 * j / count for j in range(count + 1)]
        levels += [unit * (low + high) / 2 for low, high in pairwise(ends)]
    smallest = 0.0 if signed else 0.55 * 10.0**-decades
    every = [smallest, 1.0, *levels, *([-level for level in levels] if signed else [])]
    return tuple(torch.tensor(sorted(every), dtype=torch.float64, device="cpu").to(torch.float32).tolist())


STATE_FORMATS: Registry[Format] = Registry(
    Format,
    (
        Format("dyn8", "table", 8, table=_dynamic(8, True)),
        Format("udyn8", "table", 8, signed=False, table=_dynamic(8, False)),
        Format("dyn4", "table", 4, table=_dynamic(4, True)),
        Format("ulin4", "table", 4, signed=False, table=tuple((i + 1) / 16 for i in range(16))),
        *(FORMATS[name] for name in ("int8", "uint8", "int4", "uint4")),
    ),
)


@dataclass(frozen=True)
class Storage:
    """How one tensor of a step is stored.

    Attributes:
        name: `f32`, `bf16` or `f16`, or a format of `STATE_FORMATS`.
        block: elements that share a scale, a power of two from 16 to 2048; 0 for a plain tensor.
        stochastic: written by stochastic rounding: bf16, f16 and formats of integers.

    Raises:
        QCError: "step.storage" for anything else.
    """

    name: str
    block: int = 0
    stochastic: bool = False

    def __post_init__(self) -> None:
        known = [*PLAIN, *STATE_FORMATS]
        if self.name not in known:
            raise _refused(self, f"{self.name!r} is not known{suggest(self.name, known)}; known are {' '.join(known)}")
        if self.plain != (self.block == 0) or (self.block and self.block not in BLOCK_SIZES):
            raise _refused(self, "a plain tensor has no blocks, and a block has 16, 32, ... or 2048 elements")
        if self.stochastic and (self.name == "f32" or (not self.plain and self.format.kind != "int")):
            raise _refused(self, "only bf16, f16 and formats of integers are rounded stochastically")

    @property
    def plain(self) -> bool:
        """Whether one tensor of floats holds it."""
        return self.name in PLAIN

    @property
    def format(self) -> Format:
        """What a code means; for blocks."""
        return STATE_FORMATS[self.name]

    @property
    def bits(self) -> int:
        """Bits of one element, scales left out."""
        return PLAIN[self.name].itemsize * 8 if self.plain else self.format.bits

    def parts(self, n: int) -> tuple[Part, ...]:
        """The tensors that hold `n` elements, flattened: `values`, or `codes` and `scales`."""
        if self.plain:
            return (Part("values", (n,), PLAIN[self.name]),)
        return (
            Part("codes", (ceil_div(n * self.bits, 8),), torch.uint8),
            Part("scales", (ceil_div(n, self.block),), torch.float32),
        )

    def read(self, parts: Sequence[Tensor], n: int) -> Tensor:
        """The `n` elements that `parts`, flat tensors, hold: float32 `[n]`, a tensor of its own unless it is `f32`."""
        if self.plain:
            return parts[0].to(torch.float32)
        codes, scales = parts
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), 1).reshape(-1)[:n]
        return decode_element(codes, self.format) * scales.repeat_interleave(self.block)[:n]

    def written(self, x: Tensor, bits: Tensor | None = None) -> tuple[Tensor, ...]:
        """The parts that hold `x`.

        Args:
            x: float32 `[n]`.
            bits: int64 `[n]`, 0 .. 65535, when `stochastic`.

        Raises:
            QCError: "rounding.no-bits" when they are needed and missing.
        """
        if self.stochastic and bits is None:
            raise QCError(
                "rounding.no-bits", "stochastic rounding without random bits", next="give them for each element"
            )
        if self.plain:
            dtype = PLAIN[self.name]
            return (stochastic_cast(x, dtype, bits) if self.stochastic and bits is not None else x.to(dtype),)
        n, fmt = len(x), self.format
        blocks = functional.pad(x, (0, -n % self.block)).reshape(-1, self.block)
        largest = blocks.abs().amax(1)
        scale = torch.where(torch.isfinite(largest), largest / _top(fmt, x), torch.nan)
        scale = torch.where(scale < TINY, 0.0, scale)
        used = (scale > 0).unsqueeze(1)  # NaN is not
        y = torch.where(used, blocks * (1.0 / scale).unsqueeze(1), 0.0).reshape(-1)[:n]
        codes = encode_element(y, fmt, "stochastic" if self.stochastic else "nearest", bits)
        if self.bits == 4:
            pairs = functional.pad(codes, (0, n % 2)).reshape(-1, 2)
            codes = pairs[:, 0] | (pairs[:, 1] << 4)
        return codes, scale

    def __str__(self) -> str:
        return self.name + (f"/g{self.block}" if self.block else "") + "~" * self.stochastic

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(text: str) -> Storage:
        """Read `str(storage)`. Raises `QCError` ("step.storage")."""
        match = re.fullmatch(r"(\w+)(?:/g([1-9]\d*))?(~?)", text)
        if match is None:
            raise _refused(text, "a storage is a name, for codes the size of a block, and ~ for stochastic rounding")
        return Storage(match[1], int(match[2] or 0), bool(match[3]))


def _top(fmt: Format, like: Tensor) -> Tensor:
    return torch.tensor(fmt.max, dtype=torch.float32, device=like.device)


def _refused(storage: object, why: str) -> QCError:
    return QCError(
        "step.storage",
        f"no tensor can be stored as {str(storage)!r}",
        why=why,
        next="write for example f32, bf16~, dyn8/g256, udyn8/g256, ulin4/g128 or int8/g256~",
    )


@lru_cache(maxsize=64)
def boundaries(fmt: Format) -> tuple[float, ...]:
    """Ascending float32 numbers: the nearest level to y is number `#{b : y >= b}`, for every y but NaN.

    The midpoints between neighbouring levels, where a tie goes down the next float32 above. For formats that are no
    integers: those round to even.
    """
    up, down = thresholds(fmt.table)
    return tuple(sorted((*up, *(float32_towards(b, float("inf"), strictly=True) for b in down))))
