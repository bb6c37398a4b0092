"""What the tensors of a packed weight are: one description, which everybody who reads them checks."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import QCError
from qcompile.ir.codec import check_parts, clamped, dequantize, part_names, quantize
from qcompile.ir.packing import packed_bytes, packed_parts
from qcompile.ir.scheme import Scheme

SCHEMES = [
    "int8/axis0:fp32", "int8/axis1:fp32", "int8/tensor:fp32", "uint4/g32:fp16+m", "uint4/g64:bf16+z", "nf4/g64:fp16",
    "int3/g32:fp16@rows", "e2m1/g32:e8m0", "e2m1/g16:e4m3/tensor:fp32", "int4/g32:pow2", "int6/b32x32:fp32",
    "uint5/g32:fp16+m@rows",
]  # fmt: skip


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(16, 64), (17, 70), (1, 1)])
def test_description_is_what_quantize_returns(text: str, n: int, k: int) -> None:
    scheme = Scheme.parse(text)
    parts = quantize(torch.randn(n, k), scheme)
    assert [(tuple(p.shape), p.dtype) for p in parts] == [(p.shape, p.dtype) for p in packed_parts(scheme, n, k)]
    assert packed_bytes(scheme, n, k) == sum(p.numel() * p.element_size() for p in parts)
    check_parts(parts, scheme, n, k)


@pytest.mark.parametrize("text", SCHEMES)
def test_every_part_is_checked(text: str) -> None:
    scheme = Scheme.parse(text)
    parts = quantize(torch.randn(32, 64), scheme)
    for index, name in enumerate(part_names(scheme)):
        other = torch.float64 if parts[index].is_floating_point() else torch.int16
        for wrong in (parts[index][:1], parts[index].to(other), parts[index].unsqueeze(0)):
            changed = [*parts[:index], wrong, *parts[index + 1 :]]
            for refuse in (check_parts, dequantize):
                with pytest.raises(
                    QCError, match=rf"^{name} are .* \[packing\.shape\]\n  where: .* \[32, 64\].*\n.*\n  next: "
                ):
                    refuse(changed, scheme, 32, 64)
    for count in (parts[:-1], [*parts, parts[0]]):
        with pytest.raises(QCError, match=r"codec\.parts\]\n.*\n  next: "):
            check_parts(count, scheme, 32, 64)
    with pytest.raises(QCError, match=r"packing\.shape"):
        check_parts(parts, scheme, 32 + 16, 64)


# A weight of size 1 is scaled by the largest and the smallest numbers that its scales can hold, and beyond.
@pytest.mark.parametrize(
    ("text", "size", "wanted"),
    [
        ("int4/g32:fp16", 1.0, False),
        ("int4/g32:fp16", 1e4, False),
        ("int4/g32:fp16", 1e7, True),
        ("int4/g32:fp16", 1e-9, True),
        ("int4/g32:fp16", 0.0, False),
        ("uint4/g32:fp16+m", 1e7, True),
        ("uint4/g32:fp16+m", 1e-9, True),
        ("int4/g32:bf16", 1e7, False),
        ("int8/axis0:fp32", 1e-9, False),
        ("e2m1/g16:e4m3/tensor:fp32", 1e7, False),
        ("e2m1/g32:e8m0", 1e-9, False),
    ],
)
def test_clamped(text: str, size: float, wanted: bool) -> None:
    scheme = Scheme.parse(text)
    weight = torch.linspace(-1, 1, 17 * 64).reshape(17, 64) * size  # the last panel is padded
    assert clamped(quantize(weight, scheme), scheme, 17) == wanted


def test_a_clamped_minimum() -> None:
    scheme = Scheme.parse("uint4/g32:fp16+m")
    assert clamped(quantize(torch.linspace(1e6, 1e6 + 64, 64).reshape(1, 64), scheme), scheme, 1)
