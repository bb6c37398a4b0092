"""Assembly in Triton kernels: what it computes, for every input that counts, and that AMD's way computes the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile.codegen.devices.triton import Tile, run, text_of
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, expected
from qcompile.codegen.devices.triton_instructions import Permuted
from qcompile.codegen.devices.triton_numbers import OPERANDS
from qcompile.codegen.spec import KernelSpec
from qcompile.compat import assembly
from qcompile.ir.codec import quantize
from qcompile.ir.formats import FORMATS
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.scheme import Scheme
from qcompile.testing.interpret import interpret

WORDS = [np.random.default_rng(seed).integers(-(2**31), 2**31, 4096).astype(np.int32) for seed in range(3)]


@pytest.mark.parametrize("dtype", OPERANDS)
def test_a_permuted_table_has_every_entry(dtype: str) -> None:
    """All codes of each half of a word: the lower half counts up, the upper one down."""
    half = np.arange(1 << 16, dtype=np.uint32)
    words = (half | (half[::-1] << np.uint32(16))).view(np.int32)
    permuted = Permuted.of(FORMATS["nf4"], OPERANDS[dtype])
    assert permuted is not None
    found = assembly.run(permuted.assembly(), 4, [words])
    table = FORMATS["nf4"].levels().to(OUT_DTYPES[dtype]).view(torch.int16).numpy().view(np.uint16)
    for step in range(2):
        for i1 in range(2):
            both = found[2 * step + i1].view(np.uint32)
            for b in range(2):
                code = words.view(np.uint32) >> np.uint32(4 * step + 8 * i1 + 16 * b) & 15
                assert np.array_equal(both >> np.uint32(16 * b) & 0xFFFF, table[code]), (step, i1, b)


def test_only_tables_are_permuted() -> None:
    assert [name for name, fmt in FORMATS.items() if Permuted.of(fmt, OPERANDS["bf16"])] == ["nf4"]


def test_prmt_chooses_bytes() -> None:
    low, high, choice = WORDS
    (got,) = assembly.run("prmt.b32 $0, $1, $2, $3;", 1, [low, high, choice])
    for a, b, c, word in zip(*(words.tolist() for words in (low, high, choice, got)), strict=True):
        pool = (a & 0xFFFFFFFF).to_bytes(4, "little") + (b & 0xFFFFFFFF).to_bytes(4, "little")
        for i, byte in enumerate((word & 0xFFFFFFFF).to_bytes(4, "little")):
            one = pool[c >> 4 * i & 7]
            assert byte == ((255 if one > 127 else 0) if c >> 4 * i & 8 else one)


def test_lop3_selects_by_a_mask() -> None:
    a, b, mask = WORDS
    (got,) = assembly.run("lop3.b32 $0, $1, $2, $3, 0xE4;", 1, [a, b, mask])
    assert np.array_equal(got, (a & mask) | (b & ~mask))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_floats_in_pairs(dtype: torch.dtype) -> None:
    """A multiply-add that is rounded once, against torch (halves of random bits have all exponents)."""
    name = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    words = [torch.from_numpy(word) for word in WORDS]
    a, b, c = (word.view(dtype).double() for word in words)
    (got,) = assembly.run(f"fma.rn.{name} $0, $1, $2, $3;", 1, WORDS)
    exact = a * b + c
    want = exact.to(dtype)  # torch rounds float64 twice, over float32
    halves = torch.from_numpy(got).view(dtype)
    twice = exact.float().double() != exact
    assert (halves.isnan() == want.isnan()).all()
    finite = ~want.isnan()
    assert torch.equal(halves[finite & ~twice], want[finite & ~twice])
    # Those are one of the two neighbours, and none is nearer.
    left = finite & twice & want.isfinite() & halves.isfinite()
    assert left.any()
    assert ((halves[left].double() - exact[left]).abs() <= (want[left].double() - exact[left]).abs()).all()


def test_a_conversion_to_a_pair() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    (got,) = assembly.run("cvt.rn.bf16x2.f32 $0, $1, $1;", 1, [values.numpy()])
    assert torch.equal(torch.from_numpy(got).view(torch.bfloat16), values.bfloat16().repeat_interleave(2))


def test_other_instructions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="popc"):
        assembly.run("popc.b32 $0, $1;", 1, [WORDS[0]])


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize(
    "scheme", ["nf4/g64:fp16", "uint4/g32:fp16+m", "int4/g16:fp16", "e2m1/g32:e8m0", "int3/g512:fp16"]
)
def test_devices_without_these_instructions(scheme: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget

    spec = KernelSpec(Scheme.parse(f"{scheme}@mma16"), x=dtype, y=dtype)
    n, k = 40, 600
    torch.manual_seed(1)
    x, parts = torch.randn(5, k).to(OUT_DTYPES[dtype]), quantize(torch.randn(n, k) / 8, spec.weight)
    want = expected(spec, x, parts, n, k)
    with interpret():
        from triton.runtime import driver

        assert "is_cuda" in text_of(spec).source
        asked = []

        def target() -> GPUTarget:
            asked.append(1)
            return GPUTarget("hip", "gfx942", 64)

        monkeypatch.setattr(driver.active, "get_current_target", target)
        y = run(spec, x, parts, [], [n], k, Tile(units=2))
    assert asked
    bound = want.bound + ROUNDOFF[dtype] * (want.value.abs() + want.bound) + SMALLEST[dtype]
    assert ((y.double() - want.value).abs() <= bound).all()
