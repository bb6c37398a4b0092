"""Write the README's table of results from what `make demo` measured, so that nobody types numbers.

make demo && python .ci/readme.py          # reads demo-results/results.json, keeps it in bench/results/
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
KEPT = ROOT / "bench" / "results" / "demo-cpu.json"
BEGIN, END = "<!-- results -->", "<!-- /results -->"


def ratio(row: dict[str, Any], key: str) -> str:
    return f"{row[key]['median']:.2f}x" if key in row else ""


def speeds(row: dict[str, Any], name: str) -> str:
    both = [ratio(row, f"{name}_x_{base}") for base in ("eager", "inductor")]
    return " / ".join(text or "1" for text in both)


def line(row: dict[str, Any]) -> str:
    cells = [
        row["label"],
        f"{row['perplexity']:.2f}",
        f"{row['perplexity_x_eager']:.4f} ± {row['perplexity_x_eager_error']:.4f}",
        f"{row['prompt_tokens_per_s']['median']:.0f}",
        speeds(row, "prompt"),
        f"{row['decode_tokens_per_s']['median']:.1f}",
        speeds(row, "decode"),
        f"{row['weight_bytes'] / 1e6:.0f}",
        f"{(row['resident_bytes'] - row['code_bytes']) / 1e6:.0f}",
        f"{row['first_call_s']:.0f}" + (" (warm cache)" if row["first_call_cache"] == "warm" else ""),
    ]
    return f"| {' | '.join(cells)} |"


def block(found: dict[str, Any]) -> str:
    """The Markdown between the markers."""
    about, machine = found["settings"], found["machine"]
    rows = [row for row in found["summary"].values() if "decode_tokens_per_s" in row]
    names = (
        "engine", "perplexity", "x float", "prompt tok/s", "x eager / Inductor", "decode tok/s", "x eager / Inductor",
        "weights MB", "resident MB", "first call s",
    )  # fmt: skip
    head = [f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
    text = (
        f"{about['model']} in fp32, {machine['cpu']}, {machine['inductor_isa']}, {machine['torch_threads']} threads, torch "
        f"{machine['versions']['torch']}; [all numbers of this run]({KEPT.relative_to(ROOT)}). Prompt of "
        f"{about['prompt_tokens']} tokens, then one token at a time with a static cache; medians of {about['rounds']} "
        "interleaved rounds. A speed's `x` is the median of the ratios inside each round, so it does not follow from the "
        f"columns. Perplexity on {about['scored_tokens']} tokens of {about['text']}. Weights are what the engine computes "
        "with; resident is the process without the code, and holds the float weights too unless they were given up "
        "(`convert`). First call: prompt and decode graph, empty cache."
    )
    return "\n".join([BEGIN, *head, *map(line, rows), "", text, END])


def main() -> None:
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo-results" / "results.json"
    found = json.loads(source.read_text())
    if not found.get("complete"):
        sys.exit(f"{source} is of an interrupted run")
    if source != KEPT:
        KEPT.parent.mkdir(exist_ok=True)
        KEPT.write_text(source.read_text())
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    readme.write_text(before + block(found) + rest.partition(END)[2])


if __name__ == "__main__":
    main()
