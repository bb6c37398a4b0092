"""Eager calls of `qcompile::step_` on CPUs run a kernel that is built for their spec.

The kernel's result is that of the plain-torch meaning bit for bit, so one may stand for the other at any time: a few steps of
few elements never wait for a compiler, and where there is none, or a build fails, or a kernel fails its trial, nothing changes
but the time. Inside `reference_only()` the plain-torch meaning always runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from qcompile.codegen.devices.cpu import detect_isa
from qcompile.codegen.devices.cpu_step import step_text, tile_of
from qcompile.codegen.eager import apart
from qcompile.compat import cpp_compiler, load_operator
from qcompile.errors import QCError, warn
from qcompile.ir import ops
from qcompile.ir.step import StepSpec
from qcompile.ir.step_reference import RANDOM, check_step, step_reference

Operator = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor], None]

# Elements of a call for which a kernel is built: plain torch takes a hundredth of a second for them, a build seconds.
WORTH_BUILDING = 1 << 18
# Seconds in plain torch after which smaller calls have one built too. The biases and norms of a model are few elements, but
# many tensors and thousands of steps: plain torch takes most of a millisecond for each, kernels take 30 for all the rest.
WORTH_WAITING = 0.1

_LOCK = threading.Lock()
_OPERATORS: dict[str, Operator | None] = {}  # None: looked for, and there is none
_WAITED: dict[str, float] = {}  # seconds in plain torch, of specs that nobody has looked for


def step_on_cpu(
    state: Sequence[Tensor], inputs: Sequence[Tensor], hyper: Tensor, random: Tensor | None, spec: str
) -> None:
    """`step_` by a kernel built for this processor. Raises "step.operands" for operands that do not fit."""
    if ops.reference_forced():
        return step_reference(state, inputs, hyper, random, spec)
    waited = _WAITED.get(spec, 0.0)
    if spec not in _OPERATORS and waited < WORTH_WAITING and sum(t.numel() for t in state) < WORTH_BUILDING:
        begun = time.perf_counter()
        step_reference(state, inputs, hyper, random, spec)
        _WAITED[spec] = waited + time.perf_counter() - begun
        return None
    what = StepSpec.parse(spec)
    operator = operator_of(what)
    if operator is None or what.stochastic != (random is not None):
        return step_reference(state, inputs, hyper, random, spec)
    try:
        with torch._C._AutoDispatchBelowAutograd():
            operator(state, inputs, hyper, hyper if random is None else random)
        # Autograd has to know that what it may have saved is another now; nobody told it.
        torch.autograd.graph.increment_version([t for t in state if not t.is_inference()])
    except RuntimeError as error:
        if (text := str(error).partition("\n")[0]).startswith("step_: "):
            check_step(state, inputs, hyper, random, spec)  # has more words for what does not fit
            raise QCError("step.operands", text, where=spec) from error
        raise
    return None


def operator_of(spec: StepSpec) -> Operator | None:
    """The registered kernel of a step, built and tried on the first request; None where there is none."""
    text = str(spec)
    if text in _OPERATORS:
        return _OPERATORS[text]
    operator, reason = apart(_made, spec)
    with _LOCK:
        if text not in _OPERATORS:
            _OPERATORS[text] = operator
            if reason:
                warn(f"steps run the plain-torch operator, which is slow, for {text}: {reason}")
        return _OPERATORS[text]


def _made(spec: StepSpec) -> tuple[Operator | None, str]:
    """The operator, or why there is none."""
    if cpp_compiler() is None:
        return None, "no C++ compiler"
    try:
        operator = cast("Operator", load_operator(step_text(spec, detect_isa())))
        reason = trial(spec, operator)
    except Exception as error:  # the toolchain, the loader or torch: what they raise differs by release
        return None, f"{type(error).__name__}: {error}"
    return (None, reason) if reason else (operator, "")


def operands(
    spec: StepSpec, sizes: Sequence[int], generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]:
    """Random operands of a step of parameters of these sizes: any codes, positive scales, a row of numbers for each."""

    def part(name: str, n: int, dtype: torch.dtype) -> Tensor:
        if dtype == torch.uint8:
            return torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8)
        values = torch.randn(n, generator=generator, dtype=torch.float32)
        return values.abs() + 0.1 if name == "scales" else values.to(dtype)

    lists = [
        [part(p.name, p.shape[0], p.dtype) for n in sizes for operand in group for p in operand.parts(n)]
        for group in (spec.state, spec.inputs)
    ]
    numbers = torch.rand(len(sizes), len(spec.hyper), generator=generator, dtype=torch.float32)
    random = torch.randint(0, 1 << 31, (len(sizes), len(RANDOM)), generator=generator)
    return lists[0], lists[1], numbers, random if spec.stochastic else None


def trial(spec: StepSpec, operator: Operator) -> str:
    """Run an operator on a small problem and compare every byte with the definition's: "" when all are right."""
    generator = torch.Generator().manual_seed(0)
    tile = tile_of(spec)
    state, inputs, numbers, random = operands(spec, [2 * tile + 77, 1, 0, 300], generator)
    want = [t.clone() for t in state]
    step_reference(want, inputs, numbers, random, str(spec))
    operator(state, inputs, numbers, numbers if random is None else random)
    wrong = sum(int((~equal(a, b)).sum()) for a, b in zip(state, want, strict=True))
    return f"{wrong} of {sum(t.numel() for t in want)} results of its trial are wrong" if wrong else ""


def equal(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors have the same bits, or both NaN, whose bits are nobody's business."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.dtype.itemsize]
    return (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
