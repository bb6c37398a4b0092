"""Other 4-bit kernels on the same shapes, where they can be had: torch's own, torchao's, gemlite's.

All multiply bf16 (gemlite: what its layer takes) by 4-bit weights in groups of 128. They are measured, not checked: how
right they are is their business.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from functools import partial

import torch

from gpu_blocks.device import Contestant
from gpu_blocks.session import Session

GROUP = 128
Layer = Callable[[torch.Tensor], torch.Tensor]
Made = tuple[Layer, int]  # the layer, and bytes of its weight


def contestants(session: Session, x: torch.Tensor, n: int, k: int) -> list[Contestant]:
    """Peers for `x[m, k]` and a weight of `n` rows; one line for each that is not there."""
    found = []
    for name, make in PEERS.items():
        package = name.partition(" ")[0]
        if importlib.util.find_spec(package) is None:
            session.say(f"    {name}: not installed")
            continue
        try:
            copies = 1 if session.device.interpreted else session.device.copies(n * k // 2)
            made = [make(session, n, k) for _ in range(copies)]
            made[0][0](x)
        except Exception as error:  # whatever another project's code raises is a line and no more
            reason = str(error).partition("\n")[0][:150]
            session.say(f"    {name}: {type(error).__name__}: {reason}")
            continue
        layers = [layer for layer, _ in made]
        found.append(Contestant(name, partial(_call, layers, x), copies, made[0][1]))
    return found


def _call(layers: list[Layer], x: torch.Tensor, i: int) -> torch.Tensor:
    return layers[i](x)


def _tinygemm(session: Session, n: int, k: int) -> Made:
    """torch's own int4 matmul (what torchao's tiled layout calls)."""
    device = session.device.torch
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(k // GROUP, n, 2, dtype=torch.bfloat16, device=device)
    size = packed.numel() * packed.element_size() + scales.numel() * 2
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, packed, GROUP, scales), size


def _torchao(session: Session, n: int, k: int) -> Made:
    torchao = importlib.import_module("torchao.quantization")
    layer = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=session.device.torch)
    torchao.quantize_(layer, torchao.Int4WeightOnlyConfig(group_size=GROUP))
    return layer, n * k // 2 + n * k // GROUP * 4


def _gemlite(session: Session, n: int, k: int) -> Made:
    gemlite = importlib.import_module("gemlite.helper")
    device = session.device.torch
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, device=device)
    scales = torch.rand(n * k // GROUP, 1, dtype=torch.bfloat16, device=device)
    zeros = torch.full_like(scales, 8)
    made: Layer = gemlite.A16W4_HQQ_INT(device=str(device), dtype=torch.bfloat16).from_weights(codes, scales, zeros)
    return made, n * k // 2 + n * k // GROUP * 4


PEERS: Mapping[str, Callable[[Session, int, int], Made]] = {
    "torch int4pack": _tinygemm,
    "torchao int4": _torchao,
    "gemlite int4": _gemlite,
}
