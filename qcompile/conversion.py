"""Give the float weights up: packed weights as ordinary module state.

`convert` replaces each planned weight by a parametrization that decodes plain integer buffers. No tensor
subclass and no module class is swapped, so every module with a weight parameter works, `state_dict()` holds
plain tensors, eager mode and any other backend run it (decoding on every call), and under
`backend="qcompile"` decode + matmul become one kernel on the packed bytes. This, and not the one-liner, is
what frees memory.
"""

from __future__ import annotations

import fnmatch
import gc
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.nn.utils import parametrize

from qcompile import compat
from qcompile.codegen import inductor
from qcompile.errors import QCError, warn
from qcompile.ir.codec import quantize, refuse_nonfinite
from qcompile.ir.scheme import PACKINGS, Scheme
from qcompile.packed import FLOATS, PackedParts, PackedWeight, attach, packed_weights, parametrized
from qcompile.passes.detect.sites import is_head
from qcompile.passes.rewrite.resolve import TRAINED, refuse_ragged
from qcompile.plan.recipe import Choice, Recipe
from qcompile.plan.rule import Rule
from qcompile.plan.site import Site
from qcompile.plan.table import Printed, size_unit
from qcompile.rounded import rounded_weight
from qcompile.runtime.pins import PINS
from qcompile.runtime.store import ordinary_tensors, warn_clamped


@dataclass(frozen=True)
class Converted:
    """One converted weight: module path, what it became, bytes before and after (0 when shared with
    another)."""

    path: str
    scheme: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, repr=False)
class Conversion(Printed):
    """What `convert` did; `print()` shows it as a table.

    Attributes:
        weights: converted weights.
        kept: (path, reason) of what stayed as it was, float or packed already: weights of `nn.Linear`, `nn.Embedding`, HF
            `Conv1D` and `nn.MultiheadAttention`, and the float matrices of all other modules.
        notes: rules whose glob matched none of these weights, with the nearest name.
    """

    weights: tuple[Converted, ...]
    kept: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()

    @property
    def bytes_before(self) -> int:
        return sum(item.bytes_before for item in self.weights)

    @property
    def bytes_after(self) -> int:
        return sum(item.bytes_after for item in self.weights)

    def __rich__(self) -> Group:
        unit, size_of = size_unit([item.bytes_before for item in self.weights])
        sizes = f"{size_of(self.bytes_before)} {unit} -> {size_of(self.bytes_after)} {unit}"
        title = f"{len(self.weights)} weights converted, {sizes}" if self.weights else "no weight converted"
        table = Table(title=f"{title}, {len(self.kept)} kept as they were", title_justify="left")
        for name in ("weight", "scheme", unit, "reason"):
            table.add_column(name, overflow="fold", justify="right" if name == unit else "left")
        for item in self.weights:
            shared = f"{size_of(item.bytes_before)} -> {size_of(item.bytes_after)}" if item.bytes_after else "shared"
            table.add_row(Text(item.path), item.scheme, shared, "")  # names are no markup
        for path, reason in self.kept:
            table.add_row(Text(path), "", "", Text(reason), style="yellow")
        return Group(table, *(Text(f"note: {note}") for note in self.notes))


@dataclass(frozen=True)
class _Owner:
    """A module that holds a weight; a tied weight has several."""

    module: nn.Module
    path: str
    n: int
    k: int
    transposed: bool
    refused: str


