"""Sizes that may be symbols: what they stand for, as numbers or as expressions.

Passes compare shapes and give them to kernels. A size is an integer, or a symbol with an example value behind it, or
a symbol without one; where torch keeps which differs between releases.
"""

from __future__ import annotations

from typing import Any, cast

import torch


def size_hint(size: object) -> int | None:
    """A size as an integer: itself, the example value behind a `SymInt`, `None` when it has none
    (unbacked)."""
    if isinstance(size, int):
        return size
    if not isinstance(size, torch.SymInt):
        return None
    try:
        return int(size.node.hint) if size.node.has_hint() else None
    except Exception:  # an unbacked symbol: releases differ in what they raise
        return None


def stride_hints(value: object) -> tuple[int, ...] | None:
    """A tensor's strides as integers (the example values behind symbols), or None for what is no strided
    tensor."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    found = [size_hint(s) for s in value.stride()]
    return None if None in found else cast("tuple[int, ...]", tuple(found))


def size_expression(size: object) -> Any:
    """What a symbolic size, float or boolean stands for: a sympy expression. A plain number is returned as it
    is."""
    return size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


def size_symbols(value: object) -> frozenset[Any]:
    """The size symbols that a value mentions: a size, a tensor's sizes, strides and offset, or a tuple of
    such."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return frozenset(value.node.expr.free_symbols)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        parts = (*value.shape, *value.stride(), value.storage_offset())
        return frozenset[Any]().union(*(size_symbols(s) for s in parts if not isinstance(s, int)))
    if isinstance(value, tuple | list):
        return frozenset[Any]().union(*(size_symbols(v) for v in value))
    return frozenset()
