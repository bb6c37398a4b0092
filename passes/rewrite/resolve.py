"""Turn sites into decisions: the recipe names a scheme, the lowerings say whether it pays.

The one place where policy lives. `speed` keeps a site float when its kernel is known to lose against float
at this graph's number of rows; `memory` packs whatever can be packed; `accuracy` refuses activation schemes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import fx

from qcompile.errors import QCError, warn
from qcompile.ir.granularity import Nested
from qcompile.ir.matmul import MatmulSpec
from qcompile.ir.packing import BLOCK
from qcompile.ir.scheme import PACKINGS, Packing, Scheme
from qcompile.passes.base import Pass, PassContext, node_device
from qcompile.passes.detect.canonicalize import canonicalize
from qcompile.passes.detect.sites import SITE
from qcompile.passes.detect.unhandled import elements
from qcompile.passes.detect.weights import (
    Weight,
    buffer_nodes,
    constant_nodes,
    parameter_roots,
    weight_of,
    why_not_constant,
)
from qcompile.passes.match import argument, op_name, shape_of, transformed
from qcompile.plan.plan import Decision
from qcompile.plan.recipe import Choice
from qcompile.plan.site import Site
from qcompile.runtime.pins import Pin

PACKED = "packed by convert"
PREPARED = "prepared"
TRAINED = "as it was trained"
ROUNDED = "the model rounds"
_FIXED = (PACKED, PREPARED, TRAINED)  # whatever is faster: other values would be another model
NO_KERNEL = "no fast kernel"
# What a strict user can do about a refusal, by words of its reason.
_STEPS = {
    "dtype torch.float64": "convert the model with model.float(), or use strict=False",
}


class Resolve(Pass):
    """Apply the recipe and the policy to every site of the plan."""

    name: ClassVar[str] = "resolve"
    requires: ClassVar[tuple[str, ...]] = ("detect",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        constants = constant_nodes(gm.graph, ctx.inputs)
        choices: list[Choice] = []
        linears = _linears_of_buffers(gm.graph, ctx) if ctx.options.strict else {}
        for index, decision in list(ctx.plan.decisions.items()):  # some of these lie in graphs inside this one
            if decision.site.refused:
                site = linears.get(index, decision.site)
                _refuse(ctx, site, site.refused)
        layouts: dict[str, Packing] = {}  # of tables that a matmul reads too: they share one copy
        for node in sorted(gm.graph.nodes, key=lambda node: op_name(node) == "embedding"):
            index = node.meta.get(SITE)
            if index is None or ctx.plan.decisions[index].site.refused:
                continue
            site = ctx.plan.decisions[index].site
            weight = weight_of(argument(node, 1, "weight"), constants)
            assert weight is not None  # detect refuses sites without one
            shared = layouts.get(site.path) if site.kind == "embedding" else None
            choice = _packed_for(ctx, node, _pinned(ctx, site, weight) or _choose(ctx, site, weight), shared)
            if choice.weight is None and site.trained and len(ctx.recipe.asks(site)) > 1:  # its values decided
                roots = [ctx.inputs[root.name] for root in weight.roots]
                pin = Pin(None, None, choice.fit)
                ctx.pins.pin(roots, weight.expression.text, site.kind, ctx.recipe.fingerprint(), pin)
            choices.append(choice)
            if choice.weight is not None and site.path:
                layouts.setdefault(site.path, choice.weight.packing)
            _decide(ctx, site, choice, node)
        ctx.plan.unused_rules = ctx.recipe.unused(choices)


def real_weight(weight: Weight, ctx: PassContext) -> torch.Tensor:
    """The float weight `[n, k]`, evaluated on the real parameters."""
    with torch.no_grad():
        return weight.expression.evaluate(*(ctx.inputs[root.name].detach() for root in weight.roots))


def refuse_ragged(scheme: Scheme, n: int, k: int, where: str) -> None:
    """Raise `QCError` ("scheme.ragged") when a group or block of a scheme does not divide a weight `[n, k]`."""
    granularity = scheme.granularity
    levels = (granularity.inner, granularity.outer) if isinstance(granularity, Nested) else (granularity,)
    for level in levels:
        for axis, size, length in zip("NK", (n, k), level.cell(2), strict=True):
            if length and size % length:
                raise QCError(
                    "scheme.ragged",
                    f"{level} of {scheme} does not divide {axis}={size}",
                    where=where,
                    why=f"the last group would hold {size % length} of {length} weights; strict refuses that",
                    next=f"{_even(k, length)}, or strict=False",
                )


def _even(k: int, length: int) -> str:
    """Advice that has a kernel: the longest group up to `length` that divides `k`, else the shortest, else rows."""
    groups = [size for size in range(BLOCK, k + 1, BLOCK) if k % size == 0]  # kernels take whole blocks
    if not groups:
        return f"give each row one scale (axis0): no multiple of {BLOCK}, which kernels need, divides {k}"
    return f"use a group that divides {k} (such as g{max((g for g in groups if g <= length), default=groups[0])})"


def _choose(ctx: PassContext, site: Site, weight: Weight) -> Choice:
    if weight.scheme:
        # It was fixed when the weight was given up, or prepared; the recipe may still ask for low-bit activations.
        fixed = Scheme.parse(weight.scheme)
        choice = ctx.recipe.resolve(replace(site, weight_dtype=str(fixed)), packed=fixed)
        return replace(choice, weight=fixed, reason=PREPARED if weight.packed is None else PACKED, min_sqnr=-math.inf)
    try:
        return ctx.recipe.resolve(site, lambda: real_weight(weight, ctx))
    except QCError as error:
        raise error.at(site.path or site.source) from error


def _pinned(ctx: PassContext, site: Site, weight: Weight) -> Choice | None:
    """What the weight was trained in with this recipe, which is what it is trained in further, and deployed in."""
    if weight.scheme:
        return None
    roots = [ctx.inputs[root.name] for root in weight.roots]
    pin = ctx.pins.find(roots, weight.expression.text, site.kind, ctx.recipe.fingerprint())
    if pin is None:
        return None
    if pin.weight is None:
        return Choice(None, None, -1, f"float, {TRAINED}")
    found = ctx.recipe.resolve(replace(site, weight_dtype=str(pin.weight)), packed=pin.weight)
    return replace(found, weight=pin.weight, act=pin.act, reason=TRAINED, fit=pin.fit, min_sqnr=-math.inf)


def _linears_of_buffers(graph: fx.Graph, ctx: PassContext) -> dict[int, Site]:
    """Refused contractions that would be a linear if the buffers in them were parameters, described as `F.linear` with
    that buffer is: `x @ buffer` is refused exactly where it is, with the same words."""
    products = (decision.site for decision in ctx.plan if decision.site.kind in ("bmm", "other"))
    sites = {site.index: site for site in products if site.refused}
    roots = parameter_roots(graph, ctx.inputs)
    buffers = buffer_nodes(graph, roots) if sites else set()
    if not any(node.meta.get(SITE) in sites and buffers.intersection(node.all_input_nodes) for node in graph.nodes):
        return {}
    inside = transformed(graph)
    trial = copy.deepcopy(graph)
    twins = dict(zip(graph.nodes, trial.nodes, strict=True))
    canonicalize(trial, {twins[node] for node in (*buffers, *roots)})
    left, found = set(trial.nodes), {}
    for node, twin in twins.items():
        index, operands = node.meta.get(SITE), buffers.intersection(node.all_input_nodes)
        if index in sites and operands and (twin not in left or node in inside):
            weight = max(operands, key=elements)
            why = why_not_constant(weight, roots)
            found[index] = replace(sites[index], kind="linear", n=elements(weight), k=1, refused=why)
    return found


def _packed_for(ctx: PassContext, node: fx.Node, choice: Choice, shared: Packing | None) -> Choice:
    """The choice in the layout that the kernels of the site's device read, unless the recipe names one."""
    scheme = choice.weight
    if scheme is None or choice.reason == PACKED or scheme.packing != PACKINGS[0]:
        return choice
    act = None if ctx.options.policy == "accuracy" else choice.act
    return replace(choice, weight=replace(scheme, packing=shared or ctx.packing(node_device(node), act)))


