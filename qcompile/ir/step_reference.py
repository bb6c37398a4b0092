"""What `step_` does, in plain torch: the definition that kernels are compared with, bit for bit.

It works on every device, a piece of each parameter at a time: the float32 copies of a whole vocabulary's table would be several
times its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.rounding import random_bits
from qcompile.ir.step import Operand, StepSpec, Value

PIECE = 1 << 20  # elements widened at a time; a multiple of every block and of the elements that share random words
RANDOM = ("seed", "step", "id", "offset")  # columns of `random`


def _sqrt(x: Tensor) -> Tensor:
    # torch's own for float32 is off by one unit in the last place on CPUs. Of 53 bits rounded to 24 it is right.
    return x.to(torch.float64).sqrt().to(torch.float32)


def _maximum(x: Tensor, y: Tensor) -> Tensor:
    return torch.where((x > y) | x.isnan(), x, y)


def _minimum(x: Tensor, y: Tensor) -> Tensor:
    return torch.where((x < y) | x.isnan(), x, y)


def _sign(x: Tensor) -> Tensor:
    return torch.where(x > 0, 1.0, torch.where(x < 0, -1.0, x))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "sqrt": _sqrt,
    "abs": torch.abs,
    "sign": _sign,
    "maximum": _maximum,
    "minimum": _minimum,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "where": torch.where,
}


def step_reference(
    state: Sequence[Tensor], inputs: Sequence[Tensor], hyper: Tensor, random: Tensor | None, spec: str
) -> None:
    """One step of every parameter, in place; see `check_step` for the operands.

    Raises:
        QCError: "step.operands".
    """
    what, count = check_step(state, inputs, hyper, random, spec)
    rows = hyper if hyper.dim() == 2 else hyper.expand(count, -1)
    with torch.no_grad():
        for i in range(count):
            parts = dict(_named(what.state, state, i)) | dict(_named(what.inputs, inputs, i))
            n = next(parts[o.name][0].numel() for o in what.operands if o.storage.plain)
            numbers = dict(zip(what.hyper, rows[i], strict=True))
            for start in range(0, n, PIECE):
                size = min(PIECE, n - start)
                pieces = {
                    o.name: tuple(
                        t[before.shape[0] :][: part.shape[0]]
                        for t, before, part in zip(parts[o.name], o.parts(start), o.parts(size), strict=True)
                    )
                    for o in what.operands
                }
                _step_piece(what, pieces, numbers, None if random is None else random[i], start, size)


def _named(operands: Sequence[Operand], tensors: Sequence[Tensor], i: int) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """The parts of each operand of parameter `i`, flat."""
    at = i * sum(len(o.parts(0)) for o in operands)
    for o in operands:
        after = at + len(o.parts(0))
        yield o.name, tuple(t.detach().view(-1) for t in tensors[at:after])
        at = after


def _step_piece(
    spec: StepSpec,
    pieces: Mapping[str, tuple[Tensor, ...]],
    numbers: Mapping[str, Tensor],
    random: Tensor | None,
    start: int,
    size: int,
) -> None:
    read = {o.name: o.storage.read(pieces[o.name], size) for o in spec.operands if o.read}
    values: dict[Value, Tensor] = {}
    values.update(numbers)
    values.update(read)
    like = next(iter(pieces.values()))[0]

    def value(arg: Value) -> Tensor:
        return torch.tensor(arg, dtype=torch.float32, device=like.device) if isinstance(arg, float) else values[arg]

    for operation in spec.operations:
        values[operation.result] = OPERATIONS[operation.op](*map(value, operation.args))
    # What a tensor held may be stored in another one, after its own has been overwritten.
    kept = {arg: read[arg].clone() for arg in spec.results.values() if arg in read}
    results = {name: (kept[arg] if arg in kept else value(arg)).expand(size) for name, arg in spec.results.items()}
    for o in spec.state:
        bits = None
        if o.storage.stochastic and random is not None:
            seed, step, number, offset = random
            bits = random_bits(size, seed, offset + start, (step, number), like.device)
        for old, new in zip(pieces[o.name], o.storage.written(results[o.name], bits), strict=True):
            old.copy_(new)


def check_step(
    state: Sequence[Tensor], inputs: Sequence[Tensor], hyper: Tensor, random: Tensor | None, spec: str
) -> tuple[StepSpec, int]:
    """What `step_` computes, of operands that fit it, and of how many parameters.

    Args:
        state: for each parameter, for each operand of `spec.state`, its parts (`Storage.parts`): contiguous, of any shape with
            the right number of elements, on one device.
        inputs: the same of `spec.inputs`.
        hyper: float32 `[h]`, or `[parameters, h]`: the numbers of `spec.hyper`.
        random: int64 `[parameters, 4]`, columns `RANDOM`: seed (64 bits), step, id of the parameter (32 bits each), global
            index of its first element; None where nothing is stochastic.

    Raises:
        QCError: "step.operands", "step.spec".
    """
    what = StepSpec.parse(spec)
    width, reads = (sum(len(o.parts(0)) for o in operands) for operands in (what.state, what.inputs))
    count = len(state) // width
    if len(state) != count * width or len(inputs) != count * reads:
        raise _refused(what, f"{len(state)} and {len(inputs)} tensors, not {width} and {reads} for each parameter")
    for i in range(count):
        groups = ((what.state, state[i * width :]), (what.inputs, inputs[i * reads :]))
        sizes = {}
        for operands, tensors in groups:
            at = 0
            for o in operands:
                sizes[o.name] = tensors[at].numel()
                at += len(o.parts(0))
        n = next(sizes[o.name] for o in what.operands if o.storage.plain)
        for operands, tensors in groups:
            named = ((o.name, part) for o in operands for part in o.parts(n))
            for (name, part), t in zip(named, tensors, strict=False):
                if t.numel() != part.shape[0] or t.dtype != part.dtype or not t.is_contiguous():
                    got = f"{t.dtype} {list(t.shape)}" + ("" if t.is_contiguous() else ", not contiguous")
                    want = f"{part.dtype} with {part.shape[0]} elements"
                    raise _refused(what, f"{part.name} of {name} of parameter {i} are {got}, not {want}")
                if t.device != hyper.device:
                    raise _refused(what, f"{name} of parameter {i} is on {t.device}, hyper on {hyper.device}")
    h = len(what.hyper)
    if hyper.dtype != torch.float32 or tuple(hyper.shape) not in ((h,), (count, h)) or not hyper.is_contiguous():
        raise _refused(what, f"hyper is {hyper.dtype} {list(hyper.shape)}, not torch.float32 [{h}] or [{count}, {h}]")
    if (random is not None) != what.stochastic:
        raise _refused(what, "random is missing" if random is None else "nothing is stochastic, and random is given")
    if random is not None and (
        random.dtype != torch.int64
        or tuple(random.shape) != (count, len(RANDOM))
        or not random.is_contiguous()
        or random.device != hyper.device
    ):
        raise _refused(what, f"random is {random.dtype} {list(random.shape)}, not torch.int64 [{count}, {len(RANDOM)}]")
    return what, count


def _refused(spec: StepSpec, what: str) -> QCError:
    return QCError(
        "step.operands", f"step_ got {what}", where=str(spec), next="help(qcompile.ir.step_reference.check_step)"
    )
