"""Whole models: random weights in Llama's shapes, CUDA graphs, compiled bf16 against the backend's recipes.

One engine at a time, with nothing else on the device: memory is compared as well. What a recipe's kernels compute is
checked on a model of one layer first: against float64 with the same codes, it may not be further off than a small multiple
of what plain bf16 is. Time is that of calls in a row; the first call begins with empty caches and ends with the result.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

import qcompile
from gpu_blocks.decoder import SHAPES, Decoder, random_decoder
from gpu_blocks.session import Session
from qcompile.ir.codec import dequantize
from qcompile.ir.scheme import Scheme
from qcompile.packed import packed_weights

CONTEXT = 1024
# (rows in a batch, tokens of one call)
PHASES = {"decode": (1, 1), "prefill": (1, 512), "decode 32": (32, 1)}
# A recipe; "converted": by `qcompile.convert`, so that the float weights are gone.
ENGINES = ("bf16", "int4", "int8", "int4/g128:fp16", "int4 converted")
CONVERTED = " converted"
FIRST = ("bf16", "int4")
COST = {"1B": 20.0, "8B": 60.0}  # seconds that one question may take, compiling from nothing
# Kernels round an operand up to three times (its scale, their product, the sum with a minimum) where plain bf16 rounds it
# once, and everything else less often: three times bf16's error, and a third more for another draw of roundings.
ALLOWED = 4.0
# How much faster than bf16, and its share of bf16's peak memory.
TARGETS = {("8B", "decode", "int4"): (2.5, 0.35), ("8B", "decode", "int8"): (1.6, None)}


def run(session: Session) -> None:
    models = session.pick(("1B", "8B"), ("1B",), ("tiny",))
    engines = session.pick(ENGINES, FIRST, FIRST[1:])
    phases = session.pick(tuple(PHASES), ("decode",), ("decode", "prefill"))
    configs = _questions(models, engines, phases)
    with session.guarded({"what": "warm up"}):
        _warm_up(session)
    cost = session.pick(COST, COST, {})

    def answer(config: dict[str, Any]) -> None:
        measure = _verify if config["phase"] == "verify" else _measure
        try:
            measure(session, config)
        except torch.OutOfMemoryError as error:
            session.say(f"    {config}: {str(error).splitlines()[0]}")
        finally:
            _forget(session)

    session.ask(configs, answer, lambda config: cost.get(config["model"], 0.0))


def _questions(models: Sequence[str], engines: Sequence[str], phases: Sequence[str]) -> list[dict[str, Any]]:
    """What decides first: one recipe checked, the first engines' decoding, then the other recipes, then other phases."""
    first, others = [e for e in engines if e in FIRST], [e for e in engines if e not in FIRST]

    def verify(which: Sequence[str]) -> list[tuple[str, str, str]]:
        return [(models[0], engine, "verify") for engine in which if engine != "bf16"]

    def measure(which: Sequence[str], phase: str) -> list[tuple[str, str, str]]:
        return [(model, engine, phase) for model in models for engine in which]

    found = [*verify(first), *measure(first, phases[0]), *verify(others), *measure(others, phases[0])]
    found += [question for phase in phases[1:] for question in measure([*first, *others[:1]], phase)]
    return [dict(zip(("model", "engine", "phase"), question, strict=True)) for question in found]


def _warm_up(session: Session) -> None:
    """Starts what the compiler starts once: its processes are nobody's first call."""
    torch.compile(lambda x: (x * 2).sum(-1), dynamic=False)(session.device.randn(4, 64))


def _forget(session: Session) -> None:
    torch.compiler.reset()
    gc.collect()
    session.device.free()


