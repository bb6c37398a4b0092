"""Small models in the spellings that real code uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Spelled(nn.Module):
    """One weight, one way to multiply with it."""

    def __init__(self, spelling: str, k: int = 64, n: int = 48) -> None:
        super().__init__()
        self.spelling = spelling
        shape = {"kn": (k, n), "nk": (n, k), "bkn": (3, k, n)}[_SPELLINGS[spelling][0]]
        self.w = nn.Parameter(torch.randn(shape) / k**0.5)
        self.b = nn.Parameter(torch.randn(n))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _SPELLINGS[self.spelling][1](x, self.w, self.b)
        return result


_SPELLINGS = {
    "linear": ("nk", lambda x, w, b: F.linear(x, w)),
    "linear-bias": ("nk", lambda x, w, b: F.linear(x, w, b)),
    "at": ("kn", lambda x, w, b: x @ w),
    "at-T": ("nk", lambda x, w, b: x @ w.T),
    "at-mT": ("nk", lambda x, w, b: x @ w.mT),
    "matmul": ("kn", lambda x, w, b: torch.matmul(x, w)),
    "method": ("kn", lambda x, w, b: x.matmul(w) + b),
    "mm": ("kn", lambda x, w, b: torch.mm(x.reshape(-1, x.shape[-1]), w)),
    "mm-t": ("nk", lambda x, w, b: x.reshape(-1, x.shape[-1]).mm(w.t())),
    "left": ("nk", lambda x, w, b: w @ x.reshape(-1, x.shape[-1]).t()),
    "addmm": ("kn", lambda x, w, b: torch.addmm(b, x.reshape(-1, x.shape[-1]), w)),
    "addmm-scaled": (
        "kn",
        lambda x, w, b: torch.addmm(b, x.reshape(-1, x.shape[-1]), w, beta=0.5, alpha=2.0),
    ),
    "einsum": (
        "kn",
        lambda x, w, b: torch.einsum("...k,kn->...n".replace("...", "abc"[: x.dim() - 1]), x, w),
    ),
    "einsum-nk": ("nk", lambda x, w, b: torch.einsum("bsk,nk->bns", x, w)),
    "einsum-heads": ("nk", lambda x, w, b: torch.einsum("bsk,hdk->bhsd", x, w.view(4, 12, 64))),
    "bmm": ("bkn", lambda x, w, b: torch.bmm(x.reshape(-1, x.shape[-1]).expand(3, -1, -1), w)),
    "bmm-expanded": ("kn", lambda x, w, b: torch.bmm(x, w.expand(x.shape[0], -1, -1))),
    "baddbmm": ("bkn", lambda x, w, b: torch.baddbmm(b, x.reshape(-1, x.shape[-1]).expand(3, -1, -1), w)),
    "batched": ("bkn", lambda x, w, b: x.reshape(-1, x.shape[-1]) @ w),
    "chunks": ("nk", lambda x, w, b: sum(F.linear(x, c) for c in w.chunk(3))),
    "slices": ("kn", lambda x, w, b: x @ w[:, :16] + x @ w[:, 16:32]),
    "cat": ("nk", lambda x, w, b: F.linear(x, torch.cat([w, w[:8]]))),
    "cast": ("nk", lambda x, w, b: F.linear(x.double().float(), w.to(torch.float32))),
}
SPELLINGS = tuple(_SPELLINGS)


class MLP(nn.Module):
    """Gate, up, down with a residual and a norm."""

    def __init__(self, k: int = 64, h: int = 96, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(k, h, bias=bias), nn.Linear(k, h, bias=bias)
        self.down = nn.Linear(h, k, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Attention(nn.Module):
    """Grouped-query attention with a fused-size check on q, k, v."""

    def __init__(self, k: int = 64, heads: int = 4, kv: int = 2, bias: bool = False) -> None:
        super().__init__()
        self.heads, self.kv, self.d = heads, kv, k // heads
        self.q, self.k = nn.Linear(k, k, bias=bias), nn.Linear(k, kv * self.d, bias=bias)
        self.v, self.o = nn.Linear(k, kv * self.d, bias=bias), nn.Linear(k, k, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.d).transpose(1, 2)
        k = self.k(x).view(b, t, self.kv, self.d).transpose(1, 2).repeat_interleave(self.heads // self.kv, 1)
        v = self.v(x).view(b, t, self.kv, self.d).transpose(1, 2).repeat_interleave(self.heads // self.kv, 1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(b, t, -1))


class TinyLM(nn.Module):
    """Tied embedding and head around `layers` blocks."""

    def __init__(self, vocab: int = 128, k: int = 64, layers: int = 3, bias: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, k)
        self.layers = nn.ModuleList(nn.Sequential(Attention(k, bias=bias), MLP(k, bias=bias)) for _ in range(layers))
        self.head = nn.Linear(k, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits
