"""The `qcompile::` operators: the border between graph passes and kernels.

Each has a schema, a meta ("fake") rule and a plain-torch meaning that works on every device; kernels are only faster
spellings of these, and `reference_only` keeps them out.  Schemes travel as strings, so a graph prints what it does and
caches key on it.

| op | meaning |
|---|---|
| `qmm(x, parts, extras, spec)` | matmul with packed weights and an epilogue, see `MatmulSpec` |
| `qembedding(ids, parts, scheme, n, k, dtype)` | rows of a packed table |
| `decode(parts, scheme, n, k, dtype)` | the float weight `[n, k]` of packed parts |
| `choose_qparams(x, scheme, fit)` | scales of a tensor, as constants, see `estimators` |
| `fake_quant(x, scales, learned, scheme, estimator, fit, seed)` | x rounded, with an estimator's gradient |
| `rotate(x, size, signs, inverse, dtype)` | blocks of the last dimension turned by a Hadamard matrix, see `hadamard.rotate` |
| `step_(state, inputs, hyper, random, spec)` | an optimizer's step of many parameters, in place, see `StepSpec`, `check_step` |
| `observe_(new, range, calls, lines, momentum)` | the range to round by; moves the average, see `observed` |
| `rounded(x, random, row, dtype)` | float32 to 16 bits by stochastic rounding, with the bits of one row of `random` |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from qcompile.errors import QCError
from qcompile.ir.codec import check_parts, dequantize, dequantize_rows
from qcompile.ir.estimators import chosen_qparams, fake_quant, rounded_scale
from qcompile.ir.hadamard import check_rotation, rotate
from qcompile.ir.matmul import OUT_DTYPES, MatmulSpec, check_float, check_operands, check_static, reference_qmm
from qcompile.ir.observed import fake_observe, observe_
from qcompile.ir.products import fake_low_bit_mm, low_bit_mm, quantized_linear
from qcompile.ir.rounding import random_bits
from qcompile.ir.scheme import Scheme
from qcompile.ir.step_reference import check_step, step_reference
from qcompile.ir.stochastic_cast import stochastic_cast

LIBRARY = torch.library.Library("qcompile", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_SCHEMAS = (
    "qmm(Tensor x, Tensor[] parts, Tensor[] extras, str spec) -> Tensor",
    "qembedding(Tensor ids, Tensor[] parts, str scheme, int n, int k, ScalarType dtype) -> Tensor",
    "decode(Tensor[] parts, str scheme, int n, int k, ScalarType dtype) -> Tensor",
    "choose_qparams(Tensor x, str scheme, str fit) -> Tensor[]",
    "fit_qparams(Tensor x, str scheme, str fit) -> Tensor[]",
    "stored_scale(Tensor step, str scheme) -> Tensor",
    "fake_quant(Tensor x, Tensor[] scales, Tensor[] learned, str scheme, str estimator, str fit, int seed=0) -> Tensor",
    "observe_(Tensor new, Tensor(a!) range, Tensor(b!) calls, Tensor(c!) lines, float momentum) -> Tensor",
    "low_bit_mm(Tensor a, Tensor b) -> Tensor",
    "quantized_linear(Tensor x, Tensor weight, Tensor[] scales, str scheme, str act, str grad, str estimator, str fit, "
    "ScalarType dtype) -> Tensor",
    "rotate(Tensor x, int size, Tensor? signs=None, bool inverse=False, ScalarType? dtype=None) -> Tensor",
    "rounded(Tensor x, Tensor random, int row, ScalarType dtype) -> Tensor",
    "step_(Tensor(a!)[] state, Tensor[] inputs, Tensor hyper, Tensor? random, str spec) -> ()",
)
for _schema in _SCHEMAS:
    LIBRARY.define(_schema, tags=_TAGS)


_REFERENCE_ONLY: ContextVar[bool] = ContextVar("qcompile_reference_only", default=False)


@contextmanager
def reference_only() -> Iterator[None]:
    """Inside the block, in this thread, operators run their plain-torch meaning even where there are kernels."""
    token = _REFERENCE_ONLY.set(True)
    try:
        yield
    finally:
        _REFERENCE_ONLY.reset(token)


def reference_forced() -> bool:
    """Whether this is a `reference_only` block."""
    return _REFERENCE_ONLY.get()


def qmm_reference(
    x: torch.Tensor, parts: Sequence[torch.Tensor], extras: Sequence[torch.Tensor], spec: str
) -> torch.Tensor:
    """The plain-torch meaning of `qmm`."""
    return reference_qmm(x, parts, extras, MatmulSpec.parse(spec))


def _qembedding(
    ids: torch.Tensor, parts: Sequence[torch.Tensor], scheme: str, n: int, k: int, dtype: torch.dtype
) -> torch.Tensor:
    check_float("qembedding", "result", dtype)
    check_parts(parts, Scheme.parse(scheme), n, k)
    # Panels are padded, so an id beyond the table would find a row. A lookup in the row numbers themselves makes torch
    # check it, in eager mode and in generated code, as it does for a float table; compiled, it reads no memory.
    rows = torch.arange(n, device=ids.device).unsqueeze(1)
    checked = torch.nn.functional.embedding(ids.reshape(-1), rows).squeeze(1)
    rows = dequantize_rows(list(parts), scheme, k, checked, dtype)
    return rows.reshape(*ids.shape, k)


def _decode(parts: Sequence[torch.Tensor], scheme: str, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    check_float("decode", "result", dtype)
    return dequantize(list(parts), Scheme.parse(scheme), n, k, dtype)


def _fake_qmm(
    x: torch.Tensor, parts: Sequence[torch.Tensor], extras: Sequence[torch.Tensor], spec: str
) -> torch.Tensor:
    # Every traced graph passes here, so no compiled code meets tensors other than it was written for.
    what = check_qmm(x, parts, extras, spec)
    dtype = OUT_DTYPES[what.out] if what.out else x.dtype
    return x.new_empty((*x.shape[:-1], what.columns), dtype=dtype)


def check_qmm(x: torch.Tensor, parts: Sequence[torch.Tensor], extras: Sequence[torch.Tensor], spec: str) -> MatmulSpec:
    """What `qmm` computes, of operands that fit it.

    Raises:
        QCError: `matmul.operands`, `codec.parts`, `packing.shape`; torch's RuntimeError for sizes, which may be symbolic.
    """
    what = MatmulSpec.parse(spec)
    step = what.parts_per_segment
    for i, n in enumerate(what.n):
        check_parts(parts[i * step : (i + 1) * step], what.weight, n, what.k)
    check_operands(x, parts, extras, what)
    check_static(parts[step * len(what.n) :], what)
    names = ["x", *(f"extra {i}" for i in range(len(extras)))]
    for name, operand, shape in zip(names, (x, *extras), what.shapes(x.shape[:-1]), strict=True):
        if operand.dim() != len(shape):
            raise QCError("matmul.operands", f"{name} has the shape {tuple(operand.shape)}, not {shape}", where=spec)
        for size, want in zip(operand.shape, shape, strict=True):
            torch._check(size == want, lambda n=name, s=size, w=want: f"{n} of {spec} has a size {s}, not {w}")
    return what


def _fake_decode(parts: Sequence[torch.Tensor], scheme: str, n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    check_float("decode", "result", dtype)
    check_parts(parts, Scheme.parse(scheme), n, k)
    return parts[0].new_empty((n, k), dtype=dtype)


def _fake_rotate(
    x: torch.Tensor,
    size: int,
    signs: torch.Tensor | None = None,
    inverse: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    check_rotation(x, size, signs, dtype)
    return x.new_empty(x.shape, dtype=dtype or x.dtype)


def _fake_step(
    state: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    hyper: torch.Tensor,
    random: torch.Tensor | None,
    spec: str,
) -> None:
    check_step(state, inputs, hyper, random, spec)


def rounded(x: torch.Tensor, random: torch.Tensor, row: int, dtype: torch.dtype) -> torch.Tensor:
    """The plain-torch meaning of `rounded`: what `step_` writes for a parameter that is assigned `x`.

    Args:
        x: float32, any shape; elements count in the order of indices.
        random: int64 `[parameters, 4]`, columns `step_reference.RANDOM`.
        row: the parameter's.
        dtype: bfloat16 or float16.

    Raises:
        QCError: "rounding.cast-dtype".
    """
    seed, step, number, offset = random[row]
    bits = random_bits(x.numel(), seed, offset, (step, number), x.device)
    return stochastic_cast(x.contiguous(), dtype, bits.view(x.shape))


def _fake_rounded(x: torch.Tensor, random: torch.Tensor, row: int, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _rotate_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, size, signs, inverse, _ = inputs
    ctx.save_for_backward(*([] if signs is None else [signs]))
    ctx.size, ctx.inverse, ctx.x_dtype = size, inverse, x.dtype


def _rotate_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """A rotation's transpose is its inverse."""
    signs = next(iter(ctx.saved_tensors), None)
    back = torch.ops.qcompile.rotate(grad, ctx.size, signs, not ctx.inverse, ctx.x_dtype)
    return back, None, None, None, None