def _inputs(session: Session, model: Decoder, batch: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and the last positions of half the context: a step reads as many keys wherever it is."""
    device, end = session.device.torch, model.context // 2
    ids = torch.randint(0, model.shape.vocabulary, (batch, count), generator=session.device.generator(5), device=device)
    return ids, torch.arange(end - count, end, device=device)


def _compiled(model: Decoder, engine: str, **options: Any) -> Callable[..., torch.Tensor]:
    """The model under an engine; "bf16" is Inductor."""
    if engine == "bf16":
        return torch.compile(model, dynamic=False, options=options or None)
    given = {"recipe": engine.removesuffix(CONVERTED), **options}
    return torch.compile(model, backend="qcompile", dynamic=False, options=given)


def _verify(session: Session, config: dict[str, Any]) -> None:
    """One layer: the distance from the exact result of the same codes, in units of what plain bf16 has."""
    shape, engine = replace(SHAPES[config["model"]], layers=1), config["engine"]
    context, device = session.pick(CONTEXT, CONTEXT, 32), session.device.torch
    recipe = engine.removesuffix(CONVERTED)
    plain_model, converted = (random_decoder(shape, 1, context, device) for _ in range(2))
    inputs = _inputs(session, plain_model, 1, 1)
    qcompile.convert(converted, recipe)
    model = converted if engine.endswith(CONVERTED) else plain_model
    got = _compiled(model, engine)(*inputs).double()
    exact, plain = (_decoded(converted, context, dtype)(*inputs).double() for dtype in (torch.float64, torch.bfloat16))
    error = float((got - exact).norm() / (plain - exact).norm())
    ledger = qcompile.explain(model, *inputs, recipe=recipe)
    kernels = sorted({row.kernel for row in ledger.rows if row.quantized})
    session.say(
        f"    {config['model']} {engine}: one layer is {error:.2f} of bf16's error from exact, allowed {ALLOWED:g};"
    )
    session.say(f"      {ledger.coverage:.0%} of the arithmetic is quantized, kernels {', '.join(kernels) or 'none'}")
    found = {"error": error, "coverage": ledger.coverage, "kernels": kernels}
    session.record(config, found, ok=error <= ALLOWED)


def _decoded(model: Decoder, context: int, dtype: torch.dtype) -> Decoder:
    """A float model whose weights are what the packed ones decode to; `model` was made with the same seed."""
    device = model.norm.weight.device
    made = random_decoder(model.shape, 1, context, device).to(dtype)
    modules = dict(made.named_modules())
    for path, module, item in packed_weights(model):
        originals: Any = module.parametrizations["weight"]  # type: ignore[index]
        parts = [getattr(originals, f"original{i}") for i in range(len(list(originals.buffers())))]
        weight = dequantize(parts, Scheme.parse(item.scheme), item.n, item.k)
        modules[path].weight = torch.nn.Parameter(weight.to(dtype), requires_grad=False)
    return made


def _measure(session: Session, config: dict[str, Any]) -> None:
    """First call, speed, peak memory; CUDA graphs by Inductor, or around the call where it refuses."""
    name, engine, device = config["model"], config["engine"], session.device
    if engine.endswith(CONVERTED) and (kernels := _reference(session, name, engine)):
        session.say(f"    {name} {config['phase']} {engine}: not measured, it runs {kernels}")
        session.record(config, {"kernels": kernels})
        return
    batch, count = session.pick(PHASES, PHASES, {"decode": (1, 1), "prefill": (1, 4)})[config["phase"]]
    model = random_decoder(SHAPES[name], batch, session.pick(CONTEXT, CONTEXT, 32), device.torch)
    inputs = _inputs(session, model, batch, count)
    found: dict[str, Any] = {}
    began = time.perf_counter()
    matrices = sum(
        p.numel() * p.element_size() for p in {id(p): p for p in model.parameters()}.values() if p.dim() == 2
    )
    if engine.endswith(CONVERTED):
        qcompile.convert(model, engine.removesuffix(CONVERTED))
        device.synchronize()
        found["convert_s"] = None if device.interpreted else time.perf_counter() - began
    gc.collect()
    with _empty_cache(device.interpreted), torch.no_grad():
        graphs = {} if device.interpreted else {"triton.cudagraphs": True}
        skips = _skips()
        call = _compiled(model, engine, **graphs)
        began = time.perf_counter()
        out = call(*inputs).clone()
        device.synchronize()
        found["first_s"] = None if device.interpreted else time.perf_counter() - began
        device.reset_peak()
        finite = bool(out.isfinite().all())
        call(*inputs)
        found["skips"] = _skips() - skips
        seconds = device.seconds(_step(model, engine, call, inputs, captured=found["skips"] > 0))
        found["peak_bytes"] = peak = device.peak()
        if peak and engine != "bf16" and not engine.endswith(CONVERTED):
            found["peak_without_floats"] = peak - matrices  # which the user may give up; `convert` does
    if seconds is not None:
        found |= {"seconds": seconds, "tokens_per_s": batch * count / seconds}
    _tell(session, config, found)
    session.record(config, found, ok=finite)


def _reference(session: Session, name: str, engine: str) -> str:
    """The kernels of an engine, where one of them is the plain-torch reference; else ""."""
    found = session.results.last(session.block.number, {"model": name, "engine": engine, "phase": "verify"}) or {}
    return ", ".join(found.get("kernels", [])) if "reference" in found.get("kernels", []) else ""


def _marked(call: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    torch.compiler.cudagraph_mark_step_begin()
    return call(*inputs)


def _step(
    model: Decoder, engine: str, call: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...], captured: bool
) -> Callable[[], object]:
    """What is timed: the call, whose graphs Inductor has made; or a graph around it, compiled anew without them."""
    if not captured:
        return lambda: _marked(call, inputs)
    torch.compiler.reset()
    plain = _compiled(model, engine)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            plain(*inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        plain(*inputs)
    return graph.replay


def _skips() -> int:
    """How often Inductor has refused to make a CUDA graph."""
    from torch._dynamo.utils import counters

    return int(counters["inductor"]["cudagraph_skips"])


def _empty_cache(interpreted: bool) -> Any:
    """A compile from nothing; the interpreter has its own empty caches."""
    import contextlib

    from torch._inductor.utils import fresh_cache

    return contextlib.nullcontext() if interpreted else fresh_cache()


def _tell(session: Session, config: dict[str, Any], found: dict[str, Any]) -> None:
    name, engine, phase = config["model"], config["engine"], config["phase"]
    if "seconds" not in found:
        session.say(f"    {name} {phase} {engine}: not timed")
        return
    base = session.results.last(session.block.number, {**config, "engine": "bf16"}) if engine != "bf16" else None
    words = [f"{found['tokens_per_s']:9.1f} tokens/s", f"{found['peak_bytes'] / 1e9:6.2f} GB"]
    words.append(f"first call {found['first_s']:.1f} s")
    if found["skips"]:
        words.append("Inductor made no graph")
    if base and "seconds" in base:
        held = found.get("peak_without_floats", found["peak_bytes"])
        speedup, memory = base["seconds"] / found["seconds"], held / base["peak_bytes"]
        words += [
            f"{speedup:.2f} x bf16",
            f"{memory:.2f} of its memory without the float weights",
            f"first call {found['first_s'] / base['first_s']:.2f}",
        ]
        if target := TARGETS.get((name, phase, engine)):
            met = speedup >= target[0] and (target[1] is None or memory <= target[1])
            words.append(f"target {target[0]:g} x: {'met' if met else 'MISSED'}")
    session.say(f"    {name} {phase} {engine}: {'  '.join(words)}")
