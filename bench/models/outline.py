"""What outlining buys: first-call time and time per call of a language model, as ratios to plain Inductor.

    python bench/models/outline.py [prefill] [decode] [--layers 30] [--profile]

The model has the shape of SmolLM2-135M and random weights: neither compile time nor run time depends on the
values. Every first call is measured in a process of its own with an empty Inductor cache, so that no kernel,
no precompiled header and no cached graph helps it. Calls are measured in one process that holds both compiled
models and calls them in turn, so that a busy moment of the machine hits both; the ratio is that of the
medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

SCENARIOS = ("prefill", "decode")
PHASES = {
    "Dynamo's trace": "bytecode_tracing",
    "AOTAutograd (with the compiler)": "create_aot_dispatcher_function",
    "Inductor (with joint passes)": "compile_fx.<locals>.fw_compiler_base",
    "joint passes": "_recursive_joint_graph_passes",
    "inner compile": "compile_fx_inner",
    "waiting for C++": "async_compile.wait",
    "C++ builds, all processes": "compile_file",
}


def llama(layers: int) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def step(model: Any, scenario: str, compiled: Callable[..., Any]) -> Callable[[], Any]:
    """One call: 128 tokens without a cache, or one token behind 128 with a static cache of 256."""
    import torch
    from transformers import StaticCache

    ids = torch.randint(0, 49152, (1, 129), generator=torch.Generator().manual_seed(0))
    if scenario == "prefill":
        return lambda: compiled(ids[:, :128], use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=256)
    model(ids[:, :128], past_key_values=cache)

    def decode() -> Any:
        for layer in cache.layers:
            layer.cumulative_length.fill_(128)  # always the same position: the cache does not fill up
        return compiled(ids[:, 128:], past_key_values=cache).logits

    return decode


def backend(outlined: bool, seen: list[str]) -> Callable[..., Any]:
    from qcompile import compat
    from qcompile.passes.late.outline import outline

    def compile_graph(gm: Any, inputs: Any) -> Any:
        if outlined:
            compat.warm_cpp()
        inner = outline(report=lambda r: seen.append(str(r))) if outlined else None
        config = {**compat.Fingerprint.patch(f"outline={outlined}", {}), **json.loads(os.environ.get("CFG", "{}"))}
        return compat.compile_fx(gm, inputs, inner_compile=inner, config=config)

    return compile_graph


def measure(scenario: str, layers: int, kind: str, calls: int) -> dict[str, Any]:
    """In a fresh process: the first call of `kind`, then (calls > 0) both kinds called in turn."""
    import torch

    torch.set_grad_enabled(False)
    model, seen = llama(layers), list[str]()
    steps = {}
    kinds = ("outlined", "inductor") if calls else (kind,)
    result: dict[str, Any] = {}
    for name in kinds:
        steps[name] = step(model, scenario, torch.compile(model, backend=backend(name == "outlined", seen)))
        start = time.perf_counter()
        logits = steps[name]()
        result.setdefault("first", time.perf_counter() - start)
        result.setdefault("logits", []).append(logits)
    if not calls:
        from torch._dynamo.utils import compilation_time_metrics as metrics

        result["phases"] = {label: sum(metrics.get(key, [])) for label, key in PHASES.items()}
    else:
        times: dict[str, list[float]] = {name: [] for name in kinds}
        for i in range(calls + 5):
            for name in kinds if i % 2 else reversed(kinds):
                start = time.perf_counter()
                steps[name]()
                times[name].append(time.perf_counter() - start)
        result["call"] = {name: statistics.median(t[5:]) for name, t in times.items()}
        first, second = result["logits"]
        result["difference"] = (first - second).abs().max().item()
    del result["logits"]
    result["report"] = seen
    return result


def fresh(*arguments: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": folder}
        command = [sys.executable, __file__, *arguments]
        done = subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", help=" or ".join(SCENARIOS))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--calls", type=int, default=60)
    parser.add_argument("--only-calls", action="store_true", help="skip the two first-call processes")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "CALLS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        kind, calls = options.child
        print(json.dumps(measure(options.scenarios[0], options.layers, kind, int(calls))))
        return
    for scenario in options.scenarios or SCENARIOS:
        rest = [scenario, "--layers", str(options.layers)]
        if not options.only_calls:
            first = {kind: fresh(*rest, "--child", kind, "0") for kind in ("inductor", "outlined")}
            times = {kind: run["first"] for kind, run in first.items()}
            print(f"{scenario}: {first['outlined']['report'][0]}")
            print(f"  first call  {times['outlined']:.1f} s, ratio {times['outlined'] / times['inductor']:.3f}")
            for label in PHASES:
                a, b = (first[kind]["phases"][label] for kind in ("inductor", "outlined"))
                print(f"    {label:34s} {a:7.2f} s -> {b:6.2f} s")
        both = fresh(*rest, "--child", "both", str(options.calls))
        call = both["call"]
        ratio = call["outlined"] / call["inductor"]
        print(f"  per call    {call['outlined'] * 1e3:.2f} ms, ratio {ratio:.3f}")
        print(f"  largest difference of the logits {both['difference']:.2e}")


if __name__ == "__main__":
    main()
