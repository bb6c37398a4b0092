"""The order in which tensor-core instructions take the columns of an operand in 16-bit floats.

A lane holds columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each 16 (packing mma16), as `mma` and `wgmma` want them (PTX ISA). But
where an operand was joined from pieces, Triton's compiler gives `mma.sync`, and AMD's instructions, four neighbouring columns
of a lane, 4t to 4t + 3: in which order columns are summed is its own choice, if both operands have it. So there the columns
that a lane holds are called 4t to 4t + 3, and rows of x are renamed in the same way. Both are new names of registers; without
them, lanes would exchange every decoded weight. Bytes (packing mma8) are four neighbouring columns everywhere.

Only speed depends on the order.
"""

from __future__ import annotations

_SYNC = ("sm_7", "sm_8", "sm_12")  # architectures whose instructions are mma.sync


def natural(architecture: str, *, amd: bool = True) -> bool:
    """The constexpr NATURAL of kernels: whether columns keep their order.

    Args:
        architecture: "sm_90", "gfx942", ...
        amd: the answer for AMD's, where lanes exchange codes in either order and the rest of the kernel decides.
    """
    return amd if architecture.startswith("gfx") else not architecture.startswith(_SYNC)


# Dimensions of a decoded operand, (unit, half, panel, row, t, word, i1, b), as rows and columns of a product.
STRAIGHT = "(2, 1, 3, 0, 5, 6, 4, 7)"
PERMUTED = f"{STRAIGHT} if NATURAL else (2, 1, 3, 0, 5, 4, 6, 7)"

# Device functions.
HELPERS = {
    "ordered": '''@triton.jit
def ordered(x, NATURAL: tl.constexpr):
    """Rows of the other operand in the order of the instruction's columns."""
    if not NATURAL:
        blocks = tl.permute(tl.reshape(x, (x.shape[0] // 16, 2, 4, 2, x.shape[1])), (0, 2, 1, 3, 4))
        x = tl.reshape(blocks, (x.shape[0], x.shape[1]))
    return x''',
    "place": '''@triton.jit
def place(index, NATURAL: tl.constexpr):
    """The column of a step that each of the instruction's columns is: what `ordered` does, of indices."""
    if not NATURAL:
        index = index // 16 * 16 + index % 4 // 2 * 8 + index % 16 // 4 * 2 + index % 2
    return index''',
}
