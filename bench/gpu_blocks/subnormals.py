"""Are subnormal operands exact on the tensor cores?

First the question itself: every subnormal 16-bit float, of both signs, as an operand of the instruction, times a power of
two. Then what kernels make of it: every code of every format, decoded as a subnormal number and by magic, picked out by an
identity matrix, so that the result has to be the number itself. Each with the instruction of four warps (wgmma) and the
older one (mma.sync).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gpu_blocks.matmuls import compile_job, spec_of
from gpu_blocks.session import Session
from gpu_blocks.warm import Job
from qcompile import compat
from qcompile.codegen.devices.triton import Tile
from qcompile.codegen.devices.triton import run as launch
from qcompile.codegen.devices.triton_lines import Layout
from qcompile.codegen.devices.triton_numbers import IntegerDecode, Numbers
from qcompile.codegen.devices.triton_text import kernel_text
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.formats import FORMATS
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import pack_codes, pack_scales

DOT = '''import triton
import triton.language as tl


@triton.jit
def kernel(BITS, X, Y, DT: tl.constexpr):
    """Y[64, 16] = BITS[64, 16] x X[16, 16], the first given as the bits of 16-bit floats."""
    row, k, column = tl.arange(0, 64), tl.arange(0, 16), tl.arange(0, 16)
    w = tl.load(BITS + row[:, None] * 16 + k[None, :]).to(DT, bitcast=True)
    x = tl.load(X + k[:, None] * 16 + column[None, :])
    tl.store(Y + row[:, None] * 16 + column[None, :], tl.dot(w, x))
'''


@dataclass(frozen=True)
class Kind:
    """A 16-bit float: stored bits of its mantissa, exponent of its smallest number, and by what power of two the other
    operand is multiplied so that products are normal numbers of fp32."""

    torch: torch.dtype
    triton: str
    mantissa: int
    smallest: int
    prescale: int


KINDS = {
    "f16": Kind(torch.float16, "float16", 10, -24, 0),
    "bf16": Kind(torch.bfloat16, "bfloat16", 7, -133, 60),
}
WARPS = {"wgmma": 4, "mma.sync": 2}  # of a block of 64 rows: fewer than a warpgroup cannot use wgmma


def run(session: Session) -> None:
    session.compile(partial(_warm_dot, name, warps) for name in KINDS for warps in WARPS.values())
    configs = [{"operand": name, "instruction": mma} for name in KINDS for mma in WARPS]
    session.ask(configs, partial(_operands, session))
    kinds = {name: Numbers.of(fmt, "f16").kind for name, fmt in FORMATS.items()}
    names = [name for name, kind in kinds.items() if kind != "table"]
    few = ["int3", "int4", "int8", "e4m3", "e2m1", "ternary"]
    asked = {"wgmma": session.pick(names, few, few[:4:2]), "mma.sync": session.pick(few, [], [])}
    codes = [
        {"format": name, "dtype": dtype, "decode": decode, "instruction": mma}
        for mma, formats in asked.items()
        for dtype in KINDS
        for name in formats
        for decode in (("subnormal", "magic") if kinds[name] == "int" else ("subnormal",))
    ]
    session.compile(_warm_codes(config) for config in codes)
    wrong: dict[tuple[str, ...], int] = {}

    def answer(config: dict[str, Any]) -> None:
        found = _codes(session, config)
        session.record(config, found, ok=not found["mismatches"])
        wrong[tuple(config.values())] = found["mismatches"]

    session.ask(codes, answer)
    bad = {" ".join(key): count for key, count in wrong.items() if count}
    session.say(f"    codes of kernels: {len(wrong)} cases, " + (f"MISMATCHES {bad}" if bad else "every code exact"))


def _kernel(name: str, warps: int, bits: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> Any:
    import triton.language as tl

    return compat.triton_kernel(DOT)[(1,)](bits, x, y, DT=getattr(tl, KINDS[name].triton), num_warps=warps)


def _warm_dot(name: str, warps: int, device: torch.device) -> None:
    bits, x = (torch.empty(64, 16, dtype=dtype, device=device) for dtype in (torch.int16, KINDS[name].torch))
    _kernel(name, warps, bits, x[:16], torch.empty(64, 16, device=device))


def _operands(session: Session, config: dict[str, str]) -> None:
    """Every subnormal number times 2**prescale, against float64."""
    kind, device = KINDS[config["operand"]], session.device.torch
    magnitudes = torch.arange(1 << kind.mantissa, dtype=torch.int32)
    bits = torch.cat((magnitudes, magnitudes - (1 << 15))).to(torch.int16)
    bits = bits.repeat(-(-1024 // len(bits))).reshape(-1, 64, 16)  # whole tiles
    x = (torch.eye(16) * 2.0**kind.prescale).to(kind.torch).to(device)
    mismatches, code = 0, ""
    for tile in bits:
        y = torch.full((64, 16), float("nan"), device=device)
        built = _kernel(config["operand"], WARPS[config["instruction"]], tile.contiguous().to(device), x, y)
        code = code or getattr(built, "asm", {}).get("ptx", "")
        number = (tile.long() & ((1 << kind.mantissa) - 1)).double() * torch.where(tile < 0, -1.0, 1.0).double()
        mismatches += int((y.cpu().double() != number * 2.0 ** (kind.smallest + kind.prescale)).sum())
    used = next((mma for mma in WARPS if f"{mma}." in code), "")
    session.say(
        f"    {config['operand']} subnormals as they are, {config['instruction']}"
        + (f" (compiled to {used})" if used not in ("", config["instruction"]) else "")
        + f": {mismatches} of {bits.numel()} wrong"
    )
    # Not what kernels rely on today, so a mismatch is news and no failure.
    session.record(config, {"mismatches": mismatches, "of": bits.numel(), "compiled to": used})


def _codes_spec(config: dict[str, str]) -> tuple[KernelSpec, int, Tile]:
    """The kernel, columns of the weight, and a tile for the instruction."""
    spec = spec_of(f"{config['format']}/axis0", dtype=config["dtype"])
    spec = KernelSpec(spec.weight, x=spec.x, y="f32")
    return spec, Layout.of(spec.weight).unit, Tile(columns=64, warps=WARPS[config["instruction"]])


def _warm_codes(config: dict[str, str]) -> Job:
    spec, k, tile = _codes_spec(config)
    return compile_job(spec, k, 64, k, tile, _decode(config))


def _codes(session: Session, config: dict[str, str]) -> dict[str, int]:
    """x picks one column after the other: the result is the number itself, for every code and place in a unit."""
    spec, k, tile = _codes_spec(config)
    fmt = spec.weight.format
    finite = [code for code, value in enumerate(fmt.values) if abs(value) < float("inf")]
    finite = finite[: len(fmt.table) or None]
    index = (torch.arange(64)[:, None] * 37 + torch.arange(k)[None, :] * 11).remainder(len(finite))
    codes = torch.tensor(finite)[index].to(torch.uint8)
    parts = [pack_codes(codes, fmt.bits, "mma16"), pack_scales(torch.ones(64, 1), "mma16")]
    parts = [part.to(session.device.torch) for part in parts]
    x = torch.eye(k).to(OUT_DTYPES[spec.x]).to(session.device.torch)
    y = launch(spec, x, parts, [], [64], k, tile, kernel_text(spec, _decode(config)))
    return {"mismatches": int((y.T.cpu() != fmt.levels()[codes.long()]).sum()), "of": codes.numel()}


def _decode(config: dict[str, str]) -> IntegerDecode:
    return "magic" if config["decode"] == "magic" else "subnormal"
