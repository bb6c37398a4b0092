"""Scales of a weight on CPUs: C++ text for a scheme, bit for bit the plain-torch meaning of `fit_qparams`.

Choosing scales reads each weight a dozen times where they are fitted. Training does so in every step, and packing a model does
it once for every weight; a group that stays in registers makes all of it one pass over memory.
"""

from __future__ import annotations

from qcompile.codegen.devices.cpu_operator import operator_head
from qcompile.codegen.devices.cpu_text import DTYPES, SCALES, TARGETS, fragment
from qcompile.codegen.epilogue import literal
from qcompile.compat import processor
from qcompile.ir.fit import FITS, LANES, MORE_LEVELS, ON_GRID
from qcompile.ir.formats import TINY
from qcompile.ir.granularity import PerAxis, PerGroup
from qcompile.ir.scheme import Scheme

ARGUMENTS = "(Tensor x, Tensor(a!) scale, Tensor(b!) zero) -> ()"
_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_STORED = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
_ZEROS = {None: "NONE", "z": "POINT", "m": "MINIMUM"}


def why_no_kernel(scheme: Scheme, fit: str) -> str:
    """Why scales of a scheme are chosen by plain torch, "" where a kernel does it."""
    fmt, stored = scheme.format, scheme.scale.format
    if fmt.kind != "int" or fmt.statistic != "absmax" or fmt.values[fmt.zero_code]:
        return f"{fmt} is no integer format"
    if stored.name not in _STORED or scheme.outer is not None:
        return f"its scales are {stored}, no floating-point numbers"
    if scheme.granularity != PerAxis(0) and not isinstance(scheme.granularity, PerGroup):
        return f"it has {scheme.granularity}, not one scale per row or per group"
    return "" if fit in FITS else f"{fit} is a search of its own"


def fit_text(scheme: Scheme, fit: str, x: str, isa: str) -> str:
    """The translation unit that `compat.abi.load_operator` builds, for a weight in `x` (f32, f16, bf16)."""
    assert LANES == 16, "the vectors of the fragments"
    fmt, stored = scheme.format, scheme.scale.format
    group = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else 0
    zero = "uint8" if scheme.scale.zero != "m" else _STORED[stored.name]
    levels = 2**fmt.bits - 1
    trials = ", ".join(literal(levels / (levels + more)) for more in MORE_LEVELS)
    target = ""
    if isa in TARGETS:
        macro, features = TARGETS[isa]
        target = f'#if !defined({macro}) && defined(__GNUC__)\n#pragma GCC target("{features}")\n#endif\n'
    constants = "\n".join(
        [
            f"using X = {DTYPES[x][0]};",
            f"using SCALE = {SCALES[stored.name][0]};",
            "enum Zero { NONE, POINT, MINIMUM };",
            f"constexpr Zero ZERO = {_ZEROS[scheme.scale.zero]};",
            f"constexpr bool SIGNED = {str(fmt.signed).lower()}, SEARCH = {str(fit == 'mse').lower()};",
            f"constexpr float LOW = {literal(fmt.low)}, TOP = {literal(fmt.max)};",
            f"constexpr float SMALLEST = {literal(max(stored.low, 0.0))}, LARGEST = {literal(stored.high)};",
            f"constexpr float TINY = {literal(TINY)}, ON_GRID = {literal(ON_GRID)};",
            f"constexpr int TRIALS = {len(MORE_LEVELS)}, GROUP = {group};",
            f"constexpr float TRIAL[TRIALS] = {{{trials}}};",
            f"constexpr Dtype X_DTYPE = &Torch::aoti_torch_dtype_{_TORCH[x]};",
            f"constexpr Dtype SCALE_DTYPE = &Torch::aoti_torch_dtype_{_STORED[stored.name]};",
            f"constexpr Dtype ZERO_DTYPE = &Torch::aoti_torch_dtype_{zero};",
            "",
        ]
    )
    pieces = [
        f"// fit_qparams {scheme} {fit} {x}, instruction set {isa}, processor {processor()}\n",
        target,
        fragment("fragments", "prelude"),
        operator_head("fit_qparams", ARGUMENTS),
        "namespace {\n",
        "constexpr int DIGITS = 1, CODE_TOP = 1;  // of integer products, of which there are none\n",
        fragment("fragments", isa),
        fragment("fragments", "dtypes"),
        fragment("fragments", "arithmetic"),
        constants,
        fragment("templates", "fit"),
        "}  // namespace\n",
    ]
    return "".join(pieces)


__all__ = ["ARGUMENTS", "fit_text", "why_no_kernel"]
