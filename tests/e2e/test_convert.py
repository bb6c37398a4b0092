"""Float weights given up: eager and every backend, state dicts, assigned weights, dtypes, devices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qcompile import QCError, convert, explain, load, save
from qcompile.backend import watching
from qcompile.codegen import inductor
from qcompile.packed import PackedWeight
from tests.e2e.models import TinyLM
from tests.e2e.support import FLOAT, IDS, RECIPE, compiled, decoded, encodes_during, fp32_step, noise_bound, packed


@pytest.mark.parametrize("recipe", [RECIPE, "uint4/g32:fp16+m", "nf4/g64:fp16"])
def test_eager_computes_what_the_codes_mean(recipe: str) -> None:
    torch.manual_seed(0)
    model = TinyLM(layers=1, bias=True).eval()
    plain, size = decoded(model, recipe), sum(p.numel() * 4 for p in model.parameters() if p.dim() == 2)
    report = convert(model, recipe)
    with torch.no_grad():
        assert torch.equal(model(IDS), plain(IDS))
        assert torch.equal(torch.compile(model, backend="aot_eager")(IDS), plain(IDS))
    assert report.bytes_before == size
    assert report.bytes_after == sum(b.numel() * b.element_size() for b in {id(b): b for b in model.buffers()}.values())
    assert len(report.weights) == 9
    assert not report.kept
    assert {p.dim() for p in model.parameters()} == {1}
    assert not convert(model, recipe).weights, "a second convert finds nothing to do"


def test_tied_weights_share_one_copy() -> None:
    model = packed()
    parts = [[getattr(m.parametrizations.weight, f"original{i}") for i in (0, 1)] for m in (model.embed, model.head)]
    assert all(a is b for a, b in zip(*parts, strict=True))
    model.embed.weight = torch.randn(128, 64)
    assert torch.equal(model.head.weight, model.embed.weight)


def test_conv1d() -> None:
    from transformers.pytorch_utils import Conv1D

    model, x = nn.Sequential(Conv1D(48, 64)).eval(), torch.randn(3, 64)
    want = model(x)
    convert(model, RECIPE)
    assert model[0].weight.shape == (64, 48)
    # half a step of 8 bits of every weight: absmax / 254
    step = (x.abs().sum(-1).max() * model[0].weight.abs().max() * 1.01 / 254).item()
    assert (model(x) - want).abs().max() <= step
    with torch.no_grad(), watching("reference") as trace:
        got = compiled(model)(x)
    assert trace.contexts[0].plan.coverage == 1
    assert (got - model(x)).abs().max() <= 2 * 72 * FLOAT * float(x.abs().sum(-1).max() * model[0].weight.abs().max())


def test_state_dict_is_packed_and_loads() -> None:
    model, twin = packed(), packed()
    with torch.no_grad():
        for module in twin.modules():
            if isinstance(getattr(module, "weight", None), Tensor):
                module.weight = torch.randn_like(module.weight)
        state = model.state_dict()
        assert not any(key.endswith(".weight") for key in state)
        assert not torch.equal(twin(IDS), model(IDS))
        twin.load_state_dict(state)
        assert torch.equal(twin(IDS), model(IDS))
        assert torch.equal(copy.deepcopy(model)(IDS), model(IDS))


def test_backend_runs_on_the_packed_buffers(tmp_path: Path) -> None:
    """No weight-sized float tensor in the generated code, no copy in the store."""
    from torch._inductor.utils import run_and_get_code

    model = packed()
    plain = decoded(TinyLM(layers=1).eval())
    with torch.no_grad(), watching() as trace:
        want = model(IDS)
        got, codes = run_and_get_code(compiled(model), IDS)
        assert encodes_during(lambda: compiled(model)(IDS)) == 0
    plan = trace.contexts[0].plan
    assert all(d.quantized for d in plan if d.site.kind != "attention")
    assert [d.group for d in plan if d.site.kind == "linear"][:3] == [0, 0, 0]
    code = "\n".join(codes)
    assert "qcompile_qmm" in code
    assert "qcompile.decode" not in code
    for n, k in {(64, 64), (32, 64), (96, 64), (64, 96), (128, 64)}:
        assert f"(({n}, {k})" not in code, f"a float [{n}, {k}] is allocated"
    assert (got - want).abs().max() <= noise_bound(plain, IDS, step=fp32_step(96))
    found = explain(model, IDS, recipe=RECIPE)
    assert found.bytes_after == sum(b.numel() * b.element_size() for b in {id(b): b for b in model.buffers()}.values())


def test_assigning_a_weight_encodes_it() -> None:
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(3, 64)
    convert(model, RECIPE)
    with torch.no_grad(), watching("reference") as trace:
        run = compiled(model)
        before = run(x)
        w = torch.randn(32, 64)
        model[0].weight = w
        after = run(x)
        plain = nn.Linear(64, 32)
        plain.weight.data, plain.bias = w, model[0].bias
        assert torch.equal(model(x), decoded(plain)(x))
        assert not torch.equal(before, after)
        assert (after - model(x)).abs().max() <= noise_bound(decoded(plain), x, step=72 * FLOAT)
        assert len(trace.contexts) == 1
        with pytest.raises(QCError, match="nan") as caught:
            model[0].weight = torch.full((32, 64), float("nan"))
    assert caught.value.where == "0.weight: index [0, 0]"


def linear() -> nn.Module:
    return nn.Linear(64, 128)


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(128, 64)


# Some have as many panels and blocks as the weight: the packed tensors alone would not tell.
@pytest.mark.parametrize(
    ("build", "wrong"),
    [
        (linear, torch.randn(120, 50)),
        (linear, torch.randn(3, 3)),
        (linear, torch.randn(128)),
        (linear, torch.ones(128, 64, dtype=torch.long)),
        (linear, torch.empty(128, 64, device="meta")),
        (conv1d, torch.randn(128, 64)),
    ],
)
@pytest.mark.parametrize("loaded", [False, True])
def test_only_a_weights_like_is_assigned(
    build: Callable[[], nn.Module], wrong: Tensor, loaded: bool, tmp_path: Path
) -> None:
    model = nn.ModuleDict({"fc": build()})
    convert(model, "int4")
    if loaded:
        model = load(nn.ModuleDict({"fc": build()}), save(model, tmp_path))
    shape, before = list(model["fc"].weight.shape), [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(QCError) as caught:
        model["fc"].weight = wrong
    error = caught.value
    assert (error.code, error.where) == ("weight.assign", "fc.weight")
    assert f"{wrong.dtype} {list(wrong.shape)}" in error.what
    assert f"torch.float32 {shape}" in error.why
    assert str(shape) in error.next
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    for dtype in (torch.float16, torch.float64):
        model["fc"].weight = torch.ones(shape, dtype=dtype)
        assert torch.equal(model["fc"].weight, torch.ones(shape))


class Pieces(nn.Module):
    """Views of packed weights, one of which does not begin with a panel of 16 rows."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.one, self.two, self.first = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False), first

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        linear = nn.functional.linear
        a = linear(x, self.one.weight[self.first :])
        return a, linear(x, self.two.weight[self.first : self.first + 16]), linear(x, self.two.weight[:16])


