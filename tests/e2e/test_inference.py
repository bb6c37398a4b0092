"""`backend="qcompile"` on small models: every spelling and shape is found, and computes what plain torch would."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile import explain
from qcompile.backend import watching
from qcompile.runtime.store import STORE
from tests.e2e.models import MLP, SPELLINGS, Attention, Spelled, TinyLM
from tests.e2e.support import DIGITS, FLOAT, RECIPE, compiled, decoded, entries, fp32_step, noise_bound, planned


def spelled_bounds(model: Spelled, x: Tensor) -> tuple[Tensor, Tensor]:
    """Largest distance of a spelled product from the reference, and from the float model, element by element.

    A spelling is linear in x and in w, so its bounds are itself on absolute values: of x moved by the kernel's 16-bit
    image and k fp32 roundings; of w moved by half a step of 8 bits, absmax / 254 of its row.
    """
    bound = Spelled(model.spelling)
    half_step = model.w.detach().abs().amax() / 254
    bound.w.data, bound.b.data = model.w.detach().abs() + half_step, model.b.detach().abs() * 0
    moved = x.abs().amax() * DIGITS + (x.shape[-1] + 8) * FLOAT * x.abs()
    rounding = FLOAT * (bound(x.abs()) + model.b.detach().abs().max())  # the bias, the cast
    kernel = bound(moved) + 4 * rounding
    bound.w.data = torch.full_like(bound.w, half_step)
    return kernel, kernel + bound(x.abs())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_is_found(spelling: str) -> None:
    model, x = Spelled(spelling).eval(), torch.randn(2, 5, 64)
    with torch.no_grad():
        found = explain(model, x, recipe=RECIPE)
        assert found.coverage == 1.0, str(found)
        assert {row.path for row in found} == {"w"}
        want, exact = planned(model, x), model(x)
    _, far = spelled_bounds(model, x)
    assert want.shape == exact.shape
    assert want.dtype == exact.dtype
    assert ((want - exact).abs() <= far).all()
    assert (want != exact).any(), "nothing was quantized"


class Side(nn.Module):
    """Models side by side, each with an input of its own, so that one compile covers them all."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [model(x) for model, x in zip(self.models, inputs, strict=True)]


def test_kernels_compute_every_spelling() -> None:
    model = Side([Spelled(spelling) for spelling in SPELLINGS]).eval()
    inputs = [torch.randn(2, 5, 64) for _ in SPELLINGS]
    with torch.no_grad(), watching() as trace:
        got = compiled(model)(*inputs)
        want = planned(model, *inputs)
    assert all(decision.quantized for decision in trace.contexts[0].plan)
    for spelled, x, a, b in zip(model.models, inputs, got, want, strict=True):
        near, _ = spelled_bounds(spelled, x)  # type: ignore[arg-type]
        assert ((a - b).abs() <= near).all(), (spelled.spelling, ((a - b).abs() / near).max())


SHAPES = {  # n, k, input shape
    "one output": (1, 64, (3, 64)),
    "one input": (16, 1, (3, 1)),
    "ragged K": (48, 40, (3, 40)),
    "ragged N": (17, 64, (3, 64)),
    "all ragged": (33, 47, (2, 3, 47)),
    "a vector": (24, 32, (32,)),
    "one row": (24, 32, (1, 32)),
    "four dimensions": (24, 32, (2, 3, 4, 32)),
    "no rows": (24, 32, (0, 32)),
    "no rows inside": (24, 32, (2, 0, 32)),
    "many rows": (24, 32, (70, 32)),
}


@pytest.mark.parametrize("recipe", [RECIPE, "uint4/g32:fp16+m"])
def test_shapes(recipe: str) -> None:
    model = Side([nn.Linear(k, n, bias=i % 2 == 0) for i, (n, k, _) in enumerate(SHAPES.values())]).eval()
    inputs = [torch.randn(shape) for _, _, shape in SHAPES.values()]
    # Views of wider storage: strides must be honoured.
    inputs[2] = torch.randn(3, 80)[:, ::2]
    inputs[3] = torch.randn(64, 3).t()
    with torch.no_grad(), watching() as trace:
        got = compiled(model, recipe)(*inputs)
    assert all(decision.quantized for decision in trace.contexts[0].plan)
    for name, linear, x, y in zip(SHAPES, model.models, inputs, got, strict=True):
        plain = decoded(linear, recipe)
        want = plain(x)
        assert y.shape == want.shape, name
        w, k = plain.weight.abs(), plain.weight.shape[1]
        moved = (x.abs().amax(-1, keepdim=True) if x.numel() else x) * DIGITS + (k + 8) * FLOAT * x.abs()
        # twice, because torch's own sum is in some other order
        bound = 2 * F.linear(moved.expand(x.shape), w) + 4 * FLOAT * want.abs() + FLOAT
        assert ((y - want).abs() <= bound).all(), name


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [MLP, Attention])
def test_merged(kind: type[nn.Module], bias: bool) -> None:
    """q/k/v and gate/up are one matmul each, in the order of their members, and the bias follows."""
    model, x = kind(bias=bias).eval(), torch.randn(2, 6, 64)
    with torch.no_grad(), watching("reference") as trace:
        got, want = compiled(model)(x), decoded(model)(x)
    groups = [decision.group for decision in trace.contexts[0].plan if decision.site.kind == "linear"]
    assert groups == ([0, 0, -1] if kind is MLP else [0, 0, 0, -1])
    assert (got - want).abs().max() <= noise_bound(decoded(model), x, step=fp32_step(96))


