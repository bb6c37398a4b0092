"""Outlining with Inductor as the compiler: exact results, caches, shapes that change, random numbers.

Results are compared for equality, never with a tolerance. Where the reference is eager, all values are small
integers, which floating point adds and multiplies exactly. Where it is unrolled Inductor, the generated code is scalar
and runs in one thread: there is then one order of summation, however the kernels are fused, and equal inputs give
equal bits.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qcompile import compat
from qcompile.passes.late.outline import OutlineReport, outline

LAYERS = 3
SCALAR = {"cpp.simdlen": 1, "cpp.threads": 1}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch.compiler.reset()
    with torch.no_grad():
        yield
    torch.compiler.reset()


def eager(gm: Any, inputs: Any, **_: Any) -> Callable[..., Any]:
    """An inner compile that runs the functional graph as it is: AOTAutograd's part without Inductor's time."""

    def run(args: list[Any]) -> Any:
        results = gm(*args)
        args.clear()
        return results

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def compiled(
    model: Callable[..., Any],
    reports: list[OutlineReport] | None,
    config: dict[str, Any] | None = None,
    inner: Callable[..., Any] | None = None,
    key: str = "test outline",
    **kwargs: Any,
) -> Callable[..., Any]:
    """Through compile_fx: outlined when `reports` is a list to fill, in one piece when it is None. Graphs of another
    `key` are found in no cache."""

    def backend(gm: Any, inputs: Any) -> Any:
        patches = compat.Fingerprint.patch(f"{key} {reports is not None}", config or {})
        build = inner if reports is None else outline(inner, min_nodes=8, report=reports.append)
        return compat.compile_fx(gm, inputs, inner_compile=build, config=patches)

    return torch.compile(model, backend=backend, **kwargs)


# --------------------------------------------------------------------------------------------------- a language model
def llama() -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=128, max_position_embeddings=512,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 127, shape, generator=torch.Generator().manual_seed(1))


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(got) == len(expected)
    assert [i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)] == []


@pytest.mark.parametrize("dynamic", [None, True])
def test_llama_prompts_of_several_shapes(dynamic: bool | None) -> None:
    model, results, reports = llama(), [], list[OutlineReport]()
    for seen in (None, reports):
        torch.compiler.reset()
        run = compiled(model, seen, inner=eager, dynamic=dynamic)
        results.append([run(tokens(*shape), use_cache=False).logits for shape in ((2, 16), (3, 21), (5, 7))])
    equal(results[1], results[0])
    assert [r.repeats for r in reports] == [LAYERS] * (1 if dynamic else 2)  # the second shape makes sizes symbolic


def with_static_cache(
    run: Callable[[Any], Callable[..., Any]], lengths: tuple[int, ...]
) -> tuple[list[list[torch.Tensor]], list[OutlineReport]]:
    """Logits of several steps, then the contents of the caches; in one piece and outlined."""
    from transformers import StaticCache

    model, results, reports = llama(), [], list[OutlineReport]()
    for seen in (None, reports):
        torch.compiler.reset()
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(tokens(2, 3), past_key_values=cache)  # allocates the cache
        step = run((model, seen))
        found = [step(tokens(2, length), past_key_values=cache).logits.clone() for length in lengths]
        for layer in cache.layers:
            found += [layer.keys, layer.values, layer.cumulative_length]
        results.append(found)
    return results, reports


def test_llama_with_a_static_cache_prompt_then_tokens() -> None:
    """Layers write their caches, in graphs whose sizes are fixed and then symbolic."""
    results, reports = with_static_cache(lambda a: compiled(*a, inner=eager), (9, 1, 1, 5, 4))
    equal(results[1], results[0])
    assert len(reports) == 3  # nine tokens, one token, any number
    assert all(r.repeats == LAYERS for r in reports)
    assert all(r.compiled_nodes < r.nodes / 2 for r in reports)


def test_llama_with_inductor_has_equal_bits() -> None:
    results, reports = with_static_cache(lambda a: compiled(*a, SCALAR), (1, 1))
    equal(results[1], results[0])
    assert [r.repeats for r in reports] == [LAYERS]


# ------------------------------------------------------------------------------------------------------- small stacks
class Layer(nn.Module):
    """Integers in, integers out: two matrix products, a residual, a state that is written and read back."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name in ("up", "down"):
            weight = torch.randint(-1, 2, (8, 8), generator=generator).to(dtype)
            setattr(self, name, nn.Parameter(weight, requires_grad=False))
        self.register_buffer("state", torch.zeros(3, 8, dtype=dtype))

    def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        inside = torch.clamp(x @ self.up, 0, 6)
        self.state.index_copy_(0, position, inside[:1])
        inside = inside + self.state.sum(0).clamp(-3, 3)
        return torch.clamp(x + inside @ self.down, -5, 5)


