"""How much quality each preset costs, compiled and in plain torch: SmolLM2's perplexity, MiniLM's embeddings.

For every preset the backend's own ledger says which weights and activations are quantized and how. That plan
runs twice: compiled, which is the product, and as the reference, where the weights are rounded in place and
the activations rounded in front of the layers with nothing but `qcompile.ir.codec` and eager torch. The two
may differ by what kernels do in another order, and by nothing else.

    python bench/models/quality.py [--windows 64] [--recipes int8,int4] [--reference-only] [--gpu]

`--gpu` is for presets that have other schemes there: what these cost, in plain torch on this machine.

Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import qcompile
from qcompile.demo import model, report, text
from qcompile.ir.codec import dequantize, fake_quant, quantize
from qcompile.ir.scheme import Scheme
from qcompile.plan.recipe import PRESETS

TOKENS = 256  # per perplexity window
BATCH, LENGTH = 8, 64  # sentences per call, tokens they are padded to

PERPLEXITY = {"int8": 1.005, "int4": 1.01, "w8a8": 1.06, "auto": 1.01, "w4a8": None, "nf4": None}
COSINE = {"int8": 0.9995, "w8a8": 0.997, "int4": 0.970}
# Compiled against reference, relative perplexity, beyond three standard errors of the difference. Weight-only
# recipes agree to 1e-5 or so. Rounded activations are chaotic: an activation that moves by one ulp across a
# rounding boundary moves by a whole step, and a few layers later every code has been drawn anew. Multiplying
# the table by 1 + 1e-6 of noise moves the reference's own perplexity by several percent in a window of 256
# tokens, in both directions.
AGREEMENT = 0.003


@dataclass(frozen=True)
class Line:
    """One measured number.

    Attributes:
        model: what was measured on.
        recipe: the preset.
        engine: "compiled" or "reference".
        text: what it was measured on.
        value: perplexity / float perplexity, or mean cosine to the float embeddings.
        error: standard error of `value` over windows, or standard deviation of the cosines / sqrt(sentences).
        target: the bound it must keep, None without one.
        met: whether it does, and agrees with the reference.
        coverage: share of contraction FLOPs that run quantized.
        seconds: compiling included.
        apart: compiled perplexity / the reference's and its standard error; None for other lines.
    """

    model: str
    recipe: str
    engine: str
    text: str
    value: float
    error: float
    target: float | None
    met: bool
    coverage: float
    seconds: float
    apart: tuple[float, float] | None = None

    def __str__(self) -> str:
        apart = "" if self.apart is None else f", {self.apart[0]:.5f} ± {self.apart[1]:.5f} of the reference"
        missed = "" if self.met else "   MISSED"
        return f"  {self.recipe} {self.engine}: {self.value:.5f} ± {self.error:.5f}{apart}{missed}"


# ---------------------------------------------------------------------------------------------- the reference
def chosen(recipe: str, device: str) -> qcompile.Recipe:
    """A preset as it is on a device, "cpu" or "gpu", for all."""
    rules = [rule for rule in PRESETS[recipe].rules if rule.device in ("", device)]
    return replace(PRESETS[recipe], rules=tuple(replace(rule, device="") for rule in rules))


def reference(float_model: nn.Module, recipe: qcompile.Recipe, ledger: qcompile.Explanation) -> nn.Module:
    """A copy of the model in which the ledger's decisions are carried out in plain torch."""
    fits = {str(rule.weight): rule.fit for rule in recipe.rules}
    rounded = copy.deepcopy(float_model)
    parameters = dict(rounded.named_parameters(remove_duplicate=False))
    done: dict[int, str] = {}
    for row in ledger.rows:
        if not row.quantized:
            continue
        weight, _, act = row.scheme.partition(" x ")
        parameter = parameters[row.path]
        # A table that is looked up and multiplied with has two rows in the ledger and one packed copy.
        if done.setdefault(id(parameter), weight) != weight:
            raise RuntimeError(f"{row.path} has two schemes, {done[id(parameter)]} and {weight}")
        if act:
            module = rounded.get_submodule(row.path.rpartition(".")[0])
            module.register_forward_pre_hook(_round_input(Scheme.parse(act)))
    with torch.no_grad():
        for parameter in rounded.parameters():
            if id(parameter) in done:
                scheme = done[id(parameter)]
                parameter.copy_(dequantize(quantize(parameter, scheme, fit=fits[scheme]), scheme, *parameter.shape))
    return rounded


def _round_input(scheme: Scheme) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    return lambda module, args: (fake_quant(args[0], scheme), *args[1:])


