"""The layers that `graphs.models` is made of: functions that write lines of a model's source.

A layer is a kind and six numbers. Each choice that a layer has takes the next number, whatever it means there; 0 is the
plainest, so that a smaller example is a plainer one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

T = TypeVar("T")

SIZES = (4, 1, 3, 5, 8, 16, 17, 32, 48)


@dataclass(frozen=True)
class Layer:
    """A kind of `KINDS`, the numbers that its choices take, and whether its input is added to its result."""

    kind: str
    numbers: tuple[int, ...]
    residual: bool = False

    def simpler(self) -> Iterator[Layer]:
        """The layer with a plainer choice."""
        if self.residual:
            yield replace(self, residual=False)
        if any(self.numbers):
            yield replace(self, numbers=())
            for i, number in enumerate(self.numbers):
                if number:
                    yield replace(self, numbers=(*self.numbers[:i], 0, *self.numbers[i + 1 :]))


class Source:
    """The source of a model while it is written. The activation is `h`, `[batch, length, width]`.

    Attributes:
        width: the last size of `h`.
        results: names of what is returned beside `h`.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.results: list[str] = []
        self._init: list[str] = []
        self._forward: list[str] = []
        self._weights: dict[tuple[int, int], list[str]] = {}
        self._numbers: list[int] = []
        self._count = 0

    def add(self, layer: Layer) -> None:
        """Write a layer."""
        self._numbers, before = list(layer.numbers), self.width
        start = len(self._forward)
        kept = self.name("r")
        KINDS[layer.kind](self)
        if layer.residual and self.width == before:
            self._forward.insert(start, f"{kept} = h")
            self.line(f"h = {kept} + h")

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, by the next number."""
        return choices[self._numbers.pop(0) % len(choices)] if self._numbers else choices[0]

    def size(self) -> int:
        """A width, that of `h` more often than others."""
        return self.pick((self.width, *SIZES, *[self.width] * len(SIZES)))

    def name(self, letter: str) -> str:
        """A new name."""
        self._count += 1
        return f"{letter}{self._count}"

    def line(self, text: str) -> None:
        """A line of `forward`."""
        self._forward.append(text)

    def attribute(self, value: str) -> str:
        """A new attribute of the model: how to spell it."""
        name = self.name("w")
        self._init.append(f"self.{name} = {value}")
        return f"self.{name}"

    def parameter(self, *sizes: int) -> str:
        """A parameter of random values, about as large as keeps products about 1."""
        return self.attribute(f"nn.Parameter({random(*sizes)})")

    def buffer(self, *sizes: int) -> str:
        """A buffer of random values."""
        name = self.name("b")
        self._init.append(f'self.register_buffer("{name}", {random(*sizes)})')
        return f"self.{name}"

    def weight(self, n: int, k: int) -> str:
        """An expression of a weight `[n, k]`."""
        known = self._weights.setdefault((n, k), [])
        text = self.pick(WEIGHTS)(self, n, k)
        if text == "shared":
            text = known[-1] if known else self.parameter(n, k)
        known.append(text)
        return text

    def module(self) -> list[str]:
        """The lines of the class."""
        results = ", ".join(["h", *self.results])
        if all(line.endswith(" = h") for line in self._forward):  # nothing is computed: there would be no graph
            self.line("h = h * 1")
        return [
            "class Model(nn.Module):",
            "    def __init__(self):",
            "        super().__init__()",
            *(f"        {line}" for line in self._init),
            "    def forward(self, h):",
            *(f"        {line}" for line in self._forward),
            f"        return {results}",
        ]


def random(*sizes: int) -> str:
    """An expression of random values."""
    return f"torch.randn({', '.join(map(str, sizes))}) / {math.isqrt(sizes[-1]) + 1}"


def _cat(s: Source, n: int, k: int) -> str:
    first = n // 2
    return f"torch.cat([{s.parameter(first, k)}, {s.parameter(n - first, k)}])" if first else s.parameter(n, k)


WEIGHTS: Sequence[Callable[[Source, int, int], str]] = (
    lambda s, n, k: s.parameter(n, k),
    lambda s, n, k: f"{s.parameter(k, n)}.t()",
    lambda s, n, k: "shared",
    lambda s, n, k: f"{s.parameter(n + 3, k)}[3:]",
    lambda s, n, k: f"{s.parameter(2 * n, k)}.chunk(2)[1]",
    lambda s, n, k: f"{s.parameter(n, k + 2)}[:, 1:-1]",
    lambda s, n, k: f"{s.parameter(n * k)}.view({n}, {k})",
    lambda s, n, k: f"{s.parameter(2, n, k)}[1]",
    lambda s, n, k: f"{s.parameter(k, 2, n)}.select(1, 0).mT",
    lambda s, n, k: f"{s.parameter(n, k)}.to(h.dtype)",
    lambda s, n, k: s.attribute(f"nn.Parameter(({random(k, n)}).t())"),
    lambda s, n, k: s.buffer(n, k),
    lambda s, n, k: f"{s.buffer(k, n)}.T",
    _cat,
    lambda s, n, k: f"({s.parameter(n, k)} * 0.5)",
)

_ROWS, _BACK = "h.reshape(-1, {k})", ".view(h.shape[0], h.shape[1], {n})"
# Every way to multiply by a weight `{w}` of `[{n}, {k}]`; with a bias `{b}` where it stands, else it is added.
SPELLINGS = (
    "F.linear(h, {w}, {b})",
    "h @ {w}.t()",
    "torch.matmul(h, {w}.transpose(0, 1))",
    'torch.einsum("btk,nk->btn", h, {w})',
    f"torch.addmm({{b}}, {_ROWS}, {{w}}.t()){_BACK}",
    f"torch.mm({_ROWS}, {{w}}.t()){_BACK}",
    "torch.bmm(h, {w}.t().expand(h.shape[0], {k}, {n}))",
    "torch.baddbmm({b}, h, {w}.t().expand(h.shape[0], {k}, {n}))",
    "({w} @ h.transpose(1, 2)).transpose(1, 2)",
    "torch.tensordot(h, {w}, ([2], [1]))",
    "torch.inner(h, {w})",
    'torch.einsum("btk,nk->nbt", h, {w}).permute(1, 2, 0)',
    f"torch.addmm({{b}}, {_ROWS}, {{w}}.t(), beta=0.5, alpha=2){_BACK}",
    "F.linear(h.transpose(0, 1), {w}, {b}).transpose(0, 1)",
    'torch.einsum("...k,nk->...n", h, {w})',
    "F.linear(h, {w}) + torch.mv({w}, h.sum((0, 1)))",
)


def _linear(s: Source, n: int | None = None) -> None:
    """h becomes a product with a weight."""
    n = s.size() if n is None else n
    spelling = s.pick(SPELLINGS)
    bias, k = s.pick((False, True)) or "addmm" in spelling or "baddbmm" in spelling, s.width
    weight = s.weight(n, k)
    vector = s.parameter(n) if bias else ""
    text = spelling.format(w=weight, n=n, k=k, b=vector).replace(", )", ")")
    s.line(f"h = {text}" if not bias or "{b}" in spelling else f"h = {text} + {vector}")
    s.width = n


def _module(s: Source) -> None:
    n = s.size()
    s.line(f"h = {s.attribute(f'nn.Linear({s.width}, {n}, bias={s.pick((False, True))})')}(h)")
    s.width = n


def _project(s: Source, count: int, n: int, source: str = "h") -> list[str]:
    """Several projections of one input to n columns each, merged or not: their names."""
    names, k, bias = [s.name("p") for _ in range(count)], s.width, s.pick((False, True))
    how = s.pick(("apart", "chunk", "split", "slices", "pieces"))
    if how in ("apart", "pieces"):
        whole = s.parameter(count * n, k) if how == "pieces" else ""
        for i, name in enumerate(names):
            weight = f"{whole}[{i * n}:{i * n + n}]" if whole else s.parameter(n, k)
            s.line(f"{name} = F.linear({source}, {weight}{', ' + s.parameter(n) if bias else ''})")
        return names
    vector = f", {s.parameter(count * n)}" if bias else ""
    product = f"F.linear({source}, {s.parameter(count * n, k)}{vector})"
    if how == "slices":
        s.line(f"h = {product}")
        for i, name in enumerate(names):
            s.line(f"{name} = h[..., {i * n}:{i * n + n}]")
    else:
        s.line(f"{', '.join(names)}, = {product}.{f'chunk({count}' if how == 'chunk' else f'split({n}'}, -1)")
    return names


def _gated(s: Source) -> None:
    n = s.size()
    gate, up = _project(s, 2, n)
    act = s.pick(("F.silu", "F.gelu", "torch.relu", "torch.sigmoid"))
    s.line(s.pick((f"h = {act}({gate}) * {up}", f"h = {up} * {act}({gate})", f"h = {act}({gate}).mul_({up})")))
    k, s.width = s.width, n
    s.line(f"h = F.linear(h, {s.parameter(k, n)})")
    s.width = k


def _attention(s: Source) -> None:
    heads, shared, size, k = s.pick((1, 2, 4)), s.pick((1, 2)), s.pick((4, 1, 8)), s.width
    how = s.pick(("sdpa", "by hand", "causal", "one query", "one query, repeated", "one query, expanded"))
    shared = shared if heads % shared == 0 else 1
    if "repeated" not in how and "expanded" not in how:
        shared = heads
    queries, keys, values = s.parameter(heads * size, k), s.parameter(shared * size, k), s.parameter(shared * size, k)
    for name, weight, count in (("q", queries, heads), ("k", keys, shared), ("v", values, shared)):
        s.line(f"{name} = F.linear(h, {weight}).view(h.shape[0], h.shape[1], {count}, {size}).transpose(1, 2)")
    for name in ("k", "v") if shared < heads else ():
        if "repeated" in how:
            s.line(f"{name} = {name}.repeat_interleave({heads // shared}, 1)")
        else:
            whole = f"h.shape[0], {shared}, {heads // shared}, h.shape[1], {size}"
            s.line(f"{name} = {name}[:, :, None].expand({whole}).reshape(h.shape[0], {heads}, h.shape[1], {size})")
    if how == "by hand":
        s.line(f"a = (q @ k.transpose(-1, -2) / {size}**0.5).softmax(-1) @ v")
    else:
        causal = ", is_causal=True" if how == "causal" else ""
        s.line(f"a = F.scaled_dot_product_attention(q{'[:, :, -1:]' if 'one' in how else ''}, k, v{causal})")
    s.line("a = a.transpose(1, 2).flatten(2)")
    s.line(f"h = h + F.linear(a, {s.parameter(k, heads * size)})")


def _norm(s: Source) -> None:
    d = s.width
    how = s.pick(("rms", "layer", "rms by hand", "layer without weight"))
    if how == "rms by hand":
        s.line("r = h.float()")
        s.line("r = r * torch.rsqrt(r.pow(2).mean(-1, keepdim=True) + 1e-3)")
        s.line(f"h = {s.parameter(d)} * r.to(h.dtype)")
        return
    weight = "" if "without" in how else f", {s.parameter(d)}"
    name = "rms_norm" if how == "rms" else "layer_norm"
    s.line(f"h = F.{name}(h, ({d},){weight}, eps=1e-3)")


def _conv(s: Source) -> None:
    n, taps = s.size(), s.pick((1, 3))
    weight, bias = s.parameter(n, s.width, taps), s.pick((False, True))
    vector = f", {s.parameter(n)}" if bias else ""
    s.line(f"h = F.conv1d(h.transpose(1, 2), {weight}{vector}, padding={taps // 2}).transpose(1, 2)")
    s.width = n


def _shape(s: Source) -> None:
    d = s.width
    s.line(
        s.pick(
            (
                "h = h.transpose(0, 1).contiguous().transpose(0, 1)",
                f"h = h.reshape(-1, {d}).view(h.shape[0], h.shape[1], {d})",
                "h = h.permute(2, 0, 1).flip(0).permute(1, 2, 0)",
                f"h = torch.cat(h.split({max(1, d // 2)}, -1)[::-1], -1)",
                "h = h.unsqueeze(1).squeeze(1)",
                "h = torch.stack(h.unbind(2), 2)",
            )
        )
    )


def _write(s: Source) -> None:
    """Writes in place: to a copy, to what was read before, to a buffer, to an argument."""
    d = s.width
    for line in s.pick(
        (
            ("h = h.clone()", "h.add_(0.5)"),
            ("h = h * 2", "h[..., 0] = 0.25"),
            (f"p = F.linear(h, {s.parameter(d, d)})", "h.mul_(0.5)", f"h = p + F.linear(h, {s.parameter(d, d)})"),
            ("h = F.relu(h.clone(), inplace=True)",),
            (f"v = {s.buffer(d)}", "v.add_(1)", "h = h + v"),
            ("h.add_(1)",),
            ("h = h + 1", "h[:, :1].zero_()"),
            (f"p = F.linear(h, {s.parameter(d, d)})", "v = p.clone()", "p.zero_()", "h = v + p"),
        )
    ):
        s.line(line)


def _point(s: Source) -> None:
    s.line(
        s.pick(
            (
                "h = torch.relu(h)",
                "h = F.gelu(h)",
                "h = F.silu(h)",
                "h = torch.tanh(h) * 2",
                "h = F.dropout(h, 0.5, training=self.training)",
                "h = (h.float() * 1.5).to(h.dtype)",
                'h = F.gelu(h, approximate="tanh")',
                "h = h.softmax(-1)",
                "h = 1 - h / 3",
                f"h = h * {s.parameter(s.width)}",
            )
        )
    )


def _return(s: Source) -> None:
    """One more result: the activation, a view of it, or a sum."""
    name = s.name("y")
    s.line(f"{name} = {s.pick(('h * 1', 'h', 'h[..., :1]', 'h.transpose(1, 2)', 'h.sum(-1)'))}")
    s.results.append(name)


def _experts(s: Source) -> None:
    """A stack of weights, one for each of a few copies of the input."""
    count, n, k = s.pick((2, 1, 3)), s.size(), s.width
    stack = s.pick((f"{s.parameter(count, k, n)}", f"{s.parameter(count, n, k)}.transpose(1, 2)"))
    s.line(f"h = torch.bmm({_ROWS.format(k=k)}.expand({count}, -1, {k}), {stack}).sum(0){_BACK.format(n=n)}")
    s.width = n


KINDS: Mapping[str, Callable[[Source], None]] = {
    "linear": _linear,
    "module": _module,
    "gated": _gated,
    "attention": _attention,
    "norm": _norm,
    "point": _point,
    "shape": _shape,
    "write": _write,
    "return": _return,
    "conv": _conv,
    "experts": _experts,
}