class Stack(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(i, dtype) for i in range(layers))

    def forward(self, x: torch.Tensor, position: torch.Tensor, table: torch.Tensor) -> tuple[Any, ...]:
        early = x
        for i, layer in enumerate(self.layers):
            x = layer(x, position)
            if i == 1:
                early = x
        table.add_(x.sum())  # an input that is written outside of the layers
        offsets = torch.tensor([1.0, -1.0] * 4, dtype=x.dtype)  # a constant of the graph
        return x + offsets, x.t(), early[1:], table, x, position, x.shape[0]


def stack_inputs(dtype: torch.dtype, rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randint(-4, 5, (rows, 8), generator=generator).to(dtype)
    return x, torch.tensor([rows % 3]), torch.zeros(2, 2, dtype=torch.float32)


def run_stack(model: Stack, run: Callable[..., Any], dtype: torch.dtype, rows: tuple[int, ...]) -> list[Any]:
    """Results, written inputs and strides of several calls."""
    for layer in model.layers:
        layer.state.zero_()
    found: list[Any] = []
    for n in rows:
        x, position, table = stack_inputs(dtype, n)
        results = run(x, position, table)
        tensors = [r for r in results if isinstance(r, torch.Tensor)]
        found += [(t.clone(), t.stride(), t.dtype) for t in (*tensors, table, *(layer.state for layer in model.layers))]
        found += [results[-1], results[3] is table, results[5] is position]
        found.append(results[1].data_ptr() == results[4].data_ptr())  # x.t() is still a view of x
    return found


# |x| <= 5, |inside| <= 9, so |x + inside @ down| <= 5 + 8 * 9 < 256: bfloat16 holds every value, whatever is fused.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
def test_writes_views_constants_and_early_results(dtype: torch.dtype, dynamic: bool) -> None:
    model, reports = Stack(dtype), list[OutlineReport]()
    rows = (6, 4, 9) if dynamic else (6, 6)
    expected = run_stack(model, model, dtype, rows)
    got = run_stack(model, compiled(model, reports, dynamic=dynamic), dtype, rows)
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if isinstance(b, tuple):
            assert torch.equal(a[0], b[0])
            assert a[1:] == b[1:]
        else:
            assert a == b
    assert [r.repeats for r in reports] == [LAYERS]


def test_a_training_graph_is_left_alone_and_trains() -> None:
    model, reports = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8)) for _ in range(4)]), []
    x = torch.randn(4, 8)
    with torch.enable_grad():
        compiled(model, reports, inner=eager)(x).sum().backward()
    assert {r.reason for r in reports} == {"a training graph"}
    assert len(reports) == 2  # forward and backward
    assert all(p.grad is not None for p in model.parameters())


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            kept = torch.nn.functional.dropout(torch.clamp(x + 1, -2, 2), 0.5, training=True)
            x = torch.clamp(x.flip(-1) + kept + kept.flip(-1) * 2 - kept.roll(1, -1) + x.roll(2, -1), -4, 4)
        return x


def test_random_numbers_are_those_of_the_unrolled_graph() -> None:
    """Same seed, same numbers, merged blocks or not: the generator is read as often and in the same order."""
    x, results = torch.ones(64, 8), []
    for reports in (None, list[OutlineReport]()):
        torch.compiler.reset()
        run = compiled(Noise(), reports)
        torch.manual_seed(3)
        results.append([run(x), run(x), torch.rand(3)])
    equal(results[1], results[0])
    assert not torch.equal(results[0][0], results[0][1])


def test_blocks_that_draw_random_numbers_draw_new_ones_each() -> None:
    """With eager's generator the draws are ordinary nodes, blocks merge, and the stream is eager's own."""
    x, reports = torch.ones(64, 8), list[OutlineReport]()
    run = compiled(Noise(), reports, {"fallback_random": True})
    torch.manual_seed(3)
    got = [run(x), run(x), torch.rand(3)]
    torch.manual_seed(3)
    equal(got, [Noise()(x), Noise()(x), torch.rand(3)])


# ------------------------------------------------------------------------------------------------------------- caches
CHILD = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import test_outline_inductor as t
from torch._dynamo.utils import counters
model, reports = t.Stack(), []
with torch.no_grad():
    found = t.run_stack(model, t.compiled(model, reports, key="two processes"), torch.float32, (6, 4))
sums = [float(f[0].double().sum()) for f in found if isinstance(f, tuple)]
print(json.dumps([sums, [str(r) for r in reports], dict(counters["inductor"])]))
"""


def test_a_second_process_finds_every_segment_in_the_cache() -> None:
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent)]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(2)
    ]
    (first, reports, cold), (second, again, warm) = runs
    assert first == second
    assert reports == again
    bodies = sum(report.count(" x ") for report in reports)
    assert (cold.get("fxgraph_cache_hit", 0), cold.get("fxgraph_cache_miss", 0)) == (0, bodies)
    assert (warm.get("fxgraph_cache_hit", 0), warm.get("fxgraph_cache_miss", 0)) == (bodies, 0)
