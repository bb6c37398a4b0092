"""Whole texts of kernels, one of each template, to be read in a review: what an interpreter on one thread cannot see (barriers,
orders, ways to load) is seen to change here.

After a change that is meant: rewrite the file with the text that the test makes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices import triton, triton_rotate
from qcompile.codegen.devices.triton_attention_text import AttentionSpec, attention_text
from qcompile.codegen.devices.triton_grouped import grouped_text
from qcompile.codegen.devices.triton_rotate import Rotation
from qcompile.codegen.devices.triton_text import bytes_text, decode_text, finish_text
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.kvcache import CacheLayout
from tests.codegen.products import spec_of

ROW = {"extras": (("row", "f32"),)}
PAIR = {"segments": 2, "epilogue": "silu(a0)*a1+e0", **ROW}


def matmul(spec: KernelSpec) -> str:
    return triton.text_of(spec).source


GOLDEN: dict[str, Callable[[], str]] = {
    "weight_only": lambda: matmul(spec_of("int4/g128:fp16", "bf16")),
    "operand": lambda: matmul(spec_of("uint3/g64:fp16+m", "f16", segments=2, epilogue="acc+e0", **ROW)),
    "pair_of_bytes": lambda: matmul(
        spec_of("uint4/g128:fp16+z", "bf16", act="int8/token", segments=2, epilogue="silu(a0)*a1")
    ),
    "experts": lambda: grouped_text(spec_of("uint8/axis0:fp32+z", "bf16", "int8/token", **PAIR)).source,
    "attention": lambda: (
        attention_text(AttentionSpec(CacheLayout.of("int8/token:fp16", 64, "int4/token:fp16"), "bf16")).source
    ),
    "rotate": lambda: triton_rotate.text_of(Rotation(256, "f32", "bf16", signed=True), 2),
    "bytes": lambda: bytes_text(spec_of("uint4/g128:fp16+z", "bf16", "int8/token", **PAIR)).source,
    "bytes_given": lambda: bytes_text(spec_of("int8/axis0", "bf16", "int8/token", segments=2), given=True).source,
    "finish": lambda: finish_text(spec_of("int4/g128:fp16", "bf16", **PAIR)),
    "decode": lambda: decode_text(spec_of("uint4/g64:fp16+z", "bf16")),
    "decode_bytes": lambda: decode_text(spec_of("int4/g128:fp16", "bf16", "int8/token")),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_text(name: str) -> None:
    file = Path(__file__).parent / "golden" / f"{name}.txt"
    assert GOLDEN[name]() == file.read_text(encoding="utf-8"), f"GOLDEN[{name!r}]() is another text than {file}"
