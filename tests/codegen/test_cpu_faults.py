"""What must not take a process down: memory that is out, and C++ whose behaviour is not defined.

Each case has a process of its own, whose memory is limited, or which its kernel stops.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from qcompile.codegen.devices.cpu import ISAS, CpuLowering, detect_isa
from qcompile.codegen.spec import KernelSpec
from qcompile.compat import cpp_compiler
from qcompile.ir.scheme import Scheme

RUNNABLE = ISAS[ISAS.index(detect_isa()) :]

_OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
import torch
import qcompile.backend
from qcompile.codegen.devices import cpu
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.matmul import MatmulSpec

how, rows = sys.argv[1], int(sys.argv[2])

def call(x, parts, k):
    text = f"int4/g32:fp16 n=16 k={k}"
    if how == "eager":
        return torch.ops.qcompile.qmm(x, parts, [], text)
    return cpu.run(KernelSpec.of(MatmulSpec.parse(text), "f32", "f32"), x, parts, [], 16, k)

def operands(k):
    blocks = k // 32
    packed = [torch.full((1, blocks, 256), 0x88, dtype=torch.uint8), torch.ones(1, blocks, 16, dtype=torch.half)]
    return torch.zeros(rows, k), packed, k

call(*operands(1 << 17))  # builds, starts threads
large = operands(1 << 23)
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (2 << 20), -1))
try:
    call(*large)
except (MemoryError, RuntimeError) as error:
    print(type(error).__name__, error)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
assert (call(*large) == 0).all()  # nothing of the failure is left
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space as Linux does")
@pytest.mark.parametrize("rows", [4, 14])
@pytest.mark.parametrize("how", ["compiled", "eager"])
def test_memory_that_is_out_is_an_error(how: str, rows: int) -> None:
    """Quantized rows of the few and of the many, larger than what the C library holds in reserve (64 MB)."""
    done = subprocess.run(
        [sys.executable, "-c", _OUT_OF_MEMORY, how, str(rows)], capture_output=True, text=True, check=False
    )
    name = "MemoryError" if how == "eager" else "RuntimeError"
    assert (done.returncode, done.stdout.strip()) == (0, f"{name} qmm: no memory for quantized rows"), done.stderr


_BAD_ROWS = """
import ctypes, sys
import torch
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import quantize
from qcompile.ir.scheme import Scheme

path, weight, types, n, k = sys.argv[1], sys.argv[2], sys.argv[3].split(","), 20, 100
call = ctypes.CDLL(path).kernel
call.argtypes, call.restype = [ctypes.c_int64 if t == "int64_t" else ctypes.c_void_p for t in types], None
parts = quantize(torch.randn(n, k), Scheme.parse(weight))
extra = torch.full((n,), -1, dtype=torch.int16)  # NaNs with every bit set
for m in (1, 4, 30):
    for bad in (float("nan"), -float("inf"), 2.0**-140):
        x, y = torch.full((m, k), 3.0), torch.empty(m, n)
        x[0, 3] = x[-1, 98] = bad
        x[m // 2] = bad
        call(x.data_ptr(), *(t.data_ptr() for t in (*parts, extra, y)), m, k, k, n, n)
"""


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize(
    ("weight", "act"), [("uint5/axis0:fp32+z", "int8/token"), ("int8/g64:fp16", "int8/g32:fp32")], ids=str
)
def test_bad_rows_are_no_undefined_behaviour(weight: str, act: str, isa: str, tmp_path: Path) -> None:
    """A row with a NaN or an infinity gives NaN, but on the way its digits may be any, and so may fresh memory."""
    compiler = cpp_compiler()
    assert compiler
    spec = KernelSpec(
        Scheme.parse(weight), Scheme.parse(act), epilogue="silu(acc)+e0", extras=(("row", "f16"),), y="f16"
    )
    kernel = CpuLowering(isa).emit(spec)
    text, library = tmp_path / "kernel.cpp", tmp_path / "kernel.so"
    text.write_text(kernel.source)
    # Traps instead of messages: they need no library beside the compiler.
    flags = "-fsanitize=undefined,float-cast-overflow -fsanitize-undefined-trap-on-error -fno-sanitize=alignment"
    flags += " -std=c++20 -O1 -fopenmp -shared -fPIC -w"
    subprocess.run([compiler, *flags.split(), "-o", library, text], check=True)
    command = [sys.executable, "-c", _BAD_ROWS, library, weight, ",".join(kernel.argtypes)]
    fresh = {**os.environ, "MALLOC_PERTURB_": "129"}  # glibc fills with 0x7e: 8e37 as a float
    done = subprocess.run(command, env=fresh, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr or f"stopped by signal {-done.returncode}"