@ordinary_tensors()
def convert(model: nn.Module, recipe: Any = "auto", *, strict: bool = False) -> Conversion:
    """Replace float weights by packed ones, in place.

    Args:
        model: any module, or `torch.compile` of one; its `nn.Linear`, `nn.Embedding` and HF `Conv1D` weights are
            candidates. Tied weights share one packed copy; one that is tied to a parameter of another kind of module
            stays float.
        recipe: preset, scheme, `Recipe` or JSON file. Activation schemes do not concern stored weights: give the
            recipe to the backend as well (`options={"recipe": ...}`). Of that one, only activation schemes count for
            converted weights; `explain` says where it asks for another scheme.
        strict: raise instead of keeping a candidate float, and for groups that do not divide a weight.

    Returns:
        What was converted and what was kept, with reasons. A rule whose glob matches no candidate is a `QCWarning`.

    Raises:
        QCError: "model.none" for a function, "convert.strict" or the codec's error for a weight holding NaN or Inf; they
            name the module, and no weight has been converted then. "scheme.ragged" with `strict`, when that is found.
    """
    rules, done, kept = Recipe.of(recipe), [], []
    choices: dict[str, Choice] = {}
    groups = owners_by_weight(module_of(model))
    for weight, owners in groups:
        _check(weight, owners, rules, strict)
    others = list(_others(module_of(model), {id(weight) for weight, _ in groups}))
    packed = {f"{path}.weight".lstrip("."): item.scheme for path, _, item in packed_weights(module_of(model))}
    kept += [(path, f"packed already as {scheme}") for path, scheme in packed.items()]
    while groups:
        # The weight leaves the list before it is packed: the peak is one float weight, not the model's.
        weight, owners = groups.pop(0)
        first = owners[0]
        refused = next((owner.refused for owner in owners if owner.refused), "")
        try:
            site = site_of(weight, owners)
            choice = rules.resolve(site, None if refused else lambda: rows_of(weight, first))  # noqa: B023
        except QCError as error:
            raise error.at(first.path) from error
        choices[site.path] = choice
        if (pin := PINS.of(weight, site.kind, rules.fingerprint())) is not None:
            reason = "" if pin.weight else f"float, {TRAINED}"
            choice = replace(choice, weight=pin.weight, act=pin.act, fit=pin.fit, reason=reason)
        if (prepared := rounded_weight(first.module)) is not None:  # the scheme is the one it was trained in
            choice = replace(choice, weight=Scheme.parse(prepared[1].scheme), reason="")
        if choice.weight is None or refused:
            kept += [(owner.path, choice.reason if choice.weight is None else refused) for owner in owners]
            continue
        if strict:
            refuse_ragged(choice.weight, first.n, first.k, first.path)
        scheme = choice.weight
        if scheme.packing == PACKINGS[0]:
            scheme = replace(scheme, packing=inductor.packing(weight.device, choice.act))
        rounded = rounded_weight(first.module)
        parts = quantize(
            rows_of(weight, first), scheme, qparams=None if rounded is None else rounded[1].scales(), fit=choice.fit
        )
        warn_clamped(parts, scheme, first.n, first.path)
        act = str(choice.act) if choice.act is not None else ""
        before = weight.numel() * weight.element_size()
        for owner in owners:
            if rounded is not None:
                parametrize.remove_parametrizations(owner.module, "weight", leave_parametrized=False)
            attach(
                owner.module,
                PackedWeight(
                    str(scheme), owner.n, owner.k, weight.dtype, owner.transposed, choice.fit, owner.path, act
                ),
                parts,
            )
        done.append(Converted(first.path, str(scheme), before, sum(p.numel() * p.element_size() for p in parts)))
        done += [Converted(owner.path, str(scheme), 0, 0) for owner in owners[1:]]
        del weight, owners, first
    kept += others
    gc.collect()
    compat.trim_memory()
    notes = [
        f"recipe {rules.name!r}: rule path={rule.path!r} matched no weight that convert looks at{rule.hint(choices)}"
        for rule in rules.unused(choices.values())
        if rule.path != "*" and not fnmatch.filter(packed, rule.path)
    ]
    for note in notes:
        warn(note)
    return Conversion(tuple(done), tuple(kept), tuple(notes))


