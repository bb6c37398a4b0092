"""Schemes that weights were trained in, so that the same recipe deploys them in these.

A recipe may choose by a weight's values (`min_sqnr`), and a kernel by the number of rows. Training changes the one, and a
single token has another of the other: a weight that was rounded to one scheme in every step must not be packed in
another, or stay float, when it is evaluated; nor may one be packed that stayed float in every step.

Pins belong to a process. `qcompile.trained_recipe` writes them down as rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.ir.scheme import Scheme


@dataclass(frozen=True)
class Pin:
    """What a weight was rounded to, and its input; `fit` as in `qcompile.ir.fit`. `weight` is `None` for one that stayed float
    because of its values."""

    weight: Scheme | None
    act: Scheme | None
    fit: str


class Pins:
    """Pins by parameters, weight expression, kind of site and recipe. Parameters are held weakly."""

    def __init__(self) -> None:
        self._known = WeakIdKeyDictionary()

    def pin(self, roots: Sequence[torch.Tensor], text: str, kind: str, recipe: str, pin: Pin) -> None:
        """Remember what a graph that trains does. The first one counts: another graph, compiled for another shape when the
        weight has other values, must round to the same scheme."""
        self._known.setdefault(roots[0], {}).setdefault(self._key(roots, text, kind, recipe), pin)

    def find(self, roots: Sequence[torch.Tensor], text: str, kind: str, recipe: str) -> Pin | None:
        """What the weight was trained in with this recipe, if it was."""
        found: Pin | None = self._known.get(roots[0], {}).get(self._key(roots, text, kind, recipe))
        return found

    def of(self, weight: torch.Tensor, kind: str, recipe: str) -> Pin | None:
        """What the parameter was trained in, in whatever way a graph read it; `None` where those ways differ."""
        known = self._known.get(weight, {}).items()
        found = {pin for (others, _, site, name), pin in known if not others and (site, name) == (kind, recipe)}
        return found.pop() if len(found) == 1 else None

    @staticmethod
    def _key(roots: Sequence[torch.Tensor], text: str, kind: str, recipe: str) -> tuple[object, ...]:
        return tuple(map(id, roots[1:])), text, kind, recipe


PINS = Pins()
