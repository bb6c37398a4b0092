"""A key/value cache of low-bit codes: pages, appending, and what attention over it means.

A page holds `page` tokens (128, more for formats of less than 4 bits) of every kv head. Each head of each token has one
scale for its key and one for its value. Codes lie as `mma16` packs them (`packing.py`), so that a decode kernel takes both
operands from registers, with one 16-byte load per lane:

* keys: the matrix `[tokens, head_dim]`. Where a head is shorter than one unit of the packing (128 columns at 4 bits, 64 at
  8) a row of the packing holds `fold` tokens beside each other, r, r + rows, ..., so nothing is padded.
* values: the matrix `[head_dim, tokens]`, for the product with the probabilities sums over tokens. A step of an instruction
  is 16 columns, and the codes of a word's i-th fields make up step i: columns are ordered so that the tokens of step i are
  the i-th part of the page. So probabilities are cut into whole pieces, and one token's codes of less than 8 bits share
  their bytes with other steps' tokens.

A table of page numbers per sequence says where its tokens are, as in vLLM's paged attention (Kwon et al., 2023,
arXiv 2309.06180). Everything here is plain torch on any device, without branches on values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qcompile.errors import QCError
from qcompile.ir.codec import decode, encode
from qcompile.ir.granularity import PerToken
from qcompile.ir.packing import PANEL, ceil_div, pack_codes, packed_shape, unit_columns, unpack_codes
from qcompile.ir.qparams import QParams, choose_qparams
from qcompile.ir.scheme import Scheme

PAGE = 128  # tokens of a page at 4 bits and more
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class CacheLayout:
    """Where the codes of a cache lie.

    Attributes:
        key, value: schemes, each `FORMAT/token:SCALE` with a scale that is a float. head_dim: elements of a head, 1 to 256.

    Raises:
        QCError `kvcache.scheme`, `kvcache.head-dim`.
    """

    key: Scheme
    value: Scheme
    head_dim: int

    def __post_init__(self) -> None:
        for name, scheme in (("key", self.key), ("value", self.value)):
            if not isinstance(scheme.granularity, PerToken) or scheme.scale.zero or scheme.scale.format.kind != "float":
                raise QCError(
                    "kvcache.scheme",
                    f"the {name}s of a cache cannot be {scheme}",
                    why="each token has one scale per head, a float, and no zero point or minimum",
                    next=f"write {scheme.format}/token:fp32 or {scheme.format}/token:fp16",
                )
        if self.key.scale != self.value.scale:
            raise QCError(
                "kvcache.scheme",
                f"scales of keys are {self.key.scale.format}, those of values {self.value.scale.format}",
                why="the two scales of a token lie beside each other in one tensor",
            )
        if not 1 <= self.head_dim <= MAX_HEAD_DIM:
            raise QCError(
                "kvcache.head-dim",
                f"heads of {self.head_dim} elements",
                why=f"the sums of a head must stay in registers: 1 to {MAX_HEAD_DIM} elements",
            )

    @staticmethod
    def of(key: str, head_dim: int, value: str = "") -> CacheLayout:
        """From the text of schemes; values are as keys if not said otherwise."""
        return CacheLayout(Scheme.parse(key), Scheme.parse(value or key), head_dim)

    @property
    def page(self) -> int:
        """Tokens of a page: whole units of the packing."""
        return max(PAGE, unit_columns(self.value.format.bits))

    @property
    def fold(self) -> int:
        """Tokens whose keys share a row of the packing: 1, 2 or 4, a unit having four words."""
        unit = unit_columns(self.key.format.bits)
        return next((fold for fold in (4, 2) if fold * self.head_dim <= unit), 1)

    @property
    def key_columns(self) -> int:
        """Columns that a row of the keys' packing has: `fold` heads, padded to whole units."""
        unit = unit_columns(self.key.format.bits)
        return ceil_div(self.fold * self.head_dim, unit) * unit

    @property
    def value_rows(self) -> int:
        """Rows of the values' packing: a head, padded to whole panels."""
        return ceil_div(self.head_dim, PANEL) * PANEL

    @property
    def value_steps(self) -> int:
        """Parts of a page that are multiplied one after the other (see the module)."""
        return 8 // min(self.value.format.planes)

    @property
    def key_bytes(self) -> int:
        """Of one head of a page."""
        return math.prod(packed_shape(self.key.format.bits, self.page // self.fold, self.key_columns, "mma16"))

    @property
    def value_bytes(self) -> int:
        """Of one head of a page."""
        return math.prod(packed_shape(self.value.format.bits, self.value_rows, self.page, "mma16"))

    def pack_keys(self, codes: Tensor) -> Tensor:
        """uint8 `[X, page, head_dim]` (X pages of one head) to `[X, key_bytes]`."""
        x, rows, columns = codes.shape[0], self.page // self.fold, self.key_columns // self.fold
        codes = functional.pad(codes, (0, columns - self.head_dim)).reshape(x, self.fold, rows, columns)
        matrix = codes.transpose(1, 2).reshape(x * rows, self.key_columns)
        return pack_codes(matrix, self.key.format.bits, "mma16").reshape(x, -1)

    def unpack_keys(self, packed: Tensor) -> Tensor:
        """Invert `pack_keys`."""
        x, rows, columns = packed.shape[0], self.page // self.fold, self.key_columns // self.fold
        matrix = _unpack(packed, self.key.format.bits, rows, self.key_columns)
        codes = matrix.reshape(x, rows, self.fold, columns).transpose(1, 2).reshape(x, self.page, columns)
        return codes[..., : self.head_dim]

    def pack_values(self, codes: Tensor) -> Tensor:
        """uint8 `[X, page, head_dim]` (X pages of one head) to `[X, value_bytes]`."""
        x, steps = codes.shape[0], self.value_steps
        codes = functional.pad(codes, (0, self.value_rows - self.head_dim)).transpose(1, 2)
        codes = codes.reshape(x * self.value_rows, steps, self.page // (16 * steps), 16)
        matrix = codes.transpose(1, 2).reshape(x * self.value_rows, self.page)
        return pack_codes(matrix, self.value.format.bits, "mma16").reshape(x, -1)

    def unpack_values(self, packed: Tensor) -> Tensor:
        """Invert `pack_values`."""
        x, steps = packed.shape[0], self.value_steps
        matrix = _unpack(packed, self.value.format.bits, self.value_rows, self.page)
        codes = matrix.reshape(x * self.value_rows, self.page // (16 * steps), steps, 16).transpose(1, 2)
        return codes.reshape(x, self.value_rows, self.page).transpose(1, 2)[..., : self.head_dim]


@dataclass(frozen=True)
class Cache:
    """Tensors of a cache; they are written in place.

    Attributes:
        keys, values: uint8 `[pages, heads, key_bytes]` and `[pages, heads, value_bytes]`.
        scales: `[pages, heads, page, 2]`, a token's key's and value's, in the dtype of the schemes' scales: two of 16 bits
            are one word, which asynchronous copies can move.
    """

    layout: CacheLayout
    keys: Tensor
    values: Tensor
    scales: Tensor

    @staticmethod
    def empty(layout: CacheLayout, pages: int, heads: int, device: torch.device | str | None = None) -> Cache:
        """A cache of `pages` pages with `heads` kv heads. Slots may hold anything before they are written, but padding of the
        layout stays 0."""
        return Cache(
            layout,
            torch.zeros(pages, heads, layout.key_bytes, dtype=torch.uint8, device=device),
            torch.zeros(pages, heads, layout.value_bytes, dtype=torch.uint8, device=device),
            torch.zeros(pages, heads, layout.page, 2, dtype=layout.key.scale.format.dtype, device=device),
        )

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors, as kernels take them."""
        return self.keys, self.values, self.scales


def append(cache: Cache, keys: Tensor, values: Tensor, pages: Tensor, slots: Tensor) -> None:
    """Write tokens to places of their own. No bit of any other token is changed.

    Args:
        keys, values: `[N, heads, head_dim]`, any float dtype. A token that holds NaN or infinity gets a scale of NaN.
        pages, slots: int64 `[N]`: the page of each token and its place in it. No place twice in one call.
    """
    layout, (n, heads) = cache.layout, keys.shape[:2]
    for x, scheme, pack, stored, scales, places in (
        (keys, layout.key, layout.pack_keys, cache.keys, cache.scales[..., 0], _places(layout, "key")),
        (values, layout.value, layout.pack_values, cache.values, cache.scales[..., 1], _places(layout, "value")),
    ):
        codes, scale = _encode(x, scheme)
        scales[pages, :, slots] = scale
        at, mask = (t.to(x.device)[slots].repeat_interleave(heads, 0) for t in places)
        page = codes.new_zeros(n * heads, layout.page, layout.head_dim)
        page[torch.arange(n * heads, device=x.device), slots.repeat_interleave(heads)] = codes.flatten(0, 1)
        wanted = pack(page).gather(1, at)
        head = (pages[:, None] * heads + torch.arange(heads, device=x.device)).reshape(-1, 1)
        flat, index = stored.view(-1), head * stored.shape[2] + at
        # Adding the difference changes a token's own bits only, and tokens that share a byte add theirs up.
        flat.index_put_((index,), wanted - (flat[index] & mask), accumulate=True)


def fill(cache: Cache, keys: Tensor, values: Tensor, pages: Tensor) -> None:
    """Write whole pages.

    Args:
        keys, values: `[N, page, heads, head_dim]`. pages: int64 `[N]`, none twice.
    """
    layout, (n, _, heads) = cache.layout, keys.shape[:3]
    for x, scheme, pack, stored, scales in (
        (keys, layout.key, layout.pack_keys, cache.keys, cache.scales[..., 0]),
        (values, layout.value, layout.pack_values, cache.values, cache.scales[..., 1]),
    ):
        codes, scale = _encode(x.transpose(1, 2), scheme)
        stored[pages] = pack(codes.flatten(0, 1)).reshape(n, heads, -1)
        scales[pages] = scale


def extend(cache: Cache, keys: Tensor, values: Tensor, table: Tensor, length: int) -> None:
    """Write the next tokens of one sequence: whole pages at once, those at the ends without a bit of any other token.

    Args:
        keys, values: `[N, heads, head_dim]`. table: int `[pages of the sequence]`. length: tokens it has already.
    """
    page, n, at = cache.layout.page, keys.shape[0], table.to(torch.int64)
    first = min(-length % page, n)
    whole = (n - first) // page
    middle = slice(first, first + whole * page)
    if whole:
        start, shape = ceil_div(length, page), (whole, page, *keys.shape[1:])
        fill(cache, keys[middle].reshape(shape), values[middle].reshape(shape), at[start : start + whole])
    for end in (slice(0, first), slice(middle.stop, n)):
        if end.start < end.stop:
            number, slot = divmod(length + end.start, page)
            _put(cache, keys[end], values[end], at[number], slot)


def _put(cache: Cache, keys: Tensor, values: Tensor, page: Tensor, slot: int) -> None:
    """Write tokens `[n, heads, head_dim]` into one page, from a slot on."""
    layout, slots = cache.layout, slice(slot, slot + keys.shape[0])
    for i, (x, scheme, pack, stored) in enumerate(
        (
            (keys, layout.key, layout.pack_keys, cache.keys),
            (values, layout.value, layout.pack_values, cache.values),
        )
    ):
        codes, scale = _encode(x.transpose(0, 1), scheme)
        new, mask = (codes.new_zeros(codes.shape[0], layout.page, layout.head_dim) for _ in range(2))
        new[:, slots], mask[:, slots] = codes, (1 << scheme.format.bits) - 1
        stored[page] = (stored[page] & ~pack(mask)) | pack(new)
        cache.scales[page, :, slots, i] = scale


def read_codes(cache: Cache, table: Tensor, length: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """What is stored for one sequence.

    Args:
        table: int `[pages of the sequence]`, at least ceil(length / page) of them.

    Returns:
        Codes of keys and of values, uint8 `[length, heads, head_dim]` each; scales `[length, heads, 2]` as stored.
    """
    layout, heads = cache.layout, cache.keys.shape[1]
    at = table[: ceil_div(length, layout.page)].to(torch.int64)

    def tokens(t: Tensor) -> Tensor:
        """`[pages, heads, page, ...]` to `[length, heads, ...]`."""
        return t.transpose(1, 2).flatten(0, 1)[:length]

    keys = layout.unpack_keys(cache.keys[at].flatten(0, 1)).unflatten(0, (-1, heads))
    values = layout.unpack_values(cache.values[at].flatten(0, 1)).unflatten(0, (-1, heads))
    return (tokens(keys), tokens(values)), tokens(cache.scales[at])


def read(cache: Cache, table: Tensor, length: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values of one sequence, decoded: `[length, heads, head_dim]` each. Arguments as of `read_codes`."""
    (keys, values), scales = read_codes(cache, table, length)
    key, value = scales.split(1, -1)
    layout = cache.layout
    return decode(keys, layout.key, QParams(key), dtype), decode(values, layout.value, QParams(value), dtype)


def attention(q: Tensor, cache: Cache, table: Tensor, lengths: Tensor | Sequence[int], scale: float) -> Tensor:
    """softmax(scale q K^T) V of one query per sequence over the decoded cache; what kernels are tested against.

    Args:
        q: `[B, heads, head_dim]`; head h reads kv head `h // (heads / kv heads)`. table: int32 `[B, pages]`.
        lengths: int `[B]`. A sequence without tokens gives zeros.

    Returns:
        As `q`. Computed in float64.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for b, length in enumerate(int(v) for v in lengths):
        if length == 0:
            continue
        keys, values = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in read(cache, table[b], length))
        s = torch.einsum("hd,thd->ht", q[b].double(), keys.double()) * scale
        out[b] = torch.einsum("ht,thd->hd", s.softmax(1), values.double())
    return out.to(q.dtype)


def _encode(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Codes, uint8 `x.shape`, and scales `x.shape[:-1]`."""
    qparams = choose_qparams(x, scheme)
    return encode(x, scheme, qparams), qparams.scale.squeeze(-1)


def _unpack(packed: Tensor, bits: int, rows: int, columns: int) -> Tensor:
    """`[X, bytes]` of matrices of whole panels to codes `[X * rows, columns]`."""
    n = packed.shape[0] * rows
    return unpack_codes(packed.reshape(packed_shape(bits, n, columns, "mma16")), bits, n, columns, "mma16")


@functools.lru_cache(maxsize=64)
def _places(layout: CacheLayout, which: str) -> tuple[Tensor, Tensor]:
    """For each slot of a page the bytes that hold a part of its codes, int64 `[page, n]`, and their bits, uint8.

    The layout itself tells: packed as codes, each binary digit of a slot's number lies where the slot's codes do.
    """
    scheme, pack = (layout.key, layout.pack_keys) if which == "key" else (layout.value, layout.pack_values)
    slot, ones = torch.arange(layout.page), (1 << scheme.format.bits) - 1

    def bits(of: Tensor) -> Tensor:
        """Bits of the packed page, `[bytes, 8]`, whose slots have `of` 1."""
        page = (of * ones).to(torch.uint8)[None, :, None].expand(1, -1, layout.head_dim)
        return pack(page)[0, :, None].long() >> torch.arange(8) & 1

    owner = sum((bits(slot >> digit & 1) << digit for digit in range(layout.page.bit_length())), torch.tensor(0))
    used = bits(torch.ones_like(slot))
    byte, bit = used.nonzero(as_tuple=True)
    place, which_place = (owner[byte, bit] * len(used) + byte).unique(return_inverse=True)
    mask = torch.zeros_like(place).index_add(0, which_place, 1 << bit)
    return (place % len(used)).reshape(layout.page, -1), mask.to(torch.uint8).reshape(layout.page, -1)
