"""Random bits and stochastic rounding inside Triton kernels, bit for bit those of `qcompile.ir`.

A kernel's text takes the device functions that it calls, as it does those of `triton_text`. Eight neighbours share one
block of Philox, which costs 40 multiplications and additions: a kernel asks for whole blocks, and gets their elements in
the order of memory, with nothing exchanged between lanes. A thread then owns eight neighbours, which is how the widest
loads of 16-bit values lie. A tensor whose first element is not the first of a block begins with a part of one: tiles
are cut at blocks, and a mask takes the elements that belong to the tensor.

Seeds and streams are scalars that a kernel may load from memory, so a captured graph can go on to the next step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

# Device functions: a text has those that it calls.
HELPERS = {
    "random_words": '''@triton.jit
def random_words(block, seed, stream0, stream1):
    """The four words (uint32) of Philox blocks, each like `block`, int64: see ir/rounding.py."""
    c0, c1 = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    c2, c3 = stream0.to(tl.uint32), stream1.to(tl.uint32)
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # one multiplication for both halves of a product
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0, (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = p1.to(tl.uint32), p0.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3''',
    "random_bits": '''@triton.jit
def random_bits(block, seed, stream0, stream1):
    """16 random bits (uint32) for each of the eight elements of Philox blocks: int64 [n] -> [8 n], see ir/rounding.py."""
    c0, c1, c2, c3 = random_words(block, seed, stream0, stream1)
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (block.shape[0] * 8,))''',
    "random_sixteen": '''@triton.jit
def random_sixteen(block, skip, seed, stream0, stream1):
    """16 random bits (uint32) for each of 16 neighbours, the first of them element `skip`, a scalar, of its block: int64 [n] ->
    [n, 16]."""
    w0, w1, w2, w3 = random_words(block, seed, stream0, stream1)
    w4, w5, w6, w7 = random_words(block + 1, seed, stream0, stream1)
    if skip != 0:
        # They lie in three blocks: the words move by two, by one and by a half.
        w8, w9, w10, w11 = random_words(block + 2, seed, stream0, stream1)
        two, one, half = skip & 4 != 0, skip & 2 != 0, skip & 1 != 0
        w0, w1, w2, w3 = tl.where(two, w2, w0), tl.where(two, w3, w1), tl.where(two, w4, w2), tl.where(two, w5, w3)
        w4, w5, w6, w7 = tl.where(two, w6, w4), tl.where(two, w7, w5), tl.where(two, w8, w6), tl.where(two, w9, w7)
        w8, w9 = tl.where(two, w10, w8), tl.where(two, w11, w9)
        w0, w1, w2, w3 = tl.where(one, w1, w0), tl.where(one, w2, w1), tl.where(one, w3, w2), tl.where(one, w4, w3)
        w4, w5, w6, w7 = tl.where(one, w5, w4), tl.where(one, w6, w5), tl.where(one, w7, w6), tl.where(one, w8, w7)
        w8 = tl.where(one, w9, w8)
        w0, w1 = tl.where(half, w0 >> 16 | w1 << 16, w0), tl.where(half, w1 >> 16 | w2 << 16, w1)
        w2, w3 = tl.where(half, w2 >> 16 | w3 << 16, w2), tl.where(half, w3 >> 16 | w4 << 16, w3)
        w4, w5 = tl.where(half, w4 >> 16 | w5 << 16, w4), tl.where(half, w5 >> 16 | w6 << 16, w5)
        w6, w7 = tl.where(half, w6 >> 16 | w7 << 16, w6), tl.where(half, w7 >> 16 | w8 << 16, w7)
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    words = tl.join(even, odd)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (block.shape[0], 16))''',
    "stochastic_bf16": '''@triton.jit
def stochastic_bf16(x, bits):
    """fp32 as bf16, up with the probability of the fraction: see ir/stochastic_cast.py."""
    size = x.to(tl.uint32, bitcast=True) + bits
    return tl.where(x != x, 0x7FC0, size >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)''',
    "stochastic_fp16": '''@triton.jit
def stochastic_fp16(x, bits):
    """fp32 as fp16, up with the probability of the fraction: see ir/stochastic_cast.py."""
    word = x.to(tl.uint32, bitcast=True)
    size = word & 0x7FFFFFFF
    moved = (size.to(tl.float32, bitcast=True) + 6.103515625e-05).to(tl.uint32, bitcast=True) - 0x800000
    size = tl.where(size < 0x38800000, moved, size) + (bits >> 3) - 0x38000000
    pattern = tl.minimum(size >> 13, 0x7C00) | ((word >> 16) & 0x8000)
    return tl.where(x != x, 0x7E00, pattern).to(tl.uint16).to(tl.float16, bitcast=True)''',
    "stochastic_integer": '''@triton.jit
def stochastic_integer(t, bits):
    """fp32 as an integer (in fp32), up with the probability of the fraction: see round_to_integer in ir/rounding.py."""
    low = tl.floor(t)
    # chance + bits >= 65536, the chance before its own floor, since the other side is an integer. bits is a float without
    # a conversion: beside 2^23 the last place of an fp32 is 1.
    up = (t - low) * 65536.0 + 0.5 >= 8454144.0 - (bits | 0x4B000000).to(tl.float32, bitcast=True)
    return low + tl.where(up, 1.0, 0.0)''',
}


def helper_text(*names: str) -> str:
    """The text of some device functions, and of those that they call, for a kernel's module."""
    return "\n\n\n".join(with_called(HELPERS, names))


def with_called(helpers: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """The texts of device functions and of those that they call, in the order of `helpers`."""
    wanted = set(names)
    while more := {n for w in wanted for n in helpers if calls(helpers[w], n)} - wanted:
        wanted |= more
    return [text for name, text in helpers.items() if name in wanted]


def calls(text: str, name: str) -> bool:
    """Whether a text calls a function."""
    return re.search(rf"\b{name}\(", text) is not None
