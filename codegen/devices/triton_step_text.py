"""The text of a Triton kernel that does an optimizer's step: from the operations of a `StepSpec`.

A block of threads does a tile: 2048 neighbours of a parameter. Every thread has 16 of them, all that there is of each: its
gradients, its moments, its random bits (two blocks of Philox). So nothing is exchanged but the largest magnitude of a block of
state, and 16 bytes are loaded and stored at a time: of 16-bit floats a thread has two such pieces, of float32 four. (Sixteen
codes of 4 bits are 8 bytes.)

Two kernels come from one text. With WIDE, addresses are multiples of 16 bytes and a tile has a multiple of 16 elements: a
thread has all of its elements or none. Without, each element is asked for.

What the operations mean is said in `ir/step.py`: every one rounds by itself, so a launch forbids contraction
(`enable_fp_fusion`), and divisions and square roots are those that round correctly. No number of the program becomes a
number of Python: a compiler would compute with those in float64.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from qcompile.codegen.devices.triton_random import HELPERS as RANDOM
from qcompile.codegen.devices.triton_random import calls, with_called
from qcompile.codegen.devices.triton_step_codes import Search, search
from qcompile.codegen.devices.triton_text import template
from qcompile.codegen.registry import Verdict
from qcompile.ir.formats import Format
from qcompile.ir.step import Operand, Operation, StepSpec, Value

COLUMNS = 16  # elements of a thread, a multiple of those that share random words; 16 bytes of codes
ROWS = 128  # threads
TILE = ROWS * COLUMNS  # no block of state is larger
KINDS = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
PIECES = {"f32": 4, "bf16": 8, "f16": 8, "codes": 16}  # elements in 16 bytes

# Device functions: a text has those that it calls.
HELPERS = {
    "loaded": '''@triton.jit
def loaded(pointer, row, count, PIECE: tl.constexpr, WIDE: tl.constexpr):
    """Elements of rows of 16, those from `count` on 0; PIECE of them are 16 bytes."""
    ROWS: tl.constexpr = row.shape[0]
    if WIDE:
        inside = (row * 16 < count)[:, None]
        at = pointer + row[:, None] * 16 + tl.arange(0, PIECE)[None, :]
        a = tl.load(at, mask=inside, other=0)
        if PIECE == 16:
            return a
        elif PIECE == 8:
            b = tl.load(at + PIECE, mask=inside, other=0)
            return tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, 16))
        else:
            b = tl.load(at + PIECE, mask=inside, other=0)
            c = tl.load(at + 2 * PIECE, mask=inside, other=0)
            d = tl.load(at + 3 * PIECE, mask=inside, other=0)
            return tl.reshape(tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1)), (ROWS, 16))
    else:
        element = row[:, None] * 16 + tl.arange(0, 16)[None, :]
        return tl.load(pointer + element, mask=element < count, other=0)''',
    "stored": '''@triton.jit
def stored(pointer, row, count, x, PIECE: tl.constexpr, WIDE: tl.constexpr):
    """Write what `loaded` reads."""
    ROWS: tl.constexpr = row.shape[0]
    if WIDE:
        inside = (row * 16 < count)[:, None]
        at = pointer + row[:, None] * 16 + tl.arange(0, PIECE)[None, :]
        if PIECE == 16:
            tl.store(at, x, mask=inside)
        elif PIECE == 8:
            a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, 8)), (0, 2, 1)))
            tl.store(at, a, mask=inside)
            tl.store(at + PIECE, b, mask=inside)
        else:
            even, odd = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, 2, 4)), (0, 3, 1, 2)))
            a, c = tl.split(even)
            b, d = tl.split(odd)
            tl.store(at, a, mask=inside)
            tl.store(at + PIECE, b, mask=inside)
            tl.store(at + 2 * PIECE, c, mask=inside)
            tl.store(at + 3 * PIECE, d, mask=inside)
    else:
        element = row[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(pointer + element, x, mask=element < count)''',
    "pairs_loaded": '''@triton.jit
def pairs_loaded(pointer, row, count, WIDE: tl.constexpr):
    """Bytes of rows of 16 codes of 4 bits, the first of two in the lower half."""
    byte = tl.arange(0, 8)[None, :]
    inside = (row * 16 < count)[:, None] if WIDE else row[:, None] * 16 + 2 * byte < count
    return tl.load(pointer + row[:, None] * 8 + byte, mask=inside, other=0)''',
    "pairs_stored": '''@triton.jit
def pairs_stored(pointer, row, count, low, high, WIDE: tl.constexpr):
    """Write what `pairs_loaded` reads. The half that no element uses becomes 0."""
    byte = tl.arange(0, 8)[None, :]
    inside = (row * 16 < count)[:, None] if WIDE else row[:, None] * 16 + 2 * byte < count
    if not WIDE:
        high = tl.where(row[:, None] * 16 + 2 * byte + 1 < count, high, 0)
    tl.store(pointer + row[:, None] * 8 + byte, (low | (high << 4)).to(tl.uint8), mask=inside)''',
    "side_by_side": '''@triton.jit
def side_by_side(low, high):
    """Rows of 8 pairs as rows of 16."""
    return tl.reshape(tl.join(low, high), (low.shape[0], 16))''',
    "in_pairs": '''@triton.jit
def in_pairs(x):
    """Rows of 16 as the first and the second of 8 pairs."""
    return tl.split(tl.reshape(x, (x.shape[0], 8, 2)))''',
    "largest": '''@triton.jit
def largest(x, row, count, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """The largest |x| of blocks of so many rows, for each row, as bits: of those NaN is larger than infinity."""
    ROWS: tl.constexpr = row.shape[0]
    word = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if not WIDE:
        word = tl.where(row[:, None] * 16 + tl.arange(0, 16)[None, :] < count, word, 0)
    most = tl.where(row * 16 < count, tl.max(word, 1), 0)
    if BLOCK > 1:
        blocks = tl.max(tl.reshape(most, (ROWS // BLOCK, BLOCK)), 1)
        most = tl.reshape(tl.broadcast_to(blocks[:, None], (ROWS // BLOCK, BLOCK)), (ROWS,))
    return most''',
    "scale_of": '''@triton.jit
def scale_of(most, TOP: tl.constexpr):
    """The scale of a block whose largest magnitude has these bits: see ir/state.py."""
    scale = most.to(tl.float32, bitcast=True)
    if TOP != 1:
        scale = tl.div_rn(scale, tl.full(most.shape, TOP, tl.float32))
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    return tl.where(most < 0x7F800000, scale.to(tl.int32, bitcast=True), 0x7FC00000).to(tl.float32, bitcast=True)''',
    "scaled": '''@triton.jit
def scaled(x, scale):
    """x in units of a block's scale, 0 where there is none."""
    used = scale > 0
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(used, scale, 1.0))
    return tl.where(used[:, None], x * inverse[:, None], 0.0)''',
    "entries": '''@triton.jit