def _choose_qparams(x: torch.Tensor, scheme: str, fit: str) -> list[torch.Tensor]:
    """Spelled out where that computes the same bits. A search looks at values; and where a value is rounded to 16 bits
    and read again in one loop, Inductor's C++ leaves the rounding out (2.13, `eliminate_to_dtype`). Those are an operator
    of their own."""
    what = Scheme.parse(scheme)
    plain = all(scale.format.dtype.itemsize == 4 for scale in (what.scale, what.outer) if scale is not None)
    if fit == "minmax" and plain:
        return chosen_qparams(x, scheme, fit)
    found: list[torch.Tensor] = torch.ops.qcompile.fit_qparams(x.detach(), scheme, fit)
    return found


def _fake_fit_qparams(x: torch.Tensor, scheme: str, fit: str) -> list[torch.Tensor]:
    # Every fit returns what the closed form returns, in shape and dtype.
    return chosen_qparams(x, scheme, "minmax")


def _autocast_qmm(
    x: torch.Tensor, parts: Sequence[torch.Tensor], extras: Sequence[torch.Tensor], spec: str
) -> torch.Tensor:
    """Under autocast a linear takes its activation in the autocast dtype; packed scales keep theirs."""
    device = x.device.type
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST_KEYS[device])):
        if x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))
        result: torch.Tensor = torch.ops.qcompile.qmm(x, parts, extras, spec)
        return result


