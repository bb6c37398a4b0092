"""Training steps on CPUs: through the roundings of a recipe, and in 8-bit codes, against Inductor's float step.

    python bench/training/steps.py [--quick] [--json out.json] [--layers 4] [--tokens 2048]

A step is the forward and the backward pass of a small decoder (`transformers`' LLaMA: width 512, feed-forward 1408, a
vocabulary of 4096) in float32; the optimizer, which is the same for all, is left out. Contestants run interleaved, round after
round, and each reports the median of its times, and the time of Inductor's step divided by its own: more than 1 is faster.

Before anything is timed, gradients of each contestant are compared with those of the plain-torch meaning of the same graph.
With rounded weights both are float32 sums of the same numbers in another order, as are those of Inductor's float step and of
plain torch: they may be apart by four times what those are. Where activations are rounded too, a sum that differs in its last
bit sends a few of them to the neighbouring level, and by that more of them in every later product, so that no such bound holds;
but errors of two roundings that have nothing to do with each other are at right angles, and these have to be within 60 degrees.
Anything else ends the run with an error.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from qcompile.backend import watching
from qcompile.codegen.devices.cpu import detect_isa
from qcompile.plan.recipe import Recipe

VOCABULARY = 4096
RECIPES = ("int4/axis0:fp32", "int4", "int8", "w8a8", "w4a8", "int8-train")


def decoder(layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


@dataclass(frozen=True)
class Result:
    """One contestant: its median, and the ratios of medians and of best rounds."""

    name: str
    milliseconds: float
    speedup: float
    best_speedup: float


class Contestant:
    """A model of its own, compiled."""

    def __init__(
        self, name: str, model: nn.Module, ids: Tensor, compiled: Callable[[nn.Module], Callable[..., object]]
    ):
        self.name, self.model, self.ids = name, copy.deepcopy(model), ids
        self.run = compiled(self.model)

    def step(self) -> None:
        logits = self.run(input_ids=self.ids[:, :-1]).logits  # type: ignore[attr-defined]
        cross_entropy(logits.flatten(0, 1), self.ids[:, 1:].flatten()).backward()

    def gradients(self) -> Tensor:
        """Of one step, in a row."""
        self.model.zero_grad()
        self.step()
        found = torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None]).double()
        self.model.zero_grad(set_to_none=False)
        return found


def by_recipe(recipe: str) -> Callable[[nn.Module], Callable[..., object]]:
    return lambda model: torch.compile(model, backend="qcompile", options={"recipe": recipe, "policy": "memory"})


def references(model: nn.Module, ids: Tensor, recipes: Sequence[str]) -> dict[str, Tensor]:
    """Gradients by the plain-torch meaning of each recipe's graph. Dynamo takes two models of one class and one backend to
    be served by the same code, so what was compiled for this is thrown away."""
    found = {}
    for recipe in track(recipes, "in plain torch", transient=True):
        with watching("reference"):
            found[recipe] = Contestant(recipe, model, ids, by_recipe(recipe)).gradients()
        torch._dynamo.reset()
    return found


def check(contestant: Contestant, want: Tensor, exact: Tensor, order: float) -> None:
    """`order`: how far float gradients are apart for the order of their sums."""
    found = contestant.gradients()
    ours, rounding = found - exact, want - exact
    apart, cosine = float((found - want).norm()), float(ours @ rounding / (ours.norm() * rounding.norm()))
    weights_only = all(rule.act is None for rule in Recipe.of(contestant.name).rules)
    if not (apart <= 4 * order if weights_only else cosine >= 0.5):
        sys.exit(
            f"{contestant.name}: gradients of kernels are {apart:.2e} from those of plain torch (float: {order:.2e}), "
            f"cosine of the errors {cosine:.3f}"
        )


def measure(found: list[Contestant], rounds: int) -> list[Result]:
    times: list[list[float]] = [[] for _ in found]
    for _ in track(range(rounds), "measuring", transient=True):
        for each, contestant in zip(times, found, strict=True):
            start = time.perf_counter()
            contestant.step()
            each.append(time.perf_counter() - start)
    medians, best = [statistics.median(each) for each in times], [min(each) for each in times]
    return [
        Result(c.name, t * 1e3, medians[0] / t, best[0] / b) for c, t, b in zip(found, medians, best, strict=True)
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--recipes", nargs="+", default=RECIPES)
    parser.add_argument("--quick", action="store_true", help="7 rounds of 2 layers, one recipe of each kind")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    layers, rounds, recipes = options.layers, options.rounds, options.recipes
    if options.quick:
        layers, rounds, recipes = 2, 7, ("int4/axis0:fp32", "w8a8", "int8-train")
    model = decoder(layers)
    ids = torch.randint(0, VOCABULARY, (options.tokens // 256, 257))
    wanted = references(model, ids, recipes)
    found = [Contestant("Inductor, float32", model, ids, torch.compile)]
    exact = found[0].gradients()
    order = float((exact - Contestant("plain torch", model, ids, lambda model: model).gradients()).norm())
    for recipe in track(recipes, "compiling and checking", transient=True):
        found.append(Contestant(recipe, model, ids, by_recipe(recipe)))
        check(found[-1], wanted[recipe], exact, order)
    results = measure(found, rounds)
    count = sum(p.numel() for p in model.parameters())
    title = f"{count / 1e6:.1f} million parameters, {options.tokens} tokens, {detect_isa()}, {options.threads} threads"
    table = Table(title=title, title_justify="left")
    for name in ("step", "ms", "x Inductor", "(best)"):
        table.add_column(name, justify="left" if name == "step" else "right")
    for r in results:
        table.add_row(r.name, f"{r.milliseconds:.1f}", f"{r.speedup:.2f}", f"{r.best_speedup:.2f}")
    Console(width=max(Console().width, 120)).print(table)
    if options.json:
        about = {"isa": detect_isa(), "threads": options.threads, "torch": torch.__version__, "parameters": count}
        about |= {"tokens": options.tokens}
        options.json.write_text(json.dumps({**about, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
