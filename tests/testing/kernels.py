"""Kernels that are compiled and not run, for the tests of machine code."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

import triton.language as tl  # noqa: E402

ALL = ("sm_80", "sm_90", "sm_100", "gfx942")
PROBLEM = {"a": "*fp16", "b": "*fp16", "c": "*fp16", "K": "i32", "stride": "i32"}
ALIGNED = tuple(PROBLEM)


@triton.jit
def matmul(a, b, c, K, stride, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    i = tl.arange(0, BM)[:, None]
    j = tl.arange(0, BN)[None, :]
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    here, there = a + i * stride + k[None, :], b + k[:, None] * BN + j
    for _ in range(0, K, BK):
        acc = tl.dot(tl.load(here), tl.load(there), acc)  # both loads on one line
        here += BK
        there += BK * BN
    tl.store(c + i * BN + j, acc.to(tl.float16))


@triton.jit
def specialised(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    to_a = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    to_b = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, BK])
    acc = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, K, BK, warp_specialize=True):
        acc = tl.dot(to_a.load([0, k]), to_b.load([0, k]).T, acc)
    tl.store(c + tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :], acc)


@triton.jit
def fetch(p, i):
    return tl.load(p + i)


@triton.jit
def add(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, fetch(x, i) + tl.load(y + i))


@triton.jit
def row_sum(x, out, N: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, N)), 0))


@triton.jit
def to_float(x, out, N: tl.constexpr, FLOAT: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    tl.store(out + i, v.to(tl.float32) if FLOAT else v)


@triton.jit
def refuses(x, N: tl.constexpr):
    tl.static_assert(N == 0, "N must be nothing")


@triton.autotune(configs=[triton.Config({"N": 64}, num_warps=2), triton.Config({"N": 128}, num_warps=8)], key=[])
@triton.jit
def tuned(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) + 1)
