"""Small random models for tests of passes: what passes meet in practice, each a few lines of code.

A pass is wrong on the model that its author did not think of: a weight that is a slice, two layers that share one, a write
between two projections, no rows at all. `models()` writes such models as Python source and runs that very source, so what
a failure prints can be pasted into a file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from qcompile.errors import QCError, suggest
from qcompile.testing.hypotheses import SearchStrategy, st
from qcompile.testing.layers import KINDS, Layer, Source

DTYPES = ("float32", "float16", "bfloat16")
_WIDTHS = (4, 1, 3, 5, 8, 16, 17, 32, 33, 64)


@dataclass(frozen=True)
class Model:
    """A model, as data from which its source is written.

    Attributes:
        layers: what it does, in order.
        batch, length, width: sizes of its input `[batch, length, width]`, or of the ids `[batch, length]`.
        dtype: name of its parameters' and inputs' dtype.
        ids: whether it begins with an embedding of ids.
        tied: whether it ends with that embedding's table as its output layer.
        dynamic: whether it is to be compiled for any sizes.
    """

    layers: tuple[Layer, ...]
    batch: int = 2
    length: int = 3
    width: int = 4
    dtype: str = "float32"
    ids: bool = False
    tied: bool = False
    dynamic: bool = False

    @property
    def code(self) -> str:
        """Source that defines `model`, `args` and `dynamic`."""
        source = Source(self.width)
        if self.ids:
            table = source.attribute(f"nn.Embedding(11, {self.width})")
            source.line(f"h = {table}(h)")
        for layer in self.layers:
            source.add(layer)
        if self.ids and self.tied and source.width == self.width:
            source.line(f"h = F.linear(h, {table}.weight)")
        given = f"torch.randint(0, 11, ({self.batch}, {self.length}))"
        if not self.ids:
            given = f"torch.randn({self.batch}, {self.length}, {self.width}, dtype=torch.{self.dtype})"
        return "\n".join(
            [
                *source.module(),
                "torch.manual_seed(0)",
                f"model = Model().to(torch.{self.dtype}).eval()",
                f"args = ({given},)",
                f"dynamic = {self.dynamic}",
            ]
        )

    def build(self) -> tuple[nn.Module, tuple[Any, ...]]:
        """The model, and the arguments of a call of it: new ones, always with the same values."""
        names: dict[str, Any] = {"torch": torch, "nn": nn, "F": F}
        with torch.random.fork_rng(devices=[]):
            exec(compile(self.code, "<model>", "exec"), names)
        return names["model"], names["args"]

    def simpler(self) -> Iterator[Model]:
        """Models that are simpler in one respect, those that are much simpler first."""
        for i in range(len(self.layers) if len(self.layers) > 1 else 0):
            yield replace(self, layers=self.layers[:i] + self.layers[i + 1 :])
        for field in fields(self):
            if field.default is not MISSING and getattr(self, field.name) != field.default:
                yield replace(self, **{field.name: field.default})
        for i, layer in enumerate(self.layers):
            for plainer in layer.simpler():
                yield replace(self, layers=(*self.layers[:i], plainer, *self.layers[i + 1 :]))

    def resized(self) -> Model:
        """The same model with inputs of other sizes."""
        return replace(self, batch=self.batch + 11, length=self.length + 6)  # no two sizes alike

    def __repr__(self) -> str:
        return f"\n{self.code}\n"


def models(
    kinds: str | Sequence[str] = tuple(KINDS),
    dtypes: str | Sequence[str] = DTYPES,
    max_layers: int = 5,
    dynamic: bool | None = None,
) -> SearchStrategy[Model]:
    """Small models with example inputs.

    They hold linear layers in every spelling (`F.linear`, `@`, `mm`, `addmm`, `bmm`, `einsum`, ...) with weights of every
    origin (parameters, transposed ones, slices, pieces of merged ones, buffers, shared ones, tied embeddings), attention,
    gated MLPs, norms, convolutions, residuals, reshapes, casts, dropout, writes in place, and several results. Sizes are
    small and odd; a batch may be empty.

    Args:
        kinds: name or names of layers to use, of `qcompile.testing.layers.KINDS`.
        dtypes: name or names of dtypes to use.
        max_layers: largest number of layers.
        dynamic: whether to compile for any sizes; both by default.
    """
    kinds, dtypes = ([given] if isinstance(given, str) else list(given) for given in (kinds, dtypes))
    for name, choices in [*((kind, KINDS) for kind in kinds), *((dtype, DTYPES) for dtype in dtypes)]:
        if name not in choices:
            raise QCError(
                "testing.models",
                f"models have no {name!r}{suggest(name, choices)}",
                next=f"choose of {', '.join(choices)}",
            )
    if not kinds or not dtypes or type(max_layers) is not int or max_layers < 1:
        given = f"kinds={list(kinds)} dtypes={list(dtypes)} max_layers={max_layers!r}"
        raise QCError("testing.models", f"no model has {given}", next="give one or more of each")
    numbers: Callable[[], SearchStrategy[int]] = lambda: st.integers(0, 59)  # noqa: E731
    layer = st.builds(Layer, st.sampled_from(list(kinds)), st.tuples(*[numbers()] * 6), st.booleans())
    return st.builds(
        Model,
        st.lists(layer, min_size=1, max_size=max_layers).map(tuple),
        st.sampled_from([2, 3, 1, 2, 3, 0]),
        st.sampled_from([3, 1, 2, 5]),
        st.sampled_from(_WIDTHS),
        st.sampled_from(list(dtypes)),
        st.booleans(),
        st.booleans(),
        st.booleans() if dynamic is None else st.just(dynamic),
    )


__all__ = ["DTYPES", "KINDS", "Layer", "Model", "models"]
