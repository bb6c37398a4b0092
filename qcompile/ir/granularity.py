"""Which elements share a scale.

Each granularity is a small value that answers one question: given a tensor with so many dimensions, how long
is one cell along each of them? Everything else (how many scales there are, how a statistic is reduced, how a
scale is spread over the elements) follows from that tuple. `None` stands for the whole dimension, so that a
symbolic size never meets a Python branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from qcompile.errors import QCError

Cell = tuple[int | None, ...]


def _at_least(value: int, least: int, what: str, spelling: str, example: str) -> None:
    if value < least:
        raise QCError(
            "scheme.granularity-size",
            f"{what} is {value} in {spelling!r}",
            why=f"it must be >= {least}",
            next=f"for example {example}",
        )


@dataclass(frozen=True)
class PerTensor:
    """One scale: `[N, K]` has scales `[1, 1]`. Spelled `tensor`."""

    def cell(self, ndim: int) -> Cell:
        return (None,) * ndim

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerAxis:
    """One scale per index of dimension `dim`: `[N, K]` with `axis0` has scales `[N, 1]`."""

    dim: int

    def __post_init__(self) -> None:
        _at_least(self.dim, 0, "dimension", str(self), "axis0")

    def cell(self, ndim: int) -> Cell:
        if self.dim >= ndim:
            raise QCError("scheme.rank", f"{self} on a tensor of {ndim} dimensions", next="name a dimension it has")
        return tuple(1 if d == self.dim else None for d in range(ndim))

    def __str__(self) -> str:
        return f"axis{self.dim}"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive elements of the last dimension: `[N, K]` has `[N, ceil(K/size)]`."""

    size: int

    def __post_init__(self) -> None:
        _at_least(self.size, 1, "group size", str(self), "g32")

    def cell(self, ndim: int) -> Cell:
        if ndim < 1:
            raise QCError("scheme.rank", f"{self} on a tensor without dimensions", next="use 'tensor'")
        return (1,) * (ndim - 1) + (self.size,)

    def __str__(self) -> str:
        return f"g{self.size}"


@dataclass(frozen=True)
class PerToken:
    """One scale per row, all dimensions but the last: `[B, S, K]` has `[B, S, 1]`. Dynamic, for
    activations.
    """

    def cell(self, ndim: int) -> Cell:
        if ndim < 1:
            raise QCError("scheme.rank", "token on a tensor without dimensions", next="use 'tensor'")
        return (1,) * (ndim - 1) + (None,)

    def __str__(self) -> str:
        return "token"


@dataclass(frozen=True)
class PerBlock:
    """One scale per `h` x `w` tile of the last two dimensions: `[N, K]` has `[ceil(N/h), ceil(K/w)]`."""

    h: int
    w: int

    def __post_init__(self) -> None:
        _at_least(min(self.h, self.w), 1, "block side", str(self), "b128x128")

    def cell(self, ndim: int) -> Cell:
        if ndim < 2:
            raise QCError(
                "scheme.rank", f"{self} on a tensor of {ndim} dimensions", why="a block spans two", next="use 'tensor'"
            )
        return (1,) * (ndim - 2) + (self.h, self.w)

    def __str__(self) -> str:
        return f"b{self.h}x{self.w}"


Flat = PerTensor | PerAxis | PerGroup | PerToken | PerBlock


@dataclass(frozen=True)
class Nested:
    """Scales of `inner`, themselves scaled by `outer`: `g16` inside `tensor` (NVFP4), `g64` inside `axis0`
    (DGQ).
    """

    inner: Flat
    outer: Flat

    def __post_init__(self) -> None:
        if not _fits(self.inner, self.outer):
            raise QCError(
                "scheme.nesting",
                f"{self.inner} does not nest inside {self.outer}",
                why="an outer cell must be made of whole, smaller inner cells",
                next="groups nest in a multiple, a block, token, axis or tensor; blocks in a multiple or "
                "tensor; token and axis in tensor",
            )

    def cell(self, ndim: int) -> Cell:
        self.outer_cell(ndim)
        return self.inner.cell(ndim)

    def outer_cell(self, ndim: int) -> Cell:
        """Cell of the outer scales, measured in inner scales."""
        ratio: list[int | None] = []
        for inner, outer in zip(self.inner.cell(ndim), self.outer.cell(ndim), strict=True):
            if outer is not None and (inner is None or outer % inner):
                raise QCError(
                    "scheme.nesting",
                    f"{self.inner} does not nest inside {self.outer} on {ndim} dimensions",
                    next="name an outer granularity that spans whole inner cells, such as tensor",
                )
            ratio.append(None if outer is None else 1 if inner is None else outer // inner)
        return tuple(ratio)

    def __str__(self) -> str:
        return f"{self.inner}/{self.outer}"


Granularity = Flat | Nested


def _fits(inner: Flat, outer: Flat) -> bool:
    match inner, outer:
        case PerTensor(), _:
            return False
        case _, PerTensor():
            return True
        case PerGroup(g), PerGroup(b):
            return b > g and b % g == 0
        case PerGroup(g), PerBlock(_, w):
            return w % g == 0
        case PerGroup(), PerToken() | PerAxis():
            return True
        case PerBlock(h, w), PerBlock(big_h, big_w):
            return (h, w) != (big_h, big_w) and big_h % h == 0 and big_w % w == 0
        case _:
            return False
