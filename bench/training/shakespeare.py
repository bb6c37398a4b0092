"""Train a small LLaMA on Shakespeare's works, then fine-tune it rounded, and with optimizers that keep few bits.

What rounding costs is told by three losses on text that no run has seen: of the float model that was fine-tuned (a), of that
same model rounded afterwards (b), and of a model that was rounded in every step of an equally long fine-tuning (c).
"By search" is (b) with the scales of smallest squared error.
Training through the rounding recovers (b - c) / (b - a) of the gap. All runs of a seed see the same batches.

    python bench/training/shakespeare.py [--quick] [--out train-results] [--only schemes|optimizers]

Writes results.json and curves.png after every run, so that an interrupted one keeps what is done.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import qcompile
from qcompile import optim
from qcompile.demo import text

WINDOW = 128  # tokens, which are characters


@dataclass(frozen=True)
class Case:
    """A scheme to train in.

    Attributes:
        recipe: as `options={"recipe": ...}` takes it. learned: whether scales are learned (LSQ) or chosen in every step.
        seeds: how many of the plan's.
    """

    recipe: str
    learned: bool = False
    seeds: int = 1


@dataclass(frozen=True)
class Plan:
    """How much of everything.

    Attributes:
        width, layers: of the model. batch: windows in a step. pretrain, tune, small: steps. seeds: orders of batches.
        windows: of the text that no run sees. cases: by name.
    """

    width: int
    layers: int
    batch: int
    pretrain: int
    tune: int
    small: int
    seeds: int
    windows: int
    cases: Mapping[str, Case]


_CASES = {
    "int4 per channel": Case("int4/axis0:fp32", seeds=3),
    "int4 per channel, learned scales": Case("int4/axis0:fp32", learned=True, seeds=3),
    "int3 g32": Case("int3/g32:fp16"),
    "int2 g32": Case("int2/g32:fp16"),
    "int2 g32, learned scales": Case("int2/g32:fp16", learned=True, seeds=3),
    "w4a8": Case("int4/axis0:fp32 int8/token"),
    "w4a4": Case("int4/axis0:fp32 int4/token"),
}
FULL = Plan(256, 4, 8, 1200, 200, 150, 3, 128, _CASES)
QUICK = Plan(128, 2, 8, 160, 40, 60, 1, 32, {name: _CASES[name] for name in ("int3 g32", "int2 g32")})
RATE, TUNE_RATE = 1.5e-3, 3e-4
# A step of Adam moves a number by about the rate, and a scale is much smaller than a weight is large.
SCALES_RATE = 0.03
# Of the runs with optimizers: so small that a step is mostly less than half the spacing of bf16 numbers around a weight.
SMALL_RATE = 2e-5


class Corpus:
    """Characters as tokens: those of the works, rare ones as one."""

    def __init__(self) -> None:
        whole = text.read("works")
        counts: dict[str, int] = {}
        for character in whole:
            counts[character] = counts.get(character, 0) + 1
        known = sorted(character for character, count in counts.items() if count >= 200)
        index = {character: i + 1 for i, character in enumerate(known)}
        tokens = torch.tensor([index.get(character, 0) for character in whole])
        cut = len(tokens) * 19 // 20
        self.vocabulary, self.train, self.held_out = len(known) + 1, tokens[:cut], tokens[cut:]

    def batches(self, count: int, size: int, seed: int) -> Iterator[Tensor]:
        """`count` batches `[size, WINDOW + 1]`, the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            starts = torch.randint(0, len(self.train) - WINDOW - 1, (size,), generator=generator)
            yield torch.stack([self.train[start : start + WINDOW + 1] for start in starts])

    def unseen(self, windows: int) -> Tensor:
        """`[windows, WINDOW + 1]`, spread evenly over the text that no run sees."""
        step = (len(self.held_out) - WINDOW - 1) // windows
        return torch.stack([self.held_out[i * step : i * step + WINDOW + 1] for i in range(windows)])


