"""Round the weights that are trained, and the activations before them, in the graph.

A weight that may get a gradient stays a float parameter. The plan is that of inference; here its decisions become
`choose_qparams` and `fake_quant` in front of the site, with the arithmetic of the store, so that evaluating the model
afterwards packs the very codes that training saw.

What is as large as a weight or an activation is computed again in the backward pass instead of being kept: the nodes
are marked as a checkpoint would mark them. The scales, which are small, are not.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx

from qcompile import compat
from qcompile.errors import QCError
from qcompile.ir.estimators import estimator_of
from qcompile.ir.scheme import PACKINGS, Scheme
from qcompile.passes.base import Pass, PassContext
from qcompile.passes.detect.sites import SITE
from qcompile.passes.detect.weights import constant_nodes, weight_of
from qcompile.passes.match import argument, effects_before, insert, op_name, value_of
from qcompile.plan.plan import Decision
from qcompile.runtime.pins import Pin

KERNEL, PRODUCTS = "fake_quant", "low_bit_mm"


class FakeQuant(Pass):
    """Trained weights and their activations are rounded in the graph."""

    name: ClassVar[str] = "fake_quant"
    requires: ClassVar[tuple[str, ...]] = ("resolve",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        work = _Rounder(gm.graph, ctx)
        for node in list(gm.graph.nodes):
            index = node.meta.get(SITE)
            if index is None or not ctx.plan.decisions[index].trained or ctx.plan.decisions[index].packed:
                continue
            if op_name(node) == "linear":
                work.matmul(node, ctx.plan.decisions[index])
            elif op_name(node) == "embedding":
                work.lookup(node, ctx.plan.decisions[index])


@dataclass
class _Rounder:
    graph: fx.Graph
    ctx: PassContext
    rounded: dict[tuple[object, ...], fx.Node] = field(default_factory=dict)
    counted: set[tuple[str, ...]] = field(default_factory=set)
    constants: set[fx.Node] = field(init=False)
    effects: dict[fx.Node, int] = field(init=False)  # an activation is shared where nothing was written in between

    def __post_init__(self) -> None:
        self.constants = constant_nodes(self.graph, self.ctx.inputs)
        self.effects = effects_before(self.graph)

    def matmul(self, node: fx.Node, decision: Decision) -> None:
        x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        assert decision.weight is not None
        if decision.grad is not None and decision.act is not None:
            self.products(node, decision)
            return
        if self.account(node, weight, decision):
            _set(node, 1, "weight", self.round(node, weight, decision.weight, decision))
        if decision.act is not None:
            _set(node, 0, "input", self.round(node, x, decision.act))

    def products(self, node: fx.Node, decision: Decision) -> None:
        """The linear by products of 8-bit codes, in both directions."""
        x, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
        assert decision.weight is not None
        if not self.account(node, weight, decision):
            raise QCError(
                "train.products",
                f"no products of 8-bit codes with learned scales in {decision.weight}",
                where=decision.site.path,
                next="leave grad out of the rule, or do not prepare the model",
            )
        self.ctx.plan.update(decision.site.index, kernel=PRODUCTS)
        text, act, grad = (
            str(replace(s, packing=PACKINGS[0]))
            for s in (decision.weight, decision.act, decision.grad)
            if s is not None
        )
        dtype, ops = value_of(node).dtype, torch.ops.qcompile
        with self.graph.inserting_before(node):
            scales = insert(self.graph, ops.choose_qparams.default, weight, text, decision.fit, like=node)
            how = (decision.estimator, decision.fit, dtype)
            y = insert(self.graph, ops.quantized_linear.default, x, weight, scales, text, act, grad, *how, like=node)
            if bias is not None:
                y = insert(
                    self.graph, torch.add, y, insert(self.graph, torch.Tensor.to, bias, dtype, like=node), like=node
                )
        node.replace_all_uses_with(y)

    def lookup(self, node: fx.Node, decision: Decision) -> None:
        """Rows are rounded after the lookup where each has scales of its own: a step reads few of a table's rows."""
        table, scheme = argument(node, 1, "weight"), decision.weight
        assert scheme is not None
        if not self.account(node, table, decision):
            return
        if scheme.granularity.cell(2)[0] != 1 or scheme.rounding == "stochastic":
            _set(node, 1, "weight", self.round(node, table, scheme, decision))
            return
        after = node.next
        with self.graph.inserting_before(after):
            width = value_of(node).shape[-1]
            rows = insert(self.graph, torch.reshape, node, (-1, width), like=node)
            found = self.round(node, rows, scheme, decision, before=after)
            result = insert(self.graph, torch.reshape, found, tuple(value_of(node).shape), like=node)
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user is not rows)

    def round(
        self,
        node: fx.Node,
        operand: fx.Node,
        scheme: Scheme,
        weight: Decision | None = None,
        before: fx.Node | None = None,
    ) -> fx.Node:
        """`operand`, rounded to `scheme` in front of `before` (the site itself by default); `weight` is the decision about
        it, if it is one."""
        text = str(replace(scheme, packing=PACKINGS[0]))
        fit, estimator = (weight.fit, weight.estimator) if weight is not None else ("minmax", "ste")
        region = compat.checkpoint_of(node)
        key = (
            operand,
            text,
            fit,
            estimator,
            region,
            None if operand in self.constants else self.effects.get(node, node),
        )
        if key in self.rounded:
            return self.rounded[key]
        ops = torch.ops.qcompile
        with self.graph.inserting_before(before or node):
            scales = insert(self.graph, ops.choose_qparams.default, operand, text, fit, like=node)
            seed = self.ctx.options.seed
            rounded = insert(
                self.graph, ops.fake_quant.default, operand, scales, [], text, estimator, fit, seed, like=node
            )
        compat.mark_recomputed(rounded)
        self.rounded[key] = rounded
        return rounded

    def account(self, node: fx.Node, operand: fx.Node, decision: Decision) -> bool:
        """Write to the plan what the site became; bytes go to the first site that reads the parameters.

        Returns:
            Whether the weight is still to be rounded: one that was prepared is rounded by the model itself.
        """
        weight = weight_of(operand, self.constants)
        assert weight is not None
        assert decision.weight is not None
        names = tuple(root.name for root in weight.roots)
        value = value_of(operand)
        size = 0 if names in self.counted else value.numel() * value.element_size()
        self.counted.add(names)
        self.ctx.plan.update(decision.site.index, packed=True, kernel=KERNEL, bytes_before=size, bytes_after=size)
        if weight.rounded is not None:
            compat.mark_recomputed(weight.rounded)
            return False
        if learned := estimator_of(decision.estimator).learned:
            raise QCError(
                "train.prepare",
                f"estimator {decision.estimator!r} learns a {' and a '.join(learned)} for {decision.weight}",
                where=decision.site.path,
                why="the optimizer must hold it, and the module has none",
                next="call qcompile.prepare(model, recipe) before the optimizer is made and before the first call",
            )
        self.ctx.pins.pin(
            [self.ctx.inputs[name] for name in names],
            weight.expression.text,
            decision.site.kind,
            self.ctx.recipe.fingerprint(),
            Pin(replace(decision.weight, packing=PACKINGS[0]), decision.act, decision.fit),
        )
        return True


def _set(node: fx.Node, position: int, name: str, value: Any) -> None:
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


__all__ = ["KERNEL", "FakeQuant"]
