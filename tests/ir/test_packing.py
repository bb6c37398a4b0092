"""Layouts: bijective, byte-exact, and cut along rows without touching a byte."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import QCError
from qcompile.ir.packing import (
    PANEL,
    pack_codes,
    pack_scales,
    packed_shape,
    unpack_codes,
    unpack_scales,
)
from qcompile.testing import oracles
from qcompile.testing.strategies import code_matrices, shapes

LAYOUTS = ("tile16", "mma16", "mma8", "rows")
widths = st.integers(1, 8)


@given(widths, st.sampled_from(LAYOUTS), st.data())
def test_unpack_inverts_pack(bits: int, packing: str, data: st.DataObject) -> None:
    codes = data.draw(code_matrices(bits))
    (n, k), packed = codes.shape, pack_codes(codes, bits, packing)
    assert tuple(packed.shape) == packed_shape(bits, n, k, packing)
    assert packed.is_contiguous()
    assert torch.equal(unpack_codes(packed, bits, n, k, packing), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@given(st.data())
def test_layouts_are_the_documented_loops(bits: int, data: st.DataObject) -> None:
    codes = data.draw(code_matrices(bits, max_side=18))
    assert torch.equal(pack_codes(codes, bits), oracles.pack_tile16(codes, bits))
    assert torch.equal(pack_codes(codes, bits, "rows"), oracles.pack_rows(codes, bits))
    assert torch.equal(pack_codes(codes, bits, "mma16"), oracles.pack_mma16(codes, bits))
    assert torch.equal(pack_codes(codes, bits, "mma8"), oracles.pack_mma16(codes, bits, octets=True))


def hexadecimal(block: Tensor, start: int, count: int) -> str:
    return bytes(block[start : start + count].tolist()).hex(" ")


def test_golden_bytes_of_four_bits() -> None:
    # Row 0 holds 1..10. Tile 0 serves columns 0..7: byte j has column j below and column 4 + j above, so
    # 1 | 5 << 4 = 51, 2 | 6 << 4 = 62, ...; tile 1 (64 bytes on) serves columns 8..15: 9 and 10 below.
    # Row 1 takes bytes 4..7 of each tile; row 16 starts the next panel.
    codes = torch.zeros(17, 10, dtype=torch.uint8)
    codes[0] = torch.arange(1, 11)
    codes[1, 4:8] = 15
    codes[16, 9] = 7
    packed = pack_codes(codes, 4)
    assert packed.shape == (2, 1, 256)
    assert hexadecimal(packed[0, 0], 0, 8) == "51 62 73 84 f0 f0 f0 f0"
    assert hexadecimal(packed[0, 0], 64, 8) == "09 0a 00 00 00 00 00 00"
    assert hexadecimal(packed[1, 0], 64, 4) == "00 07 00 00"
    assert int((packed != 0).sum()) == 11


def test_golden_bytes_of_eight_bits() -> None:
    # A byte is a code. Tile t serves columns 4t..4t+3, row o takes bytes 4o..4o+3; column 33 is in block 1.
    codes = torch.zeros(2, 34, dtype=torch.uint8)
    codes[0, :6] = torch.tensor([0x10, 0x11, 0x12, 0x13, 0x14, 0x15])
    codes[1, :4] = torch.tensor([0xA0, 0xA1, 0xA2, 0xA3])
    codes[0, 33] = 0xFF
    packed = pack_codes(codes, 8)
    assert packed.shape == (1, 2, 512)
    assert hexadecimal(packed[0, 0], 0, 8) == "10 11 12 13 a0 a1 a2 a3"
    assert hexadecimal(packed[0, 0], 64, 4) == "14 15 00 00"
    assert hexadecimal(packed[0, 1], 0, 4) == "00 ff 00 00"


def test_golden_bytes_of_six_bits() -> None:
    # 6 = 4 + 2. Code 0b10_1101: its low half d goes to the 4-bit plane (4 tiles, bytes 0..255), its high bits
    # 10 to the 2-bit plane (2 tiles, bytes 256..383), whose tile 0 serves columns 0..15, four to a byte:
    # columns j, 4 + j, 8 + j, 12 + j from the lowest bits up.
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0] = 0b10_1101
    codes[0, 5] = 0b01_0011
    codes[0, 12] = 0b11_0000
    codes[0, 31] = 0b11_1111
    packed = pack_codes(codes, 6)
    assert packed.shape == (1, 1, 384)
    assert hexadecimal(packed[0, 0], 0, 4) == "0d 30 00 00"  # columns 0 and 5 (5 = 4 + 1: byte 1, upper half)
    assert hexadecimal(packed[0, 0], 192, 4) == "00 00 00 f0"  # column 31 = 24 + 4 + 3: tile 3
    assert hexadecimal(packed[0, 0], 256, 4) == "c2 04 00 00"  # 10 of column 0, 11 of column 12; 01 of column 5
    assert hexadecimal(packed[0, 0], 320, 4) == "00 00 00 c0"  # column 31 = 16 + 12 + 3
    assert int((packed != 0).sum()) == 6


def test_golden_bytes_of_three_bits_and_one() -> None:
    # 3 = 2 + 1: the 2-bit plane has bytes 0..127, the 1-bit plane 128..191, one tile: column 4i + j is bit i
    # of byte j.
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, 0], codes[0, 9], codes[0, 30] = 0b111, 0b100, 0b001
    packed = pack_codes(codes, 3)
    assert hexadecimal(packed[0, 0], 0, 4) == "03 00 00 00"
    assert hexadecimal(packed[0, 0], 64, 4) == "00 00 40 00"  # column 30 = 16 + 4*3 + 2
    assert hexadecimal(packed[0, 0], 128, 4) == "01 04 00 00"  # columns 0 and 9 = 4*2 + 1
    signs = (torch.arange(32) % 2 == 0).to(torch.uint8).reshape(1, 32)
    assert hexadecimal(pack_codes(signs, 1)[0, 0], 0, 4) == "ff 00 ff 00"


def test_golden_bytes_of_rows() -> None:
    # 6 bits, 5 columns: ceil(5*4/8) = 3 bytes of low halves, then ceil(5*2/8) = 2 bytes of high bits.
    codes = torch.tensor([[0b10_0001, 0b01_0010, 0b11_0011, 0b00_0100, 0b01_0101]], dtype=torch.uint8)
    assert hexadecimal(pack_codes(codes, 6, "rows")[0], 0, 5) == "21 43 05 36 01"


def test_golden_bytes_of_operands() -> None:
    # Lane 0 holds columns 0, 1, 8, 9 of the first instruction: words' halves 0 and 1 (column mod 2), byte i1 (column
    # div 8); the low nibbles are instruction 0, the high ones instruction 1 (columns 16..31). Word 1 begins at column 32.
    codes = torch.zeros(17, 130, dtype=torch.uint8)
    codes[0, :10] = torch.arange(1, 11)
    codes[0, 16], codes[0, 32] = 15, 14
    codes[8, 0] = 7  # the second half of the tile
    codes[0, 128] = 6  # the second tile
    codes[16, 3] = 5  # the second panel; column 3 is lane 1
    packed = pack_codes(codes, 4, "mma16")
    assert packed.shape == (2, 2 * 1024)
    assert hexadecimal(packed[0], 0, 8) == "f1 09 02 0a 0e 00 00 00"
    assert hexadecimal(packed[0], 16, 4) == "03 00 04 00"  # lane 1: columns 2, 3
    assert hexadecimal(packed[0], 512, 4) == "07 00 00 00"
    assert hexadecimal(packed[0], 1024, 4) == "06 00 00 00"
    assert hexadecimal(packed[1], 16, 4) == "00 00 05 00"
    assert int((packed != 0).sum()) == 14
    # For bytes lane 0 holds columns 0 .. 3: a word's four bytes.
    packed = pack_codes(codes, 4, "mma8")
    assert hexadecimal(packed[0], 0, 8) == "f1 02 03 04 0e 00 00 00"
    assert hexadecimal(packed[0], 16, 4) == "05 06 07 08"  # lane 1: columns 4 .. 7
    assert hexadecimal(packed[1], 0, 4) == "00 00 00 05"


@given(widths, st.integers(0, 3), st.integers(0, 3), st.data())
def test_packing_commutes_with_row_shards(bits: int, first: int, count: int, data: st.DataObject) -> None:
    codes = data.draw(code_matrices(bits))
    start, stop = first * PANEL, (first + count) * PANEL
    shard = codes[start:stop]
    for packing in ("tile16", "mma16", "mma8"):
        whole = pack_codes(codes, bits, packing)
        assert torch.equal(whole[first : first + count], pack_codes(shard, bits, packing))
    assert torch.equal(pack_codes(codes, bits, "rows")[start:stop], pack_codes(shard, bits, "rows"))


@given(shapes(), st.sampled_from(LAYOUTS), st.sampled_from([torch.float16, torch.float32, torch.int8]), st.data())
def test_scales_round_trip_and_pad(
    shape: tuple[int, int], packing: str, dtype: torch.dtype, data: st.DataObject
) -> None:
    pad = data.draw(st.integers(0, 100))
    scales = torch.arange(shape[0] * shape[1]).remainder(97).reshape(shape).to(dtype)
    packed = pack_scales(scales, packing, pad)
    assert packed.dtype == dtype
    assert torch.equal(unpack_scales(packed, shape[0], packing), scales)
    if packing != "rows":
        assert packed.shape[1:] == (shape[1], PANEL)
        rows = unpack_scales(packed, packed.shape[0] * PANEL)
        assert bool((rows[shape[0] :] == pad).all())


def test_wrong_tensors_are_refused() -> None:
    with pytest.raises(QCError, match=r"packing\.codes"):
        pack_codes(torch.zeros(2, 2), 4)
    with pytest.raises(QCError, match=r"packing\.shape\]\n  where: 4-bit tile16 codes of \[17, 32\]\n.*\n  next: "):
        unpack_codes(torch.zeros(1, 1, 256, dtype=torch.uint8), 4, 17, 32)
    with pytest.raises(QCError, match=r"format\.width"):
        pack_codes(torch.zeros(2, 2, dtype=torch.uint8), 9)
