"""Threads inside a kernel and around it: the same bits however the work is shared out."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from qcompile.codegen.devices.cpu import ISAS, CpuLowering, detect_isa, run
from qcompile.codegen.spec import KernelSpec
from qcompile.compat import load_cpp_kernel
from qcompile.ir.codec import quantize
from qcompile.ir.scheme import Scheme

RUNNABLE = ISAS[ISAS.index(detect_isa()) :]
SPEC = KernelSpec(Scheme.parse("int4/g32:fp16"))


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("m", [1, 30])
def test_results_do_not_depend_on_the_number_of_threads(m: int, isa: str) -> None:
    """Each panel is summed by one thread in one order, so sharing panels out differently changes no bit."""
    n, k = 200, 520  # above the size that runs on one thread
    x, parts = torch.randn(m, k), quantize(torch.randn(n, k), SPEC.weight)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [run(SPEC, x, parts, [], n, k, isa) for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], y) for y in results)


def test_concurrent_callers_do_not_share_buffers() -> None:
    """Four Python threads call one kernel at once through ctypes, which releases the interpreter lock."""
    kernel = CpuLowering().emit(SPEC)
    module = load_cpp_kernel(kernel.argtypes, kernel.source).__self__  # type: ignore[attr-defined]
    call = ctypes.CDLL(module.__file__).kernel
    call.argtypes = [ctypes.c_int64 if t == "int64_t" else ctypes.c_void_p for t in kernel.argtypes]
    call.restype = None
    cases = []
    for i, (m, n, k) in enumerate([(1, 90, 700), (3, 33, 64), (17, 160, 300), (40, 16, 1000)]):
        torch.manual_seed(i)
        x, parts = torch.randn(m, k), quantize(torch.randn(n, k), SPEC.weight)
        cases.append((x, parts, run(SPEC, x, parts, [], n, k), n, k))
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(first, first + 40):  # each thread meets every shape, so its buffers grow and are reused
            x, parts, want, n, k = cases[i % len(cases)]
            y = torch.full_like(want, float("nan"))
            m = x.shape[0]
            call(x.data_ptr(), *(p.data_ptr() for p in parts), y.data_ptr(), m, k, k, n, n)
            if not torch.equal(y, want):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
