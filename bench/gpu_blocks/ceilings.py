"""What the device can do at best, and which versions and interfaces are there: the denominators of all shares."""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from typing import Any

import torch

from gpu_blocks.device import Contestant
from gpu_blocks.session import Session
from qcompile import compat

COPY = {"what": "copy"}
READ = '''import triton
import triton.language as tl


@triton.jit
def kernel(X, Y, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Sums of COUNT blocks each: reads, and next to no writes."""
    at = tl.program_id(0).to(tl.int64) * (COUNT * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.int32)
    for i in tl.range(0, COUNT, num_stages=4):
        total += tl.load(X + at + i * BLOCK)
    tl.store(Y + tl.program_id(0), tl.sum(total))
'''
EMPTY = """import triton


@triton.jit
def kernel(X):
    pass
"""
# What the compiler's glue calls: a signature that moved explains a block that fails.
INTERFACES = (
    "torch._inductor.select_algorithm:TritonTemplate.generate",
    "torch._inductor.select_algorithm:autotune_select_algorithm",
    "torch._inductor.codegen.common:WorkspaceArg",
    "torch._inductor.ir:ExternKernelOut",
    "torch._inductor.lowering:register_lowering",
    "torch._inductor.compile_fx:compile_fx",
    "triton.runtime.jit:JITFunction.run",
    "triton.compiler.compiler:ASTSource",
)


def run(session: Session) -> None:
    session.ask([{"what": "interface", "name": name} for name in INTERFACES], partial(_interface, session))
    session.ask([COPY], partial(_copy, session))
    session.ask([{"what": "read"}], partial(_read, session))
    session.ask([{"what": "bf16", "size": session.pick(8192, 8192, 64)}], partial(_matmul, session))
    session.ask([{"what": "launch"}], partial(_launch, session))


def copy_bandwidth(session: Session) -> float | None:
    """Bytes per second, read and written, of a copy: what is on file for this device, else measured now. `None` where
    nothing is timed."""
    found = session.results.last(0, COPY) or {}
    return found.get("bytes_per_s") or _measure_copy(session).get("bytes_per_s")


def signature(name: str) -> str:
    """The parameters of "module:name", or why there are none."""
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        return f"({', '.join(inspect.signature(found).parameters)})"
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        return f": {type(error).__name__}: {error}"


def _interface(session: Session, config: dict[str, Any]) -> None:
    found = signature(config["name"])
    session.say(f"    {config['name']}{found}")
    session.record(config, {"signature": found})


def _copy(session: Session, config: dict[str, Any]) -> None:
    found = _measure_copy(session)
    session.say(
        "    copy: not timed" if not found else f"    copy: {found['bytes_per_s'] / 1e12:.2f} TB/s, read and written"
    )
    session.record(config, found)


def _measure_copy(session: Session) -> dict[str, float]:
    words = session.pick(1 << 28, 1 << 28, 1 << 10)
    source = torch.arange(words, dtype=torch.int32, device=session.device.torch)
    target = torch.empty_like(source)
    us = session.device.race([Contestant("copy", lambda i: target.copy_(source))])["copy"]
    assert torch.equal(source, target)
    return {} if us is None else {"us": us, "bytes_per_s": 8 * words / us * 1e6}


def _read(session: Session, config: dict[str, Any]) -> None:
    count, block = session.pick(64, 64, 2), session.pick(2048, 2048, 64)
    programs = session.pick(8192, 8192, 3)
    source = torch.ones(programs * count * block, dtype=torch.int32, device=session.device.torch)
    sums = torch.zeros(programs, dtype=torch.int32, device=session.device.torch)
    kernel = compat.triton_kernel(READ)
    us = session.device.race(
        [Contestant("read", lambda i: kernel[(programs,)](source, sums, COUNT=count, BLOCK=block))]
    )
    right = bool((sums == count * block).all())
    time = us["read"]
    found = {} if time is None else {"us": time, "bytes_per_s": source.numel() * 4 / time * 1e6}
    session.say("    read: not timed" if time is None else f"    read: {found['bytes_per_s'] / 1e12:.2f} TB/s")
    session.record(config, found, ok=right)


def _matmul(session: Session, config: dict[str, Any]) -> None:
    size = config["size"]
    a, b = (session.device.randn(size, size, seed=seed) for seed in (0, 1))
    us = session.device.race([Contestant("matmul", lambda i: a @ b)])["matmul"]
    found = {} if us is None else {"us": us, "tflops": 2 * size**3 / us / 1e6}
    session.say(f"    bf16 {size}^3: " + ("not timed" if us is None else f"{found['tflops']:.0f} TFLOP/s"))
    session.record(config, found)


def _launch(session: Session, config: dict[str, Any]) -> None:
    """Kernels that do nothing, one after the other in a graph."""
    kernel, x = compat.triton_kernel(EMPTY), torch.zeros(1, device=session.device.torch)
    chain = Contestant("launch", lambda i: kernel[(132,)](x), session.pick(200, 200, 2))
    us = session.device.race([chain])["launch"]
    session.say("    an empty kernel in a graph: " + ("not timed" if us is None else f"{us:.2f} us"))
    session.record(config, {} if us is None else {"us": us})