def entries(table, code):
    """A table's entries. Threads keep the elements that they have, as many as of codes: without a hint lanes trade them."""
    COLUMNS: tl.constexpr = code.shape[1]
    return tl.load(table + tl.max_contiguous(tl.multiple_of(code, (1, 1)), (1, COLUMNS)))''',
}
HELPERS |= {name: RANDOM[name] for name in ("random_words", "random_sixteen")}
HELPERS |= {name: text for name, text in RANDOM.items() if name.startswith("stochastic_")}

_BINARY = {"add": "+", "sub": "-", "mul": "*", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_CALLS = {
    "div": "tl.div_rn({0}, {1})",
    "neg": "{0} * -1.0",  # -x would be 0 - x
    "sqrt": "tl.sqrt_rn({0})",
    "abs": "tl.abs({0})",
    "sign": "tl.where({0} > 0, 1.0, tl.where({0} < 0, -1.0, {0}))",
    "maximum": "tl.where({0} > {1}, {0}, tl.where({0} != {0}, {0}, {1}))",
    "minimum": "tl.where({0} < {1}, {0}, tl.where({0} != {0}, {0}, {1}))",
    "where": "tl.where({0}, {1}, {2})",
    **{name: f"{{0}} {sign} {{1}}" for name, sign in _BINARY.items()},
}


@dataclass(frozen=True)
class StepText:
    """A kernel's source.

    Attributes:
        source: defines `kernel`. levels: what LEVELS points to, float32; none, and no argument, where there is no table.
        wide: for each part of a parameter whether WIDE wants it to begin at a multiple of 16 bytes.
    """

    source: str
    levels: tuple[float, ...]
    wide: tuple[bool, ...]


def verdict(spec: StepSpec) -> Verdict:
    """Whether there is a kernel, and why not."""
    for operand in spec.state:
        fmt = None if operand.storage.plain else operand.storage.format
        if fmt is not None and fmt.kind != "int" and search(fmt) is None:
            return Verdict(False, f"levels of {fmt} do not lie on few lines")
    return Verdict(True)


@lru_cache(maxsize=1024)
def step_text(spec: StepSpec) -> StepText:
    """The kernel of a step for which `verdict` says yes."""
    return _Writer(spec).text()


class _Writer:
    def __init__(self, spec: StepSpec) -> None:
        self.spec = spec
        self.levels: list[float] = []
        self.tables: dict[tuple[str, str], int] = {}  # (format, "values" or "bounds") -> where in `levels`

    def text(self) -> StepText:
        spec = self.spec
        lines = [line for o in spec.operands if o.read for line in self._read(o)]
        names: dict[Value, str] = {o.name: f"x_{o.name}" for o in spec.operands}
        names |= {name: f"h_{name}" for name in spec.hyper}
        single: set[Value] = set(spec.hyper)  # numbers that are the same for all elements

        def value(arg: Value) -> str:
            return number(arg) if isinstance(arg, float) else names[arg]

        for operation in spec.operations:
            names[operation.result] = operation.result
            lines.append(f"{operation.result} = {_expression(operation, [value(arg) for arg in operation.args])}")
            if all(isinstance(arg, float) or arg in single for arg in operation.args):
                single.add(operation.result)
        if spec.stochastic:
            lines += [
                "state = RANDOM + parameter * 4",
                f"start = tl.load(state + 3) + tile * {TILE}",
                "bits = random_sixteen(start // 8 + 2 * row, (start % 8).to(tl.int32), "
                "tl.load(state), tl.load(state + 1), tl.load(state + 2))",
            ]
        for o in spec.state:
            arg = spec.results[o.name]
            x = value(arg)
            if isinstance(arg, float) or arg in single:
                x = f"tl.broadcast_to({x}, ({ROWS}, {COLUMNS}))"
            lines += self._written(o, x)
        source: str = template("step").render(
            helpers=with_called(HELPERS, [name for name in HELPERS if calls("\n".join(lines), name)]),
            spec=spec,
            random=spec.stochastic,
            levels=bool(self.levels),
            tile=TILE,
            rows=ROWS,
            hyper=spec.hyper,
            parts=list(_parts(spec)),
            lines=lines,
        )
        return StepText(source, tuple(self.levels), tuple(part["wide"] for part in _parts(spec)))

    def _read(self, o: Operand) -> Iterator[str]:
        name, storage = o.name, o.storage
        if storage.plain:
            yield f"x_{name} = loaded(at_{name}, row, count, {PIECES[storage.name]}, WIDE).to(tl.float32)"
            return
        codes = [f"c_{name}"]
        if storage.bits == 4:
            codes = [f"c_{name} & 15", f"c_{name} >> 4"]
            yield f"c_{name} = pairs_loaded(at_{name}, row, count, WIDE).to(tl.int32)"
        else:
            yield f"c_{name} = loaded(at_{name}, row, count, {PIECES['codes']}, WIDE).to(tl.int32)"
        inside = f"row * {COLUMNS} < count"
        yield f"s_{name} = tl.load(scale_{name} + row // {storage.block // COLUMNS}, mask={inside}, other=0.0)"
        levels = [self._level(storage.format, code) for code in codes]
        level = levels[0] if len(levels) == 1 else f"side_by_side({', '.join(levels)})"
        yield f"x_{name} = ({level}) * s_{name}[:, None]"

    def _level(self, fmt: Format, code: str) -> str:
        if fmt.kind == "int":
            # A float without a conversion: beside 2^23 the last place is 1.
            return f"({code} | 0x4B000000).to(tl.float32, bitcast=True) - {8388608.0 + fmt.offset!r}"
        return f"entries(LEVELS + {self._table(fmt, 'values', fmt.values)}, {code})"

    def _written(self, o: Operand, x: str) -> Iterator[str]:
        name, storage = o.name, o.storage
        if storage.plain:
            kind = KINDS[storage.name]
            short = kind.replace("bfloat", "bf").replace("float", "fp")
            rounded = f"stochastic_{short}({x}, bits)" if storage.stochastic else f"({x}).to(tl.{kind})"
            yield f"stored(at_{name}, row, count, {rounded}, {PIECES[storage.name]}, WIDE)"
            return
        rows = storage.block // COLUMNS
        yield f"w_{name} = scale_of(largest({x}, row, count, {rows}, WIDE), {storage.format.max!r})"
        yield f"tl.store(scale_{name} + row // {rows}, w_{name}, mask=(row % {rows} == 0) & (row * {COLUMNS} < count))"
        yield f"y_{name} = scaled({x}, w_{name})"
        if storage.bits == 8:
            yield from self._code(name, storage.format, storage.stochastic)
            yield f"stored(at_{name}, row, count, k_{name}.to(tl.uint8), {PIECES['codes']}, WIDE)"
            return
        low, high = f"{name}_low", f"{name}_high"
        if storage.format.kind == "int":
            yield from self._code(name, storage.format, storage.stochastic)
            yield f"k_{low}, k_{high} = in_pairs(k_{name})"
        else:  # each half by itself: threads then keep the elements of their bytes
            yield f"y_{low}, y_{high} = in_pairs(y_{name})"
            yield from self._code(low, storage.format, False)
            yield from self._code(high, storage.format, False)
        yield f"pairs_stored(at_{name}, row, count, k_{low}, k_{high}, WIDE)"

    def _code(self, name: str, fmt: Format, stochastic: bool) -> Iterator[str]:
        """Lines from y to the code k, an int32."""
        y, k = f"y_{name}", f"k_{name}"
        if fmt.kind == "int":
            if stochastic:
                yield f"{y} = stochastic_integer({y}, bits)"
            # Beside 1.5 * 2^23 the last place is 1: the sum rounds to even, and its lower bits are the integer.
            yield f"{y} = tl.minimum(tl.maximum({y}, {fmt.low!r}), {fmt.max!r}) + 12582912.0"
            yield f"{k} = ({y}.to(tl.int32, bitcast=True) + {fmt.offset}) & {(1 << fmt.bits) - 1}"
            return
        found = search(fmt)
        assert found is not None  # `verdict`
        size, guess = f"a_{name}", f"g_{name}"
        yield f"{size} = tl.abs({y})" if found.signed else f"{size} = tl.maximum({y}, 0.0)"
        yield from _guess(found, size, guess)
        bounds = self._table(fmt, "bounds", (*found.bounds, float("inf")))
        yield f"{k} = {guess} + ({size} >= entries(LEVELS + {bounds}, {guess})).to(tl.int32)"
        if found.signed:
            yield f"{k} = tl.where({y} < 0, tl.maximum({found.zero} - {k}, 0), {found.zero} + {k})"

    def _table(self, fmt: Format, what: str, entries: tuple[float, ...]) -> int:
        if (fmt.name, what) not in self.tables:
            self.tables[fmt.name, what] = len(self.levels)
            self.levels += entries
        return self.tables[fmt.name, what]


def _guess(found: Search, size: str, guess: str) -> Iterator[str]:
    """Lines to the guess, an int32: the floor of the least line. What is rounded is half less, and what rounds is a sum beside
    whose 1.5 * 2^23 the last place is 1."""
    lines = [f"tl.fma({size}, {_short(slope)}, {_short(offset - 0.5)})" for slope, offset in found.lines]
    if found.lifted:
        yield from (f"{guess} = " + (f"tl.minimum({guess}, {line})" if i else line) for i, line in enumerate(lines))
        yield f"{guess} = tl.maximum({guess}, -0.5)"
    else:
        # Floats above 0 have the order of their bits, and devices take the least of three integers at once.
        bits = [f"{line}.to(tl.int32, bitcast=True)" for line in lines]
        yield from (f"{guess} = " + (f"tl.minimum({guess}, {line})" if i else line) for i, line in enumerate(bits))
        yield f"{guess} = {guess}.to(tl.float32, bitcast=True)"
    yield f"{guess} = ({guess} + 12582912.0).to(tl.int32, bitcast=True) & 511"


def _short(value: float) -> str:
    return repr(struct.unpack("f", struct.pack("f", value))[0])


def number(value: float) -> str:
    """Text of a float32 number: its bits, as a sign of 0 and a subnormal number would be lost in Triton's own constants."""
    (word,) = struct.unpack("i", struct.pack("f", value))
    return f"tl.full((), {word}, tl.int32).to(tl.float32, bitcast=True)"


def _expression(operation: Operation, args: list[str]) -> str:
    return _CALLS[operation.op].format(*(arg if arg.isidentifier() else f"({arg})" for arg in args))


def _parts(spec: StepSpec) -> Iterator[dict[str, Any]]:
    """The pointers of a parameter, in the order of operands: name, Triton type, how many elements share one of its elements,
    whether 16 bytes are loaded at a time."""
    for o in (*spec.state, *spec.inputs):
        if o.storage.plain:
            yield {"name": f"at_{o.name}", "kind": KINDS[o.storage.name], "share": 1, "wide": True}
        else:
            yield {"name": f"at_{o.name}", "kind": "uint8", "share": 8 // o.storage.bits, "wide": True}
            yield {"name": f"scale_{o.name}", "kind": "float32", "share": o.storage.block, "wide": False}


__all__ = ["COLUMNS", "ROWS", "TILE", "StepText", "number", "step_text", "verdict"]