def trained_recipe(model: nn.Module, recipe: Any = "auto") -> Recipe:
    """The recipe with what it chose by the values of weights (`min_sqnr`) when their training began, as rules by path.

    The process that trained knows these choices. Another one, which resumes the training or deploys its result, would choose
    anew, by the values that the weights have then: keep this recipe with the checkpoint, `json.dump(made.to_json(), file)`.

    Args:
        model: a module that was trained under the backend or prepared, or `torch.compile` of one; before `convert`.
        recipe: the one it was trained with.

    Returns:
        Rules for these weights, then those of the recipe; the recipe itself where no choice depended on values.

    Raises:
        QCError: "model.none" for a function.
    """
    rules, fixed = Recipe.of(recipe), []
    for weight, owners in owners_by_weight(module_of(model)):
        at, prepared = site_of(weight, owners), rounded_weight(owners[0].module)
        # A table that is also multiplied with has sites of both kinds.
        for kind in dict.fromkeys((at.kind, *("embedding" for o in owners if isinstance(o.module, nn.Embedding)))):
            site = replace(at, kind=kind)
            pin = PINS.of(weight, kind, rules.fingerprint())
            if len(rules.asks(site)) < 2 or (pin is None and prepared is None):
                continue
            scheme = Scheme.parse(prepared[1].scheme) if prepared else pin.weight if pin else None
            if scheme is None:
                fixed.append(Rule(None, path=glob.escape(owners[0].path), kind=(kind,)))
                continue
            known = rules.resolve(replace(site, weight_dtype=str(scheme)), packed=scheme)
            act, fit = (pin.act, pin.fit) if pin else (known.act, known.fit)
            how = prepared[1].estimator if prepared else known.estimator
            fixed.append(
                Rule(scheme, act, glob.escape(owners[0].path), (kind,), fit=fit, estimator=how, grad=known.grad)
            )
    return replace(rules, rules=(*fixed, *rules.rules), name=f"{rules.name}, as trained") if fixed else rules


def _check(weight: torch.Tensor, owners: Sequence[_Owner], rules: Recipe, strict: bool) -> None:
    """Raise what `convert` would raise for a weight, before any other one has been given up."""
    first, refused = owners[0], next((owner.refused for owner in owners if owner.refused), "")
    choice = rules.resolve(site_of(weight, owners))
    if choice.weight is None and rounded_weight(first.module) is None:
        return
    if refused and strict:
        raise QCError("convert.strict", "weight cannot be converted", where=first.path, why=refused)
    if not refused:
        refuse_nonfinite(rows_of(weight, first), first.path)


def module_of(model: Any) -> nn.Module:
    """A module, or the one that `torch.compile` was given. Raises `QCError` ("model.none") for anything else, such as a
    function: its parameters are not known."""
    target = compat.uncompiled(model)
    if not isinstance(target, nn.Module):
        raise QCError(
            "model.none", f"a {type(target).__name__} has no parameters", next="pass the module that holds the weights"
        )
    return target


