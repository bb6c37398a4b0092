"""Triton kernels in the interpreter: right in bf16, for compiled functions and users' kernels, and nothing stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import gelu

from qcompile.compat import triton as switch
from qcompile.errors import QCError
from qcompile.testing import interpret as module
from qcompile.testing.interpret import interpret

triton = pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

import triton.language as tl  # noqa: E402
from torch._inductor import config  # noqa: E402
from torch._inductor.utils import run_and_get_code  # noqa: E402
from triton.language.extra import libdevice  # noqa: E402

U32, U16 = 2.0**-24, 2.0**-8  # unit roundoff of fp32 and of bf16


@triton.jit
def halve(x):
    return x * 0.5


@triton.jit
def user_kernel(a, b, out, sums, K: tl.constexpr, N: tl.constexpr):
    """out = bf16(tanh(a @ b / 2)); sums = the sum of every row of a @ b, in bf16."""
    i = tl.arange(0, 16)
    k = tl.arange(0, K)
    n = tl.arange(0, N)
    c = tl.dot(tl.load(a + i[:, None] * K + k[None, :]), tl.load(b + k[:, None] * N + n[None, :]))
    tl.store(sums + i, tl.sum(c.to(tl.bfloat16), axis=1))
    tl.store(out + i[:, None] * N + n[None, :], libdevice.tanh(halve(c)).to(tl.bfloat16))


@triton.jit
def double(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i) * 2)


@triton.jit
def without_body(x, out):
    i = tl.arange(0, 16)
    tl.store(out + i, libdevice.erfcinv(tl.load(x + i)))


def kernels_of(f: Callable[..., Tensor], *args: Tensor) -> tuple[Tensor, str]:
    """What a compiled function gives, and the code Inductor wrote for it."""
    out, code = run_and_get_code(torch.compile(f), *args)
    return out, code[0]


def run_user_kernel(kernel: object) -> None:
    """Small integers: the dot product is exact in fp32, and so are the sums (multiples of 1 below 256) in bf16."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-1, 2, (16, 32), generator=generator).bfloat16()
    b = torch.randint(0, 2, (32, 16), generator=generator).bfloat16()
    out, sums = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, dtype=torch.bfloat16)
    kernel[(1,)](a, b, out, sums, K=32, N=16)
    c = a.double() @ b.double()
    assert c.abs().max() > 2
    assert c.abs().sum(1).max() < 256
    assert torch.equal(sums.double(), c.sum(1))
    exact = (c / 2).tanh()
    # tanh in fp32 within 4 units in the last place, then one rounding to bf16.
    assert ((out.double() - exact).abs() <= exact.abs() * (U16 + 8 * U32)).all()


def state() -> dict[str, object]:
    """Everything the context touches, as it stands now."""
    from triton.language.extra.cuda import libdevice as cuda
    from triton.runtime import driver, interpreter
    from triton.runtime.jit import JITFunction

    owners = [tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base, tl.standard, JITFunction]
    owners += [interpreter, interpreter.InterpreterBuilder, interpreter.InterpretedFunction]
    owners += [interpreter.FunctionRewriter, interpreter.ReduceOps, interpreter.ScanOps, libdevice, cuda]
    found: dict[str, object] = {f"{owner.__name__}": dict(vars(owner)) for owner in owners}
    found["environment"] = dict(os.environ)
    found["inductor"] = config.get_config_copy()
    found["driver"] = (driver._active, driver._default)
    found["rewritten"] = dict(interpreter.InterpretedFunction.rewritten_fn)
    found["globals"] = set(globals())
    return found


def test_self_test_fails_without_the_repairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.compat.triton.repair_floats", lambda *_: None)
    monkeypatch.setattr(module, "_checked", set())
    with pytest.raises(QCError) as caught, interpret():
        pass
    assert caught.value.code == "testing.interpreter"
    assert caught.value.where == f"triton {triton.__version__}"
    for fault in (
        "tl.dot of bf16",
        "fp32 to bf16",
        "integers to bf16",
        "bf16 with bf16",
        "bf16 with constants",
        "fp32 to fp8",
    ):
        assert fault in caught.value.what


