"""Blockwise Hadamard rotation on GPUs, as a product with a constant matrix.

Tensor cores multiply with +1 and -1 faster than memory delivers: at 128 columns a product costs a few instructions per
value, where a butterfly trades values between lanes at every level and costs many times that. So every size is one
product with a matrix of up to 128 columns (a *panel*):

* Blocks of up to 128 values lie on the diagonal of a panel, as many as fit: eight of 16, ten of 12, five of 24. What is
  left over of a panel stays zero, and the next block's values belong to the next panel.
* Blocks of up to 512 are two or four panels, and a butterfly across them on the fp32 sums, of values that one thread
  holds: H(2 n) is Sylvester's.

A block of threads keeps its columns and the matrix, and goes down the rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from qcompile import compat
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, UNIT, Expected, gamma
from qcompile.codegen.devices.triton_launch import dense_rows
from qcompile.codegen.devices.triton_overlap import begin
from qcompile.codegen.devices.triton_text import template
from qcompile.codegen.registry import Verdict
from qcompile.errors import QCError
from qcompile.ir.hadamard import check_rotation, hadamard, has_hadamard
from qcompile.ir.hadamard import rotate as reference
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import ceil_div

PANEL = 128
WGMMA = (
    "sm_90",
    "sm_100",
    "sm_103",
)  # whose tensor cores read the matrix from shared memory; others need registers for it
_NAMES = {dtype: name for name, dtype in OUT_DTYPES.items()}
OPERANDS = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.bfloat16}


@dataclass(frozen=True)
class Rotation:
    """What a kernel computes: a canonical description, the key of its text.

    Attributes:
        size: values of a block. x, y: types of operand and result, "f16", "bf16" or "f32". signed: whether there are
            signs. inverse: whether it turns back.
    """

    size: int
    x: str
    y: str
    signed: bool = False
    inverse: bool = False

    def __str__(self) -> str:
        return f"rotate {self.x}->{self.y} {self.size}{' signed' * self.signed}{' inverse' * self.inverse}"

    @property
    def terms(self) -> int:
        """Operands that a value becomes: of the 24 bits of fp32, each bf16 holds 8."""
        if self.x != "f32":
            return 1
        return 3 if self.y == "f32" else 2

    def panels(self, width: int) -> int:
        """Panels of a block, of `width` columns at most: 1, 2, 4 or 8, or 0 when it cannot be cut so."""
        return next((p for p in (1, 2, 4, 8) if self.size <= p * width and _cuts(self.size, p)), 0)

    def used(self, width: int) -> int:
        """Columns of a panel that hold values."""
        block = self.size // self.panels(width)
        return width // block * block

    def verdict(self) -> Verdict:
        """Whether there is a kernel, and why not."""
        if not has_hadamard(self.size):
            return Verdict(False, f"there is no Hadamard matrix of order {self.size} here")
        if self.panels(PANEL) not in (1, 2, 4):
            return Verdict(False, f"blocks of {self.size}: up to {PANEL} values work, and 2 or 4 times such a block")
        return Verdict(True, "")


def _cuts(size: int, panels: int) -> bool:
    return size % panels == 0 and has_hadamard(size // panels)


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        rows: in a tile, a power of two, at least 16. width: columns of a panel, a power of two. stages: of the software
            pipeline. warps: of a block. splits: blocks that share the rows.
    """

    rows: int
    width: int
    stages: int
    warps: int
    splits: int


@functools.cache
def text_of(rotation: Rotation, panels: int) -> str:
    """A kernel's source, which defines `kernel`, for blocks of so many panels."""
    spans = [1 << level for level in range(panels.bit_length() - 1)]
    signs = ("out" if rotation.inverse else "in") if rotation.signed else ""
    source: str = template("rotate").render(
        rotation=rotation,
        panels=panels,
        terms=rotation.terms,
        butterfly=[(i, i + d) for d in spans for i in range(panels) if not i & d],
        signs=signs,
        bits=8 * OUT_DTYPES[rotation.x].itemsize,
    )
    return source


