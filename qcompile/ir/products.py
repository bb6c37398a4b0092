"""Linear layers trained with products of 8-bit numbers: the one of the forward pass, and both of the backward pass.

With codes Q_w and one scale s_w for each output, codes Q_x and one scale s_x for each token, the forward product is the one
that inference computes. In the other two the scales of the summed index move into the gradient g, which is then rounded itself:

    y  = (Q_x Q_w^T) s_x s_w
    dx = s_g (Q_g Q_w)       Q_g, s_g: g s_w, rounded per token
    dW = s_h (Q_h^T Q_x)     Q_h, s_h: g s_x, rounded per output

So the same codes serve all three products, and what is kept for the backward pass are 8 bits of x. With stochastic rounding of
g the gradients are on average those of training through the roundings (`estimators.fake_quant`); rounding to nearest is biased
and has less noise. Products of 8-bit integers in training: Wortsman et al. 2023, arXiv 2304.13013 (the forward product and dx);
Xi et al. 2024, arXiv 2403.12422 (all three).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qcompile import compat
from qcompile.errors import QCError
from qcompile.ir.codec import encode
from qcompile.ir.elements import decode_element
from qcompile.ir.estimators import Estimator, estimate, estimator_of
from qcompile.ir.formats import Format
from qcompile.ir.granularity import PerAxis, PerToken
from qcompile.ir.matmul import quantize_rows
from qcompile.ir.qparams import unpack_qparams
from qcompile.ir.rounding import random_bits, round_to_integer
from qcompile.ir.scales import load_scale
from qcompile.ir.scheme import Scheme

_NATIVE = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# The longest sum of products of int8 that is an int32 whatever the codes are.
LONGEST = (2**31 - 1) // (128 * 128)


def why_no_products(weight: Scheme, act: Scheme | None, grad: Scheme) -> str:
    """Why a linear layer cannot be trained with products of these, "" when it can."""
    if act is None:
        return "activations are not rounded"
    if weight.granularity != PerAxis(0) or not weight.symmetric or weight.scale.format.kind != "float":
        return f"weights in {weight} have no single floating-point scale for each output"
    if weight.rounding != "nearest":
        return f"weights in {weight} are not rounded to nearest"
    for name, scheme in (("activations", act), ("gradients", grad)):
        if not isinstance(scheme.granularity, PerToken) or not scheme.symmetric or scheme.scale.format.name != "fp32":
            return f"{name} in {scheme} have no single fp32 scale for each token"
    kinds = {_kind(scheme.format) for scheme in (weight, act, grad)}
    if kinds == {"int"}:
        return ""
    if kinds != {"float"}:
        return f"{weight.format}, {act.format} and {grad.format} are not all signed integers, or all e4m3 and e5m2"
    return "" if grad.rounding == "nearest" else "floats are rounded to nearest"


def _kind(fmt: Format) -> str:
    if fmt.kind == "int" and fmt.signed:
        return "int"
    return "float" if fmt.name in _NATIVE else ""


def low_bit_mm(a: Tensor, b: Tensor) -> Tensor:
    """The plain meaning of the operator: `a @ b`, exactly, for integers.

    Args:
        a: `[m, k]`, b: `[k, n]`, any strides; both int8, or both 8-bit floats.

    Returns:
        `[m, n]`: int32, or float32 with sums in float32.

    Raises:
        QCError: "products.operands" for other types or sizes, and for sums of integers that may not fit 32 bits.
    """
    kinds = {t.dtype for t in (a, b)}
    fits = kinds == {torch.int8} or kinds <= {*_NATIVE.values()}
    if not fits or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.shape[1] > LONGEST:
        raise QCError(
            "products.operands",
            f"no product of {a.dtype} {list(a.shape)} and {b.dtype} {list(b.shape)}",
            why=f"two matrices of int8, or of 8-bit floats, with a common size of at most {LONGEST}",
        )
    (m, k), n = a.shape, b.shape[1]
    if 0 in (m, k, n):
        return a.new_zeros((m, n), dtype=torch.int32 if a.dtype == torch.int8 else torch.float32)
    unit = {torch.int8: 8}.get(a.dtype, 16) if a.device.type == "cuda" else 1  # what the vendor's library wants
    a, b = _padded(a, 0, -k % unit), _padded(b, -k % unit, -n % unit)
    if a.dtype == torch.int8:
        return compat.mm_int8(_dense(a), _dense(b))[:, :n]
    if a.device.type == "cuda" and compat.multiplies_e4m3(compat.architecture(a.device)):
        return compat.mm_e4m3(_dense(a), _dense(b.t()).t())[:, :n]
    product: Tensor = a.to(torch.float32) @ b.to(torch.float32)
    return product


def _dense(t: Tensor) -> Tensor:
    """Contiguous, with the strides that say so in dimensions of one element too: torch 2.13 multiplies others wrongly."""
    return t.contiguous().view(-1).view(t.shape)


def _padded(t: Tensor, down: int, right: int) -> Tensor:
    if not down and not right:
        return t
    out = t.new_zeros((t.shape[0] + down, t.shape[1] + right))
    out[: t.shape[0], : t.shape[1]] = t
    return out


def fake_low_bit_mm(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.int32 if a.dtype == torch.int8 else torch.float32)


def quantized_linear(
    x: Tensor,
    weight: Tensor,
    scales: Sequence[Tensor],
    scheme: str,
    act: str,
    grad: str,
    estimator: str = "ste",
    fit: str = "minmax",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`x @ weight.T` by products of 8-bit codes, in both directions.

    Args:
        x: `[..., k]`, any float dtype, finite. weight: `[n, k]`, any float dtype.
        scales: what `choose_qparams(weight, scheme, fit)` returned.
        scheme, act, grad: canonical spellings; see `why_no_products`.
        estimator: the gradient at the weight's rounding; it may learn nothing.
        dtype: of the result.

    Raises:
        QCError: "products.scheme".
    """
    what, how = [Scheme.parse(text) for text in (scheme, act, grad)], estimator_of(estimator)
    why = why_no_products(*what) or ("its estimator learns scales" if how.learned else "")
    if why:
        raise QCError("products.scheme", f"no 8-bit products with {scheme}, {act} and {grad}", why=why)
    if not x.numel():  # no rows have no scales
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype))
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _QuantizedLinear.apply(rows, weight, *what, how, fit, dtype, *scales)  # type: ignore[no-untyped-call]
    return y.view(*x.shape[:-1], weight.shape[0])


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scheme: Scheme,
        act: Scheme,
        grad: Scheme,
        how: Estimator,
        fit: str,
        dtype: torch.dtype,
        *scales: Tensor,
    ) -> Tensor:
        qx, sx = _rows(x.to(torch.float32), act)
        y: Tensor = torch.ops.qcompile.low_bit_mm(qx, _codes(weight, scheme, scales).t().contiguous())
        ctx.save_for_backward(qx, sx, weight, *scales)
        ctx.types, ctx.scheme, ctx.grad, ctx.how, ctx.fit = (x.dtype, weight.dtype), scheme, grad, how, fit
        result: Tensor = (y.to(torch.float32) * sx * _scale(scales, scheme).t()).to(dtype)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        qx, sx, weight, *scales = ctx.saved_tensors
        g, dx, dw = g.to(torch.float32), None, None
        if ctx.needs_input_grad[0]:
            q, s = _rows(g * _scale(scales, ctx.scheme).t(), ctx.grad)
            dx = torch.ops.qcompile.low_bit_mm(q, _codes(weight, ctx.scheme, scales)).to(torch.float32) * s
            dx = dx.to(ctx.types[0])
        if ctx.needs_input_grad[1]:
            q, s = _rows((g * sx).t(), ctx.grad)
            dw = _long_product(q.contiguous(), qx) * s
            if not ctx.how.covers(ctx.scheme, ctx.fit):
                at = estimate(weight, ctx.how, ctx.scheme, scales, len(scales))
                dw = ctx.how.backward(dw, at)[0]
            dw = dw.to(ctx.types[1])
        return dx, dw, *[None] * (6 + len(scales))


