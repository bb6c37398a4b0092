"""Optimizer steps: state in 8 and 4 bits against torch's fused AdamW, and what stochastic rounding adds to a compiled one.

Parameters have the shapes of a decoder. One optimizer at a time is on the device, so that memory can be compared; time is that
of calls of `step()` in a row, Python included, as a training loop makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpu_blocks.decoder import SHAPES
from gpu_blocks.session import Session, Wrong
from qcompile import optim
from qcompile.codegen.eager_step import equal
from qcompile.ir.ops import reference_only

SETTINGS = {"lr": 1e-3, "weight_decay": 0.1}
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A kind of step.

    Attributes:
        dtype: of parameters and gradients. base: what its time is compared with. bits: of the state of ours; 0: torch's own.
        backend: compiles the step of torch's own, "" is its fused kernel. target: how much faster than the base.
    """

    dtype: str
    base: str = ""
    bits: int = 0
    backend: str = ""
    target: float = 0.0


CASES: Mapping[str, Case] = {
    "torch fused, fp32": Case("fp32"),
    "8 bits, fp32": Case("fp32", "torch fused, fp32", 8, target=1.0),
    "4 bits, fp32": Case("fp32", "torch fused, fp32", 4, target=1.0),
    "torch fused, bf16": Case("bf16"),
    "8 bits, bf16 stochastic": Case("bf16", "torch fused, bf16", 8),
    "4 bits, bf16 stochastic": Case("bf16", "torch fused, bf16", 4),
    "torch compiled, bf16": Case("bf16", backend="inductor"),
    "torch compiled, bf16 stochastic": Case("bf16", "torch compiled, bf16", backend="qcompile"),
}


def run(session: Session) -> None:
    with torch.enable_grad():
        session.ask([{"check": name} for name in CASES if CASES[name].bits], lambda asked: _check(session, asked))
        names = session.pick(
            tuple(CASES), tuple(CASES), ("torch fused, fp32", "8 bits, fp32", "4 bits, bf16 stochastic")
        )
        model = session.pick("8B", "1B", "tiny")
        layers = session.pick(8, 4, 1)
        session.ask(
            [{"step": name, "model": model, "layers": layers} for name in names],
            lambda asked: _measure(session, asked),
        )


def _parameters(model: str, layers: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Of so many layers and one table, with gradients."""
    shape, generator = SHAPES[model], torch.Generator(device).manual_seed(1)
    inner, outer, wide = shape.heads * shape.head, shape.shared * shape.head, shape.width
    layer = [(inner, wide), (outer, wide), (outer, wide), (wide, inner)]
    layer += [(shape.hidden, wide)] * 2 + [(wide, shape.hidden)]
    found = []
    for size in [(shape.vocabulary, wide), *layer * layers, *[(wide,)] * (2 * layers + 1)]:
        p = torch.nn.Parameter(torch.empty(size, dtype=dtype, device=device).normal_(0, 0.02, generator=generator))
        p.grad = torch.empty(size, dtype=dtype, device=device).normal_(0, 1e-3, generator=generator)
        found.append(p)
    return found


def _optimizer(case: Case, params: list[Tensor]) -> torch.optim.Optimizer:
    if case.bits:
        return optim.AdamW(params, state_bits=case.bits, **SETTINGS)
    own = {"foreach": True} if case.backend else {"fused": True}
    return torch.optim.AdamW(params, **SETTINGS, **own)


def _check(session: Session, asked: dict[str, Any]) -> None:
    """Two steps of a few parameters, by kernels there and by plain torch here: the same bits."""
    case, results = CASES[asked["check"]], []
    for device in (session.device.torch, torch.device("cpu")):
        params = _parameters("tiny", 1, TYPES[case.dtype], torch.device("cpu"))
        moved = [torch.nn.Parameter(p.detach().to(device)) for p in params]
        for p, m in zip(params, moved, strict=True):
            m.grad = None if p.grad is None else p.grad.to(device)
        optimizer = _optimizer(case, moved)
        for _ in range(2):
            if results:
                with reference_only():
                    optimizer.step()
            else:
                optimizer.step()
        results.append([t.detach().cpu() for p in moved for t in (p, *optimizer.state[p].values())])
    wrong = sum(int((~equal(a, b)).sum()) for a, b in zip(*results, strict=True))
    if wrong:
        raise Wrong(f"{asked['check']}: {wrong} numbers differ from the plain-torch meaning")
    session.say(f"    {asked['check']}: the bits of plain torch")
    session.record(asked, {"wrong": wrong})


def _measure(session: Session, asked: dict[str, Any]) -> None:
    name, device = asked["step"], session.device
    case = CASES[name]
    params = _parameters(asked["model"], asked["layers"], TYPES[case.dtype], device.torch)
    optimizer = _optimizer(case, params)
    step: Callable[[], object] = optimizer.step
    if case.backend:
        options = {"recipe": "sr"} if case.backend == "qcompile" else None
        step = torch.compile(optimizer.step, backend=case.backend, options=options)
    step()
    state = [t for p in params for t in optimizer.state[p].values() if torch.is_tensor(t) and t.numel() > 1]
    count = sum(p.numel() for p in params)
    found: dict[str, Any] = {"parameters": count, "state": sum(t.numel() * t.element_size() for t in state) / count}
    device.reset_peak()
    seconds = device.seconds(step)
    found["peak_bytes"] = device.peak()
    words = [f"{found['state']:.2f} bytes of state a parameter"]
    if seconds is not None:
        found["seconds"] = seconds
        words.insert(0, f"{seconds * 1e3:8.2f} ms")
        base = session.results.last(session.block.number, {**asked, "step": case.base}) if case.base else None
        if base and "seconds" in base:
            found["speedup"] = base["seconds"] / seconds
            words.append(f"{found['speedup']:.2f} x {case.base}")
            if case.target:
                words.append(f"target {case.target:g} x: {'met' if found['speedup'] >= case.target else 'MISSED'}")
    session.say(f"    {name:34} {'  '.join(words)}")
    session.record(asked, found, ok=all(bool(p.isfinite().all()) for p in params))
    torch.compiler.reset()
