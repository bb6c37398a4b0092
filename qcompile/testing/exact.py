"""Run a graph at a precision, and say how far apart two graphs of one function may lie.

Two graphs that compute one function differ by rounding, and by nothing else. How much that is depends on the graph (on
what cancels in it), so no tolerance fits all; but rounding shrinks by 2**29 between float32 and float64, and nothing else
does. So both graphs run in both: what they lose in float32 tells what they may differ by in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from qcompile import compat
from qcompile.ir.codec import dequantize
from qcompile.ir.matmul import MatmulSpec, evaluate_epilogue
from qcompile.ir.ops import reference_only
from qcompile.ir.scheme import Scheme
from qcompile.passes.match import op_name, value_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The same operations lose 2**-29 as much in float64 as in float32, if each rounding goes the same way. N roundings of
# random signs give about sqrt(N) units, at worst N: luck is a factor of sqrt(N) at most, and no result of a small model
# takes more than N = 2**28 operations.
SHRINKS = 2.0**-29 * 2.0**14
UNIT = 2.0**-24


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its results, and its inputs as they are afterwards, by name."""

    results: list[Any]
    inputs: dict[str, Any]

    def tensors(self, other: Outcome) -> Iterator[tuple[str, Tensor, Tensor]]:
        """The tensors of two runs side by side, each with what it is; inputs that both have."""
        for i, (a, b) in enumerate(zip(self.results, other.results, strict=True)):
            if isinstance(a, Tensor):
                yield f"result {i}", a, b
        for name in self.inputs.keys() & other.inputs.keys():
            if isinstance(self.inputs[name], Tensor):
                yield f"input {name!r} after the call", self.inputs[name], other.inputs[name]


def run(
    gm: fx.GraphModule,
    values: Mapping[str, Any],
    dtype: torch.dtype | None = None,
    packed: frozenset[str] = frozenset(),
    weights: Mapping[fx.Node, Tensor] | None = None,
) -> Outcome:
    """Run a graph on copies of its inputs.

    Args:
        values: what each placeholder stands for, by its name.
        dtype: float32 or float64: every float of the run has it, and casts to other floats are left out. `qmm` multiplies
            by the decoded weight, activations as they are. `None`: the graph as it is.
        packed: names of the inputs that hold packed weights, which keep their dtypes.
        weights: nodes (linear layers and lookups), each with the weight to be used in place of its own.
    """
    inputs = copies(values, dtype, packed)
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.no_grad(), _precision(dtype):
        result = _Runner(gm, dtype, weights or {}).run(*(inputs[name] for name in names))
    return Outcome(pytree.tree_leaves(result), {name: inputs[name] for name in names if name not in packed})


