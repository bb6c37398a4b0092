"""What optimizer steps become: machine code for every kind of GPU, read without one."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton_step import WARPS
from qcompile.codegen.devices.triton_step_text import COLUMNS, step_text
from qcompile.ir.step import StepSpec
from qcompile.testing.compile_for import Report, compile_kernel

ADAMW = "do=p=p*keep;m=m+w1*(g-m);v=v*b2+w2*g*g;p=p-size*m/(sqrt(v)/root+eps)"
NUMBERS = "h=keep,w1,b2,w2,size,root,eps"
STEPS = {
    "8 bits": f"p=bf16~ g=bf16 m=dyn8/g256 v=udyn8/g256 {NUMBERS} {ADAMW}",
    "4 bits": f"p=bf16~ g=bf16 m=dyn4/g128 v=ulin4/g128 {NUMBERS} {ADAMW}",
    "float32": f"p=f32 g=f32 m=f32 v=f32 {NUMBERS} {ADAMW}",
    "weights": "p=int8/g256~ g=bf16 m=dyn8/g256 h=a,b do=m=m+a*(g-m);p=p-b*sign(m)",
}


def build(name: str, target: str) -> Report:
    spec = StepSpec.parse(STEPS[name])
    text = step_text(spec)
    signature = {"TILES": "*i32", "TABLE": "*i64", "HYPER": "*fp32", "hyper_row": "i32"}
    signature |= {"RANDOM": "*i64"} if spec.stochastic else {}
    signature |= {"LEVELS": "*fp32"} if text.levels else {}
    kernel = compat.triton_kernel(text.source)
    reports = compile_kernel(
        kernel, signature, {"WIDE": True}, targets=(target,), num_warps=WARPS, enable_fp_fusion=False
    )
    return reports[target]


if __name__ == "__main__":
    import sys
    import time
    for name in sys.argv[2:] or STEPS:
        for target in sys.argv[1].split(","):
            t = time.time()
            r = build(name, target)
            w = r.whole
            print(name, target, "instr/elem", w.instructions * r.threads / 2048, "regs", r.registers, "spill", r.spill_bytes,
                  "shared", r.shared, dict(w.shared), "shfl", w.shuffles, "bar", w.barriers, "i2f", w.i2f)
            print("   loads", dict(w.loads), "stores", dict(w.stores), f"{time.time()-t:.1f}s")