def keeps_transposed(module: nn.Module) -> bool:
    """Whether a module is HF's `Conv1D`, a linear that keeps `[k, n]`; known by its shape contract, not by importing
    transformers."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


# Other modules whose matrices a user may expect to see in the report.
_IN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def owners_by_weight(model: nn.Module) -> list[tuple[torch.Tensor, list[_Owner]]]:
    """Every candidate weight with all modules that hold it; one that cannot be converted carries a reason."""
    groups: dict[int, tuple[torch.Tensor, list[_Owner]]] = {}
    others: dict[int, str] = {}  # parameters in other places: packing them there would untie what is tied
    for path, module in model.named_modules(remove_duplicate=True):
        if isinstance(module, parametrize.ParametrizationList) and "original" in module._parameters:
            continue  # what stands behind a parametrized weight is looked at with the module that has the weight
        candidate = isinstance(module, (nn.Linear, nn.Embedding)) or keeps_transposed(module)
        for name, weight, refused in _matrices(module, candidate):
            n, k = (int(weight.shape[0]), int(weight.shape[-1])) if weight.dim() else (1, 1)
            if keeps_transposed(module):
                n, k = k, n
            owner = _Owner(module, f"{path}.{name}" if path else name, n, k, keeps_transposed(module), refused)
            groups.setdefault(id(weight), (weight, []))[1].append(owner)
        for name, parameter in module._parameters.items():
            if parameter is not None and not (candidate and name == "weight"):
                others[id(parameter)] = f"{path}.{name}" if path else name
    for weight, owners in groups.values():
        where = others.get(id(weight), owners[0].path)
        if where not in (owner.path for owner in owners) and not owners[0].refused:
            owners[0] = replace(owners[0], refused=f"{where} is the same parameter, and convert cannot pack it there")
    return list(groups.values())


def _matrices(module: nn.Module, candidate: bool) -> Iterator[tuple[str, torch.Tensor, str]]:
    """(name, parameter, why it cannot be converted or "") of a module's weights."""
    weight = module._parameters.get("weight")
    if candidate and weight is not None:
        refused = ""
        if weight.dim() != 2 or 0 in weight.shape:
            refused = f"shape {tuple(weight.shape)} is not a non-empty matrix"
        elif weight.dtype not in FLOATS:
            refused = f"dtype {weight.dtype}"
        elif weight.is_meta:
            refused = "the weight is on the meta device: use qcompile.load"
        elif isinstance(module, nn.Embedding) and module.max_norm is not None:
            refused = "max_norm renormalizes the table in place on every call"
        yield "weight", weight, refused
    elif candidate and (rounded := rounded_weight(module)) is not None:
        yield "weight", rounded[0], ""
    elif candidate and not isinstance(parametrized(module).get("weight"), PackedParts):
        # weight_norm and its like: a matrix of the weight's shape stands for it in the report.
        made = max(module.parameters(), key=lambda p: p.numel(), default=torch.empty(0))
        yield "weight", made, "the weight is computed from other parameters: remove its parametrization first"
    elif isinstance(module, nn.MultiheadAttention):
        for name in _IN_PROJECTIONS:
            parameter = module._parameters.get(name)
            if parameter is not None:
                yield name, parameter, "MultiheadAttention reads its input projection in one piece, as a parameter"


# Why the matrices of other modules stay float.
_NOT_YET: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.modules.conv._ConvNd, "convolutions are not quantized yet"),
    ((nn.RNNBase, nn.RNNCellBase), "recurrent layers are not quantized yet"),
    ((nn.Linear, nn.Embedding), "of a linear or an embedding only `weight` is packed"),
)


def _others(model: nn.Module, seen: set[int]) -> Iterator[tuple[str, str]]:
    """(path, reason) of each float matrix that is no candidate: none of those `seen`, by identity."""
    for path, module in model.named_modules():
        if isinstance(module, parametrize.ParametrizationList):
            continue  # its tensors stand for the weight of the module that holds it
        held: dict[str, Any] = dict(module._parameters)
        for name, made in parametrized(module).items():
            held[name] = max(made.parameters(), key=lambda p: p.numel(), default=None)
        kind = f"a {type(module).__name__} is neither a linear nor an embedding of torch"
        reason = next((text for types, text in _NOT_YET if isinstance(module, types)), kind)
        for name, tensor in held.items():
            if tensor is None or id(tensor) in seen or nn.parameter.is_lazy(tensor) or not tensor.is_floating_point():
                continue
            if sum(size > 1 for size in tensor.shape) >= 2:
                seen.add(id(tensor))
                yield f"{path}.{name}" if path else name, reason


def rows_of(weight: torch.Tensor, owner: _Owner) -> torch.Tensor:
    return weight.detach().t() if owner.transposed else weight.detach()


def site_of(weight: torch.Tensor, owners: Sequence[_Owner]) -> Site:
    """The site that the backend would see; a table that is also multiplied with follows the head's rule."""
    first = owners[0]
    looked_up = any(isinstance(owner.module, nn.Embedding) for owner in owners)
    multiplied = any(not isinstance(owner.module, nn.Embedding) for owner in owners)
    kind = "linear"
    if multiplied and (looked_up or is_head(first.n, first.k)):
        kind = "head"
    elif looked_up:
        kind = "embedding"
    device = "gpu" if compat.writes_triton(weight.device) else "cpu"
    dtype = str(weight.dtype).removeprefix("torch.")
    return Site(0, kind, first.path, "", first.n, first.k, None, 0, "", dtype, device=device)
