"""A chart of the shares of copy bandwidth per shape, out of the JSON lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu_blocks.results import load

BLOCKS = (3, 7)  # those whose question is bandwidth


def bars(lines: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """By label, the newest first-rate number of each question: share of copy bandwidth, speedup over bf16."""
    found = {}
    for line in lines:
        result = line["result"]
        best = result.get("contestants", {}).get(result.get("best"), {})
        if line["block"] in BLOCKS and line["ok"] and best.get("share") is not None:
            config = line["config"]
            name = f"{config['scheme']} {config['n']}x{config['k']} M={config['m']}"
            found[name] = (best["share"], best["speedup"])
    return found


def draw(source: Path, target: Path) -> int:
    """Write a PNG.

    Returns:
        How many bars it has; nothing is written for none.
    """
    lines = load(source)
    shares = bars(lines)
    if not shares:
        return 0
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.3 * len(shares)))
    names = list(shares)
    drawn = axes.barh(names, [100 * share for share, _ in shares.values()], color="#3b6ea5")
    axes.bar_label(drawn, [f"{share:.0%}, {speedup:.2f} x bf16" for share, speedup in shares.values()], padding=3)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_xlim(0, 130)
    axes.invert_yaxis()
    axes.set_xlabel("% of measured copy bandwidth, on bytes of packed weights")
    axes.set_title(lines[-1]["device"].replace("-", " "))
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return len(shares)


__all__ = ["bars", "draw"]