def _long_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` as float32, for sums over all tokens of a step: in pieces, where 32 bits may not hold one."""
    if a.shape[1] <= LONGEST:
        whole: Tensor = torch.ops.qcompile.low_bit_mm(a, b).to(torch.float32)
        return whole
    pieces = zip(a.split(LONGEST, 1), b.split(LONGEST, 0), strict=True)
    result: Tensor = sum(torch.ops.qcompile.low_bit_mm(c, d).to(torch.float32) for c, d in pieces)
    return result


def _scale(scales: Sequence[Tensor], scheme: Scheme) -> Tensor:
    """float32 `[n, 1]`."""
    return load_scale(scales[0], scheme.scale.format)


def _codes(weight: Tensor, scheme: Scheme, scales: Sequence[Tensor]) -> Tensor:
    """The weight's levels `[n, k]`, one byte each."""
    codes = encode(weight, scheme, unpack_qparams(scales, scheme, 2))
    return _narrow(decode_element(codes, scheme.format), scheme.format)


def _rows(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Levels of `x` `[m, k]`, one byte each, and float32 scales `[m, 1]`."""
    if scheme.rounding == "nearest":
        q, s = quantize_rows(x, scheme)
        return _narrow(q, scheme.format), s
    top = scheme.format.max
    peak = x.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak > 0, torch.full_like(peak, top) / peak, torch.zeros_like(peak))
    # Other bits in every step, from torch's generator, so that a rounding is right on average over steps.
    seed = torch.randint(0, 2**31 - 1, (2,), device=x.device)
    bits = random_bits(x.numel(), seed[0], 0, (seed[1], 0), x.device).view(x.shape)
    q = round_to_integer((x * inverse).nan_to_num(0.0), "stochastic", bits)
    return _narrow(torch.clamp(q, -top, top), scheme.format), peak / top


def _narrow(levels: Tensor, fmt: Format) -> Tensor:
    return levels.to(torch.int8 if fmt.kind == "int" else _NATIVE[fmt.name])


__all__ = ["LONGEST", "fake_low_bit_mm", "low_bit_mm", "quantized_linear", "why_no_products"]