_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def _qmm_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, parts, extras, spec = inputs
    what = MatmulSpec.parse(spec)
    if what.epilogue not in ("", "acc+e0") or what.extras not in ((), ("row",)):
        raise QCError(
            "matmul.grad",
            f"gradient through qmm with epilogue {what.epilogue!r}",
            next="differentiate before fusing",
        )
    ctx.save_for_backward(*parts)
    ctx.spec, ctx.x_shape, ctx.x_dtype, ctx.extras = spec, x.shape, x.dtype, len(extras)


def _qmm_backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
    """dX from the packed weight itself (an activation scheme passes straight through): `dX = dY @ decode(W)`."""
    what, parts = MatmulSpec.parse(ctx.spec), list(ctx.saved_tensors)
    step, dx, start = what.parts_per_segment, None, 0
    for i, n in enumerate(what.n):
        piece = grad.narrow(-1, start, n).to(ctx.x_dtype)
        weight = torch.ops.qcompile.decode(parts[i * step : (i + 1) * step], str(what.weight), n, what.k, ctx.x_dtype)
        term = piece @ weight
        dx, start = term if dx is None else dx + term, start + n
    bias = [grad.reshape(-1, grad.shape[-1]).sum(0)] if ctx.extras else []
    return dx, [None] * len(parts), bias, None


for _name, _meaning, _meta in (
    ("qmm", qmm_reference, _fake_qmm),
    ("decode", _decode, _fake_decode),
    ("low_bit_mm", low_bit_mm, fake_low_bit_mm),
    ("observe_", observe_, fake_observe),
    ("rotate", rotate, _fake_rotate),
    ("fit_qparams", chosen_qparams, _fake_fit_qparams),
    ("stored_scale", rounded_scale, rounded_scale),
    ("step_", step_reference, _fake_step),
    ("rounded", rounded, _fake_rounded),
):
    LIBRARY.impl(_name, _meaning, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qcompile::{_name}", _meta, lib=LIBRARY)
# A lookup is gather and shifts: spelled out in the graph, Inductor makes one pointwise kernel of it.
LIBRARY.impl("qembedding", _qembedding, "CompositeImplicitAutograd")
# So are the roundings of training: their gradients are traced and fused with their surroundings.
LIBRARY.impl("choose_qparams", _choose_qparams, "CompositeImplicitAutograd")
LIBRARY.impl("fake_quant", fake_quant, "CompositeImplicitAutograd")
LIBRARY.impl("quantized_linear", quantized_linear, "CompositeImplicitAutograd")
for _key in _AUTOCAST_KEYS.values():
    LIBRARY.impl("qmm", _autocast_qmm, _key.name)
torch.library.register_autograd("qcompile::qmm", _qmm_backward, setup_context=_qmm_setup, lib=LIBRARY)
torch.library.register_autograd("qcompile::rotate", _rotate_backward, setup_context=_rotate_setup, lib=LIBRARY)
