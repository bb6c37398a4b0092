"""From raw numbers to what a reader sees: a table, a chart and a JSON file.

Times on a shared machine wander, so speed is given as the median over the rounds with the smallest and
largest, and engines are compared by the median of the ratios inside a round. Quality is compared window by
window on the same tokens, which leaves a standard error far below that of the perplexity itself.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

from rich.table import Table

from qcompile.demo.measure import Outcome

BASES = ("eager", "inductor")
VERSION = 1


# -------------------------------------------------------------------------------------------- derived numbers
def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def prompt_speeds(outcome: Outcome, tokens: int) -> list[float]:
    """Prompt tokens per second of every round."""
    return [tokens / prompt for prompt, _ in outcome.turns]


def decode_speeds(outcome: Outcome) -> list[float]:
    """Decoded tokens per second of every round."""
    return [len(steps) / sum(steps) for _, steps in outcome.turns]


def perplexity_ratio(surprise: Sequence[float], base: Sequence[float], tokens: int) -> tuple[float, float]:
    """Perplexity relative to another engine's on the same windows, and its standard error.

    Args:
        surprise: negative log likelihood of each window, in nats.
        base: the other engine's.
        tokens: scored tokens per window.

    Returns:
        The ratio; the standard error over windows (first order: ratio times that of the mean log ratio).
    """
    logs = [(a - b) / tokens for a, b in zip(surprise, base, strict=True)]
    ratio = math.exp(sum(logs) / len(logs))
    return ratio, ratio * stdev(logs) / len(logs) ** 0.5 if len(logs) > 1 else 0.0


_SPEEDS = ("prompt_tokens_per_s", "decode_tokens_per_s")
NOISY = 2  # rounds of a quiet machine differ by a tenth


def summarize(outcomes: Sequence[Outcome], chunk: int, window: int) -> dict[str, dict[str, Any]]:
    """Per engine what the table shows; keys that were not measured are missing."""
    known = {outcome.engine.name: outcome for outcome in outcomes}
    return {outcome.engine.name: _summary(outcome, known, chunk, window - 1) for outcome in outcomes}


def _summary(outcome: Outcome, known: dict[str, Outcome], chunk: int, scored: int) -> dict[str, Any]:
    found: dict[str, Any] = {"label": outcome.engine.label}
    report = outcome.report
    if outcome.skipped:
        found["skipped"] = True
    if outcome.error:
        found["error"] = outcome.error
    if report:
        surprise = report["surprise"]
        found["perplexity"] = math.exp(sum(surprise) / (len(surprise) * scored))
        base = known["eager"].report if "eager" in known else {}
        if base:
            ratio, error = perplexity_ratio(surprise, base["surprise"], scored)
            found["perplexity_x_eager"], found["perplexity_x_eager_error"] = ratio, error
        found["first_call_s"] = report["first_prompt"] + report["first_step"]
        found["first_call_cache"] = "none" if not outcome.engine.backend else "warm" if outcome.engine.warm else "cold"
        found["code_bytes"] = report["resident"]["start"]
        found["weight_bytes"], found["resident_bytes"] = report["weights"], report["resident"]["end"]
        found["coverage"], found["kernels"] = report["coverage"], report["kernels"]
    if outcome.turns:
        speeds: dict[str, Callable[[Outcome], list[float]]] = {
            "prompt": lambda one: prompt_speeds(one, chunk),
            "decode": decode_speeds,
        }
        for name, speed in speeds.items():
            mine = speed(outcome)
            found[f"{name}_tokens_per_s"] = spread(mine)
            for base_name in BASES:
                if base_name in known and known[base_name].turns and base_name != outcome.engine.name:
                    # The rounds of an interrupted run may differ by one.
                    pairs = zip(mine, speed(known[base_name]), strict=False)
                    found[f"{name}_x_{base_name}"] = spread([a / b for a, b in pairs])
    base_report = known["inductor"].report if "inductor" in known else {}
    if report and base_report and outcome.engine.backend == "qcompile":
        cold = base_report["first_prompt"] + base_report["first_step"]
        found["first_call_x_inductor"] = found["first_call_s"] / cold
    return found


# -------------------------------------------------------------------------------------------------- the table
def table(summary: dict[str, dict[str, Any]], title: str) -> Table:
    """One row per engine. Second lines: ratios to float (eager / Inductor)."""
    shown = Table(title=title, title_justify="left", show_lines=True)
    shown.add_column("engine")
    for name in ("perplexity", "prompt tok/s", "decode tok/s", "weights MB", "resident MB", "first call s"):
        shown.add_column(name, justify="right")
    for row in summary.values():
        if "error" in row:
            shown.add_row(row["label"], "failed: " + row["error"].splitlines()[0], style="red")
        elif "skipped" in row:
            shown.add_row(row["label"], "left out: no time", style="yellow")
        elif "perplexity" not in row:
            shown.add_row(row["label"], "interrupted", style="yellow")
        else:
            shown.add_row(
                row["label"],
                f"{row['perplexity']:.2f}\n" + _times(row, "perplexity_x_eager", "{:.4f}x"),
                _speed(row, "prompt"),
                _speed(row, "decode"),
                f"{row['weight_bytes'] / 1e6:.0f}",
                f"{(row['resident_bytes'] - row['code_bytes']) / 1e6:.0f}",
                f"{row['first_call_s']:.1f}" + ("\nwarm cache" if row["first_call_cache"] == "warm" else ""),
            )
    return shown


def _times(row: dict[str, Any], key: str, form: str) -> str:
    return form.format(row[key]) if key in row else ""


def _speed(row: dict[str, Any], name: str) -> str:
    if f"{name}_tokens_per_s" not in row:
        return ""
    now = row[f"{name}_tokens_per_s"]
    ratios = [row.get(f"{name}_x_{base}") for base in BASES]
    second = " / ".join(f"{ratio['median']:.2f}x" if ratio else "-" for ratio in ratios)
    return f"{now['median']:.0f} ({now['min']:.0f}..{now['max']:.0f})\n" + (second if any(ratios) else "")


def notes(summary: dict[str, dict[str, Any]]) -> list[str]:
    """What has to be said below the table."""
    code = median([row["code_bytes"] for row in summary.values() if "code_bytes" in row] or [0])
    lines = [
        "second lines: x float eager; speeds: x float eager / x float with Inductor, each the median of the ratios inside "
        "the rounds, so it does not follow from the columns",
        f"weights: what the engine computes with. resident: the process without the {code / 1e6:.0f} MB of code that are "
        "there before any model; it holds the float weights too unless converted",
        "first call: prompt graph + decode graph, compiled on an empty cache unless marked",
    ]
    spreads = [row[key] for row in summary.values() for key in _SPEEDS if key in row]
    if any(found["max"] > NOISY * found["min"] for found in spreads):
        lines.append(
            f"the machine was busy: some speeds differ by more than {NOISY}x between rounds. Ratios stand, columns hardly; "
            "close other programs and run it again"
        )
    return lines


# -------------------------------------------------------------------------------------------------- the chart
def chart(summary: dict[str, dict[str, Any]], path: Path, title: str) -> None:
    """Write a PNG with three panels of bars: decode speed, prompt speed, size of the weights with the
    perplexity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in summary.values() if "decode_tokens_per_s" in row]
    panels: tuple[tuple[str, Callable[[dict[str, Any]], float], Callable[[dict[str, Any]], str]], ...] = (
        (
            "decode, tokens/s",
            lambda r: float(r["decode_tokens_per_s"]["median"]),
            lambda r: _beside(r, "decode"),
        ),
        (
            "prompt, tokens/s",
            lambda r: float(r["prompt_tokens_per_s"]["median"]),
            lambda r: _beside(r, "prompt"),
        ),
        ("weights, MB (perplexity)", lambda r: float(r["weight_bytes"]) / 1e6, _size),
    )
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 1.4 + 0.45 * len(rows)), sharey=True)
    for axis, (name, value, text) in zip(axes, panels, strict=True):
        values = [value(row) for row in rows]
        colors = ["#2a7ab9" if row["label"].startswith("float") else "#e07b39" for row in rows]
        bars = axis.barh(range(len(rows)), values, color=colors)
        axis.bar_label(bars, [text(row) for row in rows], padding=3, fontsize=9)
        axis.set_title(name, fontsize=11)
        axis.set_xlim(0, 1.45 * max(values, default=1.0))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(rows)), [row["label"] for row in rows])
    axes[0].invert_yaxis()
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _beside(row: dict[str, Any], name: str) -> str:
    ratio = row.get(f"{name}_x_eager")
    return f"{row[f'{name}_tokens_per_s']['median']:.0f}" + (f" ({ratio['median']:.1f}x)" if ratio else "")


def _size(row: dict[str, Any]) -> str:
    return f"{row['weight_bytes'] / 1e6:.0f} ({row['perplexity']:.1f})"


# --------------------------------------------------------------------------------------------------- the file
def machine() -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    import torch

    from qcompile import compat

    cpu = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    packages = ("torch", "torch-qcompile", "transformers", "gguf", "numpy")
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "inductor_isa": compat.cpp_isa(),
        "compiler": compat.cpp_compiler(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "load_average": list(os.getloadavg()),
        "versions": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def write(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"version": VERSION, **content}, indent=1) + "\n", encoding="utf-8")
    fresh.replace(path)
