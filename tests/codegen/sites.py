"""Matmul sites for tests of eager calls: operands for a spec, and what its kernel gives for them."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.codegen import eager
from qcompile.codegen.devices import cpu
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import OUT_DTYPES, MatmulSpec

SCHEMES = ["int4/g32:fp16", "uint4/g64:fp16+z", "nf4/g64:bf16"]  # integers, zero points, float arithmetic
W = SCHEMES[0]
FORMS = {
    "plain": "{w} n=37 k=70",
    "act": "{w} n=37 k=70 act=int8/token",
    "bias": "{w} n=21,40 k=70 y=acc+e0 e=row",
    "pair": "{w} n=37,37 k=70 y=silu(a0)*a1+e0 e=mat",
}


def site(
    text: str, *lead: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """x, parts and extras for a spec."""
    torch.manual_seed(seed)
    what = MatmulSpec.parse(text)
    x = torch.randn(*lead, what.k).to(dtype)
    parts = [part for n in what.n for part in quantize(torch.randn(n, what.k), what.weight)]
    shapes = {"row": (what.columns,), "mat": (*lead, what.columns)}
    return x, parts, [torch.randn(shapes[kind]) for kind in what.extras]


def spec_of(text: str, x: Tensor, extras: list[Tensor]) -> KernelSpec:
    """The kernel of a call, which exists: otherwise the reference would be what is tested."""
    what = MatmulSpec.parse(text)
    spec = KernelSpec.of(what, x.dtype, OUT_DTYPES[what.out] if what.out else x.dtype, [e.dtype for e in extras])
    assert eager.operator_of(spec) is not None
    return spec


def kernel(text: str, x: Tensor, parts: list[Tensor], extras: list[Tensor]) -> Tensor:
    """What the compiled kernel gives when it is called without the dispatcher."""
    what, spec = MatmulSpec.parse(text), spec_of(text, x, extras)
    return cpu.run(spec, x, parts, extras, what.n, what.k)
