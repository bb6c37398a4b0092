"""An optimizer's step on CPUs: C++ text for a `StepSpec`, one call for all parameters.

The text is constants and one function for a tile of elements, made here, around `templates/cpu/step.h`, which reads and writes
storages and hands tiles to threads. Its result is that of the plain-torch meaning, bit for bit, on every instruction set.
"""

from __future__ import annotations

from collections.abc import Iterator

from qcompile.codegen.devices.cpu_levels import levels_of, pattern
from qcompile.codegen.devices.cpu_operator import operator_head
from qcompile.codegen.devices.cpu_text import DTYPES, TARGETS, fragment
from qcompile.codegen.epilogue import literal
from qcompile.codegen.step import COMPARISONS, Spelling, program_lines
from qcompile.compat import processor
from qcompile.ir.state import Storage
from qcompile.ir.step import Operand, StepSpec

ARGUMENTS = "(Tensor(a!)[] state, Tensor[] inputs, Tensor hyper, Tensor random) -> ()"
TILE = (
    256  # elements, or those of the largest block: what lies between reading and writing stays in the first-level cache
)
_OPERATIONS = ("add", "sub", "mul", "div", "neg", "sqrt", "abs", "sign", "maximum", "minimum")
_FUNCTIONS = {
    **{name: f"s_{name}" for name in (*_OPERATIONS, *(f"where_{name}" for name in COMPARISONS))},
    **{name: f"f{name}" for name in ("add", "sub", "mul", "div", "sqrt")},
}
SPELLING = Spelling(
    _FUNCTIONS, lambda number: f"fset({literal(number)})", lambda result, text: f"const VF {result} = {text};"
)
_STOCHASTIC = {"bf16": "stochastic_bf16", "f16": "stochastic_fp16"}


def _array(kind: str, name: str, values: Iterator[str] | list[str]) -> str:
    items = list(values)
    return f"  static constexpr {kind} {name}[{len(items)}] = {{{', '.join(items)}}};\n"


def format_text(storage: Storage) -> str:
    """The type of a format of codes."""
    fmt = storage.format
    if fmt.kind == "int":
        return f"using {fmt.name}_codes = Integers<{fmt.offset}, {int(fmt.low)}, {int(fmt.max)}>;\n"
    levels = levels_of(fmt)
    text = f"struct {fmt.name}_levels {{\n"
    text += _array("uint32_t", "LEVEL", [f"0x{pattern(level):08x}" for level in levels.levels])
    text += _array("uint32_t", "REACHED", [f"0x{pattern(size):08x}" for size in levels.reached])
    text += f"  static constexpr bool SIGNED = {str(fmt.signed).lower()};\n"
    numbers = {"ZERO": levels.zero, "SHIFT": levels.shift, "LOWEST": levels.lowest_bucket, "BUCKETS": levels.buckets}
    text += "".join(f"  static constexpr int {name} = {value};\n" for name, value in numbers.items())
    lines = levels.lines
    text += f"  static constexpr bool LINES = {str(lines is not None).lower()};\n"
    if lines is not None:
        text += _array("int32_t", "BEGIN", map(str, lines.begin))
        for name in ("slope", "shift", "most"):
            text += _array("float", f"LINE_{name.upper()}", map(literal, getattr(lines, name)))
        text += f"  static constexpr float NEAR = {literal(lines.near)};\n"
    return text + f"}};\nusing {fmt.name}_codes = Table<{fmt.name}_levels>;\n"


def parts_text(spec: StepSpec) -> tuple[str, dict[str, int]]:
    """The table of tensors, and the number of the first one of each operand."""
    rows: list[str] = []
    at: dict[str, int] = {}
    for operand in (*spec.state, *spec.inputs):
        storage, flags = operand.storage, f"{str(operand.read).lower()}, {str(operand.written).lower()}"
        at[operand.name] = len(rows)
        if storage.plain:
            rows.append(f"{{{storage.bits}, 0, {flags}, &Torch::aoti_torch_dtype_{_TORCH[storage.name]}}}")
        else:
            rows.append(f"{{{storage.bits}, 0, {flags}, &Torch::aoti_torch_dtype_uint8}}")
            rows.append(f"{{32, {storage.block}, {flags}, &Torch::aoti_torch_dtype_float32}}")
    sized = next(operand.name for operand in spec.operands if operand.storage.plain)
    states = sum(len(operand.parts(0)) for operand in spec.state)
    text = (
        f"constexpr int PARTS = {len(rows)}, STATES = {states}, SIZED = {at[sized]}, NUMBERS = {len(spec.hyper)};\n"
        f"constexpr bool STOCHASTIC = {str(spec.stochastic).lower()};\n"
        f"constexpr int TILE = {tile_of(spec)};\n"
    )
    kinds = "constexpr Part PART[PARTS] = {\n" + "".join(f"    {row},\n" for row in rows) + "};\n"
    return text + _PART + kinds, at


