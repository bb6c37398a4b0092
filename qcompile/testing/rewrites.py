"""What holds for every pass, checked on one model: the laws that `fuzz` holds a pass to.

The graph is the one that the backend would hand to the pass: the model is compiled up to the pass's place in the list, no
further. Then the pass runs on copies of graph and plan, and what it made of them is compared with what was there before.
"""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx

from qcompile import compat
from qcompile.errors import QCError, QCWarning
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.matmul import MatmulSpec
from qcompile.ir.ops import reference_only
from qcompile.passes.base import Pass
from qcompile.passes.detect.sites import SITE
from qcompile.testing.capture import FIRST, Place, State, capture
from qcompile.testing.exact import Outcome, furthest, said_otherwise
from qcompile.testing.graphs import Model

_QMM, _QEMBEDDING = torch.ops.qcompile.qmm.default, torch.ops.qcompile.qembedding.default


@dataclass(frozen=True)
class Laws:
    """What a pass promises, and where it stands.

    Attributes:
        options: as in `torch.compile(..., options=...)`: the recipe and the policy that sites are decided by.
        place: where in the list of passes; `None`: behind the last of those that it requires, else in front of its stage.
        like: a pass, plain and slow, that does the same: the two graphs have to compute one function. `None`: the function
            is that of the graph before, with the weights that the plan says were packed in their place.
        function: whether it keeps the function at all. Without, only the other laws are checked.
        twice: whether the pass finds nothing to do in a graph that it made.
        compiled: whether to compile and call the model too, every kernel being compared with the reference (seconds each).
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    place: Place | None = None
    like: Pass | None = None
    function: bool = True
    twice: bool = True
    compiled: bool = False


def check_model(passes: Sequence[Pass], model: Model, laws: Laws) -> None:
    """Hold passes to the laws on a model, each on what the one before it made. Raises what `check` raises."""
    for stage in FIRST:
        of_stage = [item for item in passes if item.stage == stage]
        if not of_stage:
            continue
        with torch.random.fork_rng(devices=[]):
            state = capture(model, stage, laws.place or _place(of_stage[0]), laws.options)
            for item in of_stage:
                with _advice([item, *([] if laws.like is None else [laws.like])]):
                    state = check(item, state, laws)
    if laws.compiled:
        with _advice(passes):
            _compile(passes, model, laws)


@contextmanager
def _advice(passes: Sequence[Pass]) -> Iterator[None]:
    """A pass under test that fails is not one to compile without: there are no options of a user's to take it out of."""
    try:
        yield
    except QCError as error:
        if error.code != "pass.failed" or not any(repr(item.name) in error.what for item in passes):
            raise
        advice = (
            "let the pass skip what it cannot change; where it belongs elsewhere in the list, say so with "
            "fuzz(..., place=('after', NAME)); where it is not meant for such models, with models(KINDS)"
        )
        raise QCError(error.code, error.what, where=error.where, why=error.why, next=advice) from error.__cause__


def _place(item: Pass) -> Place:
    return ("after", item.requires[-1]) if item.requires else FIRST[item.stage]


def _compile(passes: Sequence[Pass], model: Model, laws: Laws) -> None:
    """Compile the model with the passes: `verify` compares every kernel with the reference within a derived bound."""
    module, args = model.build()
    own = [item for item in passes if not type(item).__module__.startswith("qcompile.passes.")]
    insert = [(*(laws.place or _place(item)), item) for item in own]
    settings = {**laws.options, "verify": True, "passes": {"insert": insert}}
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", QCWarning)
        torch.compile(module, backend="qcompile", options=settings, dynamic=model.dynamic)(*args)
    torch.compiler.reset()


def check(item: Pass, before: State, laws: Laws) -> State:
    """Hold a pass to the laws on one graph.

    Returns:
        What the pass made of it.

    Raises:
        AssertionError: naming the pass, and what is wrong.
        QCError: what the pass raises, or that it failed.
    """
    text, versions, mark = before.text, _versions(before), item.fingerprint()
    after = before.after(item)
    wrong = chain(
        _manners(item, before, after, text, versions, mark),
        _inputs(before, after),
        _repeats(item, before, after, laws),
        _values(before, after, laws),
        _ledger(item, before, after),
    )
    for words in wrong:
        raise AssertionError(f"pass {item.name!r}: {words}")
    return after


