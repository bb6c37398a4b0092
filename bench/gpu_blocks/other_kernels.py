"""Kernels beside the plain product, by real launches: experts, rotations, attention over a cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch

from gpu_blocks.matmuls import spec_of, sums_of
from gpu_blocks.session import Session
from gpu_blocks.warm import Job
from qcompile.codegen.devices import triton_attention_bounds, triton_rotate
from qcompile.codegen.devices.triton_attention import choose_block, decode_attention
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, expected
from qcompile.codegen.devices.triton_grouped import run_grouped
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import quantize
from qcompile.ir.formats import FORMATS
from qcompile.ir.hadamard import random_signs
from qcompile.ir.kvcache import Cache, CacheLayout, extend
from qcompile.ir.matmul import OUT_DTYPES


@dataclass(frozen=True)
class Case:
    """Something to launch.

    Attributes:
        name: of it. error: launches it and gives the largest error in units of its bound. job: compiles it ahead.
    """

    name: str
    error: Callable[[torch.device], float]
    job: Job | None = None


def experts(session: Session) -> Iterator[Case]:
    """A weight for each expert; experts without rows, with one, with more than a tile."""
    pairs = (("int4/g128:fp16", ""), ("uint4/g32:fp16+m", ""), ("nf4/g64:fp16", ""), ("int8/axis0", "int8/token"))
    routings = session.pick(((0, 1, 40, 3), (5, 0, 0, 90)), ((0, 1, 40, 3),), ((0, 1, 4),))
    for weight, act in session.pick(pairs, pairs, pairs[:1]):
        for counts in routings:
            yield Case(f"{weight} {act} {counts}", partial(_experts, spec_of(weight, act), counts))


def _experts(spec: KernelSpec, counts: tuple[int, ...], device: torch.device) -> float:
    n, k, m, generator = 70, 600, sum(counts), torch.Generator().manual_seed(5)
    x = torch.randn(m, k, generator=generator).to(OUT_DTYPES[spec.x])
    each = [quantize(torch.randn(n, k, generator=generator) / 8, spec.weight) for _ in counts]
    ends = list(accumulate(counts))
    parts = [torch.stack(part).to(device) for part in zip(*each, strict=True)]
    y = run_grouped(spec, x.to(device), torch.tensor(ends, dtype=torch.int32, device=device), parts, [], [n], k).cpu()
    worst = 0.0
    for (begin, end), own in zip(pairwise([0, *ends]), each, strict=True):
        if begin < end:
            want = expected(spec, x[begin:end], own, n, k, **sums_of(spec, device))
            bound = want.bound + ROUNDOFF[spec.y] * (want.value.abs() + want.bound) + SMALLEST[spec.y]
            worst = max(worst, _worst(y[begin:end], want.value, bound))
    return worst


def rotations(session: Session) -> Iterator[Case]:
    """Blocks on the diagonal of a panel, of several panels, with signs, back, in all types."""
    for i, size in enumerate(session.pick((16, 128, 256, 512, 12, 28, 112, 192), (16, 256, 112), (32,))):
        for dtype in session.pick(list(OUT_DTYPES), list(OUT_DTYPES)[i % 3 :][:1], ["f16"]):
            for signed, inverse in ((False, False), (True, i % 2 == 0)):
                name = f"{size} {dtype} {'signed ' * signed}{'inverse' * inverse}"
                yield Case(name, partial(_rotation, size, OUT_DTYPES[dtype], signed, inverse))


def _rotation(size: int, dtype: torch.dtype, signed: bool, inverse: bool, device: torch.device) -> float:
    x = torch.randn(37, 3 * size, generator=torch.Generator().manual_seed(6)).to(dtype)
    signs = random_signs(3 * size, 2) if signed else None
    y = triton_rotate.rotate(x.to(device), size, None if signs is None else signs.to(device), inverse)
    want = triton_rotate.expected(x, size, signs, inverse)
    return _worst(y.cpu(), want.value, want.bound)


def caches(session: Session) -> Iterator[Case]:
    """Every format as keys and values, heads that are folded and padded, ragged lengths."""
    names = session.pick(list(FORMATS), ["int8", "int4", "e4m3", "nf4"], ["int4"])
    for i, name in enumerate(names):
        yield Case(name, partial(_cache, CacheLayout.of(f"{name}/token:fp16", (128, 64, 80)[i % 3])))


def _cache(layout: CacheLayout, device: torch.device) -> float:
    heads, kv, lengths, generator = 8, 2, (1, 300, 127), torch.Generator().manual_seed(7)
    pages = -(-max(lengths) // layout.page)
    cache = Cache.empty(layout, pages * len(lengths), kv)
    table = torch.randperm(pages * len(lengths), generator=generator).to(torch.int32).reshape(len(lengths), pages)
    for own, length in zip(table, lengths, strict=True):
        tokens = torch.randn(2, length, kv, layout.head_dim, generator=generator)
        extend(cache, tokens[0], tokens[1], own, 0)
    q = torch.randn(len(lengths), heads, layout.head_dim, generator=generator).bfloat16()
    there = Cache(layout, *(part.to(device) for part in cache.parts))
    block = choose_block(layout, len(lengths) * kv, pages, device)
    counts = torch.tensor(lengths, dtype=torch.int32)
    y = decode_attention(q.to(device), there, table.to(device), counts.to(device), block=block).cpu()
    want = triton_attention_bounds.expected(q, cache, table, lengths, splits=block.splits)
    return _worst(y, want.value, want.bound)


def _worst(y: torch.Tensor, want: torch.Tensor, bound: torch.Tensor) -> float:
    return float(((y.double() - want).abs() / bound).nan_to_num(float("inf")).max())