def copies(
    values: Mapping[str, Any], dtype: torch.dtype | None, packed: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Copies of tensors: with their strides, and with one memory where they share one."""
    memory: dict[Any, Tensor] = {}

    def copied(value: Any, target: torch.dtype | None) -> Any:
        if not isinstance(value, Tensor):
            return int(compat.size_hint(value) or 0) if isinstance(value, torch.SymInt) else value
        value = value.detach()
        key = (value.untyped_storage()._cdata, value.dtype)
        if key not in memory:
            whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
            float_ = target is not None and value.dtype in FLOATS
            memory[key] = whole.to(target if float_ else value.dtype, copy=True)
        return memory[key].as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: copied(value, None if name in packed else dtype) for name, value in values.items()}


def furthest(a: tuple[Outcome, Outcome], b: tuple[Outcome, Outcome]) -> str:
    """What two graphs differ by beyond rounding, in words; "" when they do not.

    Args:
        a, b: the outcomes of each graph, in float32 and in float64.
    """
    pairs = zip(a[0].tensors(b[0]), a[1].tensors(b[1]), strict=True)
    for (_, a32, b32), (what, a64, b64) in pairs:
        if a64.shape != b64.shape or a64.dtype != b64.dtype:
            return f"{what} is {_kind(b64)}, it was {_kind(a64)}"
        if not a64.numel():
            continue
        if a64.dtype not in FLOATS:
            if not torch.equal(a64, b64):
                return f"{what} differs"
            continue
        finite = torch.isfinite(a64)
        lost = [_largest((low.double() - high)[finite]) for low, high in ((a32, a64), (b32, b64))]
        allowed = SHRINKS * max(*lost, UNIT * _largest(a64[finite]))
        # Where one is infinite or NaN the other has to be the same.
        off = torch.where(finite, (a64 - b64).abs(), torch.where(_same(a64, b64), 0.0, float("inf")))
        off = torch.where(off.isnan(), float("inf"), off)
        if float(off.max()) > allowed:
            at = tuple(int(i) for i in (off == off.max()).nonzero()[0])
            return (
                f"{what} differs at {at}: {float(b64[at])}, it was {float(a64[at])}; rounding explains +-{allowed:.2g}; "
                f"{int((off > allowed).sum())} of {off.numel()} elements are off"
            )
    return ""


def _largest(x: Tensor) -> float:
    finite = x[torch.isfinite(x)].abs()
    return float(finite.max()) if finite.numel() else 0.0


def _same(a: Tensor, b: Tensor) -> Tensor:
    return (a == b) | (a.isnan() & b.isnan())


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


@contextmanager
def _precision(dtype: torch.dtype | None) -> Iterator[None]:
    if dtype is None:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _Floats(dtype):
            yield
    finally:
        torch.set_default_dtype(before)


class _Floats(TorchDispatchMode):
    """Every dtype that an operator is asked for, if it is one of floats, becomes one dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.view.dtype:  # the bits as they are
            return func(*args, **(kwargs or {}))
        change = lambda item: self.dtype if isinstance(item, torch.dtype) and item in FLOATS else item  # noqa: E731
        args, kwargs = pytree.tree_map(change, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Runner(fx.Interpreter):
    extra_traceback = False

    def __init__(self, gm: fx.GraphModule, dtype: torch.dtype | None, weights: Mapping[fx.Node, Tensor]) -> None:
        super().__init__(gm)
        self.dtype, self.weights = dtype, weights
        self.exact: dict[Any, Callable[..., Tensor]] = {
            torch.ops.qcompile.qmm.default: self.qmm,
            torch.ops.qcompile.qembedding.default: self.qembedding,
            torch.ops.qcompile.decode.default: self.decode,
        }

    def run_node(self, n: fx.Node) -> Any:
        weight = self.weights.get(n)
        if weight is None:
            return self.as_it_is(n) if self.dtype is not None and _foreign(n) else super().run_node(n)
        (first, _, *rest), kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, (first, weight.to(self.dtype or weight.dtype), *rest), kwargs)

    def as_it_is(self, n: fx.Node) -> Any:
        """Somebody's own function gets the dtypes that it was written for, and rounds as it does."""

        def given(node: fx.Node) -> Any:
            value, said = self.env[node], value_of(node)
            return value.to(said.dtype) if isinstance(value, Tensor) and isinstance(said, Tensor) else value

        args, kwargs = fx.map_arg((n.args, n.kwargs), given)
        with _as_they_are():
            result = n.target(*args, **kwargs)  # type: ignore[operator]
        wide = lambda x: x.to(self.dtype) if isinstance(x, Tensor) and x.dtype in FLOATS else x  # noqa: E731
        return pytree.tree_map(wide, result)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        wide = self.dtype is not None and isinstance(value, Tensor) and value.dtype in FLOATS
        return value.detach().to(self.dtype) if wide else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if self.dtype is not None and target in self.exact:
            return self.exact[target](*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def qmm(self, x: Tensor, parts: list[Tensor], extras: list[Tensor], text: str) -> Tensor:
        spec = MatmulSpec.parse(text)
        step = spec.parts_per_segment
        sums = [
            x @ self.decode(parts[i * step : i * step + step], str(spec.weight), n, spec.k).t()
            for i, n in enumerate(spec.n)
        ]
        names = {f"a{i}": s for i, s in enumerate(sums)} if spec.paired else {"acc": torch.cat(sums, -1)}
        y = evaluate_epilogue(spec.epilogue, names | {f"e{i}": extra for i, extra in enumerate(extras)})
        return y.expand(*x.shape[:-1], spec.columns).contiguous()

    def qembedding(self, ids: Tensor, parts: list[Tensor], scheme: str, n: int, k: int, dtype: torch.dtype) -> Tensor:
        return F.embedding(ids, self.decode(parts, scheme, n, k))

    def decode(self, parts: list[Tensor], scheme: str, n: int, k: int, dtype: torch.dtype | None = None) -> Tensor:
        with _as_they_are():
            return dequantize(list(parts), Scheme.parse(scheme), n, k).to(self.dtype)


def _foreign(node: fx.Node) -> bool:
    """Whether a node calls somebody's own function or operator."""
    name = op_name(node) if node.op == "call_function" else ""
    return ("." in name or "::" in name) and not name.startswith(("torch.", "higher_order::", "torch::"))


@contextmanager
def _as_they_are() -> Iterator[None]:
    """Decoding has dtypes of its own."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.utils._python_dispatch._disable_current_modes():
            yield
    finally:
        torch.set_default_dtype(before)


def said_otherwise(gm: fx.GraphModule, arguments: Sequence[Any]) -> Iterator[str]:
    """Nodes whose example values have another shape or dtype than what they give, in words."""
    found: list[str] = []

    class Comparing(fx.Interpreter):
        extra_traceback = False

        def run_node(_, n: fx.Node) -> Any:
            result = super().run_node(n)
            said = value_of(n) if n.op.startswith("call_") else None
            if isinstance(said, Tensor) and isinstance(result, Tensor):
                shape = [compat.size_hint(size) for size in said.shape]
                if (shape, said.dtype) != (list(result.shape), result.dtype):
                    found.append(f"node {n.name!r} says that it gives {_kind(said)}, and gives {_kind(result)}")
            return result

    with torch.no_grad(), reference_only():
        Comparing(gm).run(*arguments)
    yield from found