def llama(plan: Plan, vocabulary: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=plan.width,
        intermediate_size=plan.width * 11 // 4 // 32 * 32,
        num_hidden_layers=plan.layers,
        num_attention_heads=plan.width // 64,
        num_key_value_heads=plan.width // 64,
        max_position_embeddings=WINDOW,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def loss_of(run: Callable[..., Any], batch: Tensor) -> Tensor:
    logits = run(input_ids=batch[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


@dataclass
class Study:
    """What is done, and where it is written."""

    plan: Plan
    corpus: Corpus
    out: Path
    progress: Progress
    runs: list[dict[str, Any]] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def evaluate(self, run: Callable[..., Any]) -> float:
        """Mean loss on the unseen windows, in nats a character."""
        windows = self.corpus.unseen(self.plan.windows)
        with torch.no_grad():
            found = [float(loss_of(run, batch)) for batch in windows.split(self.plan.batch)]
        return sum(found) / len(found)

    def train(
        self,
        name: str,
        run: Callable[..., Any],
        update: Callable[[], Any],
        optimizer: torch.optim.Optimizer,
        steps: int,
        seed: int,
        rate: float,
        look: Callable[[int], None] = lambda step: None,
    ) -> list[float]:
        """Train with a cosine schedule, where `update` is the optimizer's step and `look` gets the number of each that is
        done; the losses of all steps."""
        bar, losses = self.progress.add_task(name, total=steps), []
        for step, batch in enumerate(self.corpus.batches(steps, self.plan.batch, seed)):
            scale = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * scale * group.get("share", 1.0)
            loss = loss_of(run, batch)
            loss.backward()
            update()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
            look(step + 1)
            self.progress.update(bar, advance=1, description=f"{name}: {losses[-1]:.3f}")
        self.progress.remove_task(bar)
        return losses

    def keep(self, **run: Any) -> dict[str, Any]:
        """Note a run, and write all of them."""
        self.runs.append(run)
        self.out.mkdir(parents=True, exist_ok=True)
        content = {"torch": torch.__version__, "seconds": time.monotonic() - self.begun, "runs": self.runs}
        (self.out / "results.json").write_text(json.dumps(content, indent=1))
        return run


def compiled(model: nn.Module, recipe: str | qcompile.Recipe = "") -> Callable[..., Any]:
    """The model by Inductor, or in a recipe by qcompile."""
    if not recipe:
        return torch.compile(model)
    return torch.compile(model, backend="qcompile", options={"recipe": recipe, "policy": "memory"})


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@dataclass
class Start:
    """The pre-trained float model, as something to begin again from: one module, compiled once, whose parameters are set.

    Attributes:
        early: the parameters after a quarter of the steps. state: at the end.
    """

    model: nn.Module
    run: Callable[..., Any]
    early: dict[str, Tensor]
    state: dict[str, Tensor]


def pretrained(study: Study) -> Start:
    model = llama(study.plan, study.corpus.vocabulary)
    run, early = compiled(model), {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)

    def look(step: int) -> None:
        if step == study.plan.pretrain // 4:
            early.update(snapshot(model))

    losses = study.train("pre-training", run, optimizer.step, optimizer, study.plan.pretrain, 0, RATE, look)
    count = sum(p.numel() for p in model.parameters())
    study.keep(kind="pretrain", losses=losses, loss=study.evaluate(run), parameters=count)
    return Start(model, run, early, snapshot(model))


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters for an optimizer: learned scales have a rate of their own, and are not pulled towards 0."""
    scales = qcompile.learned_scales(model)
    found: list[dict[str, Any]] = [{"params": [p for name, p in model.named_parameters() if name not in scales]}]
    return found + [{"params": scales.values(), "weight_decay": 0.0, "share": SCALES_RATE}] * bool(scales)


def searched(recipe: str) -> qcompile.Recipe:
    """The same schemes with the scales of smallest squared error: a stronger rounding of a trained model."""
    return qcompile.Recipe(tuple(replace(rule, fit="mse") for rule in qcompile.Recipe.of(recipe).rules), "searched")


def schemes(study: Study, start: Start) -> None:
    """For each seed the float model, trained on; then, scheme by scheme, that model rounded, and one trained in the scheme."""
    plan, tuned, best = study.plan, [], []
    for seed in range(1, plan.seeds + 1):
        start.model.load_state_dict(start.state)
        optimizer = torch.optim.AdamW(start.model.parameters(), lr=TUNE_RATE)
        name = f"float, seed {seed}"
        losses = study.train(name, start.run, optimizer.step, optimizer, plan.tune, seed, TUNE_RATE)
        tuned.append(snapshot(start.model))
        best.append(study.evaluate(start.run))
        study.keep(kind="float", seed=seed, losses=losses, loss=best[-1])
    for name, case in plan.cases.items():
        model = copy.deepcopy(start.model)
        after = []
        for recipe in (case.recipe, searched(case.recipe)):
            run = compiled(model, recipe)
            for state in tuned[: case.seeds]:
                model.load_state_dict(state)
                after.append(study.evaluate(run))
        model.load_state_dict(start.state)
        if case.learned:
            qcompile.prepare(model, case.recipe)
        begin, run = snapshot(model), compiled(model, case.recipe)
        for seed in range(1, min(plan.seeds, case.seeds) + 1):
            model.load_state_dict(begin)
            optimizer = torch.optim.AdamW(groups(model), lr=TUNE_RATE)
            label = f"{name}, seed {seed}"
            losses = study.train(label, run, optimizer.step, optimizer, plan.tune, seed, TUNE_RATE)
            found = {"float": best[seed - 1], "rounded": after[seed - 1], "searched": after[len(after) // 2 + seed - 1]}
            loss = study.evaluate(run)
            study.keep(kind="scheme", scheme=name, recipe=case.recipe, seed=seed, losses=losses, loss=loss, **found)
        torch._dynamo.reset()  # and with it what the backend keeps of these models


def stochastic(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """torch's own optimizer, whose step qcompile rewrites."""
    return torch.compile(optimizer.step, backend="qcompile", options={"recipe": "sr"})


def optimizers(study: Study, start: Start) -> None:
    """The same steps with a small learning rate, parameters and state in fewer and fewer bits, from where loss falls fast."""
    plan = study.plan
    start.model.load_state_dict(start.early)
    half = copy.deepcopy(start.model).to(torch.bfloat16)
    full, bf16 = (start.model, start.early, start.run), (half, snapshot(half), compiled(half))
    cases: dict[str, tuple[Any, type[torch.optim.Optimizer], dict[str, Any]]] = {
        "AdamW, fp32": (full, torch.optim.AdamW, {}),
        "AdamW, bf16 to nearest": (bf16, torch.optim.AdamW, {}),
        "AdamW, bf16 stochastic": (bf16, torch.optim.AdamW, {}),
        "8-bit state, bf16 stochastic": (bf16, optim.AdamW, {"state_bits": 8}),
        "4-bit state, bf16 stochastic": (bf16, optim.AdamW, {"state_bits": 4}),
    }
    for name, ((model, state, run), make, settings) in cases.items():
        model.load_state_dict(state)
        before = study.evaluate(run)
        optimizer = make(model.parameters(), lr=SMALL_RATE, **settings)  # type: ignore[call-arg]
        own = make is torch.optim.AdamW and name.endswith("stochastic")
        step = stochastic(optimizer) if own else optimizer.step
        losses = study.train(name, run, step, optimizer, plan.small, 1, SMALL_RATE)
        tensors = [
            t for held in optimizer.state.values() for t in held.values() if torch.is_tensor(t) and t.numel() > 1
        ]
        size = sum(t.numel() * t.element_size() for t in tensors)
        study.keep(
            kind="optimizer", optimizer=name, losses=losses, before=before, loss=study.evaluate(run), state_bytes=size
        )


def recovered(run: Mapping[str, float]) -> float:
    """Share of the gap, `nan` where there is none."""
    gap = run["rounded"] - run["float"]
    return (run["rounded"] - run["loss"]) / gap if gap > 0 else math.nan


def table(runs: list[dict[str, Any]]) -> Iterator[Table]:
    rounded = [run for run in runs if run["kind"] == "scheme"]
    if rounded:
        found = Table(title="loss on unseen text, nats a character: means of seeds", title_justify="left")
        for column in ("scheme", "float", "rounded", "by search", "trained rounded", "recovered", "of each seed"):
            found.add_column(column, justify="left" if column == "scheme" else "right")
        for name in dict.fromkeys(run["scheme"] for run in rounded):
            mine = [run for run in rounded if run["scheme"] == name]
            keys = ("float", "rounded", "searched", "loss")
            mean = {key: sum(run[key] for run in mine) / len(mine) for key in keys}
            each = " ".join(f"{recovered(run):.0%}" for run in mine)
            found.add_row(name, *(f"{value:.4f}" for value in mean.values()), f"{recovered(mean):.0%}", each)
        yield found
    compared = [run for run in runs if run["kind"] == "optimizer"]
    if compared:
        found = Table(title=f"optimizers at a learning rate of {SMALL_RATE:g}", title_justify="left")
        for column in ("optimizer", "loss before", "after", "/ fp32", "state MB"):
            found.add_column(column, justify="left" if column == "optimizer" else "right")
        for run in compared:
            words = (f"{run['before']:.4f}", f"{run['loss']:.4f}", f"{run['loss'] / compared[0]['loss']:.4f}")
            found.add_row(run["optimizer"], *words, f"{run['state_bytes'] / 1e6:.2f}")
        yield found


def curves(runs: list[dict[str, Any]], out: Path) -> None:
    """Losses of all steps, less those of float32 on the same batches, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4.5))
    for axis, kinds, title in zip(
        axes, (("float", "scheme"), ("optimizer",)), ("rounded in training", "optimizers"), strict=True
    ):
        shown = [run for run in runs if run["kind"] in kinds and run.get("seed", 1) == 1]
        for run in shown:
            more = [a - b for a, b in zip(run["losses"], shown[0]["losses"], strict=True)]
            smooth = [sum(more[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(more))]
            axis.plot(smooth, label=run.get("scheme") or run.get("optimizer") or "float")
        axis.set(title=title, xlabel="step", ylabel="training loss less that of float32, mean of 10 steps")
        if shown:
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("train-results"))
    parser.add_argument("--only", choices=("schemes", "optimizers"))
    options = parser.parse_args()
    console = Console(width=max(Console().width, 110))
    with Progress(console=console) as progress:
        study = Study(QUICK if options.quick else FULL, Corpus(), options.out, progress)
        try:
            start = pretrained(study)
            for part in (schemes, optimizers):
                if options.only in (None, part.__name__):
                    part(study, start)
        except KeyboardInterrupt:
            console.print("interrupted: what is done is kept")
    for found in table(study.runs):
        console.print(found)
    curves(study.runs, options.out)
    console.print(f"{time.monotonic() - study.begun:.0f} s, {options.out}/results.json and curves.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
