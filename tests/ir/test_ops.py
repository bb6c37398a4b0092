"""The operators refuse what they would otherwise read beyond: ids outside of a table, parts of another weight."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import qcompile.ir.ops  # noqa: F401  (registers the operators)
from qcompile.errors import QCError
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.hadamard import random_signs, rotate

OPS, SCHEME = torch.ops.qcompile, "int8/g64:fp16"


def table() -> tuple[list[Tensor], Tensor]:
    parts = quantize(torch.randn(20, 64), SCHEME)
    return parts, dequantize(parts, SCHEME, 20, 64)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_lookup(dtype: torch.dtype) -> None:
    parts, rows = table()
    ids = torch.tensor([[19, 0], [3, 3]], dtype=dtype)
    assert torch.equal(OPS.qembedding(ids, parts, SCHEME, 20, 64, torch.float32), rows[ids.long()])
    assert OPS.qembedding(ids[:0], parts, SCHEME, 20, 64, torch.float32).shape == (0, 2, 64)


@pytest.mark.parametrize("wrong", [20, 31, -1])  # 31: a padded row of the last panel
def test_an_id_beyond_the_table_is_an_error(wrong: int) -> None:
    with pytest.raises(IndexError):
        OPS.qembedding(torch.tensor([1, wrong]), table()[0], SCHEME, 20, 64, torch.float32)


def test_parts_of_another_weight_are_refused_when_tracing() -> None:
    parts, _ = table()
    with FakeTensorMode() as mode:
        x = torch.empty(3, 64)
        good = [mode.from_tensor(part) for part in parts]
        assert OPS.qmm(x, good, [], f"{SCHEME} n=20 k=64").shape == (3, 20)
        assert OPS.decode(good, SCHEME, 20, 64, torch.bfloat16).dtype == torch.bfloat16
        for bad in (good[:1], [good[0][:1], good[1]], [good[0], good[1].float()]):
            for call in (
                lambda bad=bad: OPS.qmm(x, bad, [], f"{SCHEME} n=20 k=64"),
                lambda bad=bad: OPS.decode(bad, SCHEME, 20, 64, torch.float32),
                lambda bad=bad: OPS.qembedding(torch.zeros(2, dtype=torch.int64), bad, SCHEME, 20, 64, torch.float32),
            ):
                with pytest.raises(QCError, match=r"codec\.parts|packing\.shape"):
                    call()


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_are_decoded_to_real_floats(dtype: torch.dtype) -> None:
    parts, _ = table()
    for call in (
        lambda: OPS.decode(parts, SCHEME, 20, 64, dtype),
        lambda: OPS.qembedding(torch.zeros(2, dtype=torch.int64), parts, SCHEME, 20, 64, dtype),
    ):
        with pytest.raises(QCError, match=f"no result in {dtype}") as caught:
            call()
        assert caught.value.code == "matmul.operands"


def test_operands_of_other_sizes_are_refused_when_tracing() -> None:
    parts, _ = table()
    with FakeTensorMode() as mode:
        good, x = [mode.from_tensor(part) for part in parts], torch.empty(3, 64)
        spec = f"{SCHEME} n=20 k=64 y=acc+e0+e1 e=row,mat"
        assert OPS.qmm(x, good, [torch.empty(20), torch.empty(3, 20)], spec).shape == (3, 20)
        wrong = [
            (torch.empty(3, 8), [torch.empty(20), torch.empty(3, 20)]),
            (x, [torch.empty(3), torch.empty(3, 20)]),
            (x, [torch.empty(20), torch.empty(4, 20)]),
            (x, [torch.empty(20)]),
        ]
        for activation, extras in wrong:
            with pytest.raises((QCError, RuntimeError)):
                OPS.qmm(activation, good, extras, spec)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
def test_rotate_is_an_operator(signed: bool, inverse: bool) -> None:
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    signs = random_signs(24, 1) if signed else None
    assert torch.equal(OPS.rotate(x, 12, signs, inverse), rotate(x, 12, signs, inverse))
    assert OPS.rotate(x, 12, signs, inverse, torch.float32).dtype == torch.float32
    torch.library.opcheck(OPS.rotate.default, (x, 12, signs, inverse))
    assert torch.autograd.gradcheck(lambda t: OPS.rotate(t, 12, signs, inverse), (x,))
    with FakeTensorMode():
        fake = torch.empty(2, 3, 24)
        # An order that no other test asks for: a matrix of fakes would be kept for all.
        assert OPS.rotate(torch.empty(5, 2**9 * 3 * 8), 2**9 * 3 * 8).shape == (5, 2**9 * 3 * 8)
        for wrong in ((fake, 5), (fake, 16), (fake, 12, torch.ones(12, dtype=torch.int8))):
            with pytest.raises(QCError, match=r"hadamard\.size|rotate\."):
                OPS.rotate(*wrong)


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
def test_integers_are_not_rotated(dtype: torch.dtype, fake: bool) -> None:
    with FakeTensorMode() if fake else nullcontext():
        with pytest.raises(QCError, match=f"no operand in {dtype}") as caught:
            OPS.rotate(torch.zeros(2, 16, dtype=dtype), 16)
        assert caught.value.code == "rotate.dtype"
        with pytest.raises(QCError, match=f"no result in {dtype}"):
            OPS.rotate(torch.zeros(2, 16), 16, None, False, dtype)


def test_static_scales_are_checked() -> None:
    parts, x = quantize(torch.randn(20, 64), "int8/axis0"), torch.randn(3, 64)
    spec = "int8/axis0 n=20 k=64 act=uint8/tensor:fp32+z static"
    scale, zero = torch.tensor([0.1]), torch.tensor([3], dtype=torch.uint8)
    assert OPS.qmm(x, [*parts, scale, zero], [], spec).shape == (3, 20)
    bad = [
        [scale],
        [],
        [scale[0], zero],
        [scale.half(), zero],
        [scale, zero.long()],
        [scale.expand(2), zero],
        [zero, scale],
    ]
    with FakeTensorMode() as mode:
        for static in bad:
            fakes = [mode.from_tensor(t) for t in (x, *parts, *static)]
            with pytest.raises(QCError, match=r"matmul\.operands"):
                OPS.qmm(fakes[0], fakes[1:], [], spec)
    for static in bad:
        with pytest.raises(QCError, match=r"matmul\.operands"):
            OPS.qmm(x, [*parts, *static], [], spec)
