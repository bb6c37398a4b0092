"""Decode attention over a low-bit cache of keys and values, against torch's own over bf16."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from gpu_blocks.device import CACHE, Contestant
from gpu_blocks.figures import figures, line
from gpu_blocks.session import Session
from qcompile.codegen.devices.triton_attention import Block, choose_block, decode_attention
from qcompile.codegen.devices.triton_attention_bounds import expected
from qcompile.ir.kvcache import Cache, CacheLayout, fill
from qcompile.ir.packing import ceil_div

HEADS, KV, DIM = 32, 8, 128  # of Llama 3.1 8B
SCHEMES = ("int8/token:fp16", "int4/token:fp16", "e4m3/token:fp16")
TARGET = 0.70  # of the copy bandwidth
DISTINCT = 8  # pages that are quantized; the others repeat them


def run(session: Session) -> None:
    tokens = session.pick(32768, 32768, 300)
    batches = session.pick((1, 8), (4,), (2,))
    schemes = session.pick(SCHEMES, SCHEMES[:2], SCHEMES[1:2])
    configs = [{"scheme": s, "batch": b, "tokens": tokens} for b in batches for s in schemes]
    session.ask(configs, partial(_measure, session))


class Problem:
    """Sequences of random keys and values, and queries."""

    def __init__(self, session: Session, scheme: str, batch: int, tokens: int) -> None:
        device = session.device
        self.layout = CacheLayout.of(scheme, DIM)
        self.pages = ceil_div(tokens, self.layout.page)
        self.q = device.randn(batch, session.pick(HEADS, HEADS, 4), DIM)
        kv = session.pick(KV, KV, 2)
        self.lengths = torch.full((batch,), tokens, dtype=torch.int32, device=device.torch)
        first = Cache.empty(self.layout, DISTINCT, kv, device.torch)
        keys, values = (device.randn(DISTINCT, self.layout.page, kv, DIM, seed=seed) for seed in (1, 2))
        fill(first, keys, values, torch.arange(DISTINCT, device=device.torch))
        index = torch.arange(batch * self.pages, device=device.torch) % DISTINCT
        parts = [part[index] for part in first.parts]
        self.bytes = sum(part.numel() * part.element_size() for part in parts)
        more = 0 if device.interpreted else int(CACHE / self.bytes)
        self.caches = [Cache(self.layout, *(part.clone() for part in parts)) for _ in range(1 + more)]
        self.table = torch.arange(batch * self.pages, device=device.torch, dtype=torch.int32).reshape(batch, -1)

    def call(self, i: int, block: Block | None = None) -> torch.Tensor:
        """Attention over the i-th copy."""
        return decode_attention(self.q, self.caches[i], self.table, self.lengths, block=block)

    def chosen(self) -> Block:
        """How the shipped choice cuts it."""
        kv = self.caches[0].keys.shape[1]
        return choose_block(self.layout, len(self.q) * kv, self.pages, self.q.device)

    def error(self) -> float:
        """Of the last sequence's queries of its last keys and values' head, in units of its bound: float64 takes its time."""
        cache, table = self.caches[0], self.table[-1].long()
        own = Cache(self.layout, *(part[table, -1:].cpu() for part in cache.parts))
        queries = self.q.shape[1] // cache.keys.shape[1]
        lengths, pages = self.lengths[-1:].cpu(), torch.arange(len(table), dtype=torch.int32)[None]
        want = expected(self.q[-1:, -queries:].cpu(), own, pages, lengths, splits=self.chosen().splits)
        got = self.call(0)[-1:, -queries:].cpu().double()
        return float(((got - want.value).abs() / want.bound).nan_to_num(float("inf")).max())


def _float(session: Session, batch: int, tokens: int) -> Contestant:
    """`scaled_dot_product_attention` over bf16, which torch has for one query."""
    device, heads, kv = session.device, session.pick(HEADS, HEADS, 4), session.pick(KV, KV, 2)
    q = device.randn(batch, heads, 1, DIM)
    size = 2 * batch * kv * tokens * DIM * 2
    count = 1 if device.interpreted else 1 + int(CACHE / size)
    pool = [[device.randn(batch, kv, tokens, DIM, seed=2 * i + j) for j in (3, 4)] for i in range(count)]

    def call(i: int) -> torch.Tensor:
        k, v = pool[i]
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    return Contestant("sdpa bf16", call, count, size)


def _measure(session: Session, config: dict[str, Any]) -> None:
    problem = Problem(session, config["scheme"], config["batch"], config["tokens"])
    base = _float(session, config["batch"], config["tokens"])
    name = str(problem.chosen())
    racers = [base, Contestant(name, problem.call, len(problem.caches), problem.bytes)]
    us = session.device.race(racers)
    figured = {racer.name: figures(session, racer, us[racer.name], us[base.name]) for racer in racers}
    error, found = problem.error(), figured[name]
    note = f"error {error:.2f} of its bound"
    if found.get("share") is not None:
        note += f"; target {TARGET:.0%}: {'met' if found['share'] >= TARGET else 'MISSED'}"
    session.say(line(f"{config['scheme']} {config['batch']} x {config['tokens']} tokens", found, note))
    session.record(config, {"best": name, "contestants": figured, "error": error}, ok=error <= 1)
    session.device.free()
