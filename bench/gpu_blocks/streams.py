"""Kernels that read and write once: rotations, quantizing activations, rounding stochastically. Memory is their limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_blocks.device import CACHE, Contestant
from gpu_blocks.figures import figures, line
from gpu_blocks.matmuls import spec_of
from gpu_blocks.session import Session
from qcompile import compat
from qcompile.codegen.devices.triton import quantize_input
from qcompile.codegen.devices.triton_random import helper_text
from qcompile.codegen.devices.triton_rotate import expected, rotate
from qcompile.ir.hadamard import random_signs
from qcompile.ir.packing import ceil_div
from qcompile.ir.rounding import random_bits
from qcompile.ir.stochastic_cast import stochastic_cast

TARGET = 0.80  # of the copy bandwidth
CHECKED = 64  # rows that are compared
SEED = 7
CAST = f'''import triton
import triton.language as tl


{helper_text("random_bits", "stochastic_bf16")}


@triton.jit
def kernel(X, Y, N, seed, BLOCK: tl.constexpr):
    """float32 to bf16, eight neighbours from one block of random bits."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    bits = random_bits(first // 8 + tl.arange(0, BLOCK // 8), seed, seed * 0, seed * 0)
    at = first + tl.arange(0, BLOCK)
    y = stochastic_bf16(tl.load(X + at, mask=at < N, other=0.0), bits)
    tl.store(Y + at, y, mask=at < N)
'''


@dataclass(frozen=True)
class Stream:
    """One of these kernels.

    Attributes:
        call: makes its results out of x. error: of what it makes of x, in units of what is allowed. dtype: of x.
        unit: what divides its columns.
    """

    call: Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
    error: Callable[[torch.Tensor, tuple[torch.Tensor, ...]], float]
    dtype: torch.dtype = torch.bfloat16
    unit: int = 1


def run(session: Session) -> None:
    streams = dict(_streams(session))
    rows, columns = session.pick((16384, 8192), (16384, 8192), (8, 512))
    configs = [
        {"kernel": name, "rows": rows, "columns": columns // stream.unit * stream.unit}
        for name, stream in streams.items()
    ]
    session.ask(configs, lambda config: _measure(session, config, streams[config["kernel"]]))


def _streams(session: Session) -> Iterator[tuple[str, Stream]]:
    sizes = session.pick((64, 128, 256, 512, 112), (128, 512), (128, 256))
    for size in sizes:
        yield f"rotate {size}", _rotation(size, signed=False)
    yield f"rotate {sizes[0]} signed", _rotation(sizes[0], signed=True)
    for weight, act in (
        ("int8/axis0", "int8/token"),
        ("e4m3/axis0", "e4m3/token"),
        ("e4m3/b128x128:fp32", "e4m3/g128:fp32"),
    ):
        yield f"quantize {act}", _quantization(weight, act)
    yield "round stochastically", Stream(_cast, _cast_error, torch.float32)


def _rotation(size: int, *, signed: bool) -> Stream:
    def signs(x: torch.Tensor) -> torch.Tensor | None:
        return _signs(x.shape[1], x.device) if signed else None

    def error(x: torch.Tensor, made: tuple[torch.Tensor, ...]) -> float:
        want = expected(x[:CHECKED].cpu(), size, random_signs(x.shape[1], SEED) if signed else None)
        return _worst((made[0][:CHECKED].cpu().double() - want.value).abs() / want.bound)

    return Stream(lambda x: (rotate(x, size, signs(x)),), error, unit=size)


_SIGNS: dict[tuple[int, torch.device], torch.Tensor] = {}


def _signs(count: int, device: torch.device) -> torch.Tensor:
    if (count, device) not in _SIGNS:
        _SIGNS[count, device] = random_signs(count, SEED).to(device)
    return _SIGNS[count, device]


def _quantization(weight: str, act: str) -> Stream:
    """As Inductor generates it where nothing is before it: codes are those of the plain function, to the bit."""
    make = partial(quantize_input, spec=spec_of(weight, act))
    compiled = torch.compile(make)

    def error(x: torch.Tensor, made: tuple[torch.Tensor, ...]) -> float:
        want = make(x[:CHECKED])
        # A scale may be off by a rounding (a quotient is a product with a reciprocal there), a code by one step then.
        codes, scales = (t[:CHECKED].double() for t in made[:2])
        values, exact = (_decoded(c, s) for c, s in ((codes, scales), (want[0].double(), want[1].double())))
        step = want[1].double() if act.startswith("int8") else want[1].double() * 32  # e4m3: its largest spacing
        return _worst((values - exact).abs() / _spread(step, exact) / (1 + 2.0**-22))

    return Stream(compiled, error)


def _decoded(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return codes * _spread(scales, codes)


def _spread(scales: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)


def _cast(x: torch.Tensor) -> tuple[torch.Tensor]:
    y, block = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device), 2048
    compat.triton_kernel(CAST)[(ceil_div(x.numel(), block),)](x, y, x.numel(), SEED, BLOCK=block)
    return (y,)


def _cast_error(x: torch.Tensor, made: tuple[torch.Tensor, ...]) -> float:
    first = x[:CHECKED].cpu()
    bits = random_bits(first.numel(), SEED).reshape(first.shape)
    same = torch.equal(stochastic_cast(first, torch.bfloat16, bits), made[0][:CHECKED].cpu())
    return 0.0 if same else float("inf")


def _worst(errors: torch.Tensor) -> float:
    return float(errors.nan_to_num(float("inf")).max())


def _measure(session: Session, config: dict[str, Any], stream: Stream) -> None:
    torch.compiler.reset()  # all streams that quantize are one function to Dynamo
    device = session.device
    first = device.randn(config["rows"], config["columns"], dtype=stream.dtype)
    made = stream.call(first)
    moved = sum(t.numel() * t.element_size() for t in (first, *made))
    copies = [first, *(first.clone() for _ in range(max(1, int(2 * CACHE / moved))))]
    racer = Contestant(config["kernel"], lambda i: stream.call(copies[i]), len(copies), moved)
    us = device.race([racer])[racer.name]
    found = figures(session, racer, us, None)
    error = stream.error(copies[-1], stream.call(copies[-1]))
    note = f"error {error:.2f} of its bound"
    if found.get("share") is not None:
        note += f"; target {TARGET:.0%}: {'met' if found['share'] >= TARGET else 'MISSED'}"
    session.say(line(config["kernel"], found, note))
    session.record(config, {"best": racer.name, "contestants": {racer.name: found}, "error": error}, ok=error <= 1)
