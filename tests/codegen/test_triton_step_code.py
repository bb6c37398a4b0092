"""What optimizer steps become: machine code for every kind of GPU, read without one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton_step import warps_of
from qcompile.codegen.devices.triton_step_text import TILE, step_text
from qcompile.ir.step import StepSpec
from qcompile.testing.compile_for import Report, compile_kernel
from qcompile.testing.sass import width

ADAMW = "do=p=p*keep;m=m+w1*(g-m);v=v*b2+w2*g*g;p=p-size*m/(sqrt(v)/root+eps)"
NUMBERS = "h=keep,w1,b2,w2,size,root,eps"
STEPS = {
    "8 bits": f"p=bf16~ g=bf16 m=dyn8/g256 v=udyn8/g256 {NUMBERS} {ADAMW}",
    "4 bits": f"p=bf16~ g=bf16 m=dyn4/g128 v=ulin4/g128 {NUMBERS} {ADAMW}",
    "float32": f"p=f32 g=f32 m=f32 v=f32 {NUMBERS} {ADAMW}",
    "plain": "p=f32 g=f32 h=a do=p=p-a*g",
    "weights": "p=int8/g256~ g=bf16 m=dyn8/g256 h=a,b do=m=m+a*(g-m);p=p-b*sign(m)",
}


# Instructions per element, of every kind, also of ways that are seldom taken (a division of which the fast way is wrong,
# shards that begin between blocks of random words), as measured with Triton 3.7 and rounded up. On an H200 memory leaves time
# for 69 in 8 bits: there arithmetic decides. In float32 it leaves time for 190.
BUDGET = {
    "8 bits": {"sm_90": 157, "gfx942": 138},
    "4 bits": {"sm_80": 143},
    "float32": {"gfx942": 57},
    "weights": {"sm_100": 83},
}
# Bytes of a piece of each operand that a thread asks for: all 16, but codes of 4 bits, of which it has 16.
WIDEST = {
    "8 bits": {16: (6, 4)},
    "4 bits": {16: (4, 2), 8: (2, 2)},
    "float32": {16: (16, 12)},
    "weights": {16: (4, 2)},
}


@pytest.mark.parametrize("name", BUDGET)
def test_code(name: str) -> None:
    """Nothing spills or passes through shared memory, lanes exchange a maximum for each kind of state in blocks alone, and
    pieces are as wide as can be. What is narrower are scalars, levels and boundaries, and scales."""
    for target, report in build(name, BUDGET[name]).items():
        whole, kinds = report.whole, sum("/g" in word for word in STEPS[name].split())
        assert (report.spill_bytes, whole.shared, whole.barriers, whole.i2f) == (0, {}, 0, 0), target
        assert whole.shuffles <= (6 if target == "gfx942" else 4) * kinds, target
        assert whole.instructions * report.threads / TILE <= BUDGET[name][target], target
        for size, (loads, stores) in WIDEST[name].items():
            assert _of_size(whole.stores, size) == stores, target
            if size == 16 and target != "gfx942":  # where scalars come by 16 bytes too
                assert _of_size(whole.loads, size) == loads, target
        narrow = sum(n for opcode, n in whole.stores.items() if width(opcode) not in WIDEST[name])
        assert narrow == kinds, target


def test_every_operation_rounds() -> None:
    """A product and a sum stay two instructions."""
    (report,) = build("plain", ["sm_90"]).values()
    code = report.texts["sass"]
    assert (code.count(" FMUL "), code.count(" FADD "), code.count("FFMA")) == (16, 16, 0)


def _of_size(opcodes: Mapping[str, int], size: int) -> int:
    return sum(n for opcode, n in opcodes.items() if width(opcode) == size)


def build(name: str, targets: Iterable[str]) -> dict[str, Report]:
    """The kernel for what is aligned."""
    spec = StepSpec.parse(STEPS[name])
    text = step_text(spec)
    signature = {"TILES": "*i32", "TABLE": "*i64", "HYPER": "*fp32", "hyper_row": "i32"}
    signature |= {"RANDOM": "*i64"} if spec.stochastic else {}
    signature |= {"LEVELS": "*fp32"} if text.levels else {}
    kernel, found = compat.triton_kernel(text.source), {}
    for warps, some in itertools.groupby(targets, warps_of):
        options = {"num_warps": warps, "enable_fp_fusion": False}
        found |= compile_kernel(kernel, signature, {"WIDE": True}, targets=tuple(some), **options)
    return found
