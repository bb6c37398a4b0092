"""Training steps of a decoder in Llama's shapes: products of 8-bit codes, and roundings, against compiled bf16.

A step is forward, backward and torch's fused AdamW. One engine at a time is on the device. What an engine computes is checked
on one layer first, against the plain-torch meaning of its graph. With rounded weights both are float32 sums of the same
numbers in another order, as are a compiled float step and a plain one: they may be apart by four times what those are. Where
activations are rounded too, a last bit sends some of them to the neighbouring level and those more in later products; but
errors of roundings that have nothing to do with each other are at right angles, and these have to be within 60 degrees.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpu_blocks.decoder import SHAPES, Decoder, Layer, random_decoder, rotated
from gpu_blocks.session import Session
from qcompile.backend import watching

BF16 = "bf16"
ENGINES: Mapping[str, Any] = {
    BF16: None,
    "int8-train": "int8-train",
    "fp8-train": "fp8-train",
    "int4": "int4",
    "w8a8": "w8a8",
}
TARGET = {"int8-train": 1.5, "fp8-train": 1.5}  # x compiled bf16
WEIGHTS_ONLY = ("int4",)
COST = 45.0  # seconds that one question may take, compiling from nothing


class Learner(nn.Module):
    """`ids [batch, count + 1]` -> the loss of each next token: the decoder without its cache."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, ids: Tensor) -> Tensor:
        model, count = self.decoder, ids.shape[1] - 1
        x = model.embedding(ids[:, :-1])
        angles = torch.arange(count, device=ids.device)[:, None].float() * model.frequencies(ids.device)
        turn = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        for layer in model.layers:
            assert isinstance(layer, Layer)
            x = x + _attend(layer, layer.first(x), turn)
            y = layer.second(x)
            x = x + layer.down(F.silu(layer.gate(y)) * layer.up(y))
        logits = model.lm_head(model.norm(x)).flatten(0, 1)
        return F.cross_entropy(logits.float(), ids[:, 1:].flatten())


def _attend(layer: Layer, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    batch, count, _ = x.shape
    size = layer.shape.head
    q, k, v = (t.view(batch, count, -1, size).transpose(1, 2) for t in (layer.q(x), layer.k(x), layer.v(x)))
    y = F.scaled_dot_product_attention(rotated(q, turn), rotated(k, turn), v, is_causal=True, enable_gqa=True)
    out: Tensor = layer.o(y.transpose(1, 2).reshape(batch, count, -1))
    return out


def run(session: Session) -> None:
    names = session.pick(tuple(ENGINES), (BF16, "int8-train", "fp8-train"), (BF16, "int8-train"))
    model = session.pick("1B", "1B", "tiny")
    configs = [{"model": model, "engine": name, "phase": "verify"} for name in names if name != BF16]
    configs += [{"model": model, "engine": name, "phase": "train"} for name in names]

    def answer(config: dict[str, Any]) -> None:
        try:
            with torch.enable_grad():
                (_verify if config["phase"] == "verify" else _measure)(session, config)
        except torch.OutOfMemoryError as error:
            session.say(f"    {config}: {str(error).splitlines()[0]}")
        finally:
            torch.compiler.reset()
            session.device.free()

    session.ask(configs, answer, lambda _: session.pick(COST, COST, 0.0))


def _learner(session: Session, model: str, layers: int | None = None) -> Learner:
    shape = SHAPES[model] if layers is None else replace(SHAPES[model], layers=layers)
    return Learner(random_decoder(shape, 1, 1, session.device.torch)).requires_grad_(True).train()


def _compiled(model: Learner, engine: str) -> Callable[[Tensor], Tensor]:
    if engine == BF16:
        return torch.compile(model, dynamic=False)
    options = {"recipe": ENGINES[engine], "policy": "memory"}
    return torch.compile(model, backend="qcompile", dynamic=False, options=options)


def _ids(session: Session, model: str, batch: int, count: int) -> Tensor:
    device = session.device
    size = (batch, count + 1)
    return torch.randint(0, SHAPES[model].vocabulary, size, generator=device.generator(5), device=device.torch)


def _verify(session: Session, config: dict[str, Any]) -> None:
    """Gradients of one layer in float32: by kernels, by their plain-torch meaning, and without any rounding."""
    ids, engine = _ids(session, config["model"], 1, session.pick(256, 256, 8)), config["engine"]

    def gradients(run_: Callable[[Learner], Callable[[Tensor], Tensor]]) -> Tensor:
        torch.compiler.reset()
        model = _learner(session, config["model"], 1).float()
        run_(model)(ids).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact, found = gradients(lambda model: model), gradients(lambda model: _compiled(model, engine))
    order = (gradients(lambda model: _compiled(model, BF16)) - exact).norm().clamp_min(2.0**-24 * exact.norm())
    with watching("reference"):
        want = gradients(lambda model: _compiled(model, engine))
    ours, expected = found - exact, want - exact
    moved, cosine = float((found - want).norm() / order), float(ours @ expected / (ours.norm() * expected.norm()))
    rounding = float(expected.norm() / exact.norm())
    ok = moved <= 4 if engine in WEIGHTS_ONLY else cosine >= 0.5
    session.say(
        f"    {engine}: rounding moves gradients by {rounding:.3f}; kernels by {moved:.2f} x another order of float sums, "
        f"cosine {cosine:.3f}"
    )
    session.record(config, {"rounding": rounding, "moved": moved, "cosine": cosine}, ok=ok)


def _measure(session: Session, config: dict[str, Any]) -> None:
    """First step, speed and peak memory."""
    name, engine, device = config["model"], config["engine"], session.device
    batch, count = session.pick((8, 1024), (4, 1024), (1, 8))
    model, ids = _learner(session, name), _ids(session, name, batch, count)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    call = _compiled(model, engine)
    losses = []

    def step() -> None:
        loss = call(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    began = time.perf_counter()
    step()
    device.synchronize()
    found: dict[str, Any] = {"first_s": None if device.interpreted else time.perf_counter() - began}
    device.reset_peak()
    seconds = device.seconds(step, rounds=5, window=3.0)
    found["peak_bytes"] = device.peak()
    words = ["not timed"]
    if seconds is not None:
        found |= {"seconds": seconds, "tokens_per_s": batch * count / seconds}
        words = [f"{found['tokens_per_s']:9.0f} tokens/s", f"{found['peak_bytes'] / 1e9:6.2f} GB"]
        words.append(f"first step {found['first_s']:.1f} s")
        base = session.results.last(session.block.number, {**config, "engine": BF16}) if engine != BF16 else None
        if base and "seconds" in base:
            found["speedup"] = base["seconds"] / seconds
            words += [f"{found['speedup']:.2f} x bf16", f"{found['peak_bytes'] / base['peak_bytes']:.2f} of its memory"]
            if target := TARGET.get(engine):
                words.append(f"target {target:g} x: {'met' if found['speedup'] >= target else 'MISSED'}")
    session.say(f"    {name} {engine}: {'  '.join(words)}")
    session.record(config, found, ok=all(bool(loss.isfinite()) for loss in losses))
