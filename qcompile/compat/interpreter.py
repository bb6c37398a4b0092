"""What Triton's interpreter computes wrongly or not at all, repaired while `triton.interpreted` holds.

The interpreter runs kernels in numpy, which has no bf16: it keeps the 16-bit patterns as integers and, in several
places, computes with the patterns. Here every operation on bf16 widens to fp32 and rounds its result to nearest even,
which is what devices do. Conversions from and to the two common fp8 formats, which are wrong in rounding, in infinity
and in NaN, are torch's. Atomics read the memory of their operands as if it were dense; where one was broadcast that is
other memory. Functions of libdevice, a library of device code, get bodies in numpy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

_MISSING = object()


def replace(stack: ExitStack, owner: Any, name: str, value: object) -> None:
    """Set an attribute until `stack` closes; one that was inherited or missing is removed again."""
    old = vars(owner).get(name, _MISSING)
    stack.callback(lambda: delattr(owner, name) if old is _MISSING else setattr(owner, name, old))
    setattr(owner, name, value)


def widen(patterns: Any) -> Any:
    """bf16 patterns (uint16) as float32, exactly."""
    return (np.asarray(patterns).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: Any, *, toward_zero: bool = False) -> Any:
    """float32 as bf16 patterns (uint16), to nearest even; NaN stays NaN, quiet."""
    bits = np.asarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(0) if toward_zero else np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, (bits + half) >> np.uint32(16)).astype(np.uint16)


def to_fp8(values: Any, dtype: torch.dtype) -> Any:
    """Floats as fp8 codes (uint8), to nearest even; too large ones become the largest finite, as on a device."""
    limit = torch.finfo(dtype).max
    clipped = np.clip(np.asarray(values, dtype=np.float32), -limit, limit)
    codes = torch.from_numpy(np.ascontiguousarray(clipped)).to(dtype).view(torch.uint8)
    return codes.numpy().reshape(clipped.shape)


def repair_floats(stack: ExitStack, interpreter: Any) -> None:
    """bf16 in casts, arithmetic, constants, dot products and reductions; fp8 in casts and dot products."""
    tl = interpreter.tl
    fp8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    plain = {tl.float16, tl.float32, tl.float64}
    handle = interpreter.TensorHandle
    builder = interpreter.InterpreterBuilder

    def is_bf16(arg: Any) -> bool:
        return bool(arg.dtype.scalar == tl.bfloat16)

    def wide(arg: Any) -> Any:
        return handle(widen(arg.data), tl.float32) if is_bf16(arg) else arg

    def result(computed: Any) -> Any:
        """A result in fp32 as bf16; a comparison's stays what it is."""
        if computed.data.dtype == np.bool_:
            return handle(computed.data, tl.int1)
        return handle(narrow(computed.data), tl.bfloat16)

    def through_fp32(name: str, operands: int) -> None:
        original = getattr(builder, name)

        def method(self: Any, *args: Any) -> Any:
            if not any(is_bf16(arg) for arg in args[:operands]):
                return original(self, *args)
            return result(original(self, *(wide(arg) for arg in args[:operands]), *args[operands:]))

        replace(stack, builder, name, method)

    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar != tl.bfloat16:
            return cast(self, wide(src), dst_type)
        return src if is_bf16(src) else handle(narrow(src.data.astype(np.float32)), tl.bfloat16)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding: Any) -> Any:
        toward_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
        src, dst = from_fp8(wide(src)), dst_type.scalar
        if dst == tl.bfloat16:
            return handle(narrow(src.data, toward_zero=toward_zero), dst)
        if dst in fp8 and not toward_zero:
            return handle(to_fp8(src.data, fp8[dst]), dst)
        if {src.dtype.scalar, dst} <= plain and not toward_zero:
            return cast(self, src, dst)
        return convert(self, src, dst_type, rounding)

    def from_fp8(arg: Any) -> Any:
        if arg.dtype.scalar not in fp8:
            return arg
        codes = torch.from_numpy(np.ascontiguousarray(arg.data)).view(fp8[arg.dtype.scalar])
        return handle(codes.float().numpy().reshape(arg.data.shape), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        out = dot(self, from_fp8(wide(a)), from_fp8(wide(b)), wide(d), *options)
        return result(out) if is_bf16(d) else out

    def get_bf16(self: Any, value: float) -> Any:
        return handle(narrow(np.array([value], dtype=np.float32)), tl.bfloat16)

    # Not `create_select`: it moves patterns and computes nothing.
    for name, operands in {"binary_op": 2, "create_clampf": 3, "create_fma": 3, "unary_op": 1}.items():
        through_fp32(name, operands)
    changed = {
        "cast_impl": cast_impl,
        "create_fp_to_fp": create_fp_to_fp,
        "create_dot": create_dot,
        "get_bf16": get_bf16,
    }
    for name, method in changed.items():
        replace(stack, builder, name, method)
    _repair_reductions(stack, interpreter)


def _repair_reductions(stack: ExitStack, interpreter: Any) -> None:
    """Sums, minima and maxima that numpy takes over a whole axis."""
    tl = interpreter.tl

    def repaired(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def method(self: Any, input: Any, *rest: Any, **options: Any) -> Any:
            value = input[0] if isinstance(input, tuple) else input
            if value.dtype != tl.bfloat16:
                return original(self, input, *rest, **options)
            return back(original(self, self.to_tensor(widen(value.handle.data), tl.float32), *rest, **options))

        return method

    def back(out: Any) -> Any:
        if isinstance(out, (tuple, list)):
            return type(out)(back(part) for part in out)
        if out.dtype != tl.float32:
            return out
        data = narrow(out.handle.data)
        kind = tl.block_type(tl.bfloat16, list(data.shape)) if out.type.is_block() else tl.bfloat16
        return tl.tensor(interpreter.TensorHandle(data, tl.bfloat16), kind)

    for owner, name in (
        (interpreter.ReduceOps, "sum"),
        (interpreter.ReduceOps, "min_max"),
        (interpreter.ScanOps, "cumsum"),
        (interpreter.ScanOps, "cumprod"),
    ):
        replace(stack, owner, name, repaired(getattr(owner, name)))


def repair_atomics(stack: ExitStack, interpreter: Any) -> None:
    """Operands that were broadcast."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def dense(original: Callable[..., Any]) -> Callable[..., Any]:
        def method(self: Any, *args: Any) -> Any:
            same = (handle(np.ascontiguousarray(a.data), a.dtype) if isinstance(a, handle) else a for a in args)
            return original(self, *same)

        return method

    for name in ("create_atomic_rmw", "create_atomic_cas"):
        replace(stack, builder, name, dense(getattr(builder, name)))


def _torch(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    return lambda *args: function(*(torch.from_numpy(np.ascontiguousarray(arg)) for arg in args)).numpy()


_SAME_NAME = "cosh sinh tan tanh log10 log1p expm1 cbrt hypot copysign fmod trunc rint nextafter".split()
# Names that `tl.math` has are forwarded there and are not in this table.
_FLOAT: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(
    {
        **{name: getattr(np, name) for name in _SAME_NAME},
        "acos": np.arccos,
        "acosh": np.arccosh,
        "asin": np.arcsin,
        "asinh": np.arcsinh,
        "atan": np.arctan,
        "atan2": np.arctan2,
        "atanh": np.arctanh,
        "fast_tanhf": np.tanh,
        "mul_rn": np.multiply,
        "nearbyint": np.rint,
        "pow": np.power,
        "erfc": _torch(torch.erfc),
        "erfcx": _torch(torch.special.erfcx),
        "erfinv": _torch(torch.erfinv),
        "ldexp": lambda x, exponent: np.ldexp(x, exponent.astype(np.int32)),
        "lgamma": _torch(torch.lgamma),
        "cyl_bessel_i0": _torch(torch.special.i0),
        "cyl_bessel_i1": _torch(torch.special.i1),
        "j0": _torch(torch.special.bessel_j0),
        "j1": _torch(torch.special.bessel_j1),
        "y0": _torch(torch.special.bessel_y0),
        "y1": _torch(torch.special.bessel_y1),
    }
)
_INT: MappingProxyType[str, Callable[..., Any]] = MappingProxyType(
    {
        "isnan": np.isnan,
        "isinf": np.isinf,
        "finitef": np.isfinite,
        "isfinited": np.isfinite,
        "signbit": np.signbit,
        "llrint": lambda x: np.rint(x).astype(np.int64),
        "ilogb": lambda x: np.frexp(x)[1] - 1,
    }
)


def replace_libdevice(stack: ExitStack, interpreter: Any) -> None:
    """Bodies for the functions of libdevice; one without a body raises NotImplementedError when it is called."""
    from triton.language.extra import libdevice
    from triton.language.extra.cuda import libdevice as cuda

    for module in (libdevice, cuda):
        for name, old in list(vars(module).items()):
            if callable(old) and not name.startswith("_") and getattr(old, "__module__", None) == module.__name__:
                replace(stack, module, name, _body(name, interpreter))


def _body(name: str, interpreter: Any) -> Callable[..., Any]:
    tl = interpreter.tl

    def forwarded(*args: Any) -> Any:  # looked up when called: the interpreter replaces it while a kernel runs
        return getattr(tl.math, name)(*args)

    def computed(*args: Any) -> Any:
        semantic = interpreter.interpreter_semantic
        first = semantic.to_tensor(args[0])
        if first.dtype not in (tl.float32, tl.float64):
            raise TypeError(f"libdevice.{name} takes fp32 or fp64, not {first.dtype}")
        rest = [semantic.cast(semantic.to_tensor(arg), first.dtype) for arg in args[1:]]
        data = [arg.handle.data for arg in (first, *rest)]
        if name in _FLOAT:
            out, dtype = np.asarray(_FLOAT[name](*data), dtype=data[0].dtype), first.dtype
        else:
            out, dtype = np.asarray(_INT[name](*data)), tl.int64 if name == "llrint" else tl.int32
            out = out.astype(np.int64 if dtype == tl.int64 else np.int32)
        block = any(arg.type.is_block() for arg in (first, *rest))
        kind = tl.block_type(dtype, list(out.shape)) if block else dtype
        return tl.tensor(interpreter.TensorHandle(out, dtype), kind)

    def missing(*args: Any) -> Any:
        raise NotImplementedError(f"libdevice.{name} has no body for the interpreter")

    if hasattr(tl.math, name):
        return forwarded
    return computed if name in _FLOAT or name in _INT else missing
