"""Epilogue expressions: the vector functions against float64, and the translation of the language."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

from qcompile.codegen.devices.cpu import ISAS, detect_isa
from qcompile.codegen.devices.cpu_text import fragment
from qcompile.codegen.epilogue import FUNCTIONS, literal, vector_expression
from qcompile.compat import load_cpp_kernel
from qcompile.ir.matmul import BINARY_FUNCTIONS, EPILOGUE_FUNCTIONS

RUNNABLE = ISAS[ISAS.index(detect_isa()) :]
# Largest error in units in the last place, as `mathfun.h` states them; 0 means the same bits as torch.
ULPS = {
    "exp": 2.0,
    "log": 3.0,
    "tanh": 3.0,
    "erf": 3.0,
    "sigmoid": 3.0,
    "silu": 4.0,
    "rsqrt": 2.0,
    "relu": 0.0,
    "abs": 0.0,
    "sqrt": 0.5,
    "maximum": 0.0,
    "minimum": 0.0,
}

# x exp(x) where exp(x) is subnormal, rounded to a multiple of 2^-149: |x| < 104 times one such step and a half.
SUBNORMAL = {"silu": 156 * 2.0**-149}


@functools.cache
def vector_functions(isa: str) -> Callable[..., None]:
    """One kernel that applies function number `which` to 16 lanes at a time."""
    cases = "".join(
        f"      case {i}: r = {name}(a{', b' if function in BINARY_FUNCTIONS else ''}); break;\n"
        for i, (function, name) in enumerate(FUNCTIONS.items())
    )
    source = (
        fragment("fragments", "prelude")
        + f"namespace {{ constexpr int DIGITS = 1, CODE_TOP = 15; // {isa}\n"
        + fragment("fragments", isa)
        + fragment("fragments", "mathfun")
        + "}\n"
        + 'extern "C" void kernel(const float* x, const float* z, float* y, int64_t n, int64_t which) {\n'
        + "  for (int64_t i = 0; i < n; i += 16) {\n    VF a = fload(x + i), b = fload(z + i), r = a;\n"
        + f"    switch (which) {{\n{cases}    }}\n    fstore(y + i, r);\n  }}\n}}\n"
    )
    types = ["const float*", "const float*", "float*", "int64_t", "int64_t"]
    return load_cpp_kernel(types, source)


def samples() -> torch.Tensor:
    """All binades, both signs, dense where the functions bend, and the special values."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x7F800000, (1 << 16,), generator=generator, dtype=torch.int32)
    near = torch.randn(1 << 16, generator=generator) * 8
    special = torch.tensor([0.0, 1.0, 0.625, 4.0, 88.7, 89.0, 104.0, float("inf"), float("nan"), 2.0**-149])
    x = torch.cat([bits.view(torch.float32), near, special, torch.linspace(-20, 20, 1 << 16)])
    return torch.nn.functional.pad(torch.cat([x, -x]), (0, -2 * x.numel() % 16))


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("function", EPILOGUE_FUNCTIONS)
def test_function(function: str, isa: str) -> None:
    x = samples()
    other = x.roll(5)
    y = torch.empty_like(x)
    vector_functions(isa)(x, other, y, x.numel(), list(FUNCTIONS).index(function))
    wide = (x.double(), other.double()) if function in BINARY_FUNCTIONS else (x.double(),)
    want = EPILOGUE_FUNCTIONS[function](*wide)
    rounded = want.float()
    assert torch.equal(y.isnan(), rounded.isnan())
    # An infinity is wanted where the exact value rounds to one; within the allowed error of that border both are right.
    top = torch.finfo(torch.float32).max
    both = ~rounded.isnan() & (want.abs() < top * (1 + 2.0**-20)) & y.isfinite()
    infinite = ~rounded.isnan() & ~both
    assert torch.equal(y[infinite], rounded[infinite])
    exponent = torch.frexp(want[both].clamp(-top, top))[1].clamp(min=-125)
    ulp = torch.ldexp(torch.ones_like(want[both]), exponent - 24)
    error = ((y[both].double() - want[both]).abs() - SUBNORMAL.get(function, 0.0)) / ulp
    assert error.max() <= ULPS[function], f"{error.max()} at {x[both][error.argmax()]}"


def test_translation() -> None:
    names = {"acc": "a[0]", "e0": "e0"}
    assert vector_expression("", names) == "a[0]"
    assert vector_expression("-acc * 2 + e0", names) == "fadd(fmul(fneg(a[0]), fset(0x1.0000000000000p+1f)), e0)"
    assert vector_expression("maximum(acc/e0, 0.1)", names).startswith("v_maximum(fdiv(a[0], e0), fset(0x1.99999a")


def test_a_literal_is_the_nearest_float() -> None:
    assert float.fromhex(literal(0.1)[:-1]) == torch.tensor(0.1).item()
    assert literal(1e39) == "std::numeric_limits<float>::infinity()"
    assert literal(-1e39) == "-std::numeric_limits<float>::infinity()"
