"""Products for tests of Triton kernels: schemes, tiles and weights, and checks that kernels of every way have to pass."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen.devices.triton import Tile, run
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, expected
from qcompile.codegen.devices.triton_numbers import why_no_bytes
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import quantize
from qcompile.ir.formats import FORMATS
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.scheme import Scheme

# Every format, with every way that scales meet it, and every kind of scale, zero and nesting.
SCHEMES = [
    *(f"{name}/axis0" for name in FORMATS),
    *(f"{name}/g{16 * 2 ** (i % 4)}:fp16" for i, name in enumerate(FORMATS)),
    "int4/g128:fp16",
    "uint4/g256:fp16+z",
    "uint4/g32:fp16+m",
    "uint4/g64:fp16+z",
    "uint8/axis0:fp32+z",
    "uint3/axis0:bf16+m",
    "int3/g512:bf16",
    "e2m1/g32:e8m0",
    "e3m2/g96:e8m0",
    "e2m1/g16:e4m3/tensor:fp32",
    "int4/g16:int8/g64:fp16",
    "int4/g128:int8/axis0:fp32",
    "uint4/g48:pow2+z/axis0:fp32",
    "ternary/tensor",
]
DTYPES = list(OUT_DTYPES)
TILES = [
    Tile(),
    Tile(units=2, columns=32, natural=False),
    Tile(splits=3),
    Tile(rows=32, columns=16, units=4, splits=2, natural=False),
]


def spec_of(weight: str, x: str = "f16", act: str = "", **more: object) -> KernelSpec:
    scheme = Scheme.parse(f"{weight}@{'mma8' if act else 'mma16'}")
    return KernelSpec(scheme, Scheme.parse(act) if act else None, **{"x": x, "y": x, **more})  # type: ignore[arg-type]


def bytes_of(operand: str) -> list[str]:
    """Every format of a kind of bytes: one scale for a row, and one for each unit of the packing or two."""
    names = [name for name, fmt in FORMATS.items() if not why_no_bytes(fmt, operand)]  # type: ignore[arg-type]
    return [
        *(f"{name}/axis0{':fp32+z' if name.startswith('u') else ''}" for name in names),
        *(f"{name}/g{512 if FORMATS[name].bits % 2 else 256}:fp16" for name in names if not name.startswith("u")),
    ]


BYTES = [
    *((scheme, "int8/token") for scheme in bytes_of("i8")),
    *((scheme, "e4m3/token") for scheme in bytes_of("e4m3")),
    ("int4/g128:fp16", "int8/token"),
    ("uint4/g128:fp16+z", "int8/token"),
    ("int8/g64:fp16", "int8/token"),
    ("uint8/g192:bf16+z", "int8/token"),
    ("int4/g128:int8/axis0:fp32", "int8/token"),
    ("int8/tensor", "int8/token"),
    ("int8/axis0", "int4/token"),
    ("int8/g64:fp16", "int8/g64:fp32"),
    ("uint4/g128:fp16+z", "int8/g256:fp32"),
    ("uint4/g384:fp16+z", "int8/g256:fp32"),
    ("int8/g512:fp16", "int8/g1024:fp32"),
    ("uint8/axis0:fp32+z", "int8/g128:fp32"),
    ("e4m3/b128x128:fp32", "e4m3/g128:fp32"),
    ("e4m3/axis0", "e4m3/g64:fp32"),
    ("uint4/g128:fp16+z", "e4m3/g128:fp32"),
    ("uint4/axis0:fp32+z", "e4m3/g256:fp32"),
    ("e2m1/g128:e8m0", "e4m3/token"),
    ("int8/axis0", "uint8/token:fp32+z"),
    ("uint4/axis0:fp32+z", "uint8/token:fp32+z"),
    ("int3/axis0", "uint6/token:fp32+z"),
    ("int4/g128:fp16", "uint8/token:fp32+z"),
    ("uint4/g256:fp16+z", "uint8/tensor:fp32+z"),
    ("uint8/g64:fp16+z", "uint8/token:fp32+z"),
    ("int8/axis0", "int8/tensor:fp32"),
    ("e4m3/axis0", "e4m3/tensor:fp32"),
]


def weight(n: int, k: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, k, generator=generator) + 0.3 * torch.randn(n, 1, generator=generator)) / 8


def allowed(want: Tensor, bound: Tensor, dtype: str) -> Tensor:
    """The sums' bound and the rounding to the result's type."""
    return bound + ROUNDOFF[dtype] * (want.abs() + bound) + SMALLEST[dtype]


def check(
    spec: KernelSpec,
    x: Tensor,
    parts: list[Tensor],
    n: int,
    k: int,
    tile: Tile,
    rounded: bool | None = None,
) -> Tensor:
    """The product of one segment, within its bound."""
    y = run(spec, x, parts, [], [n], k, tile)
    want = expected(spec, x, parts, n, k, rounded)
    assert (y.shape, y.dtype) == ((len(x), n), OUT_DTYPES[spec.y])
    assert ((y.double() - want.value).abs() <= allowed(want.value, want.bound, spec.y)).all()
    return y


def check_segments(scheme: str, x: str, m: int, tile: Tile, act: str = "", rounded: bool | None = None) -> None:
    """Merged segments whose boundaries lie inside panels and tiles, and both kinds of extras."""
    n, k = (21, 40, 3), 260
    spec = spec_of(scheme, x, act, segments=3, epilogue="acc*0.5+e0-e1", extras=(("row", "f32"), ("mat", x)))
    torch.manual_seed(1)
    values = torch.randn(m, k).to(OUT_DTYPES[x])
    parts = [quantize(weight(size, k, i), spec.weight) for i, size in enumerate(n)]
    extras = [torch.randn(sum(n)), torch.randn(m, sum(n) + 3).to(OUT_DTYPES[x])[:, : sum(n)]]
    y = run(spec, values, [p for part in parts for p in part], extras, n, k, tile)
    each = [expected(spec, values, part, size, k, rounded) for part, size in zip(parts, n, strict=True)]
    acc, bound = torch.cat([e.value for e in each], 1), torch.cat([e.bound for e in each], 1)
    want = acc * 0.5 + extras[0].double() - extras[1].double()
    # three roundings to fp32 in the epilogue
    bound = bound + 3 * 2.0**-24 * (acc.abs() + extras[0].abs() + extras[1].double().abs() + bound)
    assert ((y.double() - want).abs() <= allowed(want, bound, x)).all()


def check_pair(scheme: str, y: str, m: int, tile: Tile, act: str = "") -> None:
    """silu(a0) * a1 + e0: |silu'| < 1.1, so the error is at most 1.1 |a1| b0 + |silu(a0)| b1 + 1.1 b0 b1, and roundings."""
    n, k = 37, 260
    spec = spec_of(scheme, "bf16", act, y=y, segments=2, epilogue="silu(a0)*a1+e0", extras=(("mat", "bf16"),))
    torch.manual_seed(2)
    x, extra = torch.randn(m, k).bfloat16(), torch.randn(m, n).bfloat16()
    parts = [quantize(weight(n, k, i), spec.weight) for i in (3, 4)]
    got = run(spec, x, [p for part in parts for p in part], [extra], [n, n], k, tile)
    a, b = (expected(spec, x, part, n, k) for part in parts)
    silu = torch.nn.functional.silu(a.value)
    want = silu * b.value + extra.double()
    error = 1.1 * b.value.abs() * a.bound + silu.abs() * b.bound + 1.1 * a.bound * b.bound
    # silu is good to 4 units (3 of the sigmoid, 1 of the product); then one product and one sum
    error = error + 6 * 2.0**-23 * (silu * b.value).abs() + 2.0**-23 * want.abs()
    assert ((got.double() - want).abs() <= allowed(want, error, y)).all()
