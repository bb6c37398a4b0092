"""Recipes: which scheme each site gets, as ordered rules that are data.

A recipe is what a user names (`"int4"`), spells (`"uint4/g64:fp16+m"`), writes as an object or keeps in a
JSON file. First match wins; a rule that matched nothing is reported, because it is usually a typo in a path.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import QCError, suggest
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.estimators import estimator_of
from qcompile.ir.fit import FITS, why_unfit
from qcompile.ir.granularity import PerGroup, PerTensor, PerToken
from qcompile.ir.noise import ratio_db
from qcompile.ir.scheme import Scheme
from qcompile.plan.recipe_json import FIELDS, FILE, KEYS, UPDATES, VERSION, checked, checked_updates, plain, read, shown
from qcompile.plan.site import DEVICES, KINDS, Site

_MATMULS = ("linear", "head", "bmm")
_WEIGHTS = (*_MATMULS, "embedding")
_NEAR = 0.8  # a whole path this much like a glob is a fair guess; below, a common ".weight" is most of the likeness


@dataclass(frozen=True)
class Rule:
    """Matchers, then settings. Schemes may be given as their spellings, one kind as a string. Raises `QCError`
    ("recipe.rule" for a value of another type) naming the field.

    Attributes:
        weight: weight scheme, or `None` to keep the site float.
        act: activation scheme (`None`: activations are used exactly); ignored for lookups.
        path: glob on the weight's module path.
        kind: kinds of site.
        min_weights: smallest number of weight elements.
        min_sqnr: apply only where `weight` keeps at least this signal-to-noise ratio (dB) on this very weight, with
            scales that span its range; otherwise the next rules are tried.
        fit: how the weight's scales are chosen: "minmax" spans its range, "mse" searches for the smallest squared error.
        device: "cpu" or "gpu"; "" for both.
        estimator: the gradient at the roundings of training, see `qcompile.ir.estimators`; one that learns scales needs
            `qcompile.prepare`.
    """

    weight: Scheme | None
    act: Scheme | None = None
    path: str = "*"
    kind: tuple[str, ...] = _WEIGHTS
    min_weights: int = 0
    min_sqnr: float = -math.inf
    fit: str = "minmax"
    device: str = ""
    estimator: str = "ste"

    def __post_init__(self) -> None:
        for name in FIELDS:
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        weight = self.weight
        _check_act(self.act, weight)
        if weight is not None and weight.symmetric and weight.format.min >= 0:
            minimum = f"{weight}+m, or " if weight.format.kind == "int" else ""
            raise QCError(
                "recipe.unsigned",
                f"{weight} cannot hold negative weights",
                why=f"{weight.format} without a zero point or a minimum has no values below zero",
                next=f"write {minimum}a signed format such as int{max(weight.format.bits, 2)}/{weight.granularity}",
            )
        if self.fit not in FITS:
            found = suggest(self.fit, FITS)
            raise QCError("recipe.fit", f"unknown fit {self.fit!r}{found}", next=f"use {', '.join(FITS)}")
        if weight is not None and (why := why_unfit(self.fit, weight)):
            raise QCError("recipe.fit", f"no fit {self.fit!r} for {weight}", why=why, next="use fit='minmax'")
        if self.device not in ("", *DEVICES):
            raise QCError(
                "recipe.device",
                f"unknown device {self.device!r}{suggest(self.device, DEVICES)}",
                next=f"use {' or '.join(map(repr, DEVICES))}, or leave it out",
            )
        try:
            estimator_of(self.estimator)
        except QCError as error:
            raise error.at("estimator") from None
        for kind in self.kind or ("",):
            if kind not in _WEIGHTS:
                known = kind in KINDS
                raise QCError(
                    "recipe.kind",
                    f"no rule can match sites of kind {kind!r}"
                    if known
                    else f"unknown kind {shown(kind)}{_near(kind, _WEIGHTS)}",
                    why="they stay float under every recipe" if known else "",
                    next=f"use {', '.join(_WEIGHTS)}",
                )

    def selects(self, site: Site) -> bool:
        """Whether the matchers hold (the weight itself is not looked at)."""
        here = self.device in ("", site.device) and site.kind in self.kind
        return here and site.weights >= self.min_weights and fnmatch.fnmatchcase(site.path, self.path)

    def hint(self, paths: Iterable[str]) -> str:
        """What may be wrong with the glob of a rule that selected none of the weights at `paths`: "; did you mean ...?",
        or "". A glob that fits a path is not at fault, but an earlier rule or another matcher is."""
        paths = [path for path in paths if path]
        if self.path == "*":
            return ""
        if fits := fnmatch.filter(paths, self.path):
            return f"; its path fits {fits[0]!r}, which an earlier rule or another matcher of this one keeps from it"
        name = self.path.strip("*.")
        for glob in (f"{name}.*", f"*.{name}", f"*.{name}.*"):  # a module's name, or the end of a path
            if name and any(fnmatch.fnmatchcase(path, glob) for path in paths):
                return f"; did you mean {glob!r}?"
        if "head" in name and not any("head" in path for path in paths):
            return "; a head that shares the embedding's weight has the embedding's path: match it with kind='head'"
        if whole := difflib.get_close_matches(name, paths, n=1, cutoff=_NEAR):
            return f"; did you mean {whole[0]!r}?"
        return _near_part(name, paths)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; defaults are left out. An infinite `min_sqnr` is the text "inf"."""
        default = Rule(None)
        items = {f.name: getattr(self, f.name) for f in fields(self)}
        short = {k: v for k, v in items.items() if k == "weight" or v != getattr(default, k)}
        return {k: plain(v) for k, v in short.items()}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Rule:
        """Read what `to_json` wrote; `kind` may be one string. Raises `QCError` ("recipe.rule") on unknown keys, without
        the key "weight" and on values of another type."""
        names = list(FIELDS)
        if not isinstance(data, Mapping):
            raise QCError(
                "recipe.rule", f"a rule cannot be a JSON {type(data).__name__}", next='write {"weight": "int8/g64"}'
            )
        for key in data:
            if key not in names:
                raise QCError("recipe.rule", f"unknown key {key!r} in a rule{_near(key, names)}", next=f"use {names}")
        if "weight" not in data:
            raise QCError(
                "recipe.rule",
                "a rule has no key 'weight'",
                why="what a rule keeps float is spelled out",
                next='add "weight": a scheme such as "int8/g64", or null to keep its sites float',
            )
        return Rule(**data)


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
            act = rule.act if site.kind in _MATMULS else None
            reason = passed_over if rule.weight else f"rule {index} keeps it float"
            return Choice(rule.weight, act, index, reason, rule.fit, rule.min_sqnr, rule.estimator)
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
                raise QCError("recipe.file", f"unknown key {key!r} in a recipe{_near(key, KEYS)}", next=FILE)
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


