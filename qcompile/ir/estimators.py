"""Rounding that can be trained through: `fake_quant`, and what a gradient does at a rounding.

Rounding has no useful derivative, so training puts an estimate in its place. An `Estimator` is that choice and nothing
else: values always come from the codec, `decode(encode(x))`, so that what training saw is what inference packs, bit for
bit. Gradients are plain torch too; they are traced into the graph of the backward pass and fused by the compiler.

* `ste` learns nothing: the gradient passes where x is inside the range and is 0 outside (Bengio et al. 2013, arXiv 1308.3432).
* `lsq` learns the step. The gradient of x passes where x / s lies between the outermost levels; the step gets the sum over its
  cell of g (level - x / s) there and of g level elsewhere, times 1 / sqrt(n Q) (Esser et al. 2020, arXiv 1902.08153,
  equations 3 and 5 and section 2.2).
* `pact` learns where to clip. The gradient of x passes where |x| is below the clip, which gets the sum of g sign(x) where it
  is not (Choi et al. 2018, arXiv 1805.06085, equation 3).

Scales are chosen apart from rounding (`choose_qparams`): they are small and may be saved for the backward pass, while what
is as large as the weight is computed again there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import QCError, suggest
from qcompile.ir.codec import decode, encode
from qcompile.ir.elements import decode_element
from qcompile.ir.fit import FITS
from qcompile.ir.formats import Format
from qcompile.ir.granularity import Nested
from qcompile.ir.qparams import QParams, effective_scale, pack_qparams, unpack_qparams
from qcompile.ir.scales import cell_counts, reduce_cells, spread, store_scale
from qcompile.ir.scheme import Scheme


@dataclass(frozen=True)
class Estimate:
    """What an estimator is asked about: one tensor, its scheme and its scales, all float32 and spread over the elements.

    Attributes:
        x: the tensor before rounding.
        y: x in units of the step, as `encode` rounds it (a zero point not yet added).
        shift: the zero point, 0 without one.
        level: what y (plus the shift) was rounded to, minus the shift.
        scheme, qparams: as they were used.
        learned: the learned tensors, in the order of `Estimator.learned`.
    """

    x: Tensor
    y: Tensor
    shift: Tensor | float
    level: Tensor
    scheme: Scheme
    qparams: QParams
    learned: tuple[Tensor, ...]

    @property
    def inside(self) -> Tensor:
        """Bool, of x's shape: where rounding did not clip."""
        low, high = reach(self.scheme.format)
        at = self.y + self.shift
        return (at >= low) & (at <= high)

    @property
    def between(self) -> Tensor:
        """Bool, of x's shape: strictly between the outermost levels, half a step less on each side than `inside`."""
        levels = _levels(self.scheme.format)
        at = self.y + self.shift
        return (at > levels[0]) & (at < levels[-1])


class Estimator:
    """The gradient at a rounding. Subclass, name it, and `register` an instance.

    Attributes:
        name: what recipes and graphs call it.
        learned: names of the tensors that the optimizer must hold, one value for each scale.
    """

    name: str = ""
    learned: tuple[str, ...] = ()

    def learned_qparams(self, scheme: Scheme, learned: Sequence[Tensor], ndim: int) -> QParams:
        """The scales that learned tensors stand for; they depend on nothing else."""
        raise NotImplementedError

    def start(self, scheme: Scheme, scale: Tensor) -> tuple[Tensor, ...]:
        """Learned tensors (float32) to begin with, from the scales (float32) that would be chosen."""
        return ()

    def backward(self, grad: Tensor, at: Estimate) -> tuple[Tensor, ...]:
        """Gradient of x, then of each learned tensor, from the gradient of the result (float32, of x's shape)."""
        raise NotImplementedError

    def covers(self, scheme: Scheme, fit: str) -> bool:
        """Whether the gradient of x is that of the result, whatever x is: then nothing has to be kept for it."""
        return False


class StraightThrough(Estimator):
    name = "ste"

    def backward(self, grad: Tensor, at: Estimate) -> tuple[Tensor, ...]:
        return (torch.where(at.inside, grad, 0.0),)

    def covers(self, scheme: Scheme, fit: str) -> bool:
        return spans(scheme, fit)


class LearnedStep(Estimator):
    name = "lsq"
    learned = ("step",)

    def learned_qparams(self, scheme: Scheme, learned: Sequence[Tensor], ndim: int) -> QParams:
        return QParams(stored_scale(learned[0], scheme))

    def start(self, scheme: Scheme, scale: Tensor) -> tuple[Tensor, ...]:
        return (scale.clone(),)

    def backward(self, grad: Tensor, at: Estimate) -> tuple[Tensor, ...]:
        between, cell = at.between, at.scheme.granularity.cell(at.x.dim())
        slope = torch.where(between, at.level - at.y, at.level)
        count = cell_counts(at.x.shape, cell, at.x.device)
        factor = torch.rsqrt(count * at.scheme.format.max).to(torch.float32)
        step = reduce_cells(grad * slope, cell, _sum) * factor
        return torch.where(between, grad, 0.0), step


