"""The reference codec: what every kernel, pass and checkpoint means by a scheme.

Three steps, each plain torch and free of branches on values: `choose_qparams` (data to scales, see
`qparams.py`), `encode` (data and scales to codes), `decode` (codes and scales to values). All arithmetic is
float32 on scales already rounded to their stored form, so that training, inference and checkpoints see the
same numbers. `quantize` and `dequantize` are the same two steps on a weight matrix, with packed tensors at
the other end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.elements import decode_element, encode_element
from qcompile.ir.fit import fitted_qparams
from qcompile.ir.granularity import Cell, Nested
from qcompile.ir.packing import (
    PANEL,
    ceil_div,
    gather_codes,
    gather_scales,
    pack_codes,
    pack_scales,
    packed_parts,
    packed_shape,
    unpack_codes,
    unpack_scales,
)
from qcompile.ir.qparams import QParams, choose_qparams, effective_scale
from qcompile.ir.rounding import Stream, Word, bits_for
from qcompile.ir.scales import load_scale, spread
from qcompile.ir.scheme import Scheme

__all__ = [
    "QParams",
    "check_parts",
    "choose_qparams",
    "clamped",
    "decode",
    "dequantize",
    "encode",
    "fake_quant",
    "part_names",
    "quantize",
    "refuse_nonfinite",
]

_PACK_AGAIN = "name the scheme and size that it was packed with, or pack the weight again"
_CHUNK = 1 << 18  # elements encoded at a time by quantize, so that temporaries stay in the cache


class _Spread(NamedTuple):
    """Float32 scale, zero and inverse, broadcastable against the elements."""

    scale: Tensor
    zero: Tensor | None
    inverse: Tensor | None

    @staticmethod
    def over(scale: Tensor, zero: Tensor | None, inverse: Tensor | None, cell: Cell, shape: torch.Size) -> _Spread:
        each = (None if t is None else spread(t.to(torch.float32), cell, shape) for t in (zero, inverse))
        return _Spread(spread(scale, cell, shape), *each)


def encode(
    x: Tensor,
    scheme: Scheme | str,
    qparams: QParams,
    *,
    seed: Word | None = None,
    offset: Word = 0,
    stream: Stream = (0, 0),
) -> Tensor:
    """Codes (uint8, shape of `x`) of `x` under given scales. Monotone in x within a cell.

    `rounding` is applied to x / s (`+m`: (x - m) / s; `+z`: z is added after rounding; `token`: x * (Q /
    absmax)), all in float32. Inside the range the error is at most half the distance of the neighbouring
    levels, times s.

    Args:
        seed: key of stochastic rounding (required by it): an int or an int64 tensor.
        offset: global index of the first element, for a shard or tile of rows.
        stream: two more words of the key, for example step and parameter number.

    Raises:
        QCError `codec.seed-missing` when the scheme rounds stochastically and there is no seed.
    """
    scheme = Scheme.of(scheme)
    cell = scheme.granularity.cell(x.dim())
    s = effective_scale(qparams, scheme, x.dim())
    over = _Spread.over(s, qparams.zero, qparams.inverse, cell, x.shape)
    return _encode(x, scheme, over, seed, offset, stream)


def _encode(x: Tensor, scheme: Scheme, over: _Spread, seed: Word | None, offset: Word, stream: Stream) -> Tensor:
    bits = None
    if scheme.rounding == "stochastic":
        if seed is None:
            raise QCError(
                "codec.seed-missing",
                f"{scheme} needs a seed",
                why="the same bits at every step would bias training",
                next="pass seed=, and stream=(step, parameter) where it is repeated",
            )
        bits = bits_for(x.shape, seed, offset, stream, x.device)
    y, shift = x.to(torch.float32), None
    if scheme.scale.zero == "m" and over.zero is not None:
        y = y - over.zero
    elif scheme.scale.zero == "z":
        shift = over.zero
    y = y / over.scale if over.inverse is None else y * over.inverse
    return encode_element(y, scheme.format, scheme.rounding, bits, shift)


def decode(codes: Tensor, scheme: Scheme | str, qparams: QParams, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of codes: level * s, (code - z) * s or code * s + m in float32, then cast to `dtype`."""
    scheme = Scheme.of(scheme)
    cell = scheme.granularity.cell(codes.dim())
    s = effective_scale(qparams, scheme, codes.dim())
    return _decode(codes, scheme, _Spread.over(s, qparams.zero, None, cell, codes.shape)).to(dtype)


def _decode(codes: Tensor, scheme: Scheme, over: _Spread) -> Tensor:
    level = decode_element(codes, scheme.format)
    if scheme.scale.zero == "z" and over.zero is not None:
        level = level - over.zero
    value = level * over.scale
    return value + over.zero if scheme.scale.zero == "m" and over.zero is not None else value


