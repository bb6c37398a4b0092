"""Numbers of one measurement: time, share of the copy bandwidth, ratio to bf16; and the line that says them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gpu_blocks import ceilings
from gpu_blocks.device import Contestant
from gpu_blocks.session import Session

NOT_TIMED = "not timed"


def figures(
    session: Session, contestant: Contestant, us: float | None, base: float | None, flops: float = 0.0
) -> dict[str, Any]:
    """What is written down about a contestant.

    Args:
        us: microseconds of one call. base: of the bf16 layer. flops: of one call; gives TFLOP/s.

    Returns:
        us; GB/s of weights and their share of the copy bandwidth; speedup over bf16; TFLOP/s. Without a time: nothing.
    """
    if us is None:
        return {}
    found: dict[str, Any] = {"us": us}
    if contestant.bytes:
        rate = contestant.bytes / us * 1e6
        copy = ceilings.copy_bandwidth(session)
        found |= {"bytes": contestant.bytes, "share": rate / copy if copy else None}
    if base:
        found["speedup"] = base / us
    if flops:
        found["tflops"] = flops / us / 1e6
    return found


def line(name: str, found: Mapping[str, Any], note: str = "") -> str:
    """What is printed about a contestant."""
    if "us" not in found:
        return f"    {name:44} {NOT_TIMED}   {note}".rstrip()
    words = [f"{found['us']:9.2f} us"]
    if found.get("share") is not None:
        words.append(f"{found['share']:6.1%} of copy")
    if "tflops" in found:
        words.append(f"{found['tflops']:7.1f} TFLOP/s")
    if "speedup" in found:
        words.append(f"{found['speedup']:5.2f} x bf16")
    return f"    {name:44} {'  '.join(words)}   {note}".rstrip()


def against(found: Mapping[str, Any], share: float, speedup: float) -> str:
    """A target and whether it is met, "" where nothing was timed."""
    if found.get("share") is None:
        return ""
    met = found["share"] >= share and found["speedup"] >= speedup
    return f"target {share:.0%}, {speedup:g} x: {'met' if met else 'MISSED'}"


__all__ = ["NOT_TIMED", "against", "figures", "line"]
