"""Hypothesis strategies for the vocabulary: formats, schemes, shapes, and values that hurt.

Large tensors come from a drawn seed and a few drawn facts (magnitudes, zeros, planted values), so that an
example is cheap to make, prints small and shrinks to something a reader understands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.ir.formats import FORMATS, SCALE_FORMATS, Format
from qcompile.ir.scheme import (
    PACKINGS,
    ROUNDINGS,
    Granularity,
    Nested,
    Packing,
    PerAxis,
    PerBlock,
    PerGroup,
    PerTensor,
    PerToken,
    Rounding,
    Scale,
    Scheme,
    Zero,
)
from qcompile.testing.hypotheses import DrawFn, SearchStrategy, st

SUBNORMALS = (2.0**-149, -(2.0**-149), 2.0**-127, -3.0 * 2.0**-130)
NONFINITE = (float("nan"), float("inf"), float("-inf"))


def formats() -> SearchStrategy[Format]:
    """Every format."""
    return st.sampled_from(list(FORMATS.values()))


def flat_granularities(max_size: int = 70) -> SearchStrategy[Granularity]:
    """Granularities of one level, for matrices."""
    size = st.integers(1, max_size)
    return st.one_of(
        st.just(PerTensor()),
        st.just(PerToken()),
        st.builds(PerAxis, st.integers(0, 1)),
        st.builds(PerGroup, size | st.sampled_from([16, 32, 64, 128])),
        st.builds(PerBlock, size, size),
    )


@st.composite
def nested_granularities(draw: DrawFn, max_size: int = 20) -> Nested:
    """Granularities of two levels that fit each other on matrices."""
    size, times = draw(st.integers(1, max_size)), draw(st.integers(2, 4))
    h, w = draw(st.integers(1, max_size)), draw(st.integers(1, 3))
    return draw(
        st.sampled_from(
            [
                Nested(PerGroup(size), PerTensor()),
                Nested(PerGroup(size), PerAxis(0)),
                Nested(PerGroup(size), PerToken()),
                Nested(PerGroup(size), PerGroup(size * times)),
                Nested(PerGroup(size), PerBlock(h, size * w)),
                Nested(PerBlock(h, size), PerTensor()),
                Nested(PerBlock(h, size), PerBlock(h * times, size * w)),
                Nested(PerToken(), PerTensor()),
                Nested(PerAxis(0), PerTensor()),
            ]
        )
    )


@st.composite
def schemes(
    draw: DrawFn,
    formats: SearchStrategy[Format] | None = None,
    granularities: SearchStrategy[Granularity] | None = None,
    scales: Sequence[str] = tuple(SCALE_FORMATS),
    packings: Sequence[Packing] = PACKINGS,
    roundings: Sequence[Rounding] = ROUNDINGS,
) -> Scheme:
    """Every constructible scheme for matrices, by construction rather than by rejection.

    Args:
        scales: names of formats for the (inner) scales; those that do not suit the granularity are left out.
    """
    fmt = draw(formats if formats is not None else st.sampled_from(list(FORMATS.values())))
    granularity = draw(flat_granularities() | nested_granularities() if granularities is None else granularities)
    wide = [s for s in SCALE_FORMATS.values() if s.outer]
    nested = isinstance(granularity, Nested)
    scale = draw(st.sampled_from([s for s in (SCALE_FORMATS[n] for n in scales) if (s.inner if nested else s.outer)]))
    zeros: list[Zero | None] = [None]
    if fmt.kind == "int" and not fmt.signed:
        zeros += ["z", "m"] if scale.minimum else ["z"]
    return Scheme(
        fmt,
        granularity,
        Scale(scale, draw(st.sampled_from(zeros))),
        Scale(draw(st.sampled_from(wide))) if nested else None,
        draw(st.sampled_from(list(packings))),
        draw(st.sampled_from(list(roundings))),
    )


def shapes(max_side: int = 70, min_side: int = 1) -> SearchStrategy[tuple[int, int]]:
    """Matrix shapes, odd sides and multiples of the layout's 16 x 32 alike."""
    side = st.integers(min_side, max_side) | st.sampled_from([16, 32, 64]).filter(lambda s: min_side <= s <= max_side)
    return st.tuples(side, side)


@st.composite
def tensors(
    draw: DrawFn,
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    exponents: tuple[int, int] = (-130, 120),
    nonfinite: bool = False,
) -> Tensor:
    """Float tensors with zero groups, repeated values, subnormals, outliers and any strides.

    Args:
        exponents: the magnitudes lie around 2**e for a drawn e of this range (and are clamped to its upper
            end).
        nonfinite: plant a NaN or an infinity as well.
    """
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    centre = draw(st.sampled_from([0, -6, *exponents]) | st.integers(*exponents))
    spread = draw(st.sampled_from([0, 1, 8]))
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = x * torch.exp2(centre + spread * torch.randn(*shape, generator=generator, dtype=torch.float64))
    if draw(st.booleans()):  # ties and repeated values
        x = torch.round(x * 2.0 ** (2 - centre)) * 2.0 ** (centre - 2)
    zeros = draw(st.sampled_from([0.0, 0.0, 0.5, 1.0]))
    x = torch.where(torch.rand(*shape, generator=generator) < zeros, 0.0, x)
    limit = min(2.0 ** exponents[1], torch.finfo(dtype).max)
    x = x.clamp(-limit, limit).to(dtype)
    if len(shape) >= 1 and x.numel():
        row = draw(st.integers(0, shape[0] - 1))
        if draw(st.booleans()):
            x[row] = 0.0  # a zero row
        planted = draw(st.lists(st.sampled_from([0.0, -0.0, *SUBNORMALS]), max_size=3))
        planted += [draw(st.sampled_from(NONFINITE))] if nonfinite else []
        for value in planted:
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    return draw(strided(x))


def strided(x: Tensor) -> SearchStrategy[Tensor]:
    """`x` itself, or the same values behind transposed, gapped or offset storage."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), 7.0).to(x.dtype)
    wide[..., 1::2] = x
    layouts = [x.contiguous(), wide[..., 1::2]]
    if x.dim() >= 2:
        layouts.append(x.transpose(-1, -2).contiguous().transpose(-1, -2))
    return st.sampled_from(layouts)


@st.composite
def code_matrices(draw: DrawFn, bits: int, max_side: int = 70) -> Tensor:
    """uint8 codes `[N, K]` of a width."""
    shape = draw(shapes(max_side))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    codes = torch.randint(0, 1 << bits, shape, generator=generator).to(torch.uint8)
    return draw(strided(codes))
