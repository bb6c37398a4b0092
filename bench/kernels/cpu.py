"""CPU kernels against torch's own linear: speed and correctness in one table.

    python bench/kernels/cpu.py                     # the instruction set of this machine
    QCOMPILE_ISA=avx2 python bench/kernels/cpu.py   # the AVX2 kernels, also on a machine with AVX-512
    python bench/kernels/cpu.py --quick --json out.json
    python bench/kernels/cpu.py --dtype bf16 --rows 16,32,64,128,256,512   # where float layers win: FLOAT_WINS

Contestants of one shape run interleaved, round after round, and each reports its median: a busy neighbour
hits all of them alike, so compare ratios inside one table only. Weights are cold: every call takes the next
of enough copies to exceed the last-level cache. Before anything is timed each kernel's result is compared
with a float64 evaluation under the bound that `qcompile.codegen.devices.cpu_bounds` derives; a kernel outside
of it ends the run with an error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from qcompile.codegen.devices.cpu import CpuLowering, detect_isa, run
from qcompile.codegen.devices.cpu_bounds import expected
from qcompile.codegen.spec import KernelSpec
from qcompile.compat import load_cpp_kernel
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import DTYPE_NAMES, OUT_DTYPES
from qcompile.ir.scheme import Scheme

CACHE = 96 << 20  # bytes of weights that no last-level cache at hand holds
# The presets' schemes first, then what others use.
SCHEMES = (
    ("uint4/g32:fp16+m", "int8/g32:fp32"),
    ("uint4/g32:fp16+m", ""),
    ("int8/g64:fp16", "int8/g32:fp32"),
    ("int8/g64:fp16", ""),
    ("int4/g32:fp16", "int8/token"),
    ("int8/axis0", "int8/token"),
    ("nf4/g64:fp16", ""),
    ("e4m3/axis0", ""),
)
# (rows, outputs, inputs): decode and prefill of a 7B-sized layer, then the layers of SmolLM2-135M.
SHAPES = (
    (1, 4096, 4096),
    (8, 4096, 4096),
    (128, 4096, 4096),
    (1, 576, 576),
    (1, 1536, 576),
    (1, 3072, 576),
    (1, 576, 1536),
    (128, 1536, 576),
    (128, 576, 1536),
)


@dataclass(frozen=True)
class Result:
    """One contestant on one shape: medians, and the ratio of the best rounds (what a loaded machine still shows).

    `error` is the largest error in units of its bound.
    """

    kernel: str
    m: int
    n: int
    k: int
    microseconds: float
    speedup: float
    best_speedup: float
    gigabytes: float
    gigaops: float
    error: float


@dataclass(frozen=True)
class Contestant:
    name: str
    call: Callable[[int], object]
    bytes: int
    error: float = 0.0


def copies(size: int, share: float) -> int:
    """Enough copies of a weight of `size` bytes to be cold."""
    return max(2, min(1000, int(CACHE * share / size) + 1))


def contestant(weight: str, act: str, x: torch.Tensor, n: int, isa: str) -> Contestant:
    (m, k), name = x.shape, DTYPE_NAMES[x.dtype]
    spec = KernelSpec(Scheme.parse(weight), Scheme.parse(act) if act else None, x=name, y=name)
    parts = quantize(torch.randn(n, k) / k**0.5, spec.weight)
    checked = min(n, 256)  # the first 16 panels: float64 of the whole would take gigabytes
    want = expected(spec, x, [part[:16] for part in parts], checked, k)
    y = run(spec, x, parts, [], n, k, isa)
    # The result is rounded to its dtype once: half a unit in the last place, 2^-8 of a bf16 number.
    bound = want.bound if name == "f32" else want.bound + torch.finfo(x.dtype).eps / 2 * (want.value.abs() + want.bound)
    error = ((y[:, :checked] - want.value).abs() / bound).max().item()
    if not error <= 1:
        sys.exit(f"{isa} {spec}: error is {error} times the bound")
    kernel = CpuLowering(isa).emit(spec)
    entry = load_cpp_kernel(kernel.argtypes, kernel.source)
    size = sum(part.numel() * part.element_size() for part in parts)
    pool = [[part.clone() for part in parts] for _ in range(copies(size, 1.0))]

    def call(i: int) -> None:
        entry(x, *pool[i % len(pool)], y, m, k, k, n, n)

    return Contestant(f"{weight} act={act or 'exact'}", call, size, error)


def float_layer(x: torch.Tensor, n: int) -> Contestant:
    size = n * x.shape[1] * x.element_size()
    pool = [torch.randn(n, x.shape[1], dtype=x.dtype) for _ in range(copies(size, 1.0))]
    return Contestant(
        f"F.linear {DTYPE_NAMES[x.dtype]}", lambda i: torch.nn.functional.linear(x, pool[i % len(pool)]), size
    )


def measure(contestants: list[Contestant], rounds: int, m: int, n: int, k: int) -> list[Result]:
    times: list[list[float]] = [[] for _ in contestants]
    calls = max(1, round(3e8 / (m * n * k)))
    calls = min(calls, 20)
    for number in range(rounds + 1):  # the first round warms up
        for each, contest in zip(times, contestants, strict=True):
            start = time.perf_counter()
            for i in range(calls):
                contest.call(number * calls + i)
            each.append((time.perf_counter() - start) / calls)
    medians = [statistics.median(each[1:]) for each in times]
    best = [min(each[1:]) for each in times]
    return [
        Result(
            kernel=c.name,
            m=m,
            n=n,
            k=k,
            microseconds=t * 1e6,
            speedup=medians[0] / t,
            best_speedup=best[0] / b,
            gigabytes=c.bytes / t / 1e9,
            gigaops=2 * m * n * k / t / 1e9,
            error=c.error,
        )
        for c, t, b in zip(contestants, medians, best, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default=detect_isa())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="three shapes, four kernels")
    parser.add_argument("--dtype", choices=("f32", "bf16"), default="f32", help="of activations, results and F.linear")
    parser.add_argument("--rows", help="these numbers of rows, at 1024 x 1024 and 3072 x 768")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shapes = SHAPES[:1] + SHAPES[2:4] if options.quick else SHAPES
    if options.rows:
        shapes = tuple((int(m), n, k) for n, k in ((1024, 1024), (3072, 768)) for m in options.rows.split(","))
    schemes = SCHEMES[:4] if options.quick else SCHEMES
    console, results = Console(width=max(Console().width, 100)), []  # whole names also in a pipe
    for m, n, k in shapes:
        x = torch.randn(m, k).to(OUT_DTYPES[options.dtype])
        contestants = [float_layer(x, n)] + [contestant(weight, act, x, n, options.isa) for weight, act in schemes]
        found = measure(contestants, options.rounds, m, n, k)
        results += found
        table = Table(title=f"M={m} N={n} K={k}, {options.isa}, {options.threads} threads", title_justify="left")
        for name in ("kernel", "us", "x float", "(best)", "GB/s", "GOP/s", "error / bound"):
            table.add_column(name, justify="left" if name == "kernel" else "right")
        for r in found:
            cells = (r.microseconds, r.speedup, r.best_speedup, r.gigabytes, r.gigaops, r.error)
            table.add_row(r.kernel, *(f"{v:.{d}f}" for v, d in zip(cells, (0, 2, 2, 1, 0, 2), strict=True)))
        console.print(table)
    if options.json:
        about = {"isa": options.isa, "threads": options.threads, "torch": torch.__version__}
        options.json.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
