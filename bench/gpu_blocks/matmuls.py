"""A packed weight in many copies, the exact product to compare with, and kernels as contestants.

A generated kernel becomes a contestant only when its result is within the bound that
`qcompile.codegen.devices.triton_bounds` derives, on 256 rows of the weight and up to 64 rows of x, the first and the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch

from gpu_blocks.device import Contestant, Device
from gpu_blocks.session import Session, Wrong
from gpu_blocks.warm import Job
from qcompile import compat
from qcompile.codegen.devices.triton import Tile, choose_tile, fit, packing, run, text_of
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, Expected, expected, unit_of
from qcompile.codegen.devices.triton_numbers import IntegerDecode, byte_operand
from qcompile.codegen.devices.triton_text import kernel_text
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import PANEL, ceil_div, packed_parts
from qcompile.ir.scheme import Scheme

ROWS = 512  # of a weight that are quantized; further panels repeat these
VENDOR = "decoded, vendor"  # the weight once, then the vendor's product
CHECKED = 8  # panels at each end of the weight that are compared, and four times as many rows of x


def spec_of(weight: str, act: str = "", dtype: str = "bf16") -> KernelSpec:
    """The kernel for a weight's and an activation's scheme."""
    scheme = Scheme.parse(act) if act else None
    return KernelSpec(Scheme.parse(f"{weight}@{packing(scheme)}"), scheme, x=dtype, y=dtype)


@lru_cache(maxsize=8)
def _quantized(weight: Scheme, rows: int, k: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return quantize(torch.randn(rows, k, generator=generator) / k**0.5, weight)


class Weight:
    """An `[n, k]` weight: packed, random, in so many copies that no cache holds them."""

    def __init__(self, device: Device, spec: KernelSpec, n: int, k: int, least: int = 20) -> None:
        self.device, self.spec, self.n, self.k = device, spec, n, k
        panels = torch.arange(ceil_div(n, PANEL)) % ceil_div(min(n, ROWS), PANEL)
        self.parts = [part[panels].to(device.torch) for part in _quantized(spec.weight, min(n, ROWS), k)]
        self.bytes = sum(part.numel() * part.element_size() for part in self.parts)
        more = device.copies(self.bytes, least) - 1
        self.pool = [self.parts, *([part.clone() for part in self.parts] for _ in range(more))]


def float_weights(device: Device, n: int, k: int, dtype: torch.dtype, least: int = 20) -> list[torch.Tensor]:
    """Copies of an `[n, k]` float weight, as many as no cache holds."""
    first = device.randn(n, k, dtype=dtype) / k**0.5
    return [first, *(first.clone() for _ in range(device.copies(n * k * dtype.itemsize, least) - 1))]


def float_layer(x: torch.Tensor, pool: Sequence[torch.Tensor]) -> Contestant:
    """`F.linear`."""
    return Contestant(
        "F.linear",
        lambda i: torch.nn.functional.linear(x, pool[i]),
        len(pool),
        pool[0].numel() * pool[0].element_size(),
    )


@dataclass(frozen=True)
class Problem:
    """One product: activations, a weight, and what comes out exactly in the checked corner."""

    weight: Weight
    x: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    corner: Sequence[torch.Tensor]  # packed parts of the checked rows of the weight

    @staticmethod
    def of(weight: Weight, m: int, seed: int = 1) -> Problem:
        """`m` random rows of x."""
        spec = weight.spec
        x = weight.device.randn(m, weight.k, dtype=OUT_DTYPES[spec.x], seed=seed)
        panels = _ends(ceil_div(weight.n, PANEL), CHECKED)
        columns = (panels[:, None] * PANEL + torch.arange(PANEL)).flatten()
        corner = [part[panels.to(part.device)].cpu() for part in weight.parts]
        return Problem(weight, x, _ends(m, 4 * CHECKED), columns, corner)

    @cached_property
    def want(self) -> Expected:
        """What is allowed for a generated kernel."""
        return self._allowed(None)

    @cached_property
    def rounded(self) -> Expected:
        """The same where every weight is first rounded to the type of x."""
        return self._allowed(True)

    def _allowed(self, rounded: bool | None) -> Expected:
        spec, x = self.weight.spec, self.x[self.rows.to(self.x.device)].cpu()
        found = expected(
            spec, x, self.corner, len(self.columns), self.weight.k, rounded, **sums_of(spec, self.x.device)
        )
        bound = found.bound + ROUNDOFF[spec.y] * (found.value.abs() + found.bound) + SMALLEST[spec.y]
        inside = self.columns < self.weight.n
        return Expected(found.value[:, inside], bound[:, inside])

    def error(self, y: torch.Tensor, want: Expected | None = None) -> float:
        """The largest error of a result in units of its bound (of a generated kernel's, if not said); infinity for one
        that is not finite."""
        want, columns = want or self.want, self.columns[self.columns < self.weight.n]
        corner = y[self.rows.to(y.device)][:, columns.to(y.device)].cpu().double()
        return float(((corner - want.value).abs() / want.bound).nan_to_num(float("inf")).max())

    def allowed(self, tile: Tile) -> Expected:
        """What is allowed for a generated kernel with a tile."""
        return self.rounded if rounded(self.weight.spec, tile) else self.want

    def check(self, name: str, y: torch.Tensor, want: Expected | None = None) -> float:
        """`error`; raises `Wrong` for one beyond the bound."""
        error = self.error(y, want)
        if not error <= 1:
            raise Wrong(f"{name}: the error is {error:.3g} times the bound")
        return error

    def tuned(self) -> Tile:
        """The tile of the shipped table."""
        weight = self.weight
        return choose_tile(weight.spec, (weight.n,), weight.k, len(self.x), weight.device.torch)

    def kernel(self, tile: Tile, decode: IntegerDecode = "subnormal", name: str = "") -> Contestant:
        """A generated kernel, checked."""
        spec, n, k = self.weight.spec, self.weight.n, self.weight.k
        text, pool = kernel_text(spec, decode), self.weight.pool
        name = name or label(tile, decode)
        self.check(name, run(spec, self.x, pool[0], [], [n], k, tile, text), self.allowed(tile))
        return Contestant(
            name, lambda i: run(spec, self.x, pool[i], [], [n], k, tile, text), len(pool), self.weight.bytes
        )


def sums_of(spec: KernelSpec, device: torch.device) -> dict[str, Any]:
    """What `expected` is to know about the device's sums of e4m3."""
    coarse = spec.act is not None and byte_operand(spec.act) == "e4m3"
    return {"byte_unit": unit_of(compat.gpu(device).architecture)} if coarse else {}


def rounded(spec: KernelSpec, tile: Tile) -> bool | None:
    """`rounded` of `expected` for a tile: a weight that is decoded for the vendor's library is rounded to 16 bits first."""
    return True if tile.way == "vendor" and spec.act is None else None


def _ends(count: int, each: int) -> torch.Tensor:
    """The first and the last of so many indices."""
    return (
        torch.arange(count) if count <= 2 * each else torch.cat((torch.arange(each), torch.arange(count - each, count)))
    )


def label(tile: Tile, decode: str = "subnormal") -> str:
    """A tile in a few characters."""
    if tile.way == "vendor":
        return VENDOR
    text = f"{tile.rows}x{tile.columns} u{tile.units} split{tile.splits} stages{tile.stages} warps{tile.warps}"
    return text if decode == "subnormal" else f"{text} {decode}"


def fitted(spec: KernelSpec, tiles: Sequence[Tile], k: int) -> list[Tile]:
    """Tiles as kernels run them for so many columns, each once."""
    layout = text_of(spec).layout
    return list(dict.fromkeys(fit(tile, layout, k) for tile in tiles))


def compile_job(spec: KernelSpec, m: int, n: int, k: int, tile: Tile, decode: IntegerDecode = "subnormal") -> Job:
    """A job for `Session.compile`: the kernel of a spec for such sizes."""
    return partial(_launch, spec, m, n, k, tile, decode)


def _launch(
    spec: KernelSpec, m: int, n: int, k: int, tile: Tile, decode: IntegerDecode, device: torch.device
) -> torch.Tensor:
    x = torch.empty(m, k, dtype=OUT_DTYPES[spec.x], device=device)
    parts = [torch.empty(part.shape, dtype=part.dtype, device=device) for part in packed_parts(spec.weight, n, k)]
    extras = [
        torch.empty((n,) if kind == "row" else (m, n), dtype=OUT_DTYPES[dtype], device=device)
        for kind, dtype in spec.extras
    ]
    return run(spec, x, parts * spec.segments, extras, [n] * spec.segments, k, tile, kernel_text(spec, decode))


def kernels(
    session: Session, problem: Problem, tiles: Sequence[Tile], decode: IntegerDecode = "subnormal"
) -> dict[str, tuple[Tile, Contestant]]:
    """Contestants of those tiles that the device can launch, by name; the others' errors are printed."""
    found = {}
    for tile in tiles:
        try:
            contestant = problem.kernel(tile, decode)
        except Wrong as error:
            session.wrong(label(tile, decode), error)
            continue
        except Exception as error:
            session.refused(label(tile, decode), error)
            continue
        found[contestant.name] = (tile, contestant)
    return found


__all__ = [
    "Problem",
    "Weight",
    "compile_job",
    "fitted",
    "float_layer",
    "float_weights",
    "kernels",
    "label",
    "rounded",
    "spec_of",
    "sums_of",
]
