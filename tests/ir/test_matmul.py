"""The plain-torch meaning of `qmm` has the kernels' result in every respect, and epilogues are checked when they are read."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import QCError
from qcompile.ir.codec import quantize
from qcompile.ir.matmul import BINARY_FUNCTIONS, EPILOGUE_FUNCTIONS, MatmulSpec, reference_qmm

W = "int8/g64:fp16"


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0, 3), (2, 1, 3)], ids=str)
@pytest.mark.parametrize(
    "fields", ["", "y=2.5", "y=e0 e=row", "y=e0 e=mat", "y=acc+e0 e=mat", "y=e0*2.0 e=mat out=bf16", "y=acc out=f32"]
)
def test_the_result_is_contiguous_and_has_the_shape_of_the_kernels(fields: str, lead: tuple[int, ...]) -> None:
    """Whatever the epilogue reads, and however x and extras lie in memory."""
    spec = MatmulSpec.parse(f"{W} n=20,12 k=64 {fields}".strip())
    parts = [part for n in spec.n for part in quantize(torch.randn(n, 64), spec.weight)]

    def spread(*shape: int) -> torch.Tensor:
        """Dimensions in the opposite order in memory."""
        return torch.randn(shape[::-1]).permute(*reversed(range(len(shape))))

    x, extras = spread(*lead, 64), [spread(*shape) for shape in spec.shapes(lead)[1:]]
    if lead:
        x[..., -1, 3] = float("nan")  # the last row of every matrix
    y = reference_qmm(x, parts, extras, spec)
    assert y.shape == (*lead, 32)
    assert y.dtype == (torch.bfloat16 if spec.out == "bf16" else torch.float32)
    assert y.is_contiguous()
    if y.numel() and lead:
        assert y[..., -1, :].isnan().all()
        assert y[..., :-1, :].isfinite().all()


@pytest.mark.parametrize("shape", [(6, 32), (3, 2, 32), (2, 3, 31), (1, 32), (32,)], ids=str)
def test_extras_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    spec = MatmulSpec.parse(f"{W} n=32 k=64 y=acc+e0 e=mat")
    parts = quantize(torch.randn(32, 64), spec.weight)
    with pytest.raises(QCError, match=r"matmul\.operands"):
        reference_qmm(torch.randn(2, 3, 64), parts, [torch.randn(shape)], spec)
    assert reference_qmm(torch.randn(2, 3, 64), parts, [torch.randn(2, 3, 32)], spec).shape == (2, 3, 32)


@pytest.mark.parametrize("function", EPILOGUE_FUNCTIONS)
def test_functions_take_their_number_of_arguments(function: str) -> None:
    right = 1 + (function in BINARY_FUNCTIONS)
    for count in range(4):
        text = f"{W} n=32 k=64 y=-{function}({','.join(['acc'] * count)})"
        if count == right:
            assert MatmulSpec.parse(text).epilogue
        else:
            with pytest.raises(QCError, match="take two arguments"):
                MatmulSpec.parse(text)
    for arguments in ("*acc", "input=acc", "acc,out=acc"):
        with pytest.raises(QCError, match=r"matmul\.epilogue"):
            MatmulSpec.parse(f"{W} n=32 k=64 y={function}({arguments})")
