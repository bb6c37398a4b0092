"""Attention of one query per sequence over a cache of low-bit codes: the Triton text.

Flash-decoding (Dao, Haziza, Massa and Sizov, 2023): every block takes the queries that share a kv head and a part of a
sequence's pages, with the running maximum and sum of Milakov and Gimelshein (2018, arXiv 1805.02867); the last block to
finish merges the parts in a fixed order. Both products are transposed, as in the matmul: S^T[tokens, heads] = K q^T and
O^T[head_dim, heads] = V^T P^T, so that decoded keys and values are the operands that tensor cores take from registers,
straight from `CacheLayout`'s bytes.

The scale of a key meets its row of S. That of a value is cut into a power of two and a number from 1 to 2: the first joins
the exponent whose running maximum is subtracted, the second meets the probability. So what is rounded to 16 bits is at most
2 and its largest at least 1, whatever the size of the values, and fp16 neither overflows nor runs out of bits.

Sums have 16 columns, as instructions want them; where 8 heads or fewer share keys, what is done to each number is done to
the first half only, which a thread holds in registers of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.codegen.devices.triton_numbers import Numbers
from qcompile.codegen.devices.triton_text import HELPERS, template
from qcompile.ir.kvcache import CacheLayout
from qcompile.ir.packing import unit_columns

HEADS = 16  # query heads of a block
POWER = 40  # a value's scale gives at most this power of two, up or down, to the exponent
_ROUND = 0x4B400000  # 1.5 * 2^23 in fp32: an integer added to these bits is added to the number

_HELPERS = {
    "narrow": '''@triton.jit
def narrow(x, NH: tl.constexpr):
    """The first NH columns, all or half of them."""
    if NH < x.shape[1]:
        x, _ = tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, NH)), (0, 2, 1)))
    return x''',
    "widen": '''@triton.jit
def widen(x, COLUMNS: tl.constexpr):
    """Columns of zeros behind x, where it has half of them."""
    if x.shape[1] < COLUMNS:
        x = tl.reshape(tl.permute(tl.join(x, tl.zeros_like(x)), (0, 2, 1)), (x.shape[0], COLUMNS))
    return x''',
}


@dataclass(frozen=True)
class AttentionSpec:
    """What a text depends on.

    Attributes:
        layout: of the cache. dtype: of queries and result, "f16" or "bf16".
    """

    layout: CacheLayout
    dtype: str

    @property
    def key(self) -> Numbers:
        """How codes of keys become operands."""
        return Numbers.of(self.layout.key.format, self.dtype)

    @property
    def value(self) -> Numbers:
        """How codes of values become operands."""
        return Numbers.of(self.layout.value.format, self.dtype)

    def __str__(self) -> str:
        return f"keys {self.layout.key}, values {self.layout.value}, heads of {self.layout.head_dim}, {self.dtype}"


@dataclass(frozen=True)
class Side:
    """Keys or values: the matrix of a page's codes, and how a block holds it.

    Attributes:
        at: what names of its addresses begin with. numbers: see there. units, panels: of the packing that are loaded,
            powers of two; last_unit, last_panel: the last that are there. fold: see `CacheLayout`.
    """

    at: str
    numbers: Numbers
    units: int
    last_unit: int
    panels: int
    last_panel: int
    fold: int = 1

    @staticmethod
    def of_keys(spec: AttentionSpec) -> Side:
        layout = spec.layout
        units = layout.key_columns // unit_columns(layout.key.format.bits)
        panels = layout.page // layout.fold // 16
        return Side("k", spec.key, power_of_two(units), units - 1, panels, panels - 1, layout.fold)

    @staticmethod
    def of_values(spec: AttentionSpec) -> Side:
        layout = spec.layout
        units, panels = layout.page // unit_columns(layout.value.format.bits), layout.value_rows // 16
        return Side("v", spec.value, units, units - 1, power_of_two(panels), panels - 1)

    @property
    def rows(self) -> int:
        """Of the operand."""
        return self.panels * 16 * self.fold

    @property
    def columns(self) -> int:
        """Of the operand of one step."""
        return self.units * 64 // self.fold

    @property
    def panel_words(self) -> int:
        """32-bit words of 16 rows of the packing."""
        return (self.last_unit + 1) * 256 * self.numbers.fmt.bits // min(self.numbers.fmt.planes)

    @property
    def planes(self) -> list[dict[str, int]]:
        """Of each plane: its number, tiles in a unit, and words of a panel before it."""
        found, before, narrow = [], 0, min(self.numbers.fmt.planes)
        for index, width in enumerate(self.numbers.fmt.planes):
            found.append({"index": index, "tiles": width // narrow, "before": before})
            before += (self.last_unit + 1) * 256 * width // narrow
        return found

    @property
    def garbage(self) -> bool:
        """Whether bytes that nobody wrote may be NaN as operands: the format's infinities are those of the operand."""
        fmt = self.numbers.fmt
        return fmt.nonfinite == "ieee" and fmt.bias == self.numbers.operand.bias

    def load(self, pointer: str, words: int) -> list[str]:
        """Lines that load the codes of page `page`, which has so many words."""
        shape = f"({self.units}, 2, {self.panels}, 32, 4)"
        at = f"{pointer} + page * {words} + ({self.at}{{}} + {{}})"
        return [
            f"q{plane['index']}_{j} = tl.reshape(tl.load({at.format(plane['index'], j * 256)}), {shape})"
            for plane in self.planes
            for j in range(plane["tiles"])
        ]

    def operand(self, step: int) -> list[str]:
        """Lines that make w, `[rows, columns]`, the operand of a step, of the loaded codes."""
        numbers = self.numbers
        first, second = numbers.words(step)
        if numbers.kind == "table":
            lines = [f"c = tl.join({first}, {second})", "c = tl.join(c & 0xFFFF, (c >> 16) & 0xFFFF)"]
            lines.append(f"w = ({numbers.table('c')}).to(DT)")
        else:
            factor, constant = numbers.multiplier(step), numbers.constant(step)
            number = ("w" if factor == 1.0 else f"w * {factor!r}") + (f" - {-constant!r}" if constant else "")
            lines = [f"w = halves(tl.join({first}, {second}), DT)", *([f"w = {number}"] if number != "w" else [])]
        lines.append(f"w = tl.reshape(w, ({self.units}, 2, {self.panels}, 8, 4, {self.fold}, {4 // self.fold}, 2, 2))")
        lines.append("w = tl.permute(w, (5, 2, 1, 3, 0, 6, 7, 4, 8) if NATURAL else (5, 2, 1, 3, 0, 6, 4, 7, 8))")
        return [*lines, f"w = tl.reshape(w, ({self.rows}, {self.columns}))"]


