"""Optimizer steps on CPUs: AdamW with state in 8 and 4 bits against torch's own in float32, compiled.

    python bench/kernels/optim.py                     # 50 million parameters, all threads
    QCOMPILE_ISA=avx2 python bench/kernels/optim.py   # the AVX2 kernels, also on a machine with AVX-512
    python bench/kernels/optim.py --quick --json out.json

Everybody steps parameters of the shapes of a small language model, float32 with float32 gradients, or bfloat16 where that
is said. Times are of whole calls of `step()`, Python included. Contestants run interleaved, round after round, and each
reports its median: a busy neighbour hits all of them alike, so compare ratios inside one run only. "x compiled" is the time
of `torch.compile` around `torch.optim.AdamW(foreach=True).step()` with float32 state, divided by the contestant's.

Before anything is timed each kernel's parameters and state after a step are compared, bit for bit, with those of the
plain-torch meaning; a difference ends the run with an error.
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
from torch import Tensor

from qcompile import optim
from qcompile.codegen.devices.cpu import detect_isa
from qcompile.codegen.eager_step import equal
from qcompile.ir.ops import reference_only

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}
WARM_UP = 25  # rounds: compilers run in the first, and small tensors get a kernel when plain torch has cost enough


def shapes(layers: int) -> list[tuple[int, ...]]:
    """Parameters of a decoder: width 512, feed-forward 1408, a table of 32000; layers of 3.2 million."""
    layer = [(512, 512)] * 4 + [(1408, 512)] * 2 + [(512, 1408)] + [(512,)] * 2
    return [(32000, 512), *layer * layers, (512,)]


def parameters(layers: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in shapes(layers):
        p = torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(dtype))
        p.grad = (torch.randn(shape, generator=generator) * 1e-3).to(dtype)
        found.append(p)
    return found


@dataclass(frozen=True)
class Contestant:
    """Somebody's step, and whose time is divided by its own: the place of that one in the list."""

    name: str
    step: Callable[[], object]
    base: int = 0


@dataclass(frozen=True)
class Result:
    """One contestant: medians, and the ratio of the best rounds (what a loaded machine still shows)."""

    name: str
    base: str
    milliseconds: float
    speedup: float
    best_speedup: float


def tensors_of(optimizer: torch.optim.Optimizer, params: list[Tensor]) -> list[Tensor]:
    return params + [t for p in params for t in optimizer.state[p].values()]


def check(bits: int, dtype: torch.dtype) -> None:
    """Two steps of a smaller model by kernels, and by plain torch."""
    results = []
    for plain in (True, False):
        params = parameters(1, dtype)
        optimizer = optim.AdamW(params, state_bits=bits, **SETTINGS)
        for _ in range(2):
            if plain:
                with reference_only():
                    optimizer.step()
            else:
                optimizer.step()
        results.append(tensors_of(optimizer, params))
    wrong = sum(int((~equal(a.detach(), b.detach())).sum()) for a, b in zip(*results, strict=True))
    if wrong:
        sys.exit(f"{bits} bits, {dtype}: {wrong} numbers differ from the plain-torch meaning")


def contestants(layers: int, quick: bool) -> list[Contestant]:
    stock = torch.optim.AdamW(parameters(layers, torch.float32), foreach=True, **SETTINGS)
    compiled = torch.compile(stock.step)
    found = [Contestant("torch AdamW float32, compiled", compiled)]
    fused = torch.optim.AdamW(parameters(layers, torch.float32), fused=True, **SETTINGS)
    found.append(Contestant("torch AdamW float32, fused=True", fused.step))
    for bits, dtype in ((8, torch.float32), (4, torch.float32), (32, torch.float32), (8, torch.bfloat16))[
        : 2 + 2 * (not quick)
    ]:
        check(bits, dtype)
        own = optim.AdamW(parameters(layers, dtype), state_bits=bits, **SETTINGS)
        found.append(Contestant(f"AdamW {bits} bits, {str(dtype)[6:]}", own.step))
    check_rounding()
    for name, settings in (("compiled", {}), ("stochastic", {"backend": "qcompile", "options": {"recipe": "sr"}})):
        half = torch.optim.AdamW(parameters(layers, torch.bfloat16), foreach=True, **SETTINGS)
        base = len(found) - (name == "stochastic")
        found.append(Contestant(f"torch AdamW bfloat16, {name}", torch.compile(half.step, **settings), base))
    return found


def check_rounding() -> None:
    """torch's own step, rewritten: each parameter is one of the two neighbours of the float32 step, and both occur."""
    params = [torch.nn.Parameter(torch.full((1 << 16,), 1.0, dtype=torch.bfloat16))]
    params[0].grad = torch.ones_like(params[0])
    optimizer = torch.optim.AdamW(params, lr=2.0**-10, weight_decay=0.0)
    torch.compile(optimizer.step, backend="qcompile", options={"recipe": "sr"})()
    torch._dynamo.reset()
    values, counts = params[0].detach().float().unique(return_counts=True)
    # 1 - 2**-10 lies a quarter of the way from 1 to the number below, 1 - 2**-8: five standard deviations of a share.
    share = float(counts[0]) / (1 << 16)
    if values.tolist() != [1 - 2.0**-8, 1.0] or abs(share - 0.25) > 5 * (0.25 * 0.75 / (1 << 16)) ** 0.5:
        sys.exit(f"stochastic rounding of torch's AdamW gave {values.tolist()} in shares {counts.tolist()}")


def measure(found: list[Contestant], rounds: int) -> list[Result]:
    times: list[list[float]] = [[] for _ in found]
    for _ in range(rounds + WARM_UP):
        for each, contestant in zip(times, found, strict=True):
            start = time.perf_counter()
            contestant.step()
            each.append(time.perf_counter() - start)
    medians = [statistics.median(each[WARM_UP:]) for each in times]
    best = [min(each[WARM_UP:]) for each in times]
    return [
        Result(c.name, found[c.base].name, t * 1e3, medians[c.base] / t, best[c.base] / b)
        for c, t, b in zip(found, medians, best, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument(
        "--quick", action="store_true", help="7 rounds, of our own only 8 and 4 bits of float32 parameters"
    )
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = contestants(options.layers, options.quick)
    results = measure(found, 7 if options.quick else options.rounds)
    count = sum(torch.Size(shape).numel() for shape in shapes(options.layers))
    table = Table(
        title=f"{count / 1e6:.1f} million parameters, {detect_isa()}, {options.threads} threads", title_justify="left"
    )
    for name in ("step", "ms", "x compiled", "(best)"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for r in results:
        table.add_row(r.name, f"{r.milliseconds:.1f}", f"{r.speedup:.2f}", f"{r.best_speedup:.2f}")
    Console(width=max(Console().width, 100)).print(table)
    if options.json:
        about = {"isa": detect_isa(), "threads": options.threads, "torch": torch.__version__, "parameters": count}
        options.json.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
