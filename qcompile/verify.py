"""`verify=True`: compare every lowered matmul with its plain-torch meaning on the first call.

The functional graph that Inductor was given is interpreted once on the very inputs of the first call. At
each `qmm` the generated kernel and the reference run side by side; a difference beyond what the two orders of
summation explain is an error that names the site, not a warning: it means a kernel, a packed weight or a pass
is wrong. Lookups and sites without a kernel run the reference itself; how many sites were compared is a note of
the plan. None is a warning, also where every site stayed float; but not for a graph without sites, such as what lies
between two graph breaks, nor for a recipe without rules ("none"), which asks for nothing to be quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.codegen import inductor
from qcompile.codegen.spec import KernelSpec
from qcompile.errors import QCError, warn
from qcompile.ir.matmul import OUT_DTYPES, MatmulSpec, evaluate_epilogue
from qcompile.ir.ops import reference_only
from qcompile.passes.base import PassContext
from qcompile.passes.detect.sites import SITE

# Unit roundoff of each output dtype.
_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Each operation of an epilogue rounds once; the kernels' own functions (exp, tanh, ...) are within 4 units.
_PER_OPERATION = 4 * 2.0**-24


def verifying(inner: Callable[..., Any], ctx: PassContext) -> Callable[..., Any]:
    """Wrap a compiler of functional graphs: its first call is checked, later ones are untouched."""

    def compile_inner(gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        graph = fx.Graph()
        graph.output(graph.graph_copy(gm.graph, {}))
        copy = fx.GraphModule(gm, graph)  # which takes those attributes that the nodes ask for: tables of formats
        return _Verified(inner(gm, inputs, **settings), copy, ctx, bool(settings.get("is_backward")))

    return compile_inner


class _Verified:
    """Boxed call that checks once."""

    _boxed_call = True

    def __init__(
        self, compiled: Callable[..., Any], gm: fx.GraphModule, ctx: PassContext, backward: bool = False
    ) -> None:
        self.compiled, self.backward = compiled, backward
        # Emptied after the check: compiled code outlives the model, and these hold its weights and its first inputs.
        # (Emptied, not replaced: wrappers around this call copy its attributes.)
        self.pending = [(gm, ctx)]

    def __call__(self, args: list[Any]) -> Any:
        if self.pending:
            gm, ctx = self.pending[0]
            # The interpreter runs on copies: the graph may write to its inputs.
            copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
            checker = _Checker(gm, ctx)
            with reference_only(), compat.float32_sums():
                checker.run(*copies)
            if not self.backward:
                _report(checker.compared, ctx)
            self.pending.clear()
        return self.compiled(args)


def _report(compared: int, ctx: PassContext) -> None:
    packed = sum(decision.packed for decision in ctx.plan)
    groups = {decision.group for decision in ctx.plan if decision.packed and decision.group >= 0}
    calls = len(groups) + sum(decision.packed and decision.group < 0 for decision in ctx.plan)
    note = f"verify compared {compared} of {calls} calls that read packed weights ({packed} sites) with the reference"
    ctx.plan.notes.append(note)
    asked = bool(ctx.recipe.rules) and len(list(ctx.plan)) > 0
    if compared or not (calls or asked):
        return
    why = "lookups, and sites without a kernel, run the reference itself" if calls else "every site stayed float"
    warn(f"{note}: {why}. There was nothing to verify.")


class _Checker(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        super().__init__(gm)
        self.ctx = ctx
        self.compared = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.target is torch.ops.qcompile.qmm.default:
            x, parts, extras, spec = self.fetch_args_kwargs_from_env(n)[0]
            self.check(n, x, parts, extras, MatmulSpec.parse(str(spec)))
        return result

    def check(
        self, node: fx.Node, x: torch.Tensor, parts: list[torch.Tensor], extras: list[torch.Tensor], spec: MatmulSpec
    ) -> None:
        if not inductor.verdict(spec, x.device, x.dtype, [e.dtype for e in extras]).ok:
            return  # the reference itself runs there
        rows = x.reshape(-1, spec.k)
        rows = rows[torch.isfinite(rows.float()).all(-1)]
        if rows.shape[0] != x.numel() // spec.k:
            return  # NaN rows: defined apart, and nothing to compare
        self.compared += 1
        plain = replace(spec, epilogue="", extras=(), out="f32")
        raw = KernelSpec.of(plain, x.dtype, torch.float32)
        run, expected = inductor.proof(x.device)
        sums = run(raw, rows, parts, [], spec.n, spec.k)
        step, start = spec.parts_per_segment, 0
        pieces, bounds = [], []
        for i, n in enumerate(spec.n):
            want = expected(raw, rows, parts[i * step : (i + 1) * step], n, spec.k)
            self.compare(node, sums[:, start : start + n].double(), want.value, want.bound, f"segment {i} of {spec}")
            pieces.append(sums[:, start : start + n].double())
            bounds.append(want.bound)
            start += n
        if spec.epilogue:
            self.check_epilogue(node, x, parts, extras, spec, pieces)

    def check_epilogue(
        self,
        node: fx.Node,
        x: torch.Tensor,
        parts: list[torch.Tensor],
        extras: list[torch.Tensor],
        spec: MatmulSpec,
        sums: list[torch.Tensor],
    ) -> None:
        """The fused kernel against its own plain sums, put through the epilogue in float64."""
        out = OUT_DTYPES[spec.out] if spec.out else x.dtype
        kernel = KernelSpec.of(spec, x.dtype, out, [e.dtype for e in extras])
        got = inductor.proof(x.device).run(kernel, x.reshape(-1, spec.k), parts, extras, spec.n, spec.k).double()
        shaped = [e.reshape(got.shape) if kind == "mat" else e for e, kind in zip(extras, spec.extras, strict=True)]
        names = {f"e{i}": e.double() for i, e in enumerate(shaped)}
        accumulators = {f"a{i}": s for i, s in enumerate(sums)} if spec.paired else {"acc": torch.cat(sums, -1)}
        want = evaluate_epilogue(spec.epilogue, {**accumulators, **names})
        # Cancellation (residual plus product) is relative to the operands, so the sizes of all operands
        # count.
        size = sum((v.abs() for v in [*accumulators.values(), *names.values()]), want.abs())
        operations = 1 + sum(spec.epilogue.count(c) for c in "+-*/(")
        bound = operations * _PER_OPERATION * size * (1 + size) + _ROUNDOFF[out] * want.abs() + 2.0**-126
        self.compare(node, got, want, bound, f"epilogue of {spec}")

    def compare(self, node: fx.Node, got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, what: str) -> None:
        # NaN fails the comparison too.
        wrong = ~((got - want).abs() <= bound)
        if not bool(wrong.any()):
            return
        index = tuple(int(i) for i in wrong.nonzero()[0])
        decision = self.ctx.plan.decisions.get(node.meta.get(SITE, -1))
        raise QCError(
            "verify.mismatch",
            f"{int(wrong.sum())} of {wrong.numel()} results differ from the reference: {what}",
            where=decision.site.path if decision else str(node),
            why=f"at {index} the kernel gives {got[index]:.9g}, the reference {want[index]:.9g} +- {bound[index]:.2g}",
            next="keep this site float with a rule, and report it with the spec above",
        )
