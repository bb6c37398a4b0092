"""Give weights learned scales before training: parameters that the optimizer must see.

`prepare` puts a parametrization in front of each planned weight, `fake_quant(weight, step)`, with the step as a parameter
of its own. Nothing else changes: the float weight stays a parameter, eager mode and any other backend train it, and under
`backend="qcompile"` a step is one fused graph, and evaluation packs the codes that the learned step gives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import nn
from torch.nn.utils import parametrize

from qcompile.conversion import module_of, owners_by_weight, rows_of, site_of
from qcompile.errors import QCError
from qcompile.ir.estimators import estimator_of, why_not_learned
from qcompile.ir.fit import fitted_qparams
from qcompile.ir.qparams import effective_scale
from qcompile.ir.scheme import PACKINGS
from qcompile.plan.recipe import Recipe
from qcompile.rounded import RoundedWeight
from qcompile.runtime.store import ordinary_tensors


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did.

    Attributes:
        weights: (path, scheme) of the weights that have learned scales now.
        kept: (path, reason) of those that have none.
    """

    weights: tuple[tuple[str, str], ...]
    kept: tuple[tuple[str, str], ...]


@ordinary_tensors()
def prepare(model: nn.Module, recipe: Any = "int4/g32:fp16", *, estimator: str = "lsq") -> Preparation:
    """Add learned scales to the weights that a recipe quantizes, in place. Call it before the optimizer is made.

    Args:
        model: any module, or `torch.compile` of one; its `nn.Linear`, `nn.Embedding` and HF `Conv1D` weights are
            candidates. Tied weights share their scales.
        recipe: preset, scheme, `Recipe` or JSON file; schemes must be symmetric with floating-point scales.
        estimator: "lsq", "pact" or a registered one that learns something; a rule of the recipe that names one of its own
            keeps it.

    Returns:
        What has learned scales now, and what has not, with reasons.

    Raises:
        QCError: "train.estimator" for an estimator that learns nothing, "train.scheme" for a scheme whose scales cannot be
            learned (nothing was changed then), "model.none" for a function.
    """
    rules = Recipe.of(recipe)
    if not estimator_of(estimator).learned:
        raise QCError(
            "train.estimator",
            f"estimator {estimator!r} learns nothing",
            next="train the model under the backend as it is: only learned scales need prepare",
        )
    work, kept = [], []
    for weight, owners in owners_by_weight(module_of(model)):
        first, refused = owners[0], next((owner.refused for owner in owners if owner.refused), "")
        choice = rules.resolve(site_of(weight, owners), None if refused else partial(rows_of, weight, first))
        if refused or choice.weight is None:
            kept += [(owner.path, refused or choice.reason) for owner in owners]
            continue
        if why := why_not_learned(choice.weight):
            raise QCError(
                "train.scheme",
                f"the scales of {choice.weight} cannot be learned",
                where=first.path,
                why=why,
                next="name a symmetric scheme such as int4/g32:fp16, or train without prepare",
            )
        name = choice.estimator if estimator_of(choice.estimator).learned else estimator
        work.append((weight, owners, replace(choice.weight, packing=PACKINGS[0]), choice.fit, name))
    done = []
    for weight, owners, scheme, fit, name in work:
        scale = effective_scale(fitted_qparams(rows_of(weight, owners[0]), scheme, fit), scheme, 2)
        rounded = RoundedWeight(str(scheme), name, estimator_of(name).start(scheme, scale), owners[0].transposed)
        for owner in owners:
            parametrize.register_parametrization(owner.module, "weight", rounded, unsafe=True)
            cast("nn.ModuleDict", owner.module.parametrizations).train(owner.module.training)
            done.append((owner.path, str(scheme)))
    return Preparation(tuple(done), tuple(kept))
