"""A decoder in plain torch with the shapes of Llama 3: random weights, a static cache, one function for prompt and step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Attributes:
        layers, width, heads, shared, head, hidden, vocabulary: as in Llama; `shared` counts the heads of keys and values,
            `head` is the size of one. tied: whether the head is the embedding. theta: base of the rotations.
    """

    layers: int
    width: int
    heads: int
    shared: int
    head: int
    hidden: int
    vocabulary: int
    tied: bool
    theta: float = 500000.0


SHAPES = {
    "1B": Shape(16, 2048, 32, 8, 64, 8192, 128256, True),
    "8B": Shape(32, 4096, 32, 8, 128, 14336, 128256, False),
    "tiny": Shape(1, 64, 4, 2, 16, 128, 96, True),
}


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * self.weight


class Layer(nn.Module):
    """Attention with a static cache, then silu(gate) * up."""

    keys: Tensor
    values: Tensor

    def __init__(self, shape: Shape, batch: int, context: int) -> None:
        super().__init__()
        self.shape = shape
        inner, outer = shape.heads * shape.head, shape.shared * shape.head
        self.first, self.second = Norm(shape.width), Norm(shape.width)
        self.q, self.o = nn.Linear(shape.width, inner, bias=False), nn.Linear(inner, shape.width, bias=False)
        self.k, self.v = (nn.Linear(shape.width, outer, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(batch, shape.shared, context, shape.head))

    def forward(self, x: Tensor, positions: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        x = x + self.attend(self.first(x), positions, turn, mask)
        y = self.second(x)
        out: Tensor = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return out

    def attend(self, x: Tensor, positions: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """Queries that share keys are rows of one query: nothing is repeated."""
        batch, count, _ = x.shape
        s = self.shape
        q, k, v = (t.view(batch, count, -1, s.head).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x)))
        q, k = rotated(q, turn), rotated(k, turn)
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        group = s.heads // s.shared
        q = q.reshape(batch, s.shared, group * count, s.head)
        y = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=mask.repeat(group, 1))
        y = y.reshape(batch, s.heads, count, s.head).transpose(1, 2).reshape(batch, count, s.heads * s.head)
        out: Tensor = self.o(y)
        return out


class Decoder(nn.Module):
    """`(ids [batch, count], positions [count]) -> logits [batch, 1, vocabulary]` of the last position."""

    def __init__(self, shape: Shape, batch: int, context: int) -> None:
        super().__init__()
        self.shape, self.context = shape, context
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(Layer(shape, batch, context) for _ in range(shape.layers))
        self.norm = Norm(shape.width)
        self.lm_head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        if shape.tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(ids)
        angles = positions[:, None].float() * self.frequencies(ids.device)
        turn = (angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        mask = torch.arange(self.context, device=ids.device)[None, :] <= positions[:, None]
        for layer in self.layers:
            x = layer(x, positions, turn, mask)
        logits: Tensor = self.lm_head(self.norm(x[:, -1:]))
        return logits

    def frequencies(self, device: torch.device) -> Tensor:
        """fp32 `[head / 2]`."""
        steps = torch.arange(0, self.shape.head, 2, device=device, dtype=torch.float32)
        return self.shape.theta ** (-steps / self.shape.head)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary position embedding of `[batch, heads, count, head]`, the halves of a head as pairs."""
    a, b = x.chunk(2, -1)
    cos, sin = turn
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def random_decoder(shape: Shape, batch: int, context: int, device: torch.device) -> Decoder:
    """A bf16 model with weights of the usual size; made on the device, in no time."""
    with torch.device("meta"):
        model = Decoder(shape, batch, context)
    model = model.to(torch.bfloat16).to_empty(device=device).eval()
    if shape.tied:
        model.lm_head.weight = model.embedding.weight
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
        for buffer in model.buffers():
            buffer.zero_()
    return model.requires_grad_(False)


__all__ = ["SHAPES", "Decoder", "Shape", "random_decoder"]
