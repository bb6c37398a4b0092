"""Block sizes of the CPU kernels, per instruction set and activation digits.

Measured on Zen 4 (2 cores, 32 KB L1, 1 MB L2), for avx2 with AVX-512 switched off in the compiler. They follow from the
register files: `rows` x panels accumulators (twice that for two digits) and one or two temporaries must fit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Blocking:
    """Sizes that the driver is compiled with.

    Attributes:
        rows: rows of a register block of the matrix-matrix kernel.
        few_rows: up to this many rows the codes are streamed once and unpacked on the fly.
        stripe: rows that share one unpacked panel (a multiple of `rows` near this number).
        chunk: k values of a panel that are unpacked at a time, in units of 32.
        ahead: bytes that the streaming kernel prefetches ahead.
        chunks: how many pieces each thread's share of the panels is handed out in.
        serial_below: weights times rows (at most 16) below which one thread does the work.
    """

    rows: int
    few_rows: int = 8
    stripe: int = 256
    chunk: int = 32
    ahead: int = 4096
    chunks: int = 8
    serial_below: int = 60_000


# Key: instruction set, arithmetic ("digits1": int8 activations, "digits2": 16-bit ones, "float").
BLOCKING: Mapping[tuple[str, str], Blocking] = {
    ("avx512vnni", "digits1"): Blocking(rows=12),
    ("avx512vnni", "digits2"): Blocking(rows=8),
    ("avx512vnni", "float"): Blocking(rows=12, chunk=8),
    ("avx2", "digits1"): Blocking(rows=6, few_rows=4),
    ("avx2", "digits2"): Blocking(rows=3, few_rows=4),
    ("avx2", "float"): Blocking(rows=6, few_rows=4, chunk=8),
    ("portable", "digits1"): Blocking(rows=4, few_rows=4),
    ("portable", "digits2"): Blocking(rows=4, few_rows=4),
    ("portable", "float"): Blocking(rows=4, few_rows=4, chunk=8),
}


# Rows from which torch's own bf16 layer, where the CPU has bf16 matrix instructions, is faster than the kernel. Measured on
# Zen 4 at 1024 x 1024 and 3072 x 768 (`bench/kernels/cpu.py --dtype bf16 --rows ...`). Against fp32 layers, up to 512 rows,
# the least was 0.98, of a 6-bit float with avx2 at 512. Key as above; a kernel that is not listed did not lose.
FLOAT_WINS: Mapping[tuple[str, str], int] = {
    ("avx512vnni", "digits2"): 256,
    ("avx512vnni", "float"): 48,
    ("avx2", "digits1"): 96,
    ("avx2", "digits2"): 64,
    ("avx2", "float"): 24,
}
