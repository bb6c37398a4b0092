"""The property tests of passes find what is wrong with a pass, and nothing with a right one."""

from __future__ import annotations

import itertools
import random
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional as F

from qcompile import Pass, PassContext, QCError
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.scheme import Scheme
from qcompile.passes.freeze.freeze import Freeze
from qcompile.passes.match import argument, hint, insert, op_name, shape_of, value_of, writes
from qcompile.testing.fuzz import fuzz
from qcompile.testing.graphs import Layer, Model, models
from qcompile.testing.rewrites import Laws, check_model


def replaced(graph: fx.Graph, old: fx.Node, target: Any, *args: Any, **kwargs: Any) -> None:
    """Put a call into the place of a node."""
    with graph.inserting_before(old):
        new = insert(graph, target, *args, like=old, **kwargs)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


class OnLinears(Pass):
    """Rewrites each linear layer by itself."""

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        for node in list(gm.graph.nodes):
            if op_name(node) == "linear":
                self.rewrite(gm.graph, node, *(argument(node, i, n) for i, n in enumerate(("input", "weight", "bias"))))

    def rewrite(self, graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
        raise NotImplementedError


# ------------------------------------------------------------------------------------------------------ right ones
class Rotate(OnLinears):
    """Input and weight are reflected along the diagonal: x (I - 2 1 1^T / k), which is orthogonal and its own inverse."""

    name: ClassVar[str] = "rotate"

    def rewrite(self, graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
        turned = []
        for operand in (x, weight):
            with graph.inserting_before(node):
                mean = insert(graph, torch.mean, operand, -1, keepdim=True, like=node)
                turned.append(insert(graph, torch.sub, operand, mean, alpha=2, like=node))
        replaced(graph, node, F.linear, *turned, bias)


def test_a_rotation_passes() -> None:
    assert fuzz(Rotate(), models(max_layers=3), examples=6, twice=False) == 6


def test_a_rotation_is_no_pass_that_runs_twice() -> None:
    with pytest.raises(AssertionError, match="'rotate': a second run changes"):
        check_model([Rotate()], Model((Layer("linear", ()),)), Laws())


# ------------------------------------------------------------------------------------------------------ wrong ones
class DropBias(OnLinears):
    name: ClassVar[str] = "drop_bias"

    def rewrite(self, graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
        node.args, node.kwargs = (x, weight), {}


class SwapGate(Pass):
    """silu(gate) * up becomes silu(up) * gate."""

    name: ClassVar[str] = "swap_gate"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        for node in gm.graph.nodes:
            if op_name(node) == "mul" and op_name(node.args[0]) == "silu":
                act, up = node.args
                gate = act.args[0]
                act.prepend(up)
                act.args, node.args = (up, *act.args[1:]), (act, gate)


class ForgetTranspose(Pass):
    """x @ w is taken for x @ w.T, where both have that shape."""

    name: ClassVar[str] = "forget_transpose"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        for node in list(gm.graph.nodes):
            shape = shape_of(argument(node, 1, "other")) or () if op_name(node) == "matmul" else ()
            if len(shape) == 2 and shape[0] == shape[1]:
                replaced(gm.graph, node, F.linear, *node.args)


class WrongGroup(Pass):
    """Packs weights with half the group that the plan says."""

    name: ClassVar[str] = "wrong_group"
    requires: ClassVar[tuple[str, ...]] = ("resolve",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        asked = {d.site.index: d.weight for d in ctx.plan if d.quantized and not d.packed}
        for index, scheme in asked.items():
            ctx.plan.update(index, weight=Scheme.parse(str(scheme).replace("/g32", "/g16")))
        Freeze().run(gm, ctx)
        for index, scheme in asked.items():
            ctx.plan.update(index, weight=scheme)


PLAIN = {"dtypes": ("float32",), "dynamic": False, "max_layers": 3}
BUGS: dict[str, tuple[Pass, list[str], dict[str, Any]]] = {
    "drops a bias": (DropBias(), ["linear", "norm"], {}),
    "swaps gate and up": (SwapGate(), ["gated", "shape"], {}),
    "forgets a transposed weight": (ForgetTranspose(), ["linear", "point"], {}),
    "uses a wrong group": (
        WrongGroup(),
        ["linear", "point"],
        {"options": {"recipe": "int4/g32:fp16", "policy": "memory"}},
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_found(bug: str) -> None:
    item, kinds, laws = BUGS[bug]
    with pytest.raises(AssertionError, match=f"pass '{item.name}'") as caught:
        fuzz(item, models(kinds, **PLAIN), examples=100, **laws)
    text = str(caught.value)
    assert text.startswith("found in round 0: fuzz(..., start=0")
    assert text.index("dynamic = ") < text.index(f"pass '{item.name}'")  # what repeats it, then what is wrong
    shown = text[text.index("class Model") : text.index("dynamic = ")]
    assert shown.count("\n") <= 15, shown  # shrunk: one layer
    names: dict[str, Any] = {"torch": torch, "nn": torch.nn, "F": F}
    exec(shown, names)  # and it can be pasted
    names["model"](*names["args"])


# --------------------------------------------------------------------------------------------- quantizing by oneself
def rounded(weight: Tensor, group: int) -> Tensor:
    """A weight as it is after a round trip through a scheme."""
    scheme, (n, k) = Scheme.parse(f"int4/g{group}:fp16"), weight.shape
    return dequantize(quantize(weight.float(), scheme), scheme, n, k).to(weight.dtype)


class Round(OnLinears):
    def __init__(self, name: str, group: int) -> None:
        self.group, self.named = group, name

    name: ClassVar[str] = "round"

    def rewrite(self, graph: fx.Graph, node: fx.Node, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> None:
        if op_name(weight) != "mul":
            with graph.inserting_before(node):
                low = graph.call_function(rounded, (weight, self.group))
                low.meta["example_value"] = value_of(weight)
                one = insert(graph, torch.mul, low, 1, like=node)
            replaced(graph, node, F.linear, x, one, bias)


def test_a_pass_is_held_to_another_one() -> None:
    model = Model((Layer("linear", (4,)),), width=33)
    plain = Round("plain", 32)
    check_model([Round("same", 32)], model, Laws(like=plain))
    with pytest.raises(AssertionError, match="result 0 differs at"):
        check_model([Round("other", 16)], model, Laws(like=plain))
    with pytest.raises(AssertionError, match="result 0 differs at"):
        check_model([plain], model, Laws())
    check_model([plain], model, Laws(function=False))


# ------------------------------------------------------------------------------------------------------- each law
class Doing(Pass):
    """Does something to the first linear layer."""

    name: ClassVar[str] = "doing"

    def __init__(self, what: str) -> None:
        self.what = what

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        graph = gm.graph
        node = next(node for node in graph.nodes if op_name(node) == "linear")
        x, weight = node.args[:2]
        with graph.inserting_after(node):
            ACTIONS[self.what](self, graph, node, x, weight, ctx)


_COUNT = itertools.count()


def _scaled(graph: fx.Graph, node: fx.Node, factor: float) -> None:
    new = insert(graph, torch.mul, node, factor, like=node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _relu_of(shape: Any) -> Any:
    def act(p: Doing, graph: fx.Graph, node: fx.Node, x: fx.Node, w: fx.Node, ctx: PassContext) -> None:
        new = insert(graph, torch.reshape, node, shape(node), like=node)
        node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    return act


def _no_write(p: Doing, graph: fx.Graph, node: fx.Node, x: fx.Node, w: fx.Node, ctx: PassContext) -> None:
    for written in [n for n in graph.nodes if writes(n)]:
        written.replace_all_uses_with(written.args[0])
        graph.erase_node(written)


def _bare(p: Doing, graph: fx.Graph, node: fx.Node, x: fx.Node, w: fx.Node, ctx: PassContext) -> None:
    new = graph.call_function(torch.mul, (node, 1))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def _lying(p: Doing, graph: fx.Graph, node: fx.Node, x: fx.Node, w: fx.Node, ctx: PassContext) -> None:
    _bare(p, graph, node, x, w, ctx)
    node.next.meta["example_value"] = value_of(node).double()


def _write(p: Doing, graph: fx.Graph, node: fx.Node, x: fx.Node, w: fx.Node, ctx: PassContext) -> None:
    with torch.no_grad():
        ctx.inputs[w.name].mul_(1)


def _new_output(p: Doing, graph: fx.Graph, node: fx.Node, x: fx.Node, w: fx.Node, ctx: PassContext) -> None:
    graph.output_node().args = ((*graph.output_node().args[0], node),)


def _narrow(p: Doing, graph: fx.Graph, node: fx.Node, x: fx.Node, w: fx.Node, ctx: PassContext) -> None:
    new = insert(graph, torch.Tensor.half, node, like=node)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


ACTIONS: dict[str, Any] = {
    "random": lambda p, graph, node, x, w, ctx: _scaled(graph, node, 1 + random.random()),
    "once more": lambda p, graph, node, x, w, ctx: _scaled(graph, node, 1),
    "no example value": _bare,
    "a wrong example value": _lying,
    "a write": _write,
    "a fingerprint": lambda p, graph, node, x, w, ctx: setattr(p, "seen", next(_COUNT)),
    "a size of the example": _relu_of(lambda node: [hint(size) for size in shape_of(node) or ()]),
    "no write": _no_write,
    "another result": _new_output,
    "another dtype": _narrow,
    "an error": lambda p, graph, node, x, w, ctx: node.args[7],
}
LINEAR, WRITE = Layer("linear", ()), Layer("write", (5,))
BROKEN = {
    "random": "it makes two things of one graph",
    "once more": "a second run changes",
    "no example value": "has no example value",
    "a wrong example value": r"says that it gives float64 .*, and gives float32",
    "a write": "it wrote to the input",
    "a fingerprint": "its fingerprint changes when it runs",
    "a size of the example": r"reshape|shape|size",
    "no write": "the input .* is no longer written to",
    "another result": "it returns 2 values, 1 before",
    "another dtype": "result 0 is torch.float16",
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_law_can_be_broken(what: str) -> None:
    model = Model((WRITE, LINEAR), dynamic=True)
    laws = Laws(twice=what in ("once more", "no write"))
    with pytest.raises((AssertionError, RuntimeError), match=BROKEN[what]):
        check_model([Doing(what)], model, laws)


def test_a_pass_that_fails_is_named() -> None:
    with pytest.raises(QCError, match="pass 'doing' failed: IndexError") as caught:
        check_model([Doing("an error")], Model((LINEAR,)), Laws())
    assert isinstance(caught.value.__cause__, IndexError)
    assert "options" not in caught.value.next  # there are none to take the pass out of
    assert "skip" in caught.value.next


def test_a_pass_that_fails_in_fuzz_is_shown_behind_its_model() -> None:
    with pytest.raises(QCError) as caught:
        fuzz(Doing("an error"), models(["linear"], **PLAIN), examples=5, start=3)
    assert (caught.value.code, type(caught.value.__cause__)) == ("pass.failed", IndexError)
    text = str(caught.value)
    assert text.startswith("found in round 3: fuzz(..., start=3)")
    assert text.index("dynamic = ") < text.index("pass 'doing' failed") < text.index("next: let the pass skip")


def test_what_is_no_pass_is_refused() -> None:
    for subject in (Rotate, 3, [Rotate], []):
        with pytest.raises((QCError, AttributeError)):
            fuzz(subject, models(), examples=1)  # type: ignore[call-overload]
