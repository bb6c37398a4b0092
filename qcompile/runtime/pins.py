"""Schemes that weights were trained in, so that the same recipe deploys them in these.

A recipe may choose by a weight's values (`min_sqnr`), and a kernel by the number of rows. Training changes the one, and a
single token has another of the other: a weight that was rounded to one scheme in every step must not be packed in
another, or stay float, when it is evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.ir.scheme import Scheme


@dataclass(frozen=True)
class Pin:
    """What a weight was rounded to, and its input; `fit` as in `qcompile.ir.fit`."""

    weight: Scheme
    act: Scheme | None
    fit: str


class Pins:
    """Pins by parameters, weight expression, kind of site and recipe. Parameters are held weakly."""

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def pin(self, roots: Sequence[torch.Tensor], text: str, kind: str, recipe: str, pin: Pin) -> None:
        """Remember what a graph that trains does; the latest one counts."""
        self._known.setdefault(roots[0], {})[self._key(roots, text, kind, recipe)] = pin

    def find(self, roots: Sequence[torch.Tensor], text: str, kind: str, recipe: str) -> Pin | None:
        """What the weight was trained in with this recipe, if it was."""
        found: Pin | None = self._known.get(roots[0], {}).get(self._key(roots, text, kind, recipe))
        return found

    @staticmethod
    def _key(roots: Sequence[torch.Tensor], text: str, kind: str, recipe: str) -> tuple[object, ...]:
        return tuple(map(id, roots[1:])), text, kind, recipe


PINS = Pins()