class LearnedClip(Estimator):
    name = "pact"
    learned = ("clip",)

    def learned_qparams(self, scheme: Scheme, learned: Sequence[Tensor], ndim: int) -> QParams:
        return QParams(stored_scale(learned[0] / scheme.format.max, scheme))

    def start(self, scheme: Scheme, scale: Tensor) -> tuple[Tensor, ...]:
        return (scale * scheme.format.max,)

    def backward(self, grad: Tensor, at: Estimate) -> tuple[Tensor, ...]:
        cell = at.scheme.granularity.cell(at.x.dim())
        clip = spread(at.learned[0].to(torch.float32), cell, at.x.shape)
        above, below = at.x >= clip, at.x <= (-clip if at.scheme.format.signed else torch.zeros_like(clip))
        slope = above.to(torch.float32) - (below.to(torch.float32) if at.scheme.format.signed else 0.0)
        return torch.where(above | below, 0.0, grad), reduce_cells(grad * slope, cell, _sum)


ESTIMATORS: dict[str, Estimator] = {}


def register(estimator: Estimator) -> Estimator:
    """Make an estimator known by its name; replaces one of the same name of the same class only.

    Raises:
        QCError: `estimator.name` without a name, or where the name belongs to another class.
    """
    known = ESTIMATORS.get(estimator.name)
    if not estimator.name or (known is not None and type(known) is not type(estimator)):
        raise QCError(
            "estimator.name",
            f"an estimator cannot be called {estimator.name!r}",
            why=f"that is {type(known).__name__}" if known is not None else "graphs and caches find it by its name",
            next="give the class a name of its own",
        )
    ESTIMATORS[estimator.name] = estimator
    return estimator


for _estimator in (StraightThrough(), LearnedStep(), LearnedClip()):
    register(_estimator)


def estimator_of(name: str) -> Estimator:
    """The estimator called `name`; raises QCError `estimator.unknown` with a suggestion."""
    found = ESTIMATORS.get(name)
    if found is None:
        raise QCError(
            "estimator.unknown",
            f"unknown estimator {name!r}{suggest(name, ESTIMATORS)}",
            next="known estimators: " + " ".join(ESTIMATORS),
        )
    return found


def why_not_learned(scheme: Scheme) -> str:
    """Why the scales of a scheme cannot be learned, "" when they can."""
    if not scheme.symmetric:
        return "it has a zero point or a minimum, which is not learned"
    if isinstance(scheme.granularity, Nested):
        return "its scales are nested"
    if scheme.scale.format.kind != "float":
        return f"its scales are {scheme.scale.format}, no floating-point numbers"
    return ""


def stored_scale(step: Tensor, scheme: Scheme) -> Tensor:
    """A learned step in the form in which scales are stored: positive, at least the smallest that the form has."""
    if scheme.scale.format.dtype == torch.float32:
        return rounded_scale(step, str(scheme))
    # An operator of its own: see `ops._choose_qparams`.
    found: Tensor = torch.ops.qcompile.stored_scale(step, str(scheme))
    return found


def rounded_scale(step: Tensor, scheme: str) -> Tensor:
    """The plain-torch meaning of `stored_scale`; contiguous."""
    fmt = Scheme.parse(scheme).scale.format
    return store_scale(torch.clamp(step.detach().to(torch.float32), min=fmt.low), fmt).contiguous()


def _levels(fmt: Format) -> list[float]:
    """What x may be rounded to, in units of the step, ascending."""
    return sorted({value for value in fmt.values if math.isfinite(value) and value >= fmt.low})


def reach(fmt: Format) -> tuple[float, float]:
    """The values (in units of the step) that round to a level without being clipped: half a step beyond both ends."""
    levels = _levels(fmt)
    if len(levels) < 2:
        return levels[0], levels[0]
    return levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2


def spans(scheme: Scheme, fit: str) -> bool:
    """Whether scales chosen over a tensor's own range leave nothing to clip: absmax of a symmetric signed format, where
    rounding the scale to its stored form moves the largest value by less than half a step."""
    fmt, scale = scheme.format, scheme.scale
    if fit != "minmax" or fmt.statistic != "absmax" or not fmt.signed or not scheme.symmetric:
        return False
    mx = scale.format.name == "e8m0" and fmt.kind != "table"  # the OCP rule lets large values saturate
    if mx or (scheme.outer is not None and scale.format.kind != "float"):
        return False
    # A stored scale is smaller than the wanted one by at most this share of it.
    error = torch.finfo(scale.format.dtype).eps / 2 if scale.format.kind == "float" else 0.0  # powers of two round up
    low, high = reach(fmt)
    return fmt.max / (1 - error) <= min(high, -low)