@functools.cache  # a captured graph reads it by its address: it stays
def _constant(block: int, width: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The right factor of `x @ constant`, `[width, width]`: blocks on the diagonal."""
    if compat.capturing(device):
        raise QCError(
            "rotate.capture",
            "A graph is recorded, and the matrix of this rotation is not on the device yet.",
            next="call the function once before it is recorded",
        )
    matrix = hadamard(block)
    blocks = torch.block_diag(*[matrix if inverse else matrix.T] * (width // block))
    rest = width - len(blocks)
    padded = torch.nn.functional.pad(blocks, (0, rest, 0, rest)).contiguous()
    return compat.for_ever(lambda: padded.to(device, dtype), device)


def choose_tile(rotation: Rotation, m: int, k: int, device: torch.device) -> Tile:
    """How to cut a rotation of `m` rows of `k` values, which the device's shared memory has room for."""
    gpu = compat.gpu(device)
    return _tile(rotation, m, k, gpu.architecture, gpu.processors, gpu.shared)


@functools.lru_cache(maxsize=1024)
def _tile(rotation: Rotation, m: int, k: int, architecture: str, processors: int, shared: int) -> Tile:
    # Rows whose sums, and operands on their way, are in registers without one that spills.
    width, most = PANEL, 64 if rotation.panels(PANEL) < 4 else 32
    if rotation.x == "f32" and (architecture not in WGMMA or rotation.panels(PANEL) == 4):
        width, most = (PANEL // 2 if rotation.panels(PANEL // 2) else PANEL), 16
    panels = rotation.panels(width)
    if panels == 1:
        width = min(width, max(16, 1 << (k - 1).bit_length()))
    x, y = (OUT_DTYPES[name].itemsize for name in (rotation.x, rotation.y))
    stages = 3 if panels == 1 else 2
    # Beside the matrix shared memory has the stages of the pipeline, and the result or the operand on their way.
    row = width * (panels * stages * x + max(y, 2 * rotation.terms))
    rows = next((r for r in (64, 32) if r <= min(m, most) and 2 * width * width + r * row <= shared), 16)
    groups = ceil_div(k, panels * rotation.used(width))
    # Two blocks for each multiprocessor, each with a tile at least.
    splits = max(1, min(ceil_div(m, rows), 2 * processors // groups))
    return Tile(rows, width, stages, 4 if panels == 1 or width < PANEL else 8, splits)


class Rotate:
    """The kernels of a rotation as a callable over raw operands, for generated code.

    One object serves every shape; what depends on it is decided at each call, on the host.
    """

    def __init__(self, rotation: Rotation) -> None:
        self.rotation = rotation

    def __call__(self, x: torch.Tensor, *rest: Any, tile: Tile | None = None) -> None:
        """Write y.

        Args:
            x: rows of k values.
            rest: signs, int8 `[k]`, if there are some; y, as many rows, dense; then the integers M, K and the row stride of x.
            tile: how to cut the work, in place of the choice.
        """
        *operands, m, k, ldx = rest
        if m == 0 or k == 0:
            return
        rotation, y = self.rotation, operands[-1]
        signs = [_words(operands[0])] if rotation.signed else []
        tile = tile or choose_tile(rotation, m, k, x.device)
        panels, used = rotation.panels(tile.width), rotation.used(tile.width)
        matrix = _constant(rotation.size // panels, tile.width, rotation.inverse, OPERANDS[rotation.x], x.device)
        compat.triton_kernel(text_of(rotation, panels))[ceil_div(k, panels * used), tile.splits](
            x, matrix, *signs, y, m, k, ldx, 1 / math.sqrt(rotation.size),
            R=tile.rows, P=tile.width, USED=used, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
            EVEN=used == tile.width and k % (panels * used) == 0, FULL=m >= tile.rows, **begin(x.device),
        )  # fmt: skip


@functools.cache
def prepare(size: int, x: str, y: str, signed: bool, inverse: bool) -> Rotate:
    """What generated code calls: the kernels of a `Rotation`."""
    return Rotate(Rotation(size, x, y, signed, inverse))


def rotation_of(x: torch.dtype, size: int, signed: bool, inverse: bool, dtype: torch.dtype | None) -> Rotation:
    """What a call computes. Raises `rotate.kernel` for dtypes without a kernel."""
    return Rotation(size, _name(x), _name(dtype or x), signed, inverse)


def rotate(
    x: torch.Tensor,
    size: int,
    signs: torch.Tensor | None = None,
    inverse: bool = False,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> torch.Tensor:
    """`qcompile.ir.hadamard.rotate` by a kernel: see there for operands, result and errors.

    Signs meet the matrix where a block is one panel, and cost nothing there. A NaN or an infinity makes its block of the
    result not finite, and other blocks of the same row may be NaN too; other rows are untouched.

    Args:
        x: fp16, bf16 or fp32.
        dtype: of the result, one of these, None for that of x.
        tile: how to cut the work, in place of the choice.
    """
    check_rotation(x, size, signs)
    rotation = rotation_of(x.dtype, size, signs is not None, inverse, dtype)
    if not (verdict := rotation.verdict()):
        raise QCError("rotate.kernel", f"There is no kernel: {verdict.reason}.", next="use qcompile.ir.hadamard.rotate")
    k = x.shape[-1]
    y = torch.empty(x.shape, dtype=OUT_DTYPES[rotation.y], device=x.device)
    if y.numel() == 0:
        return y
    rows = dense_rows(x)
    with compat.on(x.device):
        Rotate(rotation)(rows, *([] if signs is None else [signs]), y, len(rows), k, rows.stride(0), tile=tile)
    return y


def _name(dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        raise QCError(
            "rotate.kernel", f"There is no kernel for {dtype}.", next=f"use one of {', '.join(map(str, _NAMES))}"
        )
    return _NAMES[dtype]


def _words(signs: torch.Tensor) -> torch.Tensor:
    """Bytes as words of four, int32."""
    rest = -len(signs) % 4
    signs = torch.nn.functional.pad(signs, (0, rest)) if rest or signs.data_ptr() % 4 else signs
    return signs.contiguous().view(torch.int32)


def expected(
    x: torch.Tensor,
    size: int,
    signs: torch.Tensor | None = None,
    inverse: bool = False,
    dtype: torch.dtype | None = None,
) -> Expected:
    """The rotation of finite `x` in float64, and how far the kernel may be from it.

    With A the sum of |x| over a block, over sqrt(size): products with +1 and -1 are exact; one rounding, or cut, per value
    and operand, one for each level of the butterfly (three at most), and three at the end, of the constant, its square root
    and the product. Two bf16 operands of an fp32 value, each cut to 8 bits, leave out less than 2^-14 of it, three leave
    out nothing, and both less than the smallest bf16. Then comes the rounding to the result's type.
    """
    rotation = Rotation(size, _name(x.dtype), _name(dtype or x.dtype))
    value = reference(x.double(), size, signs, inverse)
    total = x.double().abs().unflatten(-1, (-1, size)).sum(-1, keepdim=True).expand(*x.shape[:-1], -1, size).flatten(-2)
    total = total / math.sqrt(size)
    roundings = rotation.terms * (size + 1) + 3 + 3
    lost = {1: 0.0, 2: 2.0**-14, 3: 0.0}[rotation.terms]
    tiny = (SMALLEST["bf16"] if rotation.terms > 1 else 0.0) + 2.0**-126 * UNIT
    bound = (gamma(roundings) * (1 + lost) + lost) * total + math.sqrt(size) * tiny
    bound = bound + ROUNDOFF[rotation.y] * (value.abs() + bound) + SMALLEST[rotation.y]
    return Expected(value, bound)