class Mixed(nn.Module):
    """Three readers of one input, only some with a bias: the joined bias is zero where a member has none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(32, 16, bias=False), nn.Linear(32, 24)
        self.c = nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.a(x), self.b(x), self.c(x)


def test_merged_with_some_biases() -> None:
    model, x = Mixed().eval(), torch.randn(3, 32)
    with torch.no_grad():
        for got, want in zip(planned(model, x), decoded(model)(x), strict=True):
            # one dot product of 32 terms in two orders, |y| <= sum |x| |w|
            size = x.abs().sum(-1).max() * max(float(p.abs().max()) for p in model.parameters())
            assert (got - want).abs().max() <= 2 * (32 + 8) * FLOAT * size


class Writes(nn.Module):
    """The input changes between two readers of it, by every road."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(32, 32), nn.Linear(32, 32), how

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 1
        y = self.a(x)
        if self.how == "method":
            x.add_(1)
        elif self.how == "augmented":
            x += 1
        elif self.how == "item":
            x[0] = 5
        elif self.how == "out":
            torch.add(x, 1, out=x)
        elif self.how == "view":
            x.view(-1).mul_(3)
        else:
            F.relu(x, inplace=True)
        return y, self.b(x)


@pytest.mark.parametrize("how", ["method", "augmented", "item", "out", "view", "functional"])
def test_readers_around_a_write_are_not_merged(how: str) -> None:
    model, x = Writes(how).eval(), torch.randn(3, 32)
    with torch.no_grad(), watching("reference") as trace:
        got, want = compiled(model)(x), decoded(model)(x)
    assert [d.group for d in trace.contexts[0].plan] == [-1, -1]
    for a, b in zip(got, want, strict=True):
        size = float(x.abs().amax()) * 3 + 5
        assert (a - b).abs().max() <= 2 * (32 + 8) * FLOAT * 32 * size * 0.2  # |w| <= 1/sqrt(32) < 0.2


class Written(nn.Module):
    """A weight that the graph itself writes is no constant."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.w = how, nn.Parameter(torch.randn(32, 32))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "augmented":
            self.w *= 2
        elif self.how == "item":
            self.w[0] = 5
        elif self.how == "data":
            self.w.data.mul_(2)
        elif self.how == "view":
            self.w.diagonal().zero_()
        else:
            self.w.mul_(2)
        return F.linear(x, self.w)


@pytest.mark.parametrize("how", ["method", "augmented", "item", "data", "view"])
def test_a_weight_that_the_graph_writes_stays_float(how: str) -> None:
    model, twin, x = Written(how), Written(how), torch.randn(3, 32)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad(), watching("reference") as trace:
        compiled_model = compiled(model)
        for _ in range(2):
            assert torch.equal(compiled_model(x), twin(x))
    assert [d.quantized for d in trace.contexts[0].plan] == [False]


class Cached(nn.Module):
    """Writes whose results nobody reads: a counter, a cache, an item."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", torch.zeros(4, 32))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        y = self.fc(x)
        self.cache.index_copy_(0, torch.tensor([1]), y[:1])
        self.cache[2] = y[1]
        return y


def test_unread_writes_happen() -> None:
    model, x = Cached().eval(), torch.randn(2, 32)
    with torch.no_grad():
        y = compiled(model)(x)
    assert model.calls == 1
    assert torch.equal(model.cache[1:3], y)


def test_tied_embedding_has_one_packed_copy() -> None:
    model, ids = TinyLM(layers=1).eval(), torch.randint(0, 128, (2, 5))
    known = {id(entry) for entry in STORE}
    with torch.no_grad(), watching("reference") as trace:
        got, want = compiled(model)(ids), decoded(model)(ids)
    assert (got - want).abs().max() <= noise_bound(decoded(model), ids, step=fp32_step(96))
    tables = [d for d in trace.contexts[0].plan if d.site.kind in ("embedding", "head")]
    assert len(tables) == 2
    assert tables[0].entry is tables[1].entry
    # 128 rows of 64 codes and one fp32 scale each: counted once.
    assert [d.bytes_after for d in tables] == [128 * 64 + 128 * 4, 0]
    new = entries(known)
    # The table, q k v o, gate up down.
    assert len(new) == 8
    assert sum(d.bytes_after for d in trace.contexts[0].plan) == sum(entry.nbytes for entry in new)


def test_conv1d() -> None:
    """HF's Conv1D keeps `[k, n]` and calls addmm."""
    from transformers.pytorch_utils import Conv1D

    model, x = Conv1D(48, 64).eval(), torch.randn(2, 5, 64)
    with torch.no_grad():
        assert explain(model, x, recipe=RECIPE).coverage == 1.0
        plain = nn.Linear(64, 48)
        plain.weight.data, plain.bias.data = model.weight.t(), model.bias
        got = planned(model, x)
        assert (got - decoded(plain)(x)).abs().max() <= noise_bound(decoded(plain), x, step=72 * FLOAT)


def test_embedding_rows() -> None:
    model, ids = nn.Embedding(37, 24), torch.randint(0, 37, (2, 3, 4))
    ids[0, 0, 0], ids[0, 0, 1] = 0, 36
    for recipe in (RECIPE, "uint4/g8:fp16+m", "int8/axis0:fp32@rows", "int4/tensor:fp32"):
        with torch.no_grad():
            assert torch.equal(planned(model, ids, recipe=recipe, policy="memory"), decoded(model, recipe)(ids)), recipe
            assert planned(model, ids[:0], recipe=recipe, policy="memory").shape == (0, 3, 4, 24)