def chosen_qparams(x: Tensor, scheme: str, fit: str) -> list[Tensor]:
    """The plain-torch meaning of `choose_qparams`: scales of a tensor as a constant, without a gradient."""
    what = Scheme.parse(scheme)
    with torch.no_grad():
        return pack_qparams(FITS[fit](x.detach(), what))


def fake_quant(
    x: Tensor,
    scales: Sequence[Tensor],
    learned: Sequence[Tensor],
    scheme: str,
    estimator: str = "ste",
    fit: str = "minmax",
    seed: int = 0,
) -> Tensor:
    """decode(encode(x)) in x's dtype, with an estimator's gradient: the plain-torch meaning of the operator.

    Args:
        x: any float dtype and shape.
        scales: what `choose_qparams` returned for x; empty for estimators that learn them.
        learned: the learned tensors of the estimator, shaped as the scheme's scales for x.
        scheme: canonical spelling.
        fit: how the scales were chosen: says whether anything can clip.
        seed: key of stochastic rounding.

    Raises:
        QCError: `estimator.unknown`, `estimator.operands` for another number of learned tensors.
    """
    what, how = Scheme.parse(scheme), estimator_of(estimator)
    if len(learned) != len(how.learned) or not (scales or learned):
        raise QCError(
            "estimator.operands",
            f"{estimator} got {len(learned)} learned tensors",
            where=scheme,
            why=f"it learns {', '.join(how.learned) or 'nothing'}, and takes scales otherwise",
            next="call qcompile.prepare(model, ...) before compiling, which registers them",
        )
    result: Tensor = _FakeQuant.apply(x, what, how, fit, seed, len(scales), *scales, *learned)  # type: ignore[no-untyped-call]
    return result


class _FakeQuant(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scheme: Scheme, how: Estimator, fit: str, seed: int, count: int, *tensors: Tensor
    ) -> Tensor:
        ctx.how, ctx.scheme, ctx.fit, ctx.seed, ctx.count, ctx.dtype = how, scheme, fit, seed, count, x.dtype
        ctx.covered = how.covers(scheme, fit)
        if not ctx.covered:
            ctx.save_for_backward(x, *tensors)
        qparams = _qparams(how, scheme, tensors, count, x.dim())
        codes = encode(x, scheme, qparams, seed=seed)
        return decode(codes, scheme, qparams, x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        if ctx.covered:
            return grad, *[None] * 5, *[None] * ctx.count
        x, *tensors = ctx.saved_tensors
        at = estimate(x, ctx.how, ctx.scheme, tensors, ctx.count, ctx.seed)
        dx, *rest = ctx.how.backward(grad.to(torch.float32), at)
        learned = [g.to(t.dtype) for g, t in zip(rest, at.learned, strict=True)]
        return dx.to(ctx.dtype), *[None] * 5, *[None] * ctx.count, *learned


def _qparams(how: Estimator, scheme: Scheme, tensors: Sequence[Tensor], count: int, ndim: int) -> QParams:
    return how.learned_qparams(scheme, tensors, ndim) if how.learned else unpack_qparams(tensors[:count], scheme, ndim)


def estimate(
    x: Tensor, how: Estimator, scheme: Scheme, tensors: Sequence[Tensor], count: int, seed: int = 0
) -> Estimate:
    """Everything about one rounding, computed again from x and its scales."""
    qparams = _qparams(how, scheme, tensors, count, x.dim())
    cell = scheme.granularity.cell(x.dim())
    wide = x.to(torch.float32)
    s = spread(effective_scale(qparams, scheme, x.dim()), cell, x.shape)
    zero = None if qparams.zero is None else spread(qparams.zero.to(torch.float32), cell, x.shape)
    y = wide - zero if zero is not None and scheme.scale.zero == "m" else wide
    y = y / s if qparams.inverse is None else y * spread(qparams.inverse, cell, x.shape)
    level = decode_element(encode(x, scheme, qparams, seed=seed), scheme.format)
    if zero is not None and scheme.scale.zero == "z":
        return Estimate(wide, y, zero, level - zero, scheme, qparams, tuple(tensors[count:]))
    return Estimate(wide, y, 0.0, level, scheme, qparams, tuple(tensors[count:]))


def _sum(x: Tensor, dim: int) -> Tensor:
    return torch.sum(x, dim)