def fake_quant(
    x: Tensor, scheme: Scheme | str, *, seed: Word | None = None, offset: Word = 0, stream: Stream = (0, 0)
) -> Tensor:
    """decode(encode(x)) with freshly chosen scales, in x's dtype. Not differentiable: estimators wrap it."""
    scheme = Scheme.of(scheme)
    qparams = choose_qparams(x, scheme)
    codes = encode(x, scheme, qparams, seed=seed, offset=offset, stream=stream)
    return decode(codes, scheme, qparams, x.dtype)


def quantize(
    w: Tensor,
    scheme: Scheme | str,
    *,
    qparams: QParams | None = None,
    fit: str = "minmax",
    seed: Word = 0,
    offset: Word = 0,
) -> list[Tensor]:
    """Encode and pack a weight `[N, K]`.

    Args:
        w: any float dtype and strides; finite.
        qparams: scales to use instead of the chosen ones (learned, for example).
        fit: how scales are chosen: "minmax", or "mse" (see `qcompile.ir.fit`).
        seed: key of stochastic rounding.
        offset: global index of the first element, when `w` is a shard of rows.

    Returns:
        `[codes, scales]`, then zeros or minima when the scheme has them, then outer scales when it is nested.
        Layouts are those of `packing.py`; scales are repeated per row where rows share them.

    Raises:
        QCError `codec.not-a-matrix`, `codec.nonfinite-weight` (naming the index).
    """
    scheme = Scheme.of(scheme)
    if w.dim() != 2:
        raise QCError(
            "codec.not-a-matrix",
            f"a weight of shape {list(w.shape)}",
            why="packed weights are [N, K]",
            next="reshape",
        )
    refuse_nonfinite(w)
    n, k = w.shape
    qparams = qparams or fitted_qparams(w, scheme, fit)
    over = _RowScales.of(qparams, scheme, n)
    codes = torch.empty(packed_shape(scheme.format.bits, n, k, scheme.packing), dtype=torch.uint8, device=w.device)
    for start, stop, at in _chunks(scheme, n, k):
        part = _encode(w[start:stop], scheme, over.rows(start, stop, k), seed, offset + start * k, (0, 0))
        codes[at] = pack_codes(part, scheme.format.bits, scheme.packing)
    parts = [codes]
    for stored, pad in zip(over.stored, _pads(scheme), strict=True):
        parts.append(pack_scales(stored, scheme.packing, pad))
    return parts


