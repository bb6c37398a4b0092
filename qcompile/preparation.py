"""Give weights learned scales before training: parameters that the optimizer must see.

`prepare` puts a parametrization in front of each planned weight, `fake_quant(weight, step)`, with the step as a parameter
of its own. Nothing else changes: the float weight stays a parameter, eager mode and any other backend train it, and under
`backend="qcompile"` a step is one fused graph, and evaluation packs the codes that the learned step gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from qcompile.conversion import module_of, owners_by_weight, rows_of, site_of
from qcompile.errors import QCError
from qcompile.ir.codec import refuse_nonfinite
from qcompile.ir.estimators import estimator_of, why_not_learned
from qcompile.ir.fit import fitted_qparams
from qcompile.ir.granularity import PerTensor
from qcompile.ir.qparams import effective_scale
from qcompile.ir.scheme import PACKINGS, Scheme
from qcompile.plan.recipe import Recipe
from qcompile.rounded import RoundedInput, RoundedWeight, attach_input, detach_input, has_rounded_input, rounded_weight
from qcompile.runtime.store import ordinary_tensors


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did.

    Attributes:
        weights: (path, scheme) of the weights that have learned scales now.
        kept: (path, reason) of those that have none.
        inputs: (path of the weight, scheme) of the inputs that have static scales now.
    """

    weights: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]
    inputs: tuple[tuple[str, str], ...] = ()


@ordinary_tensors()
def prepare(
    model: nn.Module,
    recipe: Any = "int4/g32:fp16",
    *,
    estimator: str = "lsq",
    activations: str = "",
    inputs: Iterable[Any] = (),
) -> Preparation:
    """Add learned scales to the weights that a recipe quantizes, in place. Call it before the optimizer is made.

    Args:
        model: any module, or `torch.compile` of one; its `nn.Linear`, `nn.Embedding` and HF `Conv1D` weights are
            candidates. Tied weights share their scales.
        recipe: preset, scheme, `Recipe` or JSON file; schemes must be symmetric with floating-point scales.
        estimator: "lsq", "pact" or a registered one that learns something; a rule of the recipe that names one of its own
            keeps it. "ste": weights keep the scales that are chosen in every step.
        activations: of rules whose activations have one scale per tensor (`int8/tensor`, `uint8/tensor:fp32+z`): "observed" for
            static scales, moving averages of the ranges seen in training, or an estimator that learns them. "": they are
            chosen in every call. Only inputs of `nn.Linear` and `Conv1D` modules.
        inputs: examples to begin with, each what the model is called with (a tuple of arguments, a mapping of keywords, or one
            argument); needed for activations that are learned.

    Returns:
        What has learned scales now, and what has not, with reasons.

    Raises:
        QCError: "train.estimator" for an estimator that learns nothing, "train.scheme" for a scheme whose scales cannot be
            learned (nothing was changed then), "train.examples" for learned activations without examples,
            "codec.nonfinite-weight" for a weight with a NaN or an infinity, "model.none" for a function.
    """
    rules = Recipe.of(recipe)
    if not activations and not estimator_of(estimator).learned:
        raise QCError(
            "train.estimator",
            f"estimator {estimator!r} learns nothing",
            next="train the model under the backend as it is: only learned and static scales need prepare",
        )
    if activations not in ("", "observed") and not estimator_of(activations).learned:
        raise QCError(
            "train.estimator", f"estimator {activations!r} learns nothing", next='use "observed", or one that learns'
        )
    static: list[tuple[str, nn.Module, Scheme]] = []
    work, kept = [], []
    for weight, owners in owners_by_weight(module_of(model)):
        first, refused = owners[0], next((owner.refused for owner in owners if owner.refused), "")
        choice = rules.resolve(site_of(weight, owners), None if refused else partial(rows_of, weight, first))
        if refused or choice.weight is None:
            kept += [(owner.path, refused or choice.reason) for owner in owners]
            continue
        if activations and choice.act is not None and choice.act.granularity == PerTensor():
            if activations != "observed":
                _refuse_unlearned(choice.act, first.path)
            for owner in (o for o in owners if not isinstance(o.module, nn.Embedding)):
                if has_rounded_input(owner.module):
                    kept.append((owner.path, "its input has a static scale already"))
                else:
                    static.append((owner.path, owner.module, choice.act))
        if not estimator_of(estimator).learned and not estimator_of(choice.estimator).learned:
            continue
        if any(rounded_weight(owner.module) for owner in owners):
            kept += [(owner.path, "it has learned scales already") for owner in owners]
            continue
        _refuse_unlearned(choice.weight, first.path)
        refuse_nonfinite(rows_of(weight, first), first.path)
        name = choice.estimator if estimator_of(choice.estimator).learned else estimator
        work.append((weight, owners, replace(choice.weight, packing=PACKINGS[0]), choice.fit, name))
    _round_inputs(module_of(model), static, activations, inputs)  # first: it undoes what it did when an example fails
    done = []
    for weight, owners, scheme, fit, name in work:
        scale = effective_scale(fitted_qparams(rows_of(weight, owners[0]), scheme, fit), scheme, 2)
        rounded = RoundedWeight(str(scheme), name, estimator_of(name).start(scheme, scale), owners[0].transposed)
        for owner in owners:
            parametrize.register_parametrization(owner.module, "weight", rounded, unsafe=True)
            cast("nn.ModuleDict", owner.module.parametrizations).train(owner.module.training)
            done.append((owner.path, str(scheme)))
    return Preparation(tuple(done), tuple(kept), tuple((path, str(act)) for path, _, act in static))


def learned_scales(model: nn.Module) -> dict[str, nn.Parameter]:
    """The learned scales and clips of a model, by name as `model.named_parameters()` has them.

    Optimizers whose steps have the size of the learning rate (Adam and its kin) should move them slower than weights, since
    they are smaller, and without weight decay, which pulls them towards 0.
    """
    own = (m for m in model.modules() if isinstance(m, (RoundedWeight, RoundedInput)))
    held = {id(p) for module in own for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) in held}


def _refuse_unlearned(scheme: Scheme, where: str) -> None:
    """Raise `QCError` ("train.scheme") for a scheme whose scales cannot be learned."""
    if why := why_not_learned(scheme):
        raise QCError(
            "train.scheme",
            f"the scales of {scheme} cannot be learned",
            where=where,
            why=why,
            next="name a symmetric scheme such as int4/g32:fp16 or int8/tensor, or train without prepare",
        )


def _round_inputs(
    model: nn.Module, static: Sequence[tuple[str, nn.Module, Scheme]], activations: str, inputs: Iterable[Any]
) -> None:
    """Give modules an `input_rounding` each, and show them the examples, in evaluation mode: no statistics move and nothing is
    dropped. Nothing is changed where that fails."""
    made: list[tuple[str, nn.Module, RoundedInput]] = []
    modes = {module: module.training for module in model.modules()}
    try:
        for path, module, act in static:
            rounding = RoundedInput(str(act)).to(next(module.parameters()).device)
            attach_input(module, rounding)
            made.append((path, module, rounding))
        model.eval()
        for _, _, rounding in made:
            rounding.train()  # which is what observes
        with torch.no_grad():
            for example in inputs if made else ():
                if isinstance(example, Mapping):
                    model(**example)
                else:
                    model(*(example if isinstance(example, tuple | list) else (example,)))
        for path, module, rounding in made:
            rounding.train(modes[module])
            if activations != "observed":
                try:
                    rounding.learn(activations)
                except QCError as error:
                    raise error.at(path) from None
    except BaseException:
        for _, module, _ in made:
            detach_input(module)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
