"""Counting what runs outside of every compiled graph.

torch's own counter cannot do it: Dynamo compiles nothing below it, and it knows neither the fused operators of
multi-head attention, encoder layers and LSTMs nor attention on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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


_COUNTS: Mapping[Any, Callable[..., int]] = {
    **flop_registry,
    aten._native_multi_head_attention: _reads(5, 7),
    aten._transformer_encoder_layer_fwd: _reads(3, 5, 14, 16),
    aten.mkldnn_rnn_layer: _reads(1, 2),
    aten._cudnn_rnn: _reads(1),
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


class EagerFlops(TorchDispatchMode):
    """Counts the FLOPs of the operators that run in the block but in no compiled graph; Dynamo compiles as it would
    without. A graph has to run under `paused()`: what it runs, torch cannot tell from eager code."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
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

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._pauses or not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        count = _COUNTS.get(func.overloadpacket)
        if count is None:
            with self:  # in inference mode composite operators arrive whole
                result = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if result is NotImplemented else result
        result = func(*args, **kwargs)
        self.total += int(count(*args, **kwargs, out_val=result))
        return result
