"""Which calls a compiled graph served: how often, with whose weights, and what they computed.

Dynamo makes one graph of layers that are equal but for their weights, and one of all sizes after the second: what a graph
says of itself is true of the call that it was compiled for. So calls are counted as they come.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qcompile.backend import release
from qcompile.passes.base import PassContext
from qcompile.passes.detect.weights import parameter_path
from qcompile.plan.plan import Decision
from qcompile.runtime.store import Entry


@dataclass
class Calls:
    """Calls of a graph with the same weights."""

    values: Mapping[int, torch.Tensor] = field(default_factory=dict)  # by position; held, so that no id is used twice
    count: int = 1
    flops: Counter[str] = field(default_factory=Counter)  # of the nodes of Dynamo's graph, as they ran


@dataclass
class Graph:
    """A compiled graph, and the calls it served.

    Attributes:
        ctx: what the passes decided.
        sites: its decisions, each with the positions of the arguments that its weight is made of.
        constants: joined biases, likewise.
        calls: by the identities of these arguments. A graph that nobody counted is taken for one call, with the weights
            that it was compiled for.
    """

    ctx: PassContext
    sites: list[tuple[Decision, tuple[int, ...]]]
    constants: list[tuple[Entry, tuple[int, ...]]]
    calls: dict[tuple[int, ...], Calls] = field(default_factory=dict)

    @classmethod
    def of(cls, ctx: PassContext, gm: torch.fx.GraphModule | None = None) -> Graph:
        """A graph of Dynamo after it was compiled; without `gm` nothing is known of weights that the store has not."""
        position = {name: index for index, name in enumerate(ctx.inputs)}
        roots = {id(item.entry): tuple(position[name] for name in item.roots) for item in ctx.packed}
        by_path = _positions(gm, ctx) if gm is not None else {}
        sites = [
            (d, roots.get(id(d.entry), ()) if d.entry is not None else by_path.get(d.site.path, ())) for d in ctx.plan
        ]
        constants = {id(item.entry): item.entry for item in ctx.packed if item.entry.scheme is None}
        return cls(ctx, sites, [(entry, roots[one]) for one, entry in constants.items()])

    def count(self, values: Sequence[Any], flops: Counter[str]) -> None:
        used = sorted({i for _, positions in (*self.sites, *self.constants) for i in positions})
        calls = self.calls.setdefault(tuple(id(values[i]) for i in used), Calls({i: values[i] for i in used}, 0))
        calls.count += 1
        calls.flops += flops

    def flops(self, calls: Calls) -> list[int]:
        """Of each site in these calls. What ran is counted, by the node that the site was in Dynamo's graph; the sites of one
        node share that as their own shapes say. Where nothing was counted these are all that is known."""
        origins = [self.ctx.origins.get(decision.site.index, "") for decision, _ in self.sites]
        known = [decision.site.flops for decision, _ in self.sites]
        totals: Counter[str] = Counter()
        for origin, size in zip(origins, known, strict=True):
            totals[origin] += max(size, 1)
        return [
            calls.flops[origin] * max(size, 1) // totals[origin] if calls.flops[origin] else size * calls.count
            for origin, size in zip(origins, known, strict=True)
        ]

    def others(self, calls: Calls) -> Iterator[tuple[str, str, int]]:
        """What else contracted: operator, line, FLOPs."""
        sites = set(self.ctx.origins.values())
        for origin, flops in calls.flops.items():
            if flops and origin in self.ctx.others and origin not in sites:
                yield (*self.ctx.others[origin], flops)

    def forget(self) -> None:
        """Let go of the model: Dynamo keeps the function that serves a graph, and with it this."""
        self.calls.clear()
        self.sites.clear()
        self.constants.clear()
        release(self.ctx)


def _positions(gm: torch.fx.GraphModule, ctx: PassContext) -> dict[str, tuple[int, ...]]:
    """Where the graph takes the weight of a path: one parameter, or the first of the packed tensors that stand for it."""
    found: dict[str, list[int]] = {}
    for index, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), ctx.inputs.values(), strict=True)):
        if isinstance(value, torch.Tensor) and (path := parameter_path(node)):
            found.setdefault(path, []).append(index)
    values = list(ctx.inputs.values())
    # Two parameters of one path belong to two modules that the frame knows by different names.
    return {
        path: tuple(places[:1])
        for path, places in found.items()
        if sum(isinstance(values[i], nn.Parameter) for i in places) < 2
    }
