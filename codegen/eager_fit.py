"""Calls of `qcompile::fit_qparams` on CPUs run a kernel that is built for their scheme.

The kernel's bits are those of the plain-torch meaning, so one may stand for the other at any time. A build takes seconds, in
which plain torch fits millions of weights: it is worth it once so many were asked for, which training soon does.
Inside `reference_only()` the plain-torch meaning always runs.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from qcompile.codegen.devices.cpu import detect_isa
from qcompile.codegen.devices.cpu_fit import fit_text, why_no_kernel
from qcompile.codegen.eager import apart
from qcompile.compat import cpp_compiler, load_operator
from qcompile.errors import warn
from qcompile.ir import ops
from qcompile.ir.estimators import chosen_qparams
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.scheme import Scheme

Operator = Callable[[Tensor, Tensor, Tensor], None]
Key = tuple[str, str, torch.dtype]

# Elements that were fitted by plain torch, some tenths of a second, before a kernel is built.
WORTH_BUILDING = 1 << 22

_LOCK = threading.Lock()
_OPERATORS: dict[Key, Operator | None] = {}  # None: looked for, and there is none
_SEEN: Counter[Key] = Counter()
_NAMES = {dtype: name for name, dtype in OUT_DTYPES.items()}


def fit_on_cpu(x: Tensor, scheme: str, fit: str) -> list[Tensor]:
    """`fit_qparams` by a kernel built for this processor; any `x` and scheme that its plain-torch meaning takes."""
    key = (scheme, fit, x.dtype)
    if ops.reference_forced() or x.dim() != 2 or x.numel() == 0 or x.dtype not in _NAMES:
        return chosen_qparams(x, scheme, fit)
    if key not in _OPERATORS:
        _SEEN[key] += x.numel()
        if _SEEN[key] < WORTH_BUILDING:
            return chosen_qparams(x, scheme, fit)
    operator = operator_of(key)
    return chosen_qparams(x, scheme, fit) if operator is None else run(operator, x, Scheme.parse(scheme))


def run(operator: Operator, x: Tensor, scheme: Scheme) -> list[Tensor]:
    """Scales of `x` `[N, K]` by an operator."""
    n, k = x.shape
    shape = (n, -(-k // scheme.group_size(k)))
    scale = torch.empty(shape, dtype=scheme.scale.format.dtype)
    kind = scheme.scale.zero
    zero = torch.empty(shape if kind else (0,), dtype=scale.dtype if kind == "m" else torch.uint8)
    operator(x.detach().contiguous(), scale, zero)
    return [scale, zero] if kind else [scale]


def operator_of(key: Key) -> Operator | None:
    """The registered kernel, built and tried on the first request; None where there is none."""
    if key in _OPERATORS:
        return _OPERATORS[key]
    operator, reason = apart(_made, key)
    with _LOCK:
        if key not in _OPERATORS:
            _OPERATORS[key] = operator
            if reason:
                warn(f"scales of {key[0]} are chosen by plain torch, which is slow: {reason}")
        return _OPERATORS[key]


def _made(key: Key) -> tuple[Operator | None, str]:
    """The operator, or why there is none ("" where none is meant to be)."""
    scheme, fit, dtype = Scheme.parse(key[0]), key[1], key[2]
    if why_no_kernel(scheme, fit):
        return None, ""
    if cpp_compiler() is None:
        return None, "no C++ compiler"
    try:
        operator = cast("Operator", load_operator(fit_text(scheme, fit, _NAMES[dtype], detect_isa())))
        reason = trial(key, operator)
    except Exception as error:  # the toolchain, the loader or torch: what they raise differs by release
        return None, f"{type(error).__name__}: {error}"
    return (None, reason) if reason else (operator, "")


def trial(key: Key, operator: Operator) -> str:
    """Run an operator on a small weight and compare every bit with the definition's: "" when all are right."""
    scheme = Scheme.parse(key[0])
    generator = torch.Generator().manual_seed(0)
    k = 2 * scheme.group_size(150) + 21
    x = torch.randn(24, k, generator=generator, dtype=torch.float32) * torch.logspace(-9, 9, 24).unsqueeze(1)
    x[:, ::19] *= 5  # clipping them is better than spanning them
    x[0], x[1], x[2], x[3, 5], x[4, 7] = 0.0, 3.0, x[2].abs(), float("nan"), float("inf")
    x = x.to(key[2])
    for got, want in zip(run(operator, x, scheme), chosen_qparams(x, key[0], key[1]), strict=True):
        wrong = int((~equal(got, want)).sum())
        if got.shape != want.shape or wrong:
            return f"{wrong} of {want.numel()} scales of its trial are wrong"
    return ""


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors hold the same numbers, or both NaN."""
    return (a == b) | (a.isnan() & b.isnan()) if a.dtype.is_floating_point else a == b


__all__ = ["WORTH_BUILDING", "equal", "fit_on_cpu", "operator_of", "run", "trial"]
