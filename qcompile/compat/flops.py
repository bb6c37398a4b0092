"""Counting what runs outside of every compiled graph.

torch's own counter cannot do it: Dynamo compiles nothing below it, and it knows neither the fused operators of
multi-head attention, encoder layers and LSTMs nor attention on a CPU.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten


def _reads(*weights: int) -> Callable[..., int]:
    """A count for operators that multiply each row of their first argument by matrices among the others: two for each
    element of a matrix and each row. Products of two activations inside of them are left out, as in the ledger's rows
    for operators that are not handled."""

    def count(*args: Any, **_: Any) -> int:
        given = [args[index] for index in weights]
        flat = [t for item in given for t in (item if isinstance(item, Sequence) else (item,))]
        matrices = [t for t in flat if t.dim() == 2]
        rows = int(args[0].numel()) // int(matrices[0].shape[1])
        return 2 * rows * sum(int(t.numel()) for t in matrices)

    return count


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> int:
    count: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return count


def _product(left: int) -> Callable[..., int]:
    """A count for `left @ right`, neighbours among the arguments: the elements of `left` meet each column of `right`, all of
    them or those that a sparse one stores."""

    def count(*args: Any, **_: Any) -> int:
        a, b = args[left], args[left + 1]
        if (stored := _stored(b)) is not None:  # each element meets each row of `left`
            return 2 * int(a.numel()) // int(a.shape[-1]) * stored
        columns = int(b.shape[-1]) if b.dim() > 1 else 1
        stored = _stored(a)
        return 2 * columns * (int(a.numel()) if stored is None else stored)

    return count


def _stored(tensor: torch.Tensor) -> int | None:
    """Number of elements that a sparse tensor stores, `None` for a dense one."""
    if tensor.layout is torch.sparse_coo:
        return int(tensor._nnz())
    return int(tensor.values().numel()) if tensor.layout in _COMPRESSED else None


_COMPRESSED = (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def _trilinear(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, *expand: Sequence[int], **_: Any) -> int:
    """Two for each element of the product of three before it is summed: what the ledger counts for `bilinear`."""
    shapes = []
    for operand, places in zip((a, b, c), expand, strict=False):
        shape = list(operand.shape)
        for place in sorted(places):
            shape.insert(place, 1)
        shapes.append(shape)
    return 2 * math.prod(map(int, torch.broadcast_shapes(*shapes)))


def _distance(a: torch.Tensor, b: torch.Tensor, *_: Any, **__: Any) -> int:
    return 2 * int(a.numel()) * int(b.shape[-2])


_COUNTS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._native_multi_head_attention: _reads(5, 7),
    aten._transformer_encoder_layer_fwd: _reads(3, 5, 14, 16),
    aten.mkldnn_rnn_layer: _reads(1, 2),
    aten._cudnn_rnn: _reads(1),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    **dict.fromkeys((aten.mm, aten.mv, aten.dot, aten.vdot, aten._sparse_mm, aten._int_mm), _product(0)),
    **dict.fromkeys((aten.addmm, aten.addmv, aten.addbmm, aten._addmm_activation, aten._sparse_addmm), _product(1)),
    **dict.fromkeys((aten.addmm_, aten.addmv_, aten.addbmm_, aten.baddbmm_), _product(1)),
    aten._trilinear: _trilinear,
    aten._cdist_forward: _distance,
    aten._euclidean_dist: _distance,
}
_COUNTED_HIGHER = {"flex_attention": _attention}
# Whose operators are in the table if they contract anything. Those of `qcompile` decode weights.
_KNOWN = ("aten", "prim", "prims", "profiler", "qcompile")


class EagerFlops(TorchDispatchMode):
    """Counts the FLOPs of the operators that run in the block but in no compiled graph; Dynamo compiles as it would
    without. A graph has to run by `run` or under `paused()`: what it runs, torch cannot tell from eager code.

    Attributes:
        total: FLOPs so far.
        uncounted: operators that may have contracted something, by name, in order: no formula is known for them.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.uncounted: dict[str, None] = {}
        self._pauses = 0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def run(self, gm: fx.GraphModule, values: Sequence[Any]) -> tuple[Any, Counter[str]]:
        """Run a graph: its result, and the FLOPs of its nodes by name. Those of calls that hold graphs are not known."""
        counts: Counter[str] = Counter()
        outside, uncounted = self.total, dict(self.uncounted)

        class Nodes(fx.Interpreter):
            extra_traceback = False

            def run_node(_, node: fx.Node) -> Any:
                self.total = 0
                with self.paused() if isinstance(node.target, torch._ops.HigherOrderOperator) else nullcontext():
                    result = super().run_node(node)
                counts[node.name] += self.total
                return result

        try:
            return Nodes(gm).run(*values), counts
        finally:
            self.total, self.uncounted = outside, uncounted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._pauses:
            return func(*args, **kwargs)
        if not isinstance(func, torch._ops.OpOverload):
            return self._higher_order(func, args, kwargs)
        if any(_wraps(kind) for kind in types):
            return NotImplemented  # the operators that its own dispatch runs come here, on what it wraps
        count = _COUNTS.get(func.overloadpacket)
        if count is None:
            with self:  # in inference mode composite operators arrive whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            if func.namespace not in _KNOWN and any(map(_is_weight, pytree.tree_leaves((args, kwargs)))):
                self.uncounted[str(func)] = None
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        self.total += int(count(*args, **kwargs, out_val=result))
        return result

    def _higher_order(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operator that takes functions so that what those run is counted."""
        count = _COUNTED_HIGHER.get(func.name())
        given = pytree.tree_leaves((args, kwargs))
        if count is not None:
            self.total += int(count(*args, **kwargs))
            return func(*args, **kwargs)
        if not any(map(_is_body, given)):
            self.uncounted[str(func)] = None
            return func(*args, **kwargs)
        args, kwargs = pytree.tree_map(lambda item: self._counted(item) if _is_body(item) else item, (args, kwargs))
        return func(*args, **kwargs)

    def _counted(self, body: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with self:
                return body(*args, **kwargs)

        return run


def _is_body(item: Any) -> bool:
    return isinstance(item, FunctionType | MethodType | torch.nn.Module)


def _is_weight(item: Any) -> bool:
    return isinstance(item, torch.nn.Parameter) and item.dim() >= 2 and item.is_floating_point()


def _wraps(kind: type) -> bool:
    """Whether a tensor type has a dispatch of its own, as jagged tensors have."""
    return issubclass(kind, torch.Tensor) and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