def _versions(state: State) -> dict[str, int]:
    return {name: value._version for name, value in state.values.items() if isinstance(value, Tensor)}


def _manners(
    item: Pass, before: State, after: State, text: str, versions: Mapping[str, int], mark: str
) -> Iterator[str]:
    """What a pass must not touch: the graph it got a copy of, the tensors, itself."""
    if before.text != text:
        yield f"it changed what it had a copy of\n{_changes(text, before.text)}"
    for name, version in _versions(before).items():
        if version != versions[name]:
            yield f"it wrote to the input {name!r} while it ran"
    if item.fingerprint() != mark:
        yield "its fingerprint changes when it runs: every compile would miss the caches"
    old = {node.name for node in before.gm.graph.nodes}
    for node in after.gm.graph.nodes:
        new = node.op.startswith("call_") and node.name not in old
        if new and not {"example_value", "val"} & node.meta.keys():
            yield f"node {node.name!r} has no example value: add nodes with qcompile.passes.match.insert"


def _repeats(item: Pass, before: State, after: State, laws: Laws) -> Iterator[str]:
    again = before.after(item)
    if again.text != after.text:
        yield f"it makes two things of one graph\n{_changes(after.text, again.text)}"
    if laws.twice:
        once, twice = str(after.gm.graph), str(after.after(item).gm.graph)
        if once != twice:
            yield f"a second run changes what the first one made\n{_changes(once, twice)}"


def _changes(a: str, b: str) -> str:
    return "\n".join(line for line in difflib.unified_diff(a.splitlines(), b.splitlines(), lineterm="", n=0))


def _inputs(before: State, after: State) -> Iterator[str]:
    kept = {node.name for node in after.gm.graph.nodes if node.op == "placeholder"}
    for name, value in before.values.items():
        if name not in kept and not isinstance(value, torch.nn.Parameter):
            yield f"the input {name!r} is gone"
    for name in sorted(kept - after.values.keys()):
        yield f"nobody supplies the new input {name!r}"


def _values(before: State, after: State, laws: Laws) -> Iterator[str]:
    if laws.like is None and str(before.gm.graph) == str(after.gm.graph):
        return
    try:
        after.outcome()
    except Exception as error:
        yield f"the graph that it made does not run: {error}"
        return
    yield from said_otherwise(after.gm, after.arguments())
    want = before if laws.like is None else before.after(laws.like)
    weights = decoded_weights(before, after) if laws.like is None else {}
    for other in (False, True) if before.others else (False,):
        yield from _alike(want.outcome(other=other), after.outcome(other=other), want.others if other else want.values)
        if laws.function:
            a, b = (
                (state.outcome(torch.float32, given, other), state.outcome(torch.float64, given, other))
                for state, given in ((want, weights), (after, {}))
            )
            if words := furthest(a, b):
                yield words + " (with inputs of other sizes)" * other


