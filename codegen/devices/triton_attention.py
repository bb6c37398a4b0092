"""Attention of one query per sequence over a cache of low-bit codes: launching the Triton kernel.

What the kernel computes and how is in `triton_attention_text`, how far off it may be in `triton_attention_bounds`, what it
means in `qcompile.ir.kvcache.attention`. Like the matmul it needs no GPU to be proven.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from qcompile import compat
from qcompile.codegen.devices.triton_attention_text import HEADS, AttentionSpec, AttentionText, attention_text
from qcompile.codegen.devices.triton_launch import SplitMemory
from qcompile.codegen.devices.triton_order import natural
from qcompile.codegen.devices.triton_overlap import begin
from qcompile.errors import QCError
from qcompile.ir.kvcache import Cache, CacheLayout
from qcompile.ir.packing import ceil_div

DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
WAVES = 2  # blocks per multiprocessor that a sequence is split for
SHARE = 3  # blocks that share a multiprocessor's memory for pages under way


@dataclass(frozen=True)
class Block:
    """How a launch is cut, and what its blocks are like.

    Attributes:
        splits: blocks that share a sequence, at most. stages: of the software pipeline, one more than pages under way.
            warps: of a block. natural: the order in which instructions take columns, see `triton_order`; only speed depends on
            it.
    """

    splits: int = 1
    stages: int = 2
    warps: int = 4
    natural: bool = True


@compat.chosen_once(maxsize=1024)
def choose_block(layout: CacheLayout, blocks: int, pages: int, device: torch.device) -> Block:
    """How to cut a call.

    Args:
        blocks: sequences times kv heads (times chunks of 16 query heads). pages: the most that a sequence has.
    """
    gpu = compat.gpu(device)
    splits = min(max(1, WAVES * gpu.processors // max(blocks, 1)), max(1, pages))
    return block_for(layout, gpu.architecture, gpu.shared, splits)


def block_for(layout: CacheLayout, architecture: str, shared: int, splits: int = 1) -> Block:
    """Stages and warps for an architecture ("sm_90", "gfx942", ...) with so many bytes of shared memory for a block."""
    page = layout.key_bytes + layout.value_bytes + 8 * layout.page
    # One to three pages under way; none, but loads into registers, where not even one fits.
    stages = 1 + max(min(3, shared // SHARE // page), 1 if page <= shared * 3 // 4 else 0)
    # The sums of a head and the codes under way are in registers: twice the warps for twice the rows.
    warps = 8 if layout.head_dim > 128 else 4
    return Block(splits, stages, warps, natural(architecture, amd=False))


@functools.lru_cache(maxsize=256)
def text_of(spec: AttentionSpec) -> AttentionText:
    """The text of a spec's kernel."""
    return attention_text(spec)


def decode_attention(
    q: torch.Tensor,
    cache: Cache,
    table: torch.Tensor,
    lengths: torch.Tensor,
    scale: float | None = None,
    block: Block | None = None,
) -> torch.Tensor:
    """softmax(scale q K^T) V of one query per sequence over a cache of codes.

    Args:
        q: `[B, heads, head_dim]`, fp16 or bf16, elements of a head dense; head h reads kv head `h // (heads / kv heads)`.
        cache: pages of codes. Bytes of slots that no sequence has reached may be anything.
        table: int32 `[B, pages]`, rows dense: the pages of each sequence. The first ceil(length / page) of a row are read and
            must be pages of the cache; the others may be anything.
        lengths: int32 `[B]`, dense, 0 up to pages * page (more is cut off there). No token: zeros.
        scale: of the scores, `head_dim ** -0.5` if not given.
        block: how to cut the work, in place of the chosen way.

    Returns:
        As `q`, contiguous. The same bits for the same arguments, whatever the order in which blocks finish.

    Raises:
        QCError: `kvcache.operands` for operands that do not fit together.
    """
    layout = cache.layout
    check(q, cache, table, lengths)
    (batch, heads, dim), kv = q.shape, cache.keys.shape[1]
    y = torch.empty((batch, heads, dim), dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    group = heads // kv
    chunks = ceil_div(group, HEADS)
    blocks = batch * kv * chunks
    block = block or choose_block(layout, blocks, table.shape[1], q.device)
    columns = HEADS if group > HEADS // 2 else HEADS // 2
    text = text_of(AttentionSpec(layout, DTYPES[q.dtype]))
    exponent = (dim**-0.5 if scale is None else scale) * math.log2(math.e)
    rows = text.rows + 2  # the sums of each split, its maximum and its sum of probabilities
    with compat.on(q.device), SplitMemory(blocks, block.splits, columns * rows, lengths) as work:
        compat.triton_kernel(text.source)[blocks, block.splits](
            q, *(part.view(torch.int32) for part in cache.parts), table, lengths, y, *work, exponent,
            kv, group, chunks, table.shape[1], table.stride(0), q.stride(0), q.stride(1), y.stride(0), y.stride(1),
            NH=columns, NATURAL=block.natural, STAGES=block.stages, num_warps=block.warps, num_stages=block.stages,
            **begin(q.device),
        )  # fmt: skip
    return y


def check(q: torch.Tensor, cache: Cache, table: torch.Tensor, lengths: torch.Tensor) -> None:
    """Raise QCError `kvcache.operands` for what a kernel cannot read: it trusts shapes, dtypes and strides."""
    kv, dim = cache.keys.shape[1], cache.layout.head_dim
    said = {
        f"queries [B, heads, {dim}], heads a multiple of {kv}": q.dim() == 3
        and q.shape[2] == dim
        and q.shape[1] % kv == 0,
        "queries in fp16 or bf16, elements of a head beside each other": q.dtype in DTYPES and q.stride(-1) == 1,
        "a table int32 [B, pages], rows dense": table.dtype == torch.int32
        and table.dim() == 2
        and (table.stride(1) == 1 or table.shape[1] < 2),
        "lengths int32 [B], dense": lengths.dtype == torch.int32 and lengths.dim() == 1 and lengths.is_contiguous(),
        "as many queries, rows of the table and lengths": q.shape[0] == table.shape[0] == lengths.shape[0],
        "a cache whose tensors are contiguous": all(part.is_contiguous() for part in cache.parts),
        "everything on one device": {t.device for t in (q, table, lengths, *cache.parts)} == {q.device},
    }
    for wanted, holds in said.items():
        if not holds:
            raise QCError(
                "kvcache.operands",
                f"the kernel wants {wanted}",
                why=f"queries {q.dtype} {list(q.shape)}, table {table.dtype} {list(table.shape)}, "
                f"lengths {lengths.dtype} {list(lengths.shape)}, {kv} kv heads",
            )


__all__ = ["Block", "block_for", "check", "choose_block", "decode_attention", "text_of"]