def _refuse(ctx: PassContext, site: Site, reason: str) -> None:
    ctx.plan.update(site.index, reason=reason)
    contracts = site.kind == "other" and site.flops != 0
    # What a rule keeps float may be refused.
    asked = ctx.recipe.resolve(replace(site, kind="linear") if contracts else site).weight is not None
    stacked = site.kind == "bmm" and site.n > 0  # a product of two activations has no n
    if ctx.options.strict and asked and (site.kind in ("linear", "head", "embedding") or contracts or stacked):
        raise QCError(
            "site.refused",
            f"{site.kind} site cannot be quantized",
            where=site.path or site.source,
            why=reason,
            next=next((step for words, step in _STEPS.items() if words in reason), "use strict=False: it stays float"),
        )


def _decide(ctx: PassContext, site: Site, choice: Choice, node: fx.Node) -> None:
    plan, options = ctx.plan, ctx.options
    decision = Decision(
        site,
        choice.weight,
        choice.act,
        choice.fit,
        reason=choice.reason,
        min_sqnr=choice.min_sqnr,
        estimator=choice.estimator,
        grad=choice.grad,
    )
    plan.decisions[site.index] = decision
    if choice.weight is None:
        return
    if options.strict and choice.reason not in _FIXED:
        refuse_ragged(choice.weight, site.n, site.k, site.path or site.source)
    act = None if options.policy == "accuracy" else choice.act
    if act is not choice.act:
        plan.update(site.index, act=None, reason='policy="accuracy" keeps activations exact')
    if act is not None and op_name(argument(node, 0, "input")) == "fake_quant":
        act, said = None, f"{ROUNDED} its input to {argument(node, 0, 'input').args[3]}"
        plan.update(site.index, act=None, reason="; ".join(filter(None, (choice.reason, said))))
    if site.kind == "embedding":
        plan.update(site.index, kernel="lookup")
        return
    spec = MatmulSpec(choice.weight, (site.n,), site.k, act)
    dtype = getattr(torch, site.dtype)
    # A graph whose number of rows is open serves few rows too, whatever the example had; so will a trained weight.
    fixed = not site.trained and all(isinstance(size, int) for size in shape_of(argument(node, 0, "input")) or ())
    kernel = ctx.kernel(spec, node_device(node), dtype, site.m if fixed else None)
    if not kernel.found:
        reason = f"{NO_KERNEL} for {choice.weight}: {kernel.reason}"
        if options.strict:
            raise QCError("kernel.none", reason, where=site.path, next="choose another scheme or strict=False")
        if options.policy == "speed" and choice.reason not in _FIXED:
            plan.keep_float(site.index, f"{reason}; policy='memory' packs it anyway")
            return
        plan.update(site.index, kernel="reference", reason=reason)
    elif kernel.slower_than_float and options.policy == "speed" and choice.reason not in _FIXED:
        plan.keep_float(site.index, f"{kernel.name} would be slower than float here: {kernel.reason}")
    else:
        plan.update(site.index, kernel=kernel.name)


def _unwanted(decision: Decision, ctx: PassContext) -> bool:
    """Whether a weight stays float that the recipe would pack: not by a rule, and not because float is faster."""
    site = decision.site
    if not site.refused:
        return decision.reason.startswith(NO_KERNEL)
    return site.kind not in ("bmm", "attention") and ctx.recipe.resolve(replace(site, kind="linear")).weight is not None


def warn_notes(ctx: PassContext) -> None:
    """Say once per compile what the user must know."""
    if overruled := ctx.plan.overruled(ctx.recipe):
        warn(overruled)
    paths = [decision.site.path for decision in ctx.plan]
    looked_at = any(not decision.site.refused for decision in ctx.plan)
    for rule in ctx.plan.unused_rules if looked_at else ():
        if rule.path != "*":
            warn(f"recipe {ctx.recipe.name!r}: rule path={rule.path!r} matched no site of this graph{rule.hint(paths)}")
    matmuls = [decision for decision in ctx.plan if decision.site.kind != "embedding"]
    lost = [decision.reason for decision in matmuls if _unwanted(decision, ctx)]
    if lost and not any(decision.quantized for decision in matmuls):
        warn(f"recipe {ctx.recipe.name!r} quantizes no matmul of this graph: {lost[0]}")
