"""What Triton's interpreter was once wrong about: small kernels, each compared with torch, bit by bit.

They run at the head of `interpret()`, so that a new version of Triton cannot bring a fault back unseen. No tolerance
is needed: the dot products are of small integers, and every other operation is defined by rounding to nearest even.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qcompile.compat.triton import triton_modules

triton, tl = triton_modules()


def _dot(a: Any, b: Any, out: Any) -> None:
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


def _cast(x: Any, out: Any) -> None:
    i = tl.arange(0, 1024)
    tl.store(out + i, tl.load(x + i).to(tl.bfloat16))


def _fp8(x: Any, codes: Any, out: Any) -> None:
    i = tl.arange(0, 1024)
    a = tl.load(x + i)
    tl.store(out + i, a.to(tl.float8e4nv).to(tl.float32))
    tl.store(out + 1024 + i, a.to(tl.float8e5).to(tl.float32))
    every = tl.load(codes + tl.arange(0, 256))
    tl.store(out + 2048 + tl.arange(0, 256), every.to(tl.float8e4nv, bitcast=True).to(tl.float32))
    tl.store(out + 2304 + tl.arange(0, 256), every.to(tl.float8e5, bitcast=True).to(tl.float32))


def _arithmetic(x: Any, y: Any, out: Any) -> None:
    i = tl.arange(0, 256)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, a * b)
    tl.store(out + 256 + i, a + b)
    tl.store(out + 512 + i, a - b)
    tl.store(out + 768 + i, tl.where(a < b, a, -b))


def _constants(x: Any, out: Any) -> None:
    i = tl.arange(0, 256)
    a = tl.load(x + i)
    tl.store(out + i, a * 1.5)
    tl.store(out + 256 + i, 3 + a)
    tl.store(out + 512 + i, tl.full((256,), 2.5, tl.bfloat16) - a)


def _atomics(x: Any, indices: Any, out: Any) -> None:
    row, i = tl.arange(0, 1)[:, None], tl.arange(0, 64)[None, :]
    at = tl.load(indices + row)
    tl.store(out + row * 64 + i, 0.0)
    tl.atomic_add(out + at + i, tl.load(x + row * 64 + i), row < 1)
    tl.atomic_add(out + at + i, tl.load(x + row) + tl.zeros([1, 64], tl.float32), row < 1)


def _differs(kernel: Callable[..., None], inputs: list[Tensor], expected: Tensor) -> bool:
    """Whether a kernel gives anything but `expected`; zeros have a sign, NaN is NaN."""
    out = torch.full_like(expected, -1)
    try:
        triton.jit(kernel)[(1,)](*inputs, out)
    except Exception:  # an interpreter that cannot is as wrong as one that does not
        return True
    nan = expected.isnan()
    bits = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    same = torch.equal(out[~nan].view(bits), expected[~nan].view(bits))
    return not (same and torch.equal(out.isnan(), nan))


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16()


def dot() -> bool:
    a = (torch.arange(256) * 37 % 17 - 8).reshape(16, 16)
    b = (torch.arange(256) * 23 % 15 - 7).reshape(16, 16)
    return _differs(_dot, [a.bfloat16(), b.bfloat16()], (a @ b).float())


def rounding() -> bool:
    """Halves between neighbours of every exponent and parity, values beside them, and the ends of the range."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(-(2**31), 2**31, (1024,), generator=generator).int()
    patterns[:512] = patterns[:512] & -(2**16) | 2**15
    patterns[:128] += torch.arange(128).int() % 3 - 1
    x = patterns.view(torch.float32)
    ends = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), torch.finfo(torch.float32).max, 2.0**-149, 2.0**-134]
    x[-len(ends) :] = torch.tensor(ends)
    return _differs(_cast, [x], x.bfloat16())


def fp8() -> bool:
    """Halves between codes and values beside them, inside the range (beyond it torch and devices differ), and every
    code back."""
    formats = (torch.float8_e4m3fn, torch.float8_e5m2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-(2**31), 2**31, (1024,), generator=generator).int()
    x[:512] = x[:512] & -(2**19)  # four bits of fraction: codes of three, and halves between them
    x[:128] += torch.arange(128).int() % 3 - 1
    exponent = torch.randint(112, 135, (1024,), generator=generator).int()
    x = ((x & ~(255 << 23)) | exponent << 23).view(torch.float32)
    codes = torch.arange(256).to(torch.uint8)
    back = [x.to(dtype).float() for dtype in formats] + [codes.view(dtype).float() for dtype in formats]
    return _differs(_fp8, [x, codes], torch.cat(back))


def integers() -> bool:
    x = torch.arange(1024).int() * 97 - 50_000
    return any(_differs(_cast, [value], value.bfloat16()) for value in (x, x.to(torch.int8), x.to(torch.uint8)))


def arithmetic() -> bool:
    x, y = _random(256), _random(1, 256)[0]
    return _differs(_arithmetic, [x, y], torch.cat([x * y, x + y, x - y, torch.where(x < y, x, -y)]))


def constants() -> bool:
    x = _random(256)
    return _differs(_constants, [x], torch.cat([x * 1.5, 3 + x, 2.5 - x]))


def atomics() -> bool:
    x = torch.arange(64).float()
    return _differs(_atomics, [x + 1, torch.zeros(1, dtype=torch.int32)], x + 2)


# What is wrong, in words -> whether it is.
FAULTS: dict[str, Callable[[], bool]] = {
    "tl.dot of bf16": dot,
    "fp32 to bf16": rounding,
    "fp32 to fp8 and back": fp8,
    "integers to bf16": integers,
    "bf16 with bf16": arithmetic,
    "bf16 with constants": constants,
    "atomics with a mask for a row": atomics,
}