@dataclass(frozen=True)
class AttentionText:
    """A kernel's source and its arguments.

    Attributes:
        source: defines `kernel`. pointers: (name, Triton type of the elements), in order; then `scale`, a fp32. sizes: names
            of the run-time integers behind it, in order. rows: of the sums, head_dim or the next power of two from 16 on.
    """

    source: str
    pointers: tuple[tuple[str, str], ...]
    sizes: tuple[str, ...]
    rows: int


def attention_text(spec: AttentionSpec) -> AttentionText:
    """The kernel of a spec."""
    layout, key, value = spec.layout, Side.of_keys(spec), Side.of_values(spec)
    # Values are loaded before the probabilities are made: where nothing is pipelined that hides a part of their way.
    body = _scores(layout, key) + value.load("V", layout.value_bytes // 4)
    body += _probabilities(layout, key) + _products(layout, value)
    said = "place(\n" + "\n".join(body)
    name = key.numbers.operand.name
    source = template("attention").render(
        spec=spec,
        helpers=[text for helper, text in (HELPERS | _HELPERS).items() if f"{helper}(" in said],
        operand={"fp16": "float16", "bf16": "bfloat16"}[name],
        page=layout.page,
        head_dim=layout.head_dim,
        heads=HEADS,
        key=key,
        value=value,
        q_span=unit_columns(layout.key.format.bits) // 4,
        value_unit=repr(2.0**value.numbers.unit),
        body=body,
    )
    pointers = [("Q", name), ("K", "i32"), ("V", "i32"), ("S", "i32"), ("TABLE", "i32"), ("LENGTHS", "i32")]
    pointers += [("Y", name), ("WORK", "fp32"), ("TICKETS", "i32")]
    sizes = ("heads", "group", "chunks", "columns", "ldt", "ldqb", "ldqh", "ldyb", "ldyh")
    return AttentionText(source, tuple(pointers), sizes, value.rows)


def _scores(layout: CacheLayout, side: Side) -> list[str]:
    """The products of keys and queries: s, `[tokens, heads]`."""
    lines = side.load("K", layout.key_bytes // 4)
    for step in range(side.numbers.steps):
        lines += side.operand(step)
        lines.append(f"s {'+=' if step else '='} tl.dot(w, x{step})")
    return lines


def _scales(layout: CacheLayout) -> list[str]:
    """The scales of a page's tokens, fp32: ks and vs; 0 beyond the end."""
    at, fmt = f"page * {layout.page} + token", layout.key.scale.format
    if fmt.bits == 32:
        cast = ".to(tl.float32, bitcast=True)"
        return [
            f"{name} = tl.load(S + ({at}) * 2 + {i}, mask=there, other=0){cast}" for i, name in ((0, "ks"), (1, "vs"))
        ]
    cast = f".to(tl.int16).to({ {'fp16': 'tl.float16', 'bf16': 'tl.bfloat16'}[fmt.name] }, bitcast=True).to(tl.float32)"
    return [f"both = tl.load(S + {at}, mask=there, other=0)", f"ks = both{cast}", f"vs = (both >> 16){cast}"]


def _probabilities(layout: CacheLayout, side: Side) -> list[str]:
    """Scores to probabilities times what is left of the values' scales: p. `old` brings what earlier pages left to the same
    power of two."""
    unit = f" * {2.0**side.numbers.unit!r}" if side.numbers.unit else ""
    return [
        *_scales(layout),
        f"ks = ks * (scale{unit})",
        "power = ((vs.to(tl.int32, bitcast=True) >> 23) & 255) - 127",
        f"power = tl.minimum(tl.maximum(power, -{POWER}), {POWER})",
        "inverse = ((127 - power) << 23).to(tl.float32, bitcast=True)",
        f"least = (power + {_ROUND:#x}).to(tl.float32, bitcast=True) - {1.5 * 2**23!r}",
        'least = tl.where(there, least, float("-inf"))',
        "s = narrow(s, NH) * ks[:, None] + least[:, None]",
        *(['s = tl.where(there[:, None], s, float("-inf"))'] if side.garbage else []),
        "new = tl.maximum(top, tl.max(s, 0))",
        "old = tl.exp2(top - new)",
        "top = new",
        "p = tl.exp2(s - new[None, :])",
        "total = total * old[None, :] + p * inverse[:, None]",
        f"p = ordered(widen((p * (vs * inverse)[:, None]).to(DT), {HEADS}), NATURAL)",
    ]


def _products(layout: CacheLayout, side: Side) -> list[str]:
    """The products of values and probabilities, into acc, one part of the page after the other."""
    steps = side.numbers.steps
    lines, part = _halved("p", layout.page, steps), layout.page // steps
    for step in range(steps):
        lines += side.operand(step)
        if side.garbage:  # 0 times what memory held before is NaN where that is
            lines.append(f"inside = i * {layout.page} + {part * step} + place(tl.arange(0, {part}), NATURAL) < length")
            lines.append("w = tl.where(inside[None, :], w, 0.0)")
        lines.append(f"o {'+=' if step else '='} tl.dot(w, {_piece('p', steps, step)})")
    return [*lines, "acc = acc * old[None, :] + narrow(o, NH)"]


def _halved(name: str, rows: int, count: int) -> list[str]:
    """Lines that cut a block of `rows` into `count` pieces of neighbouring rows."""
    if count == 1:
        return []
    low, high, half = f"{name}0", f"{name}1", rows // 2
    cut = f"{low}, {high} = tl.split(tl.permute(tl.reshape({name}, (2, {half}, {HEADS})), (1, 2, 0)))"
    return [cut, *_halved(low, half, count // 2), *_halved(high, half, count // 2)]


def _piece(name: str, count: int, index: int) -> str:
    """Name of a piece of `_halved`."""
    return name + (f"{index:0{count.bit_length() - 1}b}" if count > 1 else "")


def power_of_two(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()
