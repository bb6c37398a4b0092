"""Number formats as data.

A format says what one low-bit element means: the value of each bit pattern and nothing else. Everything that
encodes, decodes, packs or generates a kernel reads these fields, so that adding a format is adding one entry
to `FORMATS`. The same holds for the formats a *scale* is stored in (`SCALE_FORMATS`).

Sources: OCP 8-bit Floating Point Specification (e4m3, e5m2); OCP Microscaling Formats (e3m2, e2m3, e2m1,
e8m0); the QLoRA paper, arXiv 2305.14314 (nf4).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from qcompile.errors import QCError, suggest

Kind = Literal["int", "float", "table"]
NonFinite = Literal["none", "nan", "ieee"]
Statistic = Literal["absmax", "mean"]

_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Format:
    """One low-bit element. A *code* is an unsigned integer `0 .. 2**bits - 1`, held in uint8.

    Attributes:
        name: spelling in a scheme.
        kind: `int` (value = code - offset), `float` (the code is the bit pattern), `table` (value =
            table[code]).
        bits: width of a code, 1 to 8.
        signed: whether negative values exist.
        exponent, mantissa: field widths of a `float` format; the bias is `2**(exponent-1) - 1`.
        table: values of codes 0, 1, ... of a `table` format, strictly ascending; codes beyond the table are
            never produced and decode to 0.
        nonfinite: `none`; `nan` (the all-ones magnitude is NaN, no infinity); `ieee` (the top exponent).
        statistic: how a scale is chosen: `absmax` (the largest value meets the largest level) or `mean` of
            |x|.

    Raises:
        QCError: `format.entry` for fields that do not fit each other.
    """

    name: str
    kind: Kind
    bits: int
    signed: bool = True
    exponent: int = 0
    mantissa: int = 0
    table: tuple[float, ...] = ()
    nonfinite: NonFinite = "none"
    statistic: Statistic = "absmax"

    def __post_init__(self) -> None:
        if why := self._fault():
            raise QCError("format.entry", f"{self.name!r} is no format", why=why, next="see docs/formats.md, Add one")

    def _fault(self) -> str:
        """What is wrong with the fields, "" when nothing is."""
        words = {"kind": Kind, "nonfinite": NonFinite, "statistic": Statistic}
        for field, known in words.items():
            if (word := getattr(self, field)) not in get_args(known):
                return (
                    f"{field}={word!r}: it is one of {', '.join(get_args(known))}{suggest(str(word), get_args(known))}"
                )
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z]\w*", self.name, re.ASCII):
            return "a name is a letter, then letters, digits and _"
        for field, kind in (("bits", int), ("exponent", int), ("mantissa", int), ("signed", bool), ("table", tuple)):
            if type(value := getattr(self, field)) is not kind:
                return f"{field}={value!r}: it is of type {kind.__name__}"
        if not 1 <= self.bits <= 8:
            return f"bits={self.bits}: a code has 1 to 8 bits"
        if self.kind == "int" and self.bits == 1 and self.signed:
            return "a signed integer has 2 bits or more"
        if self.kind != "float" and (self.exponent or self.mantissa or self.nonfinite != "none"):
            return "exponent, mantissa and nonfinite are of floats"
        if self.kind != "table" and self.table:
            return "a table is of formats of kind table"
        if self.kind == "int":
            return ""
        return self._float_fault() if self.kind == "float" else self._table_fault()

    def _float_fault(self) -> str:
        fields = self.signed + self.exponent + self.mantissa
        if self.exponent < 1 or self.mantissa < 0 or fields != self.bits:
            sign = "a sign, " * self.signed
            return f"{sign}{self.exponent} bits of exponent and {self.mantissa} of mantissa are not {self.bits} bits"
        if not 0 < max(map(_as_float32, (v for v in self.values if math.isfinite(v)))) < math.inf:
            return "its largest finite value is none of float32 above 0"
        return ""

    def _table_fault(self) -> str:
        if not 2 <= len(self.table) <= 1 << self.bits:
            return f"a table of {len(self.table)}: codes of {self.bits} bits have 2 to {1 << self.bits}"
        if not all(isinstance(v, int | float) and math.isfinite(_as_float32(v)) for v in self.table):
            return "a table has finite numbers of float32"
        values = [_as_float32(v) for v in self.table]
        if any(a >= b for a, b in itertools.pairwise(values)) or values[-1] <= 0:
            return "a table is strictly ascending in float32, and its last number is positive"
        if values[0] < 0 and not self.signed:
            return "a table with negative numbers is signed"
        return ""

    @staticmethod
    def of(name: str) -> Format:
        """Return the format called `name`; raises QCError `format.unknown` with a suggestion."""
        found = FORMATS.get(name)
        if found is None:
            raise QCError(
                "format.unknown",
                f"unknown format {name!r}{suggest(name, FORMATS)}",
                next="known formats: " + " ".join(FORMATS),
            )
        return found

    @cached_property
    def values(self) -> tuple[float, ...]:
        """Value of every code, as Python floats (exact: each is a float32 number)."""
        # Python floats, not a cached tensor: one first made under fake mode would be fake for ever.
        if self.kind == "int":
            return tuple(float(code - self.offset) for code in range(1 << self.bits))
        if self.kind == "float":
            return tuple(self._float_value(code) for code in range(1 << self.bits))
        return self.table + (0.0,) * ((1 << self.bits) - len(self.table))

    def _float_value(self, code: int) -> float:
        magnitude = code & ((1 << (self.exponent + self.mantissa)) - 1)
        sign = -1.0 if code != magnitude else 1.0
        field, fraction = magnitude >> self.mantissa, magnitude & ((1 << self.mantissa) - 1)
        top = (1 << self.exponent) - 1
        if self.nonfinite == "nan" and magnitude == (1 << (self.exponent + self.mantissa)) - 1:
            return math.nan
        if self.nonfinite == "ieee" and field == top:
            return math.nan if fraction else sign * math.inf
        hidden = 1 if field else 0  # a zero field is subnormal: no hidden bit, the exponent of field 1
        scale = max(field, 1) - self.bias - self.mantissa
        return sign * math.ldexp(fraction + (hidden << self.mantissa), scale)

    def levels(self, device: torch.device | str | None = None) -> Tensor:
        """Return float32 `[2**bits]`: the value of each code (NaN or infinity where the format has them)."""
        return torch.tensor(self.values, dtype=torch.float32, device=device)

    @cached_property
    def max(self) -> float:
        """Largest finite value."""
        return max(v for v in self.values if math.isfinite(v))

    @cached_property
    def min(self) -> float:
        """Smallest finite value (for intN this is -2**(N-1), which symmetric encoding leaves unused: see
        `low`).
        """
        return min(v for v in self.values if math.isfinite(v))

    @cached_property
    def low(self) -> float:
        """Smallest value `encode` produces: -max for signed integers, so that zero is the middle; else
        `min`.
        """
        return -self.max if self.kind == "int" and self.signed else self.min

    @property
    def bias(self) -> int:
        """Exponent bias of a `float` format."""
        return (1 << (self.exponent - 1)) - 1

    @property
    def emax(self) -> int:
        """floor(log2(max)): the exponent of the largest value, as the OCP MX scale rule uses it."""
        return math.frexp(self.max)[1] - 1

    @property
    def emin(self) -> int:
        """Exponent of the smallest normal number of a `float` format."""
        return 1 - self.bias

    @property
    def offset(self) -> int:
        """`o` with value = code - o for every code `encode` produces: int, uint and ternary formats.

        Raises:
            QCError `format.no-offset` for a format whose values are not consecutive integers.
        """
        if self.kind == "int":
            return 1 << (self.bits - 1) if self.signed else 0
        if self.kind == "table" and all(v == self.table[0] + i for i, v in enumerate(self.table)):
            return -int(self.table[0])
        raise QCError(
            "format.no-offset",
            f"values of {self.name} are not consecutive integers",
            next="look the value up in levels()",
        )

    @cached_property
    def is_integer(self) -> bool:
        """Whether every value is an integer that fits int8 arithmetic: int, uint, ternary and binary."""
        return self.kind != "float" and all(v == int(v) for v in self.values)

    @cached_property
    def zero_code(self) -> int:
        """Code of the value nearest to 0 (binary has no zero: the code of +1, as sign(0) = +1)."""
        return min(range(len(self.values)), key=lambda c: (abs(self.values[c]), -self.values[c], c), default=0)

    @property
    def planes(self) -> tuple[int, ...]:
        """Power-of-two plane widths, descending: 6 -> (4, 2). The first plane holds the low bits."""
        return bit_planes(self.bits)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"Format.of({self.name!r})"


def _as_float32(value: float) -> float:
    """The nearest float32 number, which may be infinity."""
    return float(torch.tensor(value, dtype=torch.float64).to(torch.float32)) if math.isfinite(value) else value


def bit_planes(bits: int) -> tuple[int, ...]:
    """Split a code width of 1..8 bits into descending powers of two; raises QCError `format.width`."""
    if not 1 <= bits <= 8:
        raise QCError("format.width", f"a code has 1 to 8 bits, not {bits}")
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@dataclass(frozen=True)
class ScaleFormat:
    """How a scale is stored.

    Attributes:
        name: spelling in a scheme.
        dtype: storage dtype. Codes of a float live in an integer dtype, never in a float one.
        kind: `float` (stored as it is), `exponent` (a power of two), `element` (codes of a `Format`).
        low, high: smallest and largest scale that is ever chosen; a scale is clamped to them. `low` is a
            normal float32 number, so that a machine which flushes subnormals computes the same.
        pad: stored value used where a layout pads.
        bias: `exponent` kind: stored = exponent + bias.
        nan: `exponent` kind: the stored value that means NaN.
        inner: needs an outer scale around it, as its range is too small to stand alone.
        outer: can stand alone or around an inner scale.
        minimum: can also hold a signed minimum (`+m`).
    """

    name: str
    dtype: torch.dtype
    kind: Literal["float", "exponent", "element"]
    low: float
    high: float
    pad: int = 0
    bias: int = 0
    nan: int = 0
    inner: bool = False
    outer: bool = True
    minimum: bool = False

    @staticmethod
    def of(name: str) -> ScaleFormat:
        """Return the scale format called `name`; raises QCError `scale.unknown` with a suggestion."""
        found = SCALE_FORMATS.get(name)
        if found is None:
            raise QCError(
                "scale.unknown",
                f"unknown scale format {name!r}{suggest(name, SCALE_FORMATS)}",
                next="known scale formats: " + " ".join(SCALE_FORMATS),
            )
        return found

    @property
    def bits(self) -> int:
        """Stored width in bits."""
        return self.dtype.itemsize * 8

    @cached_property
    def values(self) -> tuple[float, ...]:
        """Value by stored byte (0..255, signed storage read as unsigned) of an `exponent` or `element`
        scale.
        """
        if self.kind == "element":
            element = FORMATS[self.name]
            if element.kind == "float":
                return element.values
            return tuple(float(_signed(byte)) for byte in range(256))
        stored = range(256) if self.dtype == torch.uint8 else [_signed(byte) for byte in range(256)]
        return tuple(math.nan if v == self.nan else math.ldexp(1.0, v - self.bias) for v in stored)

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"ScaleFormat.of({self.name!r})"


def _signed(byte: int) -> int:
    return byte - 256 if byte > 127 else byte


E = TypeVar("E", bound=Format | ScaleFormat)


class Registry(MutableMapping[str, E]):
    """Entries by name. A name keeps its meaning: packed weights and kernels are found by it.

    Raises:
        QCError: `format.entry` for a key that is not the entry's name, or an entry of another type; `format.redefined` for a
            name that has meant another entry in this process, even if that was taken out again.
    """

    def __init__(self, kind: type[E], entries: Iterable[E]) -> None:
        self._kind = kind
        self._entries: dict[str, E] = {}
        self._meant: dict[str, E] = {}
        self.update({entry.name: entry for entry in entries})

    def __getitem__(self, name: str) -> E:
        return self._entries[name]

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __setitem__(self, name: str, entry: E) -> None:
        if not isinstance(entry, self._kind) or entry.name != name:
            given = f"the format {entry.name!r}" if isinstance(entry, self._kind) else f"a {type(entry).__name__}"
            raise QCError("format.entry", f"{given} under the name {name!r}", next="give an entry under its own name")
        if self._meant.setdefault(name, entry) != entry:
            raise QCError(
                "format.redefined",
                f"{name!r} means another format already",
                why="packed weights and kernels of this process are found by the name",
                next="give the changed one a name of its own, or define it in a new process",
            )
        self._entries[name] = entry


def _table() -> list[Format]:
    formats = [Format(f"int{bits}", "int", bits) for bits in range(2, 9)]
    formats += [Format(f"uint{bits}", "int", bits, signed=False) for bits in range(2, 9)]
    formats += [
        Format("e4m3", "float", 8, exponent=4, mantissa=3, nonfinite="nan"),
        Format("e5m2", "float", 8, exponent=5, mantissa=2, nonfinite="ieee"),
        Format("e3m2", "float", 6, exponent=3, mantissa=2),
        Format("e2m3", "float", 6, exponent=2, mantissa=3),
        Format("e2m1", "float", 4, exponent=2, mantissa=1),
        Format("nf4", "table", 4, table=_NF4),
        Format("ternary", "table", 2, table=(-1.0, 0.0, 1.0), statistic="mean"),
        Format("binary", "table", 1, table=(-1.0, 1.0), statistic="mean"),
    ]
    return formats


FORMATS = Registry(Format, _table())

TINY = 2.0**-126  # smallest normal float32: below it division and kernels that flush subnormals go wrong

SCALE_FORMATS = Registry(
    ScaleFormat,
    (
        ScaleFormat("fp32", torch.float32, "float", TINY, torch.finfo(torch.float32).max, minimum=True),
        # 2**-24 is the smallest positive half; as float32 it is a normal number
        ScaleFormat("fp16", torch.float16, "float", 2.0**-24, torch.finfo(torch.float16).max, minimum=True),
        ScaleFormat("bf16", torch.bfloat16, "float", TINY, torch.finfo(torch.bfloat16).max, minimum=True),
        ScaleFormat("e8m0", torch.uint8, "exponent", TINY, 2.0**127, pad=127, bias=127, nan=255),
        ScaleFormat("pow2", torch.int8, "exponent", TINY, 2.0**127, nan=-128, inner=True),
        ScaleFormat("e4m3", torch.uint8, "element", 2.0**-9, 448.0, inner=True, outer=False),
        ScaleFormat("int8", torch.int8, "element", 1.0, 127.0, inner=True, outer=False),
    ),
)