@pytest.mark.parametrize(
    ("method", "fault"),
    [
        ("create_dot", "tl.dot of bf16"),
        ("cast_impl", "fp32 to bf16"),
        ("binary_op", "bf16 with bf16"),
        ("create_atomic_rmw", "atomics with a mask for a row"),
    ],
)
def test_one_missing_repair_is_named(monkeypatch: pytest.MonkeyPatch, method: str, fault: str) -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    original = getattr(InterpreterBuilder, method)
    repair = switch.repair_atomics

    def all_but_one(stack: object, interpreter: object) -> None:
        repair(stack, interpreter)
        setattr(InterpreterBuilder, method, original)

    monkeypatch.setattr("qcompile.compat.triton.repair_atomics", all_but_one)
    monkeypatch.setattr(module, "_checked", set())
    with pytest.raises(QCError) as caught, interpret():
        pass
    assert fault in caught.value.what


def test_compiled_softmax_and_gelu() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 33)
    with interpret():
        out, code = kernels_of(lambda x: gelu(torch.softmax(x, -1)), x)
    assert code.count("async_compile.triton(") == 1
    assert "async_compile.cpp" not in code
    p = torch.softmax(x.double(), -1)
    # p: an argument of exp is off by |x - max| u, exp by 2 u, the sum of 33 terms by as much again and 32 u, the
    # quotient by u. gelu has a slope below 1.13; erf, two products and a sum round by 2 u each at most.
    spread = (x.max() - x.min()).item()
    relative = (2 * (spread + 2) + 33) * U32
    assert ((out.double() - gelu(p)).abs() <= p * (1.13 * relative + 8 * U32)).all()


def test_compiled_bf16_chain() -> None:
    """Inductor computes the chain in fp32 and rounds once: half a step, which an interpreter that truncates exceeds."""
    torch.manual_seed(0)
    x = torch.randn(16, 64).bfloat16()
    with interpret():
        out, code = kernels_of(lambda x: torch.tanh(x) * x + 1.5, x)
    assert code.count("async_compile.triton(") == 1
    exact = torch.tanh(x.double()) * x.double() + 1.5
    # tanh within 4 units (8 u), a product, a sum (the terms are positive).
    bound = exact * (U16 + 12 * U32)
    assert ((out.double() - exact).abs() <= bound).all()
    truncated = (exact.float().view(torch.int32) & -(2**16)).view(torch.float32)
    assert ((truncated.double() - exact).abs() > bound).any()


def test_user_kernels() -> None:
    with interpret():
        run_user_kernel(user_kernel)
        run_user_kernel(triton.jit(user_kernel.fn))
        with pytest.raises(Exception, match=r"libdevice\.erfcinv has no body"):
            without_body[(1,)](torch.zeros(16), torch.zeros(16))


def test_user_kernel_in_a_compiled_function() -> None:
    def f(x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        double[(1,)](x * 3, out, N=16)
        return out + 1

    x = torch.arange(16.0)
    with interpret():
        assert torch.equal(torch.compile(f)(x), x * 6 + 1)


def test_a_kernel_without_a_grid_is_refused_and_poisons_nothing() -> None:
    before = state()
    for kernel in (double, triton.jit(double.fn)):
        with interpret(), pytest.raises(QCError, match=r"double was called without a grid[^$]*double\[grid\]\("):
            kernel(torch.zeros(4), torch.zeros(4), N=4)
    assert state() == before


def test_nothing_stays() -> None:
    before = state()
    with interpret():
        run_user_kernel(user_kernel)
        torch.compile(lambda x: torch.softmax(x, -1))(torch.randn(4, 8))
        with interpret():
            pass
        assert os.environ["TRITON_INTERPRET"] == "1"  # the inner one ends nothing
        run_user_kernel(user_kernel)
    assert state() == before
    with pytest.raises(Exception, match="erfcinv"), interpret():
        without_body[(1,)](torch.zeros(16), torch.zeros(16))
    assert state() == before


def test_compiled_functions_are_cpp_outside(own_disk_cache: Path) -> None:
    def f(x: Tensor) -> Tensor:
        return x.relu() + 1

    x = torch.randn(5, 7)
    compiled = torch.compile(f)

    def code() -> str:
        out, text = run_and_get_code(compiled, x)
        assert torch.equal(out, f(x))
        return text[0]

    assert "async_compile.cpp" in code()
    with interpret():
        assert "async_compile.triton(" in code()
    assert "async_compile.cpp" in code()


def test_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.testing.interpret.triton_version", lambda: None)
    with pytest.raises(QCError) as caught, interpret():
        pass
    assert caught.value.code == "testing.no-triton"
