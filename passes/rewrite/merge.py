"""Sites that read the same activation become one matmul with several segments (q/k/v, gate/up).

One kernel call then quantizes the activation once, starts threads once and streams the weights back to back.
Member weights are not concatenated: each stays its own store entry, so a changed member re-encodes alone and
a weight may sit in different groups of different graphs.
"""

from __future__ import annotations

from typing import ClassVar

from torch import fx

from qcompile.passes.base import Pass, PassContext
from qcompile.passes.detect.sites import SITE, may_be_trained
from qcompile.passes.detect.weights import constant_nodes, weight_of
from qcompile.passes.match import argument, effects_before, op_name

MAX_SEGMENTS = 8


class Merge(Pass):
    """Give quantized linears with one input, one scheme and one dtype a common group number."""

    name: ClassVar[str] = "merge"
    requires: ClassVar[tuple[str, ...]] = ("resolve",)
    optional: ClassVar[bool] = True

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        constants = constant_nodes(gm.graph, ctx.inputs)
        effects = effects_before(gm.graph)
        groups: dict[tuple[object, ...], list[int]] = {}
        for node in gm.graph.nodes:
            index = node.meta.get(SITE)
            if index is None or op_name(node) != "linear" or not ctx.plan.decisions[index].packable:
                continue
            bias = weight_of(argument(node, 2, "bias"), constants)
            if argument(node, 2, "bias") is not None and (bias is None or may_be_trained(bias, ctx)):
                # A computed bias may come later than the first member of the group; the joined biases are a constant.
                continue
            decision = ctx.plan.decisions[index]
            key = (
                argument(node, 0, "input"),
                effects[node],  # the members move to the place of the first: nothing may be written in between
                decision.weight,
                decision.act,
                decision.site.k,
                decision.kernel,
            )
            groups.setdefault(key, []).append(index)
        number = 0
        for members in groups.values():
            for start in range(0, len(members), MAX_SEGMENTS):
                chunk = members[start : start + MAX_SEGMENTS]
                if len(chunk) > 1:
                    for index in chunk:
                        ctx.plan.update(index, group=number)
                    number += 1