# ------------------------------------------------------------------------------------------- the two measures
@torch.inference_mode()
def surprise(call: Callable[..., Any], windows: torch.Tensor) -> list[float]:
    """Negative log likelihood in nats of each window `[count, TOKENS]`, without its first token."""
    found = []
    for window in windows.split(1):
        ids = window.clone(memory_format=torch.contiguous_format)
        logits = call(input_ids=ids, use_cache=False).logits[0, :-1].float()
        found.append(float(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
    return found


@torch.inference_mode()
def embeddings(call: Callable[..., Any], batches: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """`[sentences, 384]`, each of length 1."""
    return torch.cat([model.embed(call, {k: v.clone() for k, v in batch.items()}) for batch in batches])


def engines(
    float_model: nn.Module, recipe: qcompile.Recipe, example: dict[str, Any], compiled: bool
) -> Iterable[tuple[str, Callable[..., Any], float]]:
    """(name, what to call, coverage) of the reference and, if wanted, the compiled model."""
    torch.compiler.reset()
    ledger = qcompile.explain(float_model, recipe=recipe, **example)
    yield "reference", reference(float_model, recipe, ledger), ledger.coverage
    if compiled:
        torch.compiler.reset()
        options: dict[str, Any] = {"recipe": recipe}
        call = torch.compile(float_model, backend="qcompile", options=options)
        yield "compiled", call, ledger.coverage


def language_model(given: argparse.Namespace, recipes: list[str], say: Callable[[str], None]) -> list[Line]:
    """Perplexity ratios of SmolLM2."""
    with tempfile.TemporaryDirectory() as folder:
        where = model.unpack(Path(folder))
        tokenizer, float_model = model.load_tokenizer(where), model.load(where)
    windows = text.windows(tokenizer, text.read(given.text), given.windows, TOKENS)
    scored = TOKENS - 1
    base = surprise(float_model, windows)
    perplexity = math.exp(sum(base) / (len(base) * scored))
    say(f"{model.LANGUAGE_MODEL}: float {perplexity:.3f} on {len(base) * scored} tokens of {text.NAMES[given.text]}")
    lines = []
    for recipe in recipes:
        target, plain = PERPLEXITY[recipe], list[float]()
        example = {"input_ids": windows[:1].clone(), "use_cache": False}
        for engine, call, coverage in engines(
            float_model, chosen(recipe, given.device), example, not given.reference_only
        ):
            begun = time.monotonic()
            found = surprise(call, windows)
            value, error = report.perplexity_ratio(found, base, scored)
            apart = report.perplexity_ratio(found, plain, scored) if plain else None
            met = (target is None or value <= target) and (
                apart is None or abs(apart[0] - 1) <= AGREEMENT + 3 * apart[1]
            )
            plain = plain or found
            took = time.monotonic() - begun
            name = model.LANGUAGE_MODEL
            lines.append(Line(name, recipe, engine, given.text, value, error, target, met, coverage, took, apart))
            say(str(lines[-1]))
    return lines


def sentence_model(given: argparse.Namespace, recipes: list[str], say: Callable[[str], None]) -> list[Line]:
    """Mean cosines of MiniLM's sentence embeddings, on prose: verse is no sentence."""
    float_model, tokenizer = model.load_sentence_model()
    sentences = text.sentences(text.read("article"), given.sentences // BATCH * BATCH)
    padded = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
    batches = [dict(tokenizer(sentences[at : at + BATCH], **padded)) for at in range(0, len(sentences), BATCH)]
    base = embeddings(float_model, batches)
    say(f"{model.SENTENCE_MODEL}: {len(base)} sentences of {text.NAMES['article']}")
    lines = []
    for recipe in recipes:
        for engine, call, coverage in engines(
            float_model, chosen(recipe, given.device), batches[0], not given.reference_only
        ):
            begun = time.monotonic()
            cosines = (embeddings(call, batches) * base).sum(-1)
            value, error = float(cosines.mean()), float(cosines.std()) / len(cosines) ** 0.5
            target, took = COSINE[recipe], time.monotonic() - begun
            name = model.SENTENCE_MODEL
            lines.append(Line(name, recipe, engine, "article", value, error, target, value >= target, coverage, took))
            say(str(lines[-1]))
    return lines


def table(lines: list[Line]) -> Table:
    shown = Table(title="quality: perplexity / float (lower is better), mean cosine (higher)", title_justify="left")
    for name in ("model", "recipe", "engine"):
        shown.add_column(name)
    for name in ("value", "±", "target", "/ reference", "coverage", "s", ""):
        shown.add_column(name, justify="right")
    for one in lines:
        shown.add_row(
            one.model,
            one.recipe,
            one.engine,
            f"{one.value:.5f}",
            f"{one.error:.5f}",
            "" if one.target is None else f"{one.target:g}",
            "" if one.apart is None else f"{one.apart[0]:.5f}",
            f"{one.coverage:.3f}",
            f"{one.seconds:.0f}",
            "ok" if one.met else "MISSED",
            style=None if one.met else "red",
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", choices=list(text.NAMES), default="works", help="for the perplexity")
    parser.add_argument("--windows", type=int, default=64, help=f"pieces of text of {TOKENS} tokens")
    parser.add_argument("--sentences", type=int, default=64)
    parser.add_argument("--recipes", default=",".join(PERPLEXITY), help="comma separated")
    parser.add_argument("--reference-only", action="store_true", help="compile nothing")
    parser.add_argument("--gpu", action="store_true", help="the schemes for GPUs, as the reference; compile nothing")
    parser.add_argument("--models", default="language,sentence", help="language, sentence or both")
    parser.add_argument("--out", type=Path, default=Path("bench-results/quality.json"))
    given = parser.parse_args()
    given.device, given.reference_only = "gpu" if given.gpu else "cpu", given.reference_only or given.gpu
    recipes = given.recipes.split(",")
    for recipe in recipes:
        qcompile.Recipe.of(recipe)
    console = Console(highlight=False, soft_wrap=True)
    lines: list[Line] = []
    if "language" in given.models:
        lines += language_model(given, recipes, console.print)
    if "sentence" in given.models:
        lines += sentence_model(given, [recipe for recipe in recipes if recipe in COSINE], console.print)
    wide = Console(width=110)
    wide.print(table(lines))
    report.write(given.out, {"machine": report.machine(), "lines": [asdict(one) for one in lines]})
    missed = [one for one in lines if not one.met]
    console.print(f"{len(lines) - len(missed)} of {len(lines)} within their targets; {given.out}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
