"""A rule of a recipe: which sites it is about, and what they get.

A rule is data that a user writes, in Python or in a file, so every mistake in it is told where it stands: a wrong type, a
scheme that no site can have, a glob that matched nothing.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from qcompile.errors import QCError, suggest
from qcompile.ir.estimators import estimator_of
from qcompile.ir.fit import FITS, why_unfit
from qcompile.ir.granularity import PerGroup, PerTensor, PerToken
from qcompile.ir.products import why_no_products
from qcompile.ir.scheme import Scheme
from qcompile.plan.recipe_json import FIELDS, checked, plain, shown
from qcompile.plan.site import DEVICES, KINDS, Site

MATMULS = ("linear", "head", "bmm")
_WEIGHTS = (*MATMULS, "embedding")
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
        grad: scheme of the gradients of a linear's result where its weight is trained: all three of its products are then
            of 8-bit codes (see `qcompile.ir.products`). `None`: they are of floats that were rounded.
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
    grad: Scheme | None = None

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
        _check_grad(self)
        for kind in self.kind or ("",):
            if kind not in _WEIGHTS:
                known = kind in KINDS
                raise QCError(
                    "recipe.kind",
                    f"no rule can match sites of kind {kind!r}"
                    if known
                    else f"unknown kind {shown(kind)}{near(kind, _WEIGHTS)}",
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
                raise QCError("recipe.rule", f"unknown key {key!r} in a rule{near(key, names)}", next=f"use {names}")
        if "weight" not in data:
            raise QCError(
                "recipe.rule",
                "a rule has no key 'weight'",
                why="what a rule keeps float is spelled out",
                next='add "weight": a scheme such as "int8/g64", or null to keep its sites float',
            )
        return Rule(**data)


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


def _check_grad(rule: Rule) -> None:
    """Refuse schemes that have no 8-bit products in training."""
    if rule.grad is None:
        return
    why = "the weight stays float" if rule.weight is None else why_no_products(rule.weight, rule.act, rule.grad)
    if not why and estimator_of(rule.estimator).learned:
        why = f"estimator {rule.estimator!r} learns scales"
    if why:
        raise QCError(
            "recipe.grad",
            f"no products of 8-bit codes with gradients in {rule.grad}",
            where="grad",
            why=why,
            next="write Rule('int8/axis0', act='int8/token', grad='int8/token'), or leave grad out",
        )


def near(name: object, choices: Iterable[str]) -> str:
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


__all__ = ["MATMULS", "Rule", "near"]
