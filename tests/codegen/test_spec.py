"""Kernel specs, and what lowerings say to them."""

from __future__ import annotations

import pytest
import torch

from qcompile.codegen.devices.cpu import CpuLowering, detect_isa
from qcompile.codegen.spec import KernelSpec, dtype_name
from qcompile.errors import QCError
from qcompile.ir.matmul import MatmulSpec
from qcompile.ir.scheme import Scheme

INT4, TOKEN = Scheme.parse("int4/g32:fp16"), Scheme.parse("int8/token")


def test_equal_sites_share_a_kernel() -> None:
    a = MatmulSpec(INT4, (64, 32), 128, None, "acc+e0", ("row",))
    b = MatmulSpec(INT4, (16, 48), 512, None, "acc+e0", ("row",))
    one, two = (KernelSpec.of(s, torch.bfloat16, "f32", [torch.float32]) for s in (a, b))
    assert one == two
    assert str(one) == "int4/g32:fp16 bf16->f32 segments=2 y=acc+e0 e=row:f32"


def test_every_field_is_in_the_key() -> None:
    specs = [
        KernelSpec(INT4),
        KernelSpec(INT4, TOKEN),
        KernelSpec(INT4, segments=2),
        KernelSpec(INT4, epilogue="relu(acc)"),
        KernelSpec(INT4, extras=(("row", "f32"),)),
        KernelSpec(INT4, extras=(("mat", "f32"),)),
        KernelSpec(INT4, extras=(("row", "bf16"),)),
        KernelSpec(INT4, x="bf16"),
        KernelSpec(INT4, y="f16"),
        KernelSpec(Scheme.parse("int4/axis0"), TOKEN),
        KernelSpec(Scheme.parse("int4/axis0"), TOKEN, long_k=True),
    ]
    assert len({str(s) for s in specs}) == len(specs)
    # The first line names the spec; the code has to differ as well.
    sources = {CpuLowering("portable").emit(s).source.partition("\n")[2] for s in specs}
    assert len(sources) == len(specs)


def test_unknown_dtypes_are_named() -> None:
    with pytest.raises(QCError, match="float64"):
        dtype_name(torch.float64)
    with pytest.raises(QCError, match="i8"):
        KernelSpec(INT4, x="i8")


@pytest.mark.parametrize("isa", ["avx512vnni", "avx2", "portable"])
def test_source_names_its_instruction_set(isa: str) -> None:
    """Two texts for one spec differ, so no cache keyed on the text can confuse them."""
    assert f"instruction set {isa}" in CpuLowering(isa).emit(KernelSpec(INT4)).source


def test_isa_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QCOMPILE_ISA", "portable")
    assert detect_isa() == "portable"
    monkeypatch.setenv("QCOMPILE_ISA", "sse9")
    with pytest.raises(QCError, match="sse9"):
        detect_isa()


def test_emit_refuses_with_the_reason() -> None:
    with pytest.raises(QCError, match="multiple of 32"):
        CpuLowering("portable").emit(KernelSpec(Scheme.parse("int4/g16:fp16")))
