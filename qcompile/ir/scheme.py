"""One spelling for a whole number format: the `Scheme`.

The string is what travels: op argument, cache key, checkpoint field, golden text, error text, benchmark
label, JSON value. So it must be unique (equal schemes print equally) and must parse back:

    scheme := format "/" gran [":" scale [zero]] { "/" gran ":" scale } ["@" packing] ["~" rounding]
    gran   := "tensor" | "axis" d | "g" size | "token" | "b" h "x" w   (two nest, the innermost first)
    scale  := fp32 | fp16 | bf16 | e8m0 | pow2 | e4m3 | int8           (e4m3, int8: inside an outer scale)
    zero   := "+z" | "+m"                                              (zero point | minimum; uintN only)
    packing := tile16 | mma16 | mma8 | rows     rounding := nearest | stochastic | floor

The scale may be left out when read (fp32; fp16 for groups) and is always printed; the default packing
(tile16) and rounding (nearest) are never printed.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, cast

from qcompile.errors import QCError, suggest
from qcompile.ir.formats import FORMATS, SCALE_FORMATS, Format, ScaleFormat
from qcompile.ir.granularity import (
    Flat,
    Granularity,
    Nested,
    PerAxis,
    PerBlock,
    PerGroup,
    PerTensor,
    PerToken,
)
from qcompile.ir.packing import ceil_div, packed_bytes

__all__ = [
    "PACKINGS",
    "ROUNDINGS",
    "ZEROS",
    "Granularity",
    "Nested",
    "PerAxis",
    "PerBlock",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "Scale",
    "Scheme",
]

Zero = Literal["z", "m"]
Packing = Literal["tile16", "mma16", "mma8", "rows"]
Rounding = Literal["nearest", "stochastic", "floor"]

ZEROS: tuple[Zero, ...] = ("z", "m")
PACKINGS: tuple[Packing, ...] = ("tile16", "mma16", "mma8", "rows")
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "floor")


@dataclass(frozen=True)
class Scale:
    """Format of a scale, and what comes with it.

    Attributes:
        format: how each scale is stored.
        zero: None, `z` (an integer zero point, one uint8 per scale: w = s * (code - z)) or `m` (a minimum in the
            scale's own format: w = s * code + m).
    """

    format: ScaleFormat
    zero: Zero | None = None

    def __str__(self) -> str:
        return self.format.name + (f"+{self.zero}" if self.zero else "")


@dataclass(frozen=True)
class Scheme:
    """A number format for a whole tensor. Construction raises QCError `scheme.*` for impossible combinations.

    Attributes:
        format: the element.
        granularity: which elements share a scale.
        scale: format of the (inner) scales.
        outer: format of the outer scales of a `Nested` granularity, else None.
        packing: `tile16` (16 rows x 32 columns), `mma16` or `mma8` (operands of tensor cores) or `rows`, see `packing.py`.
        rounding: `nearest` (ties to even), `stochastic`, `floor`.
    """

    format: Format
    granularity: Granularity
    scale: Scale
    outer: Scale | None = None
    packing: Packing = "tile16"
    rounding: Rounding = "nearest"

    def __post_init__(self) -> None:
        for broken, code, what, why, fix in _RULES:
            if broken(self):
                raise QCError(code, f"{what}: {self}", why=why, next=fix)

    @staticmethod
    def parse(text: str) -> Scheme:
        """Read a spelling; raises QCError `scheme.*` naming the position and the nearest known word."""
        if not isinstance(text, str):
            raise QCError(
                "scheme.text",
                f"a scheme cannot be {reprlib.repr(text)}",
                why="it is read from its spelling",
                next="write text such as 'int8/g64' or 'uint4/g32:fp16+m'",
            )
        return _parse(text)

    @staticmethod
    def of(value: Scheme | str) -> Scheme:
        """Return `value`, parsed when it is a string."""
        return value if isinstance(value, Scheme) else Scheme.parse(value)

    def __str__(self) -> str:
        if isinstance(self.granularity, Nested):
            text = f"{self.format}/{self.granularity.inner}:{self.scale}/{self.granularity.outer}:{self.outer}"
        else:
            text = f"{self.format}/{self.granularity}:{self.scale}"
        if self.packing != PACKINGS[0]:
            text += f"@{self.packing}"
        if self.rounding != ROUNDINGS[0]:
            text += f"~{self.rounding}"
        return text

    def __repr__(self) -> str:
        return f"Scheme.parse({str(self)!r})"

    @property
    def symmetric(self) -> bool:
        """Whether a value is level * scale: neither zero point nor minimum."""
        return self.scale.zero is None

    @property
    def nested(self) -> bool:
        """Whether scales are themselves scaled."""
        return self.outer is not None

    def group_size(self, k: int) -> int:
        """Number of consecutive elements of a row of length `k` that share a scale (`k` when all do)."""
        size = self.granularity.cell(2)[1]
        return k if size is None else min(size, k)

    def groups(self, k: int) -> int:
        """Number of scales of a row of length `k`; the last group may be ragged."""
        return _groups(self.granularity.cell(2)[1], k)

    def outer_groups(self, k: int) -> int:
        """Number of outer scales of a row of length `k`; 0 when the scheme is not nested."""
        return _groups(self.granularity.outer.cell(2)[1], k) if isinstance(self.granularity, Nested) else 0

    def bits_per_weight(self, n: int, k: int) -> float:
        """Stored bits per weight of an `[n, k]` matrix: codes, scales, zeros and the padding of the layout.

        Equals the bytes of `codec.quantize` exactly.
        """
        return 8 * packed_bytes(self, n, k) / (n * k)


def _groups(size: int | None, k: int) -> int:
    return 1 if size is None else ceil_div(k, size)


_Rule = tuple[Callable[[Scheme], bool], str, str, str, str]


def _integer_unsigned(s: Scheme) -> bool:
    return s.format.kind == "int" and not s.format.signed


_RULES: tuple[_Rule, ...] = (
    (
        lambda s: s.scale.zero is not None and s.format.kind != "int",
        "scheme.zero-on-float",
        "a zero point or minimum on a format that is not an integer",
        "float and table formats have their own zero and sign; +z and +m are for uintN",
        "leave it out, or use uintN",
    ),
    (
        lambda s: s.scale.zero is not None and not _integer_unsigned(s),
        "scheme.zero-on-signed",
        "a zero point or minimum on a signed integer",
        "intN is symmetric around its own zero",
        "leave it out, or use uintN",
    ),
    (
        lambda s: s.scale.zero == "m" and not s.scale.format.minimum,
        "scheme.minimum-format",
        "a minimum in a scale format that cannot hold a signed number",
        "a minimum is stored in the scale's format",
        "use a scale in fp32, fp16 or bf16",
    ),
    (
        lambda s: isinstance(s.granularity, Nested) != (s.outer is not None),
        "scheme.outer-scale",
        "an outer scale without nesting, or nesting without an outer scale",
        "each granularity has exactly one scale format",
        "give Nested(inner, outer) two scales, any other granularity one",
    ),
    (
        lambda s: s.outer is None and not s.scale.format.outer,
        "scheme.scale-needs-outer",
        "a scale format of small range standing alone",
        "e4m3 and int8 scales need an outer scale",
        "add one, as in e2m1/g16:e4m3/tensor:fp32",
    ),
    (
        lambda s: s.outer is not None and not s.scale.format.inner,
        "scheme.inner-scale",
        "a wide scale inside an outer one",
        "an outer scale is for inner scales of small range",
        "use an inner scale in e4m3, int8 or pow2, or leave the outer one out",
    ),
    (
        lambda s: s.outer is not None and (not s.outer.format.outer or s.outer.zero is not None),
        "scheme.outer-format",
        "an outer scale that cannot stand alone",
        "nothing scales the outer scale",
        "use one of " + ", ".join(s.name for s in SCALE_FORMATS.values() if s.outer) + ", without zero",
    ),
    (
        lambda s: s.packing not in PACKINGS or s.rounding not in ROUNDINGS,
        "scheme.unknown-option",
        "unknown packing or rounding",
        "no kernel knows it",
        "packings: " + " ".join(PACKINGS) + "; roundings: " + " ".join(ROUNDINGS),
    ),
)

_GRANULARITIES: tuple[tuple[re.Pattern[str], Callable[..., Flat]], ...] = (
    (re.compile(r"tensor"), PerTensor),
    (re.compile(r"token"), PerToken),
    (re.compile(r"axis([0-9]{1,9})"), PerAxis),
    (re.compile(r"g([0-9]{1,9})"), PerGroup),
    (re.compile(r"b([0-9]{1,9})x([0-9]{1,9})"), PerBlock),
)
_EXAMPLES = ("tensor", "token", "axis0", "axis1", "g16", "g32", "g64", "g128", "b128x128")


class _Reader:
    """The text being read, so that every refusal can point into it."""

    def __init__(self, text: str) -> None:
        self.text = text

    def unknown(self, what: str, word: str, at: int, choices: tuple[str, ...]) -> QCError:
        return QCError(
            f"scheme.unknown-{what}",
            f"unknown {what} {word!r}{suggest(word, choices)}",
            where=f"position {at} of {self.text!r}",
            next=("for example: " if choices is _EXAMPLES else "one of: ") + " ".join(choices),
        )

    def word(self, what: str, word: str, at: int, choices: tuple[str, ...]) -> None:
        if word not in choices:
            raise self.unknown(what, word, at, choices)

    def granularity(self, word: str, at: int) -> Flat:
        for pattern, build in _GRANULARITIES:
            found = pattern.fullmatch(word)
            if found:
                return build(*(int(g) for g in found.groups()))
        raise self.unknown("granularity", word, at, _EXAMPLES)

    def scale(self, word: str, at: int) -> Scale:
        name, plus, zero = word.partition("+")
        self.word("scale", name, at, tuple(SCALE_FORMATS))
        if plus:
            self.word("zero", zero, at + len(name) + 1, ZEROS)
        return Scale(SCALE_FORMATS[name], cast(Zero, zero) if plus else None)


def _default_scale(granularity: Flat) -> Scale:
    return Scale(SCALE_FORMATS["fp16" if isinstance(granularity, PerGroup) else "fp32"])


@lru_cache(maxsize=4096)
def _parse(text: str) -> Scheme:
    try:
        return _read(text)
    except QCError as error:
        raise error if error.where else error.at(f"in {text!r}") from None


def _read(text: str) -> Scheme:
    read = _Reader(text)
    body, tilde, rounding = text.partition("~")
    body, at_sign, packing = body.partition("@")
    if tilde:
        read.word("rounding", rounding, len(text) - len(rounding), ROUNDINGS)
    if at_sign:
        read.word("packing", packing, len(body) + 1, PACKINGS)
    name, *cells = body.split("/")
    read.word("format", name, 0, tuple(FORMATS))
    position = len(name) + 1
    if not cells:
        raise QCError(
            "scheme.incomplete",
            "a scheme needs a granularity",
            where=f"position {len(name)} of {text!r}",
            next=f"for example {name}/axis0 or {name}/g32",
        )
    grains: list[Flat] = []
    scales: list[Scale] = []
    for cell in cells:
        grain, colon, scale = cell.partition(":")
        grains.append(read.granularity(grain, position))
        scales.append(read.scale(scale, position + len(grain) + 1) if colon else _default_scale(grains[-1]))
        position += len(cell) + 1
    if len(grains) > 2:
        raise QCError(
            "scheme.nesting",
            f"{len(grains)} levels of scales",
            why="there are two levels at most",
            next="leave levels out, as in e2m1/g16:e4m3/tensor:fp32",
        )
    return Scheme(
        FORMATS[name],
        grains[0] if len(grains) == 1 else Nested(*grains),
        scales[0],
        scales[1] if len(scales) == 2 else None,
        cast(Packing, packing) if at_sign else PACKINGS[0],
        cast(Rounding, rounding) if tilde else ROUNDINGS[0],
    )
