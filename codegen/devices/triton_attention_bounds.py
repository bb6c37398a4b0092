"""How far the attention kernel may be from the exact result: a bound derived from its arithmetic, as code.

Notation: token t of a sequence has the exponent a_t = c ks_t (q . k_t) + e_t, where c = scale log2(e), ks_t is its key's
scale, and 2^e_t f_t the cut of its value's scale. With M = max a_t and w_t = 2^(a_t - M) the result is O / L,

    O = sum over t of w_t f_t v_t,    L = sum over t of w_t 2^-e_t.

Unit and gamma are those of `triton_bounds`: 2^-23, and n roundings by it.

* Exponents. The dot product has one rounding per column, c three (log2(e), to fp32, times ks), then one product and one sum.
  What is subtracted are maxima of computed numbers, so they are exact; but each difference is rounded, and those of one
  token's way from its page to the end add up to M - a_t, twice: to its page's maximum and from there. An error d of the
  exponent is a factor of 2^d.
* exp2 has 2 ulp (CUDA C++ Programming Guide, "Mathematical Functions", ex2.approx), and a product follows it: one pair for
  the token, one for each later page, two where splits are merged.
* f_t w_t has one rounding to fp32 and one to 16 bits; below the normal numbers of fp16 an error of half the smallest one.
* Sums: O one rounding for each token and two for each page and split; L as many.
* Numbers below 2^-126 may be flushed to 0.
* The quotient: three roundings, then that of the result's type.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from qcompile.codegen.devices.triton_attention import DTYPES
from qcompile.codegen.devices.triton_attention_text import POWER, AttentionSpec
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, UNIT, Expected, gamma
from qcompile.codegen.devices.triton_numbers import Numbers
from qcompile.ir.kvcache import Cache, read_codes
from qcompile.ir.packing import ceil_div

EXP2 = 2 * UNIT


def expected(
    q: torch.Tensor,
    cache: Cache,
    table: torch.Tensor,
    lengths: torch.Tensor | Sequence[int],
    scale: float | None = None,
    splits: int = 1,
) -> Expected:
    """What `decode_attention` should give for finite queries, float64 `[B, heads, head_dim]`, and how far it may be from
    that, the rounding to its dtype included."""
    value, bound = (torch.zeros(q.shape, dtype=torch.float64) for _ in range(2))
    for b, length in enumerate(int(n) for n in lengths):
        if length:
            value[b], bound[b] = _sequence(q[b].double(), cache, table[b], length, scale, splits, DTYPES[q.dtype])
    return Expected(value, bound)


def _sequence(
    q: torch.Tensor, cache: Cache, table: torch.Tensor, length: int, scale: float | None, splits: int, dtype: str
) -> tuple[torch.Tensor, torch.Tensor]:
    layout, spec = cache.layout, AttentionSpec(cache.layout, dtype)
    codes, scales = read_codes(cache, table, length)
    heads = q.shape[0] // scales.shape[1]
    # [heads, tokens, head_dim] and [heads, tokens, 1], each kv head as often as it is read
    (k, k_error), (v, v_error) = (
        (t.repeat_interleave(heads, 1).transpose(0, 1) for t in _numbers(numbers, part))
        for numbers, part in zip((spec.key, spec.value), codes, strict=True)
    )
    ks, vs = scales.double().repeat_interleave(heads, 1).transpose(0, 1).unbind(-1)
    c = (layout.head_dim**-0.5 if scale is None else scale) * math.log2(math.e)
    e = torch.floor(torch.log2(vs)).clamp(-POWER, POWER)
    f = vs * 2.0**-e

    s = c * ks * torch.einsum("hd,htd->ht", q, k)
    size = abs(c) * ks * torch.einsum("hd,htd->ht", q.abs(), k.abs() + k_error)
    a = s + e
    below = a.amax(1, keepdim=True) - a
    columns = layout.key_columns + 8
    d = abs(c) * ks * torch.einsum("hd,htd->ht", q.abs(), k_error) + gamma(columns + 5) * size
    d = d + UNIT * (a.abs() + d) + 2 * UNIT * (below + 2 * d.amax(1, keepdim=True))
    pages = ceil_div(length, layout.page)
    weight = torch.expm1(math.log(2) * d + (pages + 3) * (EXP2 + UNIT))  # of w_t, relative

    w = 2.0**-below
    roundings = gamma(length + 2 * (pages + splits) + 8)
    flushed = 2.0**-126
    upper, lower = torch.einsum("ht,htd->hd", w * f, v), (w * 2.0**-e).sum(1, keepdim=True)
    relative = weight + (1 + weight) * (ROUNDOFF[dtype] + UNIT + roundings)
    absolute = SMALLEST[dtype] / 2 + flushed * (1 + f)
    error = torch.einsum("ht,htd->hd", w * f * relative + absolute, v.abs() + v_error)
    error = error + torch.einsum("ht,htd->hd", w * f, v_error)
    error_lower = (w * 2.0**-e * (weight + (1 + weight) * roundings) + flushed * 2.0**-e).sum(1, keepdim=True)
    value = upper / lower
    bound = (error + value.abs() * error_lower) / (lower - error_lower).clamp_min(0)
    bound = bound + 3 * UNIT * (value.abs() + bound) + flushed
    return value, bound + ROUNDOFF[dtype] * (value.abs() + bound) + SMALLEST[dtype]


def _numbers(numbers: Numbers, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of each code, and how far its operand may be from it: entries of tables are rounded."""
    number = numbers.fmt.levels().double()[codes.long()]
    if numbers.kind != "table":
        return number, torch.zeros_like(number)
    name = {"fp16": "f16", "bf16": "bf16"}[numbers.operand.name]
    return number, ROUNDOFF[name] * number.abs()
