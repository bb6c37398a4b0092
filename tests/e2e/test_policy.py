"""Where a float layer is faster than the kernel, `speed` keeps it, and the ledger says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcompile
from qcompile import QCWarning
from qcompile.codegen.devices.cpu import CpuLowering
from qcompile.codegen.spec import KernelSpec
from qcompile.codegen.tuning.cpu import BLOCKING, FLOAT_WINS
from qcompile.ir.scheme import Scheme

NF4 = "nf4/g64:fp16"


@pytest.fixture(autouse=True)
def bf16_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.codegen.devices.cpu.cpu_has_bf16", lambda: True)
    monkeypatch.setattr("qcompile.codegen.devices.cpu.detect_isa", lambda: "avx2")


@pytest.fixture(autouse=True)
def lowering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.codegen.inductor.CpuLowering", lambda: CpuLowering("avx2"))


def row(rows: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> qcompile.Row:
    torch.compiler.reset()
    model = nn.Linear(64, 96).to(dtype).eval()
    with torch.inference_mode():
        return next(iter(qcompile.explain(model, torch.randn(rows, 64, dtype=dtype), recipe=NF4, options=options)))


def test_many_rows_of_bf16_stay_float_with_the_reason() -> None:
    found = row(200)
    assert not found.quantized
    assert "would be slower than float" in found.reason
    assert f"from {FLOAT_WINS['avx2', 'float']} on" in found.reason


@pytest.mark.parametrize(
    ("rows", "dtype", "options"),
    [(4, torch.bfloat16, {}), (200, torch.float32, {}), (200, torch.bfloat16, {"policy": "memory"})],
)
def test_elsewhere_it_is_packed(rows: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    assert row(rows, dtype, **options).quantized


def test_without_bf16_instructions_no_kernel_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.codegen.devices.cpu.cpu_has_bf16", lambda: False)
    assert row(200).quantized


def test_an_open_number_of_rows_stays_packed() -> None:
    model = nn.Linear(64, 96).to(torch.bfloat16).eval()
    x = torch.randn(200, 64, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compiler.reset()
    with torch.inference_mode():
        assert next(iter(qcompile.explain(model, x, recipe=NF4))).quantized


def test_the_table_names_kernels() -> None:
    assert FLOAT_WINS.keys() <= BLOCKING.keys()
    spec = KernelSpec(Scheme.parse(NF4), x="bf16", y="bf16")
    least = FLOAT_WINS["avx2", "float"]
    assert CpuLowering("avx2").loses(spec, least)
    assert not CpuLowering("avx2").loses(spec, least - 1)


@pytest.mark.parametrize(
    ("model", "x", "words"),
    [
        (nn.Conv2d(3, 8, 3), torch.randn(2, 3, 8, 8), "convolutions are not quantized yet"),
        (nn.Linear(64, 64).double(), torch.randn(2, 64).double(), "dtype torch.float64"),
    ],
    ids=["convolution", "double"],
)
def test_a_graph_whose_weights_all_stay_float_is_announced(model: nn.Module, x: Tensor, words: str) -> None:
    with pytest.warns(QCWarning, match=f"recipe 'int8' quantizes no matmul of this graph: .*{words}"), torch.no_grad():
        torch.compile(model.eval(), backend="qcompile", options={"recipe": "int8"})(x)


def test_a_graph_without_weights_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    def product(x: Tensor) -> Tensor:
        return x @ x.t()

    with torch.no_grad():
        torch.compile(product, backend="qcompile", options={"recipe": "int8"})(torch.randn(8, 8))
        torch.compile(nn.Linear(8, 8).eval(), backend="qcompile", options={"recipe": "none"})(torch.randn(8, 8))
    assert not [item for item in recwarn if item.category is QCWarning]