@pytest.mark.parametrize("first", [0, 16, 32, 8])
@pytest.mark.parametrize("scheme", [RECIPE, RECIPE + "@rows"])
def test_views_of_packed_weights(first: int, scheme: str) -> None:
    model, x = Pieces(first).eval(), torch.randn(3, 32)
    convert(model, scheme)
    with torch.no_grad(), watching("reference") as trace:
        got, want = compiled(model)(x), model(x)
    cut = scheme == RECIPE and first % 16 != 0
    assert [d.quantized for d in trace.contexts[0].plan] == [not cut, not cut, True]
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 2 * 40 * FLOAT * float(x.abs().sum(-1).max())  # |w| < 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_changing_the_dtype_keeps_the_codes(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    convert(model, "uint4/g32:fp16+m")
    weight, parts = model[0].weight, [b.clone() for b in model.buffers()]
    model.to(dtype)
    assert model[0].weight.dtype == dtype
    assert torch.equal(model[0].weight, weight.to(dtype))
    for a, b in zip(model.buffers(), parts, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    if dtype != torch.float64:
        with torch.no_grad(), watching("reference"):
            x = torch.randn(2, 64).to(dtype)
            assert compiled(model)(x).dtype == dtype


def test_packed_weight_prints_itself() -> None:
    assert "uint4/g32:fp16+m" in repr(PackedWeight("uint4/g32:fp16+m", 4, 64, torch.float32))


class Tied(nn.Module):
    """A small vocabulary, so that only the shared weight tells a head."""

    def __init__(self, graph_break: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
        self.head.weight, self.graph_break = self.embed.weight, graph_break

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.embed(ids))
        if self.graph_break:
            torch._dynamo.graph_break()
        y: Tensor = self.head(x)
        return y


@pytest.mark.parametrize("graph_break", [False, True])
@pytest.mark.parametrize("given_up", [False, True])
def test_tied_head_is_a_head(given_up: bool, graph_break: bool) -> None:
    """Also where a graph break lies between the table and the head, and where `convert` has packed them."""
    model, ids = Tied(graph_break).eval(), torch.randint(0, 96, (2, 5))
    if given_up:
        convert(model, "w8a8")
    report = explain(model, ids, recipe="w8a8")
    assert [(row.kind, row.scheme) for row in report if row.kind != "eager"] == [
        ("embedding", "int8/g64:fp16"),
        ("head", "int8/g64:fp16"),
    ]
    assert not any("keep their schemes" in note for note in report.notes)


def test_inference_mode_makes_ordinary_tensors(tmp_path: Path) -> None:
    with torch.inference_mode():
        model = packed()
        save(model, tmp_path)
        loaded = load(TinyLM(layers=1), tmp_path)
        model.embed.weight = torch.randn(128, 64)
    assert not any(buffer.is_inference() for m in (model, loaded) for buffer in m.buffers())
    model.load_state_dict(loaded.state_dict())


def test_moving_a_model_lays_its_codes_out_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device is stood in for by copies: whatever is moved has another layout afterwards."""
    table = nn.Embedding(40, 64)
    model = nn.Sequential(table, nn.Linear(64, 40, bias=False))
    model[1].weight = table.weight
    convert(model, "int4/g32:fp16")
    values, state = model[1].weight.clone(), {k: v.clone() for k, v in model.state_dict().items()}
    monkeypatch.setattr(inductor, "packing", lambda device, act: "mma16")
    model._apply(torch.clone)
    parts = [item.parametrizations.weight for item in model]
    assert "mma16" in parts[0][0].scheme
    assert parts[0].original0 is parts[1].original0  # still tied
    assert torch.equal(model[1].weight, values)
    model[1].weight = torch.zeros(40, 64)
    model.load_state_dict(state)  # of the other layout
    assert torch.equal(model[1].weight, values)
    assert torch.equal(model[0].weight, values)