def dequantize(
    parts: Sequence[Tensor], scheme: Scheme | str, n: int, k: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Invert `quantize`: the decoded weight `[n, k]`, equal bit for bit to `decode(encode(w))`.

    Raises:
        QCError `codec.parts` or `packing.shape` when they are not the parts of an `[n, k]` weight in `scheme`.
    """
    scheme = Scheme.of(scheme)
    check_parts(parts, scheme, n, k)
    named = dict(zip(part_names(scheme), parts, strict=True))
    rows = {name: unpack_scales(part, n, scheme.packing) for name, part in named.items() if name != "codes"}
    over = _RowScales(rows["scales"], rows.get("zeros", rows.get("mins")), rows.get("outer"), None, scheme)
    codes, bits = named["codes"], scheme.format.bits
    out = torch.empty((n, k), dtype=dtype, device=codes.device)
    for start, stop, at in _chunks(scheme, n, k):
        part = unpack_codes(codes[at], bits, stop - start, k, scheme.packing)
        out[start:stop] = _decode(part, scheme, over.rows(start, stop, k))
    return out


def dequantize_rows(
    parts: Sequence[Tensor], scheme: Scheme | str, k: int, rows: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Some rows of a packed matrix, `[len(rows), k]`: a lookup that decodes nothing else.

    Args:
        parts: what `quantize` returned for the `[n, k]` matrix.
        rows: int64 `[M]`.
    """
    scheme = Scheme.of(scheme)
    named = dict(zip(part_names(scheme), parts, strict=True))
    stored = {name: gather_scales(part, rows, scheme.packing) for name, part in named.items() if name != "codes"}
    over = _RowScales(stored["scales"], stored.get("zeros", stored.get("mins")), stored.get("outer"), None, scheme)
    codes = gather_codes(named["codes"], scheme.format.bits, k, rows, scheme.packing)
    return _decode(codes, scheme, over.rows(0, rows.shape[0], k)).to(dtype)


def check_parts(parts: Sequence[Tensor], scheme: Scheme, n: int, k: int) -> None:
    """Refuse tensors that are no `[n, k]` weight in `scheme`: code that reads them trusts shapes and dtypes.

    Raises:
        QCError `codec.parts` for another number of them, `packing.shape` naming the first that does not fit.
    """
    wanted = packed_parts(scheme, n, k)
    if len(parts) != len(wanted):
        names = ", ".join(part.name for part in wanted)
        raise QCError(
            "codec.parts",
            f"{len(parts)} parts for {scheme}",
            why=f"it has {len(wanted)}: {names}",
            next=_PACK_AGAIN,
        )
    for part, want in zip(parts, wanted, strict=True):
        if tuple(part.shape) != want.shape or part.dtype != want.dtype:
            raise QCError(
                "packing.shape",
                f"{want.name} are {part.dtype} {list(part.shape)}",
                where=f"a weight [{n}, {k}] in {scheme}",
                why=f"its {want.name} are {want.dtype} {list(want.shape)}",
                next=_PACK_AGAIN,
            )


def clamped(parts: Sequence[Tensor], scheme: Scheme, n: int) -> bool:
    """Whether a weight of `n` rows has a size that the format of its scales cannot hold: a scale or minimum at the upper
    end of the range, or no scale above the lower end. Such a weight decodes to other values than were encoded."""
    named = dict(zip(part_names(scheme), parts, strict=True))
    stored, fmt = named["scales"], scheme.scale.format
    if scheme.outer is not None:  # inner scales are relative to the outer ones
        stored, fmt = named["outer"], scheme.outer.format
    scales = load_scale(unpack_scales(stored, n, scheme.packing), fmt)
    if scales.numel() == 0:
        return False
    top = float(scales.max())
    return top >= fmt.high or top <= fmt.low or ("mins" in named and float(named["mins"].abs().max()) >= fmt.high)


def part_names(scheme: Scheme) -> tuple[str, ...]:
    """Names of the tensors `quantize` returns: codes, scales, then zeros | mins, then outer."""
    return tuple(part.name for part in packed_parts(scheme, 1, 1))


def _pads(scheme: Scheme) -> list[int]:
    pads = [scheme.scale.format.pad] + [0] * (scheme.scale.zero is not None)
    return pads + ([scheme.outer.format.pad] if scheme.outer is not None else [])


class _RowScales(NamedTuple):
    """Stored scales of a matrix, one row each: `[N, G]`, as they are packed."""

    scale: Tensor
    zero: Tensor | None
    outer: Tensor | None
    inverse: Tensor | None
    scheme: Scheme

    @staticmethod
    def of(qparams: QParams, scheme: Scheme, n: int) -> _RowScales:
        def rows(t: Tensor | None, length: int | None) -> Tensor | None:
            return None if t is None else spread(t, (length, 1), (n, t.shape[1])).expand(n, -1)

        length = scheme.granularity.cell(2)[0]
        outer_length = scheme.granularity.outer.cell(2)[0] if isinstance(scheme.granularity, Nested) else None
        scale = rows(qparams.scale, length)
        assert scale is not None
        return _RowScales(
            scale,
            rows(qparams.zero, length),
            rows(qparams.outer, outer_length),
            rows(qparams.inverse, length),
            scheme,
        )

    @property
    def stored(self) -> list[Tensor]:
        return [t for t in (self.scale, self.zero, self.outer) if t is not None]

    def rows(self, start: int, stop: int, k: int) -> _Spread:
        """Float32 scales of rows start..stop, spread along their columns."""
        scale, zero, outer, inverse = (None if t is None else t[start:stop] for t in self[:4])
        assert scale is not None
        s = load_scale(scale, self.scheme.scale.format)
        granularity = self.scheme.granularity
        if self.scheme.outer is not None and outer is not None and isinstance(granularity, Nested):
            ratio = granularity.outer_cell(2)[1]
            s = s * spread(load_scale(outer, self.scheme.outer.format), (1, ratio), s.shape)
        cell = (1, granularity.cell(2)[1])
        return _Spread.over(s, zero, inverse, cell, torch.Size((stop - start, k)))


def _chunks(scheme: Scheme, n: int, k: int) -> Iterator[tuple[int, int, slice]]:
    """(first row, end row, slice of the packed tensor) of pieces small enough for the cache."""
    step = max(PANEL, _CHUNK // max(k, 1) // PANEL * PANEL)
    unit = 1 if scheme.packing == "rows" else PANEL
    for start in range(0, n, step):
        stop = min(start + step, n)
        yield start, stop, slice(start // unit, ceil_div(stop, unit))


def refuse_nonfinite(w: Tensor, where: str = "") -> None:
    """Raise `codec.nonfinite-weight`, naming the first index, for a matrix that holds a NaN or an infinity.

    Args:
        w: `[n, k]`, floating point.
        where: path of the weight, for the error.
    """
    if w.numel() == 0:
        return
    low, high = (float(v) for v in torch.aminmax(w))
    limit = torch.finfo(torch.float32).max
    if -limit <= low and high <= limit:  # NaN fails both
        return
    for row in range(w.shape[0]):
        bad = torch.nonzero(~torch.isfinite(w[row].to(torch.float32)))
        if len(bad):
            column = int(bad[0])
            raise QCError(
                "codec.nonfinite-weight",
                f"weight holds {float(w[row, column])}",
                where=f"{where}: index [{row}, {column}]".removeprefix(": "),
                why="a scale chosen over NaN or infinity is meaningless",
                next="repair the checkpoint, or leave this weight out of the recipe",
            )