def _alike(want: Outcome, got: Outcome, values: Mapping[str, Any]) -> Iterator[str]:
    """Number, shapes and dtypes of results, and which inputs are written to, of the graphs as they are."""
    if len(want.results) != len(got.results):
        yield f"it returns {len(got.results)} values, {len(want.results)} before"
        return
    for what, a, b in want.tensors(got):
        if not isinstance(b, Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"{what} is {b.dtype} {list(b.shape)}, it was {a.dtype} {list(a.shape)}"
    for name in want.inputs.keys() & got.inputs.keys():
        old = values[name]
        if isinstance(old, Tensor) and _written(old, want.inputs[name]) != _written(old, got.inputs[name]):
            yield f"the input {name!r} is {'no longer' if _written(old, want.inputs[name]) else 'now'} written to"


def _written(before: Tensor, after: Tensor) -> bool:
    return not torch.equal(before.nan_to_num(), after.nan_to_num())


def decoded_weights(before: State, after: State) -> dict[fx.Node, Tensor]:
    """The nodes of a graph whose weights a pass packed, each with what its weight decodes to, by the plan's scheme."""
    plan, old = after.ctx.plan.decisions, before.ctx.plan.decisions
    sites = {i: d for i, d in plan.items() if d.packed and d.weight is not None and i in old and not old[i].packed}
    nodes = {node: sites[node.meta[SITE]] for node in before.gm.graph.nodes if node.meta.get(SITE) in sites}
    found = {}
    for node, weight in _operands(before, nodes).items():
        n, k = weight.shape
        decision, seed = nodes[node], before.ctx.options.seed
        assert decision.weight is not None
        parts = quantize(weight, decision.weight, fit=decision.fit, seed=seed)
        found[node] = dequantize(parts, decision.weight, n, k)
    return found


def _operands(state: State, nodes: Collection[fx.Node]) -> dict[fx.Node, Tensor]:
    """The second operands of nodes, as a run of the graph gives them."""
    found: dict[fx.Node, Tensor] = {}

    class Reading(fx.Interpreter):
        extra_traceback = False

        def run_node(self, n: fx.Node) -> Any:
            if n in nodes:
                args, kwargs = self.fetch_args_kwargs_from_env(n)
                found[n] = (args[1] if len(args) > 1 else kwargs["weight"]).clone()
            return super().run_node(n)

    with torch.no_grad(), reference_only():
        Reading(state.gm).run(*state.arguments())
    return found


def _ledger(item: Pass, before: State, after: State) -> Iterator[str]:
    """Every contraction is in the plan, with a reason where it stays float; every packed weight is read once."""
    plan, nodes = after.ctx.plan, list(after.gm.graph.nodes)
    if item.stage == "dynamo" and (plan.decisions or item.name == "detect"):
        counts = _flops(after)
        for node in nodes:
            index = node.meta.get(SITE)
            if counts[node.name] and index is None:
                yield f"node {node.name!r} is a contraction of {counts[node.name]} FLOPs and no site of the plan"
            elif index is not None and index not in before.ctx.plan.decisions:
                flops = plan.decisions[index].site.flops
                if counts[node.name] and flops != counts[node.name]:  # torch may find that nothing is summed
                    yield f"site {index} has {flops} FLOPs in the plan, its node {node.name!r} {counts[node.name]}"
    if _packed_sites(before) + _fresh(before, after) != _packed_sites(after):
        yield (
            f"{_fresh(before, after)} sites were packed by the plan, and the graph reads {_packed_sites(after)} packed "
            f"weights, {_packed_sites(before)} before"
        )
    for node in nodes:
        decision = plan.decisions.get(node.meta.get(SITE, -1))
        if node.target is _QMM and decision is not None:
            spec = MatmulSpec.parse(str(node.args[3]))
            if (spec.weight, spec.act) != (decision.weight, decision.act):
                yield f"node {node.name!r} computes {spec}, the plan says {decision.weight} x {decision.act}"
    for decision in plan:
        if any(d.packed for d in plan) and not decision.quantized and not decision.reason:
            yield f"site {decision.site.index} stays float without a reason"


def _fresh(before: State, after: State) -> int:
    return sum(d.packed for d in after.ctx.plan) - sum(d.packed for d in before.ctx.plan)


def _packed_sites(state: State) -> int:
    """How many packed weights matmuls and lookups of a graph read."""
    qmm = [MatmulSpec.parse(str(node.args[3])) for node in state.gm.graph.nodes if node.target is _QMM]
    return sum(len(spec.n) for spec in qmm) + sum(node.target is _QEMBEDDING for node in state.gm.graph.nodes)


def _flops(state: State) -> Counter[str]:
    with torch.no_grad(), reference_only(), compat.EagerFlops() as counter:
        counts: Counter[str] = counter.run(state.gm, state.arguments())[1]
    return counts