def _check_act(act: Scheme | None, weight: Scheme | None) -> None:
    """Refuse what no activation can be rounded to while the model runs; `reference_qmm` has the formulas."""
    if act is None:
        return
    if weight is None:
        raise QCError(
            "recipe.act",
            f"a rule without a weight scheme cannot round activations to {act}",
            where="act",
            why="weight None (in a file: null) keeps a site float, activations included",
            next="give the rule a weight such as 'int8/g64', or leave act out",
        )
    grouped = isinstance(act.granularity, PerGroup)
    fits = isinstance(act.granularity, PerToken | PerTensor) or grouped
    number = act.format.kind in ("int", "float") and (
        act.symmetric if act.format.signed else act.scale.zero == "z" and not grouped
    )
    if not fits or not number or act.scale.format.name != "fp32" or act.rounding != "nearest":
        raise QCError(
            "recipe.act",
            f"activations cannot be {act}",
            why="they are rounded to nearest as they come, with an fp32 scale per token, group or tensor: signed integers or "
            "floats, or unsigned integers with a zero point per token or tensor",
            next="write int8/token, uint8/token:fp32+z, int8/g32:fp32 for one scale for each 32 values, or e4m3/token",
        )


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


def _near(name: object, choices: Iterable[str]) -> str:
    return suggest(name, choices) if isinstance(name, str) else ""


def _near_part(name: str, paths: Sequence[str]) -> str:
    """The hint for the part of a path that is nearest to a name: a module's path, or a glob that fits. A last word that
    both have, such as "weight", counts for nothing: it is in nearly every path."""
    *stem, last = name.split(".")
    tail = bool(stem) and any(path.endswith(f".{last}") for path in paths)
    found: dict[str, str] = {}  # what is compared: what is said
    for *modules, end in (path.split(".") for path in paths if not tail or path.endswith(f".{last}")):
        for i in range(len(modules)):
            for j in [len(modules)] if tail else range(i + 1, len(modules) + 1):
                run = ".".join(modules[i:j])
                rest = f".{end}" if tail else ".*" if i else ""
                found.setdefault(run, f"*.{run}{rest}" if i else f"{run}{rest}")
    near = difflib.get_close_matches(".".join(stem) if tail else name, found, n=1, cutoff=0.5)
    return f"; did you mean {found[near[0]]!r}?" if near else ""


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
    "w4a8": (_linear("uint4/g128:fp16+z", _TOKEN8, fit="mse", device="gpu"), _linear(_INT4, _ACT8, fit="mse")),
}
PRESETS: Mapping[str, Recipe] = {name: Recipe((_TABLES, *rules), name) for name, rules in _RULES.items()} | {
    "none": Recipe((), "none"),
    "sr": Recipe((), "sr", "stochastic"),
}
__all__ = ["PRESETS", "Choice", "Recipe", "Rule", "sqnr_db"]
