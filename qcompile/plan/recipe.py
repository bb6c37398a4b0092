"""Recipes: which scheme each site gets, as ordered rules that are data.

A recipe is what a user names (`"int4"`), spells (`"uint4/g64:fp16+m"`), writes as an object or keeps in a
JSON file. First match wins; a rule that matched nothing is reported, because it is usually a typo in a path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import QCError, suggest
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.noise import ratio_db
from qcompile.ir.scheme import Scheme
from qcompile.plan.recipe_json import FILE, KEYS, UPDATES, VERSION, checked_updates, read, shown
from qcompile.plan.rule import MATMULS, Rule, near
from qcompile.plan.site import Site


@dataclass(frozen=True)
class Choice:
    """What a recipe says about one site; `rule` is the index of the rule that matched, -1 for none; `min_sqnr` is what
    that rule asks of the weight."""

    weight: Scheme | None
    act: Scheme | None
    rule: int
    reason: str = ""
    fit: str = "minmax"
    min_sqnr: float = -math.inf
    estimator: str = "ste"
    grad: Scheme | None = None


@dataclass(frozen=True)
class Recipe:
    """Ordered rules with a name. `Recipe.of` accepts everything a user may pass as `recipe=`. Raises `QCError`
    ("recipe.rules", "recipe.name", "recipe.updates") for other values.

    `updates` says how 16-bit parameters are written that a graph updates: "nearest" as torch does, or "stochastic"."""

    rules: tuple[Rule, ...]
    name: str = "custom"
    updates: str = UPDATES[0]

    def __post_init__(self) -> None:
        if not isinstance(self.rules, tuple | list):
            raise QCError(
                "recipe.rules", f"rules cannot be {shown(self.rules)}", next="give a tuple: Recipe((Rule('int8/g64'),))"
            )
        for index, rule in enumerate(self.rules):
            if not isinstance(rule, Rule):
                raise QCError(
                    "recipe.rules",
                    f"a rule cannot be {shown(rule)}",
                    where=f"rule {index}",
                    next="make it with Rule(...) or Rule.from_json({...})",
                )
        if not isinstance(self.name, str):
            raise QCError(
                "recipe.name", f"the name of a recipe cannot be {shown(self.name)}", where="name", next="give it text"
            )
        checked_updates(self.updates)
        object.__setattr__(self, "rules", tuple(self.rules))

    def resolve(
        self, site: Site, weight: Callable[[], torch.Tensor] | None = None, packed: Scheme | None = None
    ) -> Choice:
        """First rule that matches.

        Args:
            site: the site.
            weight: gives the float weight `[n, k]` when a rule has `min_sqnr`.
            packed: what `convert` made of the weight; a rule with `min_sqnr` for another scheme was not the one.
        """
        passed_over = ""
        for index, rule in enumerate(self.rules):
            if not rule.selects(site) or (packed is not None and rule.min_sqnr > -math.inf and rule.weight != packed):
                continue
            if rule.weight is not None and rule.min_sqnr > -math.inf and weight is not None:
                found = sqnr_db(weight(), rule.weight)
                if not found >= rule.min_sqnr:  # what cannot be compared is not enough
                    passed_over = f"{rule.weight} keeps only {found:.1f} dB here, the recipe asks for {rule.min_sqnr:g}"
                    continue
            act = rule.act if site.kind in MATMULS else None
            reason = passed_over if rule.weight else f"rule {index} keeps it float"
            return Choice(rule.weight, act, index, reason, rule.fit, rule.min_sqnr, rule.estimator, rule.grad)
        return Choice(None, None, -1, passed_over or f"no rule of recipe {self.name!r} matches")

    def asks(self, site: Site) -> tuple[Scheme | None, ...]:
        """Every weight scheme (`None`: float) that `resolve` may choose for a site whose float weight is not known: each
        rule with `min_sqnr` that matches, and the first one without."""
        found: list[Scheme | None] = []
        for rule in self.rules:
            if rule.selects(site):
                found.append(rule.weight)
                if rule.min_sqnr == -math.inf:
                    return tuple(found)
        return (*found, None)

    def unused(self, choices: Iterable[Choice]) -> list[Rule]:
        """Rules that matched no site."""
        used = {choice.rule for choice in choices}
        return [rule for index, rule in enumerate(self.rules) if index not in used]

    def to_json(self) -> dict[str, Any]:
        more = {} if self.updates == UPDATES[0] else {"updates": self.updates}
        return {"version": VERSION, "name": self.name, "rules": [rule.to_json() for rule in self.rules], **more}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Recipe:
        """Read what `to_json` wrote. Raises `QCError` for another version, unknown keys or values of another type, naming
        the rule by its place in the list, from 0."""
        if not isinstance(data, Mapping):
            raise QCError("recipe.version", f"a recipe cannot be a JSON {type(data).__name__}", next=FILE)
        version, given = data.get("version"), data.get("rules")
        if type(version) is not int or version != VERSION or not isinstance(given, list):
            raise QCError(
                "recipe.version",
                f"recipe has version {shown(version)} and {type(given).__name__} rules",
                next=FILE,
            )
        for key in data:
            if key not in KEYS:
                raise QCError("recipe.file", f"unknown key {key!r} in a recipe{near(key, KEYS)}", next=FILE)
        rules = []
        for index, rule in enumerate(given):
            try:
                rules.append(Rule.from_json(rule))
            except QCError as error:
                raise error.at(f"rule {index}") from error
        return Recipe(tuple(rules), data.get("name", "custom"), data.get("updates", UPDATES[0]))

    def fingerprint(self) -> str:
        """Text that is equal exactly when the rules are."""
        return json.dumps(self.to_json(), sort_keys=True, allow_nan=False)

    @staticmethod
    def of(value: Any) -> Recipe:
        """A preset name, a scheme spelling (optionally followed by an activation scheme), a `Recipe`, a JSON
        file.

        Raises:
            QCError: "recipe.unknown" with the nearest preset, or the error of the scheme or file.
        """
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Scheme):
            return _uniform(value, None, str(value))
        if isinstance(value, Path) or (isinstance(value, str) and value.endswith(".json")):
            return _from_file(Path(value))
        if isinstance(value, str):
            if value in PRESETS:
                return PRESETS[value]
            if "/" in value:
                # "weight", "weight activation" or, as the ledger prints it, "weight x activation".
                weight, *act = (word for word in value.split() if word != "x")
                if len(act) > 1:
                    raise QCError(
                        "recipe.unknown",
                        f"recipe {value!r} names more than two schemes",
                        next="write 'weight' or 'weight activation'",
                    )
                return _uniform(Scheme.parse(weight), Scheme.parse(act[0]) if act else None, value)
            raise QCError(
                "recipe.unknown",
                f"unknown recipe {value!r}{suggest(value, PRESETS)}",
                next=f"use a preset ({', '.join(PRESETS)}), a scheme such as 'uint4/g64:fp16+m', or a .json file",
            )
        fix = "read it: Recipe.from_json({...})" if isinstance(value, Mapping) else "pass a name or a Recipe"
        raise QCError("recipe.unknown", f"a recipe cannot be a {type(value).__name__}", next=fix)


def sqnr_db(weight: torch.Tensor, scheme: Scheme) -> float:
    """Signal-to-quantization-noise ratio of a weight under a scheme, in dB (inf when exact, -inf for a weight with NaN or
    infinity: whether that is an error is for whoever packs it to say).

    Args:
        weight: `[n, k]` floating point.
    """
    wide = weight.detach().to(torch.float32)
    if not bool(torch.isfinite(wide).all()):
        return -math.inf
    return ratio_db(dequantize(quantize(wide, scheme), scheme, *wide.shape), wide)


def _from_file(path: Path) -> Recipe:
    data = read(path)
    try:
        return Recipe.from_json(data)
    except QCError as error:
        raise error.at(str(path)) from error


def _uniform(weight: Scheme, act: Scheme | None, name: str) -> Recipe:
    return Recipe((Rule(weight, act),), name)


def _linear(weight: str, act: str = "", **more: Any) -> Rule:
    return Rule(Scheme.parse(weight), Scheme.parse(act) if act else None, kind=("linear", "bmm"), **more)


_INT8, _INT4 = "int8/g64:fp16", "uint4/g32:fp16+m"
# One outlier in a row of activations would cost all of its other values their resolution; in a group it costs 31.
_ACT8 = "int8/g32:fp32"
# Kernels of GPUs have no sums of 32: there a row of activations has one scale, and 8-bit weights have one for a row.
_ROW8, _TOKEN8 = "int8/axis0:fp32", "int8/token:fp32"
# Embeddings and the head, where small errors hurt most, stay at 8 bits.
_TABLES = Rule(Scheme.parse(_INT8), kind=("embedding", "head"))
_RULES = {
    # 30 dB is a relative weight error of 3 %; 8-bit groups keep about 43 dB, 4-bit groups of a Gaussian weight about 21.
    "auto": (_linear(_INT4, fit="mse", min_sqnr=30.0), _linear(_INT8)),
    "int8": (_linear(_INT8),),
    "int4": (_linear(_INT4, fit="mse"),),
    "nf4": (_linear("nf4/g64:fp16"),),
    "w8a8": (_linear(_ROW8, _TOKEN8, device="gpu"), _linear(_INT8, _ACT8)),
    "int8-train": (_linear(_ROW8, _TOKEN8, grad=Scheme.parse(_TOKEN8)),),
    "fp8-train": (_linear("e4m3/axis0:fp32", "e4m3/token:fp32", grad=Scheme.parse("e5m2/token:fp32")),),
    "w4a8": (_linear("uint4/g128:fp16+z", _TOKEN8, fit="mse", device="gpu"), _linear(_INT4, _ACT8, fit="mse")),
}
PRESETS: Mapping[str, Recipe] = {name: Recipe((_TABLES, *rules), name) for name, rules in _RULES.items()} | {
    "none": Recipe((), "none"),
    "sr": Recipe((), "sr", "stochastic"),
}
__all__ = ["PRESETS", "Choice", "Recipe", "Rule", "sqnr_db"]
