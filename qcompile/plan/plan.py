"""The plan: a decision with a reason for every site, which is also the ledger that `explain` prints.

Passes read decisions and nothing else; whatever a pass learns (kernel, bytes, refusal) it writes back here,
so that nothing about a site is ever silent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from qcompile.ir.scheme import Scheme
from qcompile.plan.recipe import PRESETS, Recipe, Rule
from qcompile.plan.site import Site
from qcompile.runtime.store import Entry


@dataclass(frozen=True)
class Decision:
    """What happens at one site, and why.

    Attributes:
        site: the site.
        weight: weight scheme, `None` when the site stays float.
        act: activation scheme, `None` when activations are used exactly.
        fit: how the weight's scales are chosen (see `qcompile.ir.fit`).
        kernel: name of the lowering that was chosen ("cpu-avx2", "reference", ...), "" for float.
        reason: why it stays float, or a remark.
        bytes_before: bytes of the float weight (0 when another site already counts it).
        bytes_after: bytes of the packed weight held by the store (0 when another site already counts it).
        sqnr: weight signal-to-noise ratio in dB, `None` when not measured.
        group: index of the merge group (sites that became one matmul), or -1.
        min_sqnr: the signal-to-noise ratio (dB) that the recipe's rule asks the weight to keep.
        estimator: the gradient at the site's roundings, where it is trained.
        grad: scheme of the gradients in products of codes, where it is trained; `None` for products in float.
        packed: whether a pass gave the site packed (or, in training, rounded) operands; a decision alone changes nothing.
        entry: the store's packed weight behind the site, if the store holds it; a weight that `convert` packed is the
            module's own.
    """

    site: Site
    weight: Scheme | None = None
    act: Scheme | None = None
    fit: str = "minmax"
    kernel: str = ""
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr: float | None = None
    group: int = -1
    min_sqnr: float = -math.inf
    estimator: str = "ste"
    grad: Scheme | None = None
    packed: bool = False
    entry: Entry | None = field(default=None, compare=False, repr=False)

    @property
    def quantized(self) -> bool:
        return self.weight is not None

    @property
    def trained(self) -> bool:
        """Whether the weight is rounded in the graph in every step."""
        return self.weight is not None and self.site.trained

    @property
    def packable(self) -> bool:
        """Whether the store packs the weight: not one that is trained, which is rounded in the graph."""
        return self.weight is not None and not self.site.trained


@dataclass
class Plan:
    """Decisions by site index, plus what concerns the whole graph."""

    decisions: dict[int, Decision] = field(default_factory=dict)
    unused_rules: list[Rule] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[Decision]:
        return iter(self.decisions.values())

    def update(self, index: int, **changes: object) -> Decision:
        """Replace fields of one decision and return it."""
        self.decisions[index] = decision = replace(self.decisions[index], **changes)  # type: ignore[arg-type]
        return decision

    def keep_float(self, index: int, reason: str) -> None:
        """Turn a site back to float, with the reason."""
        self.update(index, weight=None, act=None, kernel="", reason=reason, group=-1, bytes_after=0)

    def overruled(self, recipe: Recipe) -> str:
        """One sentence about converted weights whose scheme is not one that the recipe asks for, or "".

        Their scheme was fixed by `convert`. What the recipe still decides is activations: those of the first rule that
        matches; one with `min_sqnr` matches the weights that have its scheme. The preset "auto" asks for nothing in particular.
        """
        if recipe is PRESETS["auto"]:
            return ""
        found = {
            d.site.path: (d.weight, asked[0])
            for d in self
            if d.packable and d.packed and d.entry is None and d.weight not in (asked := recipe.asks(d.site))
        }
        if not found:
            return ""
        path, (kept, wanted) = next(iter(found.items()))
        return (
            f"converted weights keep their schemes, {len(found)} of which recipe {recipe.name!r} does not ask for "
            f"({path} is {kept}, not {wanted or 'float'}): the recipe only decides how activations are rounded there"
        )

    @property
    def coverage(self) -> float:
        """Share of contraction FLOPs that run quantized; 1.0 for a graph without contractions."""
        total = sum(d.site.flops for d in self)
        return sum(d.site.flops for d in self if d.quantized) / total if total else 1.0