_PART = """struct Part {  // one tensor of a parameter: bits of an element, or float32 for each block of elements
  int bits, block;
  bool read, written;
  Dtype dtype;
  constexpr int64_t bytes(int64_t n) const { return block ? (n + block - 1) / block * 4 : (n * bits + 7) / 8; }
  constexpr int64_t count(int64_t n) const { return block ? (n + block - 1) / block : bits == 4 ? (n + 1) / 2 : n; }
};
"""
_TORCH = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}


def tile_of(spec: StepSpec) -> int:
    """Elements of a tile: a multiple of every block."""
    return max((TILE, *spec.blocks))


def _waits(operand: Operand) -> bool:
    """Whether results are kept until the tile is computed."""
    return operand.written and not operand.storage.plain


def tile_text(spec: StepSpec, at: dict[str, int]) -> str:
    """The function that computes a tile: random bits, then 64 elements at a time, then blocks."""
    begin, loads, before, stores, scales, after = [], [], [], [], [], []
    for i, name in enumerate(spec.hyper):
        begin.append(f"const VF x_{name} = fset(h[{i}]);")
    if spec.stochastic:
        begin.append("alignas(64) uint16_t made[TILE + Philox::BATCH];")
        begin.append("const uint16_t* const bits = random.philox.fill<TILE>(random.offset, made);")
    for o in spec.operands:
        name, storage, k = o.name, o.storage, at[o.name]
        kind, ctype = DTYPES[storage.name] if storage.plain else (f"{storage.name}_codes", "uint8_t")
        begin.append(f"auto* const a_{name} = ({ctype}*)at[{k}];")
        codes = f"a_{name}"
        if not storage.plain:
            begin.append(f"auto* const s_{name} = (float*)at[{k + 1}];")
            if storage.bits == 4:
                codes = f"c_{name}"
                begin.append(f"alignas(64) uint8_t {codes}[TILE];")
                if o.read:
                    begin.append(f"widen({codes}, a_{name});")
        if _waits(o):
            begin.append(f"alignas(64) float r_{name}[TILE];")
        if o.read and storage.plain:
            before.append(f"const VF x_{name} = {kind}::load(a_{name} + e);")
        elif o.read:
            loads.append(f"VF q_{name}[4];")
            loads.append(f"{kind}::decode(q_{name}, {codes} + i);")
            before.append(f"const VF x_{name} = fmul(q_{name}[j], fset(s_{name}[e / {storage.block}]));")
        if o.written:
            value = SPELLING.value(spec.results[name], spec)
            if _waits(o):
                stores.append(f"fstore(r_{name} + e, {value});")
            elif storage.stochastic:
                stores.append(f"store_16(a_{name} + e, {_STOCHASTIC[storage.name]}({value}, load_u16(bits + e)));")
            else:
                stores.append(f"{kind}::store(a_{name} + e, {value});")
        if _waits(o):
            random = ", bits" if storage.stochastic else ""
            begin.append(f"float i_{name}[TILE / {storage.block}];")
            scales.append(f"scale<{kind}, {storage.block}>(r_{name}, n, s_{name}, i_{name});")
            after.append(f"encode<{kind}, {storage.block}>(r_{name}, i_{name}, {codes}{random});")
            if storage.bits == 4:
                after.append(f"narrow4(a_{name}, {codes}, n);")
    inner = [*before, *program_lines(spec, SPELLING), *stores]
    lines = [
        "// The tile whose parts begin at at[...]; n elements of it exist, the others are anything.",
        "static void compute(char* const* at, const float* h, int n, const Random& random) {",
        *(f"  {line}" for line in begin),
        "  for (int i = 0; i < TILE; i += 64) {",
        *(f"    {line}" for line in loads),
        "    UNROLL for (int j = 0; j < 4; j++) {",
        "      const int e = i + 16 * j;",
        *(f"      {line}" for line in inner),
        "    }",
        "  }",
        *(f"  {line}" for line in scales),
        *(f"  {line}" for line in after),
        "  (void)h, (void)n, (void)random;",
        "}",
        "",
    ]
    return "\n".join(lines)


def step_text(spec: StepSpec, isa: str) -> str:
    """The translation unit that `compat.abi.load_operator` builds. Raises `QCError` ("kernel.unsupported")."""
    target = ""
    if isa in TARGETS:
        macro, features = TARGETS[isa]
        target = f'#if !defined({macro}) && defined(__GNUC__)\n#pragma GCC target("{features}")\n#endif\n'
    constants, at = parts_text(spec)
    formats = {s.name: format_text(s) for _, s in spec.tensors if not s.plain}
    pieces = [
        f"// step_ {spec}, instruction set {isa}, processor {processor()}\n",
        target,
        fragment("fragments", "prelude"),
        f"#define LINES_IN_REGISTERS {int(isa == 'avx512vnni')}\n",
        operator_head("step_", ARGUMENTS),
        "namespace {\n",
        "constexpr int DIGITS = 1, CODE_TOP = 1;  // of integer products, which a step has none of\n",
        fragment("fragments", isa),
        fragment("fragments", "dtypes"),
        fragment("fragments", "arithmetic"),
        fragment("templates", "philox"),
        constants,
        fragment("templates", "step"),
        *formats.values(),
        tile_text(spec, at),
        "}  // namespace\n",
        fragment("templates", "step_run"),
    ]
    return "".join(pieces)
