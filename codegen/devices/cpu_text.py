"""A CPU kernel's text: constants derived from the spec, then the fragments and templates it needs, then its
entry.

The fragments are C++ headers under `codegen/fragments/cpu` and `codegen/templates/cpu` that know neither
formats nor schemes: a weight is a list of bit planes, a byte table (or none) and an offset, which
`WeightCode` derives here from the format's levels. Adding a format therefore touches no C++.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib import resources

from qcompile.codegen.epilogue import literal, vector_expression
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.cpu import BLOCKING
from qcompile.compat import processor
from qcompile.ir.formats import Format
from qcompile.ir.granularity import PerGroup
from qcompile.ir.packing import BLOCK

DTYPES = {"f32": ("F32", "float"), "bf16": ("BF16", "uint16_t"), "f16": ("F16", "uint16_t")}
SCALES = {
    "fp32": ("F32", "float"),
    "fp16": ("F16", "uint16_t"),
    "bf16": ("BF16", "uint16_t"),
    "e8m0": ("E8M0", "uint8_t"),
    "pow2": ("POW2", "int8_t"),
}
LONG_GROUP = 1024  # blocks summed at a time where all of K has one scale and is too long for one int32 sum
TARGETS = {
    "avx512vnni": ("__AVX512VNNI__", "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c"),
    "avx2": ("__FMA__", "avx2,fma,f16c"),
}


@functools.cache
def fragment(kind: str, name: str) -> str:
    """A C++ header: `kind` is "fragments" or "templates"."""
    return resources.files("qcompile.codegen").joinpath(kind, "cpu", f"{name}.h").read_text()


@dataclass(frozen=True)
class WeightCode:
    """How packed codes become operands.

    Attributes:
        integer: whether the levels are small integers times a power of two, so that sums of products are
        exact. table: byte by code ("" when the code itself serves), 16 entries. offset: an integer operand
        stands for `operand - offset` ... factor: ... times this power of two. top: largest operand.
    """

    integer: bool
    table: tuple[int, ...] = ()
    offset: int = 0
    factor: float = 1.0
    top: int = 0

    @staticmethod
    def of(fmt: Format) -> WeightCode:
        """Derived from the levels alone."""
        if fmt.kind == "int":
            return WeightCode(True, (), fmt.offset, 1.0, (1 << fmt.bits) - 1)
        levels = fmt.values
        if fmt.bits <= 4 and all(map(math.isfinite, levels)):
            for power in range(12):
                scaled = [v * 2**power for v in levels]
                if any(v != int(v) for v in scaled):
                    continue
                low, high = int(min(scaled)), int(max(scaled))
                if high - low > 255:
                    break
                table = tuple(int(v) - low for v in scaled)
                padded = table + (0,) * (16 - len(table))
                identity = table == tuple(range(len(table)))
                return WeightCode(True, () if identity else padded, -low, 2.0**-power, high - low)
        return WeightCode(False)


def group_blocks(spec: KernelSpec) -> int:
    """Blocks of 32 k per group of weights; 0 when one group spans all of K."""
    granularity = spec.weight.granularity
    if isinstance(granularity, PerGroup):
        return granularity.size // BLOCK
    return LONG_GROUP if spec.long_k and not step_blocks(spec) else 0


def step_blocks(spec: KernelSpec) -> int:
    """Blocks of 32 k that share a scale of the activation; 0 when a row has one scale."""
    if spec.act is not None and isinstance(spec.act.granularity, PerGroup):
        return spec.act.granularity.size // BLOCK
    return int(arithmetic(spec) == "digits2")


def arithmetic(spec: KernelSpec) -> str:
    """ "digits1", "digits2" or "float": how products are formed (a key of the tuning table)."""
    if not WeightCode.of(spec.weight.format).integer:
        return "float"
    return "digits2" if spec.act is None else "digits1"


def _levels(fmt: Format) -> str:
    """Value by code, padded to 16 entries; codes that mean no number are never stored."""
    values = [v if math.isfinite(v) else 0.0 for v in fmt.values]
    values += [0.0] * (16 - len(values))
    return f"constexpr float LEVELS[{len(values)}] = {{{', '.join(map(literal, values))}}};"


def _constants(spec: KernelSpec, isa: str) -> str:
    code, how = WeightCode.of(spec.weight.format), arithmetic(spec)
    blocking = BLOCKING[isa, how]
    planes, shift, offset = [], 0, 0
    for width in spec.weight.format.planes:
        planes.append(f"{{{width}, {shift}, {offset}}}")
        shift, offset = shift + width, offset + 64 * width
    zero = {"z": "POINT", "m": "MINIMUM"}.get(spec.weight.scale.zero or "", "NONE")
    top = 0 if spec.act is None else int(spec.act.format.max)
    values: dict[str, dict[str, object]] = {
        "bool": {"MAP": bool(code.table), "PAIRED": spec.paired, "ROUNDED": spec.act is not None},
        "int": {
            "PLANE_COUNT": len(planes),
            "BITS": spec.weight.format.bits,
            "OFFSET": code.offset,
            "CODE_TOP": max(code.top, 1),
            "DIGITS": 2 if how == "digits2" else 1,
            "SCALES_PER_GROUP": 16 if isinstance(spec.weight.granularity, PerGroup) else 0,
            "GB": group_blocks(spec),
            "AB": step_blocks(spec),
            "TOP": top or 127,
            "SEGMENTS": spec.segments,
            "MR": blocking.rows,
            "FEW_ROWS": blocking.few_rows,
            "CHUNKS": blocking.chunks,
            "STRIPE": max(1, blocking.stripe // blocking.rows),
            "CHUNK_BLOCKS": blocking.chunk,
            "AHEAD": blocking.ahead,
            "SERIAL_BELOW": blocking.serial_below,
        },
        "float": {"LEVEL_SCALE": literal(code.factor)},
    }
    if how == "float":
        fmt = spec.weight.format
        fields = (fmt.exponent, fmt.mantissa, fmt.bias) if fmt.kind == "float" else (0, 0, 0)
        values["int"] |= dict(zip(("EXPONENT", "MANTISSA", "BIAS"), fields, strict=True))
        values["float"]["SMALLEST"] = literal(2.0 ** (1 - fields[2] - fields[1]))
    table = ", ".join(map(str, code.table or (0,) * 16))
    return "\n".join(
        [
            "enum class Zero { NONE, POINT, MINIMUM };",
            "struct Plane { int width, shift, offset; };",
            f"constexpr Plane PLANES[] = {{{', '.join(planes)}}};",
            f"constexpr Zero ZERO = Zero::{zero};",
            f"alignas(16) constexpr uint8_t LEVELS8[16] = {{{table}}};",
            *([_levels(spec.weight.format)] if how == "float" else []),
            *(
                f"constexpr {kind} {name} = {str(value).lower() if kind == 'bool' else value};"
                for kind, group in values.items()
                for name, value in group.items()
            ),
            "",
        ]
    )


def _types(spec: KernelSpec) -> str:
    scale = SCALES[spec.weight.scale.format.name][0]
    zero = scale if spec.weight.scale.zero == "m" else "U8"
    return f"using X = {DTYPES[spec.x][0]}; using Y = {DTYPES[spec.y][0]}; using S = {scale}; using Z = {zero};\n"


def _epilogue(spec: KernelSpec) -> str:
    fields, loads, names = [], [], {"acc": "a[0]"} | {f"a{i}": f"a[{i}]" for i in range(spec.segments)}
    for i, (kind, dtype) in enumerate(spec.extras):
        name, of = DTYPES[dtype][0], f"e{i}"
        fields.append(f"  const {name}::T* {of};")
        at = f"x.{of} + column"
        if kind == "mat":
            fields.append(f"  int64_t ld{i};")
            at += f" + m * x.ld{i}"
        loads.append(f"  VF {of} = load_part<{name}>({at}, left);")
        names[of] = of
    body = vector_expression(spec.epilogue, names)
    unused = "".join(f"  (void){name};\n" for name in ("x", "m", "column", "left"))
    return (
        "struct Extras {\n" + "\n".join(fields) + "\n};\n"
        "// Row m, columns column .. column + min(left, 16), of the sums a.\n"
        "INL VF epilogue(const VF* a, const Extras& x, int64_t m, int64_t column, int64_t left) {\n"
        + unused
        + "\n".join(loads)
        + f"\n  return {body};\n}}\n"
    )


def _entry(spec: KernelSpec) -> tuple[str, tuple[str, ...]]:
    """The entry function and the C types of its arguments."""
    pointers = [("x", DTYPES[spec.x][1], True)]
    segments, zero = [], spec.weight.scale.zero
    for i in range(spec.segments):
        pointers += [(f"codes{i}", "uint8_t", True), (f"scale{i}", SCALES[spec.weight.scale.format.name][1], True)]
        if zero:
            pointers.append((f"zero{i}", "uint8_t" if zero == "z" else SCALES[spec.weight.scale.format.name][1], True))
        segments.append(f"{{codes{i}, scale{i}, {f'zero{i}' if zero else 'nullptr'}, N{i}, 0, 0}}")
    pointers += [(f"e{i}", DTYPES[dtype][1], True) for i, (_, dtype) in enumerate(spec.extras)]
    pointers.append(("y", DTYPES[spec.y][1], False))
    mats = [i for i, (kind, _) in enumerate(spec.extras) if kind == "mat"]
    sizes = ["M", "K", "ldx", *(f"N{i}" for i in range(spec.segments)), *(f"ld{i}" for i in mats), "ldy"]
    types = [f"{'const ' if const else ''}{ctype}*" for _, ctype, const in pointers] + ["int64_t"] * len(sizes)
    names = [name for name, _, _ in pointers] + sizes
    extras = ", ".join(f"e{i}, ld{i}" if i in mats else f"e{i}" for i in range(len(spec.extras)))
    text = (
        f'extern "C" void kernel({", ".join(f"{t} {n}" for t, n in zip(types, names, strict=True))}) {{\n'
        f"  Problem p{{x, {{{', '.join(segments)}}}, {{{extras}}}, y, M, K, ldx, ldy, 0, 0, 0}};\n"
        "  run(p);\n}\n"
    )
    return text, tuple(types)


def kernel_text(spec: KernelSpec, isa: str) -> tuple[str, tuple[str, ...]]:
    """The whole translation unit and the argument types of its entry function."""
    entry, types = _entry(spec)
    integer = arithmetic(spec) != "float"
    target = ""
    if isa in TARGETS:
        macro, features = TARGETS[isa]
        target = f'#if !defined({macro}) && defined(__GNUC__)\n#pragma GCC target("{features}")\n#endif\n'
    pieces = [
        # The compiler is told "this machine", which is another one where a cache folder travels.
        f"// qmm {spec}, instruction set {isa}, processor {processor()}\n",
        target,
        fragment("fragments", "prelude"),
        "namespace {\n",
        _constants(spec, isa),
        fragment("fragments", isa),
        fragment("fragments", "dtypes"),
        fragment("fragments", "mathfun") if spec.epilogue else "",
        _types(spec),
        fragment("fragments", "codes"),
        fragment("fragments", "digits" if integer else "rows"),
        fragment("templates", "integer" if integer else "floating"),
        _epilogue(spec),
        fragment("templates", "driver"),
        "}  // namespace\n",
        entry,
    ]
    return "".join(pieces), types
