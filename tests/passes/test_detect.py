"""Nothing that multiplies by a weight goes unseen, and nothing else is listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qcompile import QCError, explain
from qcompile.passes.detect.canonicalize import Canonicalize
from qcompile.passes.detect.sites import NO_CONTRACTION, Detect
from qcompile.passes.match import op_name
from qcompile.plan.recipe import Recipe, Rule
from qcompile.plan.site import KINDS
from tests.passes.graphs import context, dynamo_graph, run, sites

B, K, N = 4, 16, 16


class With(nn.Module):
    """A function of an input and a weight."""

    def __init__(self, function: Callable[..., Any], *shape: int) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(*(shape or (N, K)))), nn.Parameter(torch.randn(N))
        self.register_buffer("buffer", torch.randn(N, K))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self)


def imatmul(x: Tensor, m: With) -> Tensor:
    x = x + 0
    x @= m.w
    return x


SPELLINGS: dict[str, Callable[[Tensor, With], Tensor]] = {
    "x @= w": imatmul,
    "dunder": lambda x, m: x.__matmul__(m.w),
    "linalg.matmul": lambda x, m: torch.linalg.matmul(x, m.w),
    "inner": lambda x, m: torch.inner(x, m.w),
    "inner, weight first": lambda x, m: torch.inner(m.w, x),
    "tensordot": lambda x, m: torch.tensordot(x, m.w, 1),
    "tensordot of dims": lambda x, m: torch.tensordot(x, m.w, ([-1], [1])),
    "tensordot, weight first": lambda x, m: torch.tensordot(m.w, x, dims=([1], [1])),
    "tensordot over two": lambda x, m: torch.tensordot(x.view(B, 2, 8), m.w.view(2, 8, N), 2),
    "mv": lambda x, m: torch.mv(m.w, x[0]),
    "weight @ vector": lambda x, m: m.w @ x[0],
    "addmv": lambda x, m: torch.addmv(m.v, m.w, x[0], alpha=2, beta=0.5),
    "einsum with dots": lambda x, m: torch.einsum("...k,nk->...n", x, m.w),
    "einsum without arrow": lambda x, m: torch.einsum("bk,kn", x, m.w),
    "left, viewed": lambda x, m: (m.w @ x.t()).view(-1),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name: str) -> None:
    model, x = With(SPELLINGS[name]), torch.randn(B, K)
    gm, inputs = dynamo_graph(model, x)
    with torch.no_grad():
        (want,) = gm(*inputs)
        assert [op_name(n) for n in gm.graph.nodes].count("linear") == 0
        run([Canonicalize()], gm, context(gm, inputs))
        (got,) = gm(*inputs)
    assert [op_name(n) for n in gm.graph.nodes].count("linear") == 1
    # sums of K products in another order, and the roundings of addmv's factors (2 and 0.5) and of its sum
    largest = [float(t.detach().abs().max()) for t in (x, model.w, model.v)]
    bound = 2 * (K + 4) * 2.0**-24 * (K * largest[0] * largest[1] * 2 + largest[2])
    assert (got.shape, got.stride()) == (want.shape, want.stride())
    assert (got - want).abs().max() <= bound


UNTOUCHED: dict[str, tuple[Callable[[Tensor, With], Tensor], str]] = {
    "one matrix, batch broadcast": (lambda x, m: torch.matmul(x[None], m.w.expand(3, N, K)), "form of matmul"),
    "einsum, a size of one": (lambda x, m: torch.einsum("bk,kn->bn", x[:, :1], m.w), "form of einsum"),
    "both weights": (lambda x, m: x * torch.mm(m.w, m.w)[0], "both operands are weights"),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_rewrites_that_would_change_the_result(name: str) -> None:
    function, reason = UNTOUCHED[name]
    gm, inputs = dynamo_graph(With(function), torch.randn(B, K))
    before, ctx = str(gm.graph), context(gm, inputs)
    assert run([Canonicalize()], gm, ctx) == before
    run([Detect()], gm, ctx)
    (decision,) = ctx.plan
    assert decision.site.kind == "other"
    assert reason in decision.site.refused


def test_canonicalize_compares_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewrite that gives another shape leaves no trace."""
    from qcompile.passes.detect import canonicalize

    def wrong(build: Any, node: Any) -> Any:
        return build.linear(node.args[0], build.call(torch.narrow, node.args[1], 0, 0, 3))

    monkeypatch.setitem(canonicalize._REWRITES, "matmul", wrong)
    gm, inputs = dynamo_graph(With(lambda x, m: x @ m.w), torch.randn(B, K))
    before = str(gm.graph)
    assert run([Canonicalize()], gm, context(gm, inputs)) == before


UNHANDLED: dict[str, tuple[Any, tuple[int, ...], int]] = {
    # model, shape of its input, multiply-adds for each row
    "encoder layer": (
        lambda: nn.TransformerEncoderLayer(K, 2, 32, batch_first=True),
        (2, 3, K),
        4 * K * K + 2 * 32 * K,
    ),
    "attention": (lambda: Heads(), (2, 3, K), 4 * K * K),
    "bilinear": (lambda: With(lambda x, m: F.bilinear(x, x, m.w), 8, K, K), (B, K), 8 * K * K),
    "addbmm": (lambda: With(lambda x, m: torch.addbmm(m.v, x.expand(2, B, K), m.w), 2, K, N), (B, K), 2 * 2 * K * N),
    "cdist": (lambda: With(lambda x, m: torch.cdist(x, m.w)), (B, K), N * K),
    "custom": (lambda: With(lambda x, m: foreign(x, m.w)), (B, K), N * K),
    "lookups": (lambda: With(lambda x, m: F.embedding_bag(torch.tensor([[1, 2]]), m.w) + x), (B, K), 0),
}


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(K, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x)[0]


def foreign(x: Tensor, w: Tensor) -> Tensor:
    return x @ w


torch.compiler.allow_in_graph(foreign)


@pytest.mark.parametrize("name", UNHANDLED)
def test_unhandled_operators_are_listed(name: str) -> None:
    make, shape, macs = UNHANDLED[name]
    model, x = make().eval(), torch.randn(shape)
    (site,) = sites(model, x)
    assert site.kind == ("other" if macs else "embedding")
    assert site.kind in KINDS
    assert site.path.endswith(("w", "in_proj_weight"))
    assert site.refused.startswith("operator ")
    assert site.refused.endswith(" is not handled")
    assert site.flops == 2 * macs * x[..., 0].numel()
    with pytest.raises(QCError, match="cannot be quantized") as caught:
        sites(model, x, strict=True)
    assert caught.value.where == site.path


def test_ordinary_reads_of_parameters_are_not_listed() -> None:
    class Ordinary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos, self.cls = nn.Parameter(torch.randn(1, B, K)), nn.Parameter(torch.randn(1, 1, K))
            self.norm, self.gain = nn.LayerNorm((B, K)), nn.Parameter(torch.ones(K, 1))
            self.table, self.fc = nn.Parameter(torch.randn(20, K)), nn.Linear(K, K)
            self.state = nn.Parameter(torch.zeros(B, K))

        def forward(self, x: Tensor, ids: Tensor) -> Tensor:
            x = F.dropout(self.norm(x + self.pos) * self.gain.squeeze(-1), 0.1)
            x[:, 0] = self.table[ids]
            x = torch.where(x > 0, x, self.cls).lerp(self.pos, 0.5).addcmul(self.cls, self.cls)
            x = x + self.table.index_select(0, ids)[:, None] + self.table.gather(0, ids[:, None].expand(-1, K))[:, None]
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
            x = x - F.interpolate(self.pos.transpose(1, 2), size=B + 1).transpose(1, 2).type_as(x)
            self.state.copy_(x[0, :B])
            x = x.masked_fill(self.cls > 5, 0.0) // self.cls.clamp(min=1) ** 2
            return self.fc(F.layer_norm(x, (K,), self.norm.weight[0]))

    found = sites(Ordinary(), torch.randn(2, B, K), torch.tensor([1, 2]))
    assert [(site.kind, site.path, site.refused) for site in found] == [("linear", "fc.weight", "")]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x, m: F.linear(x, m.w * m.v), "arithmetic on parameters (mul)"),
        (lambda x, m: F.linear(x, m.buffer), "not a parameter: it depends on buffers"),
        (lambda x, m: F.linear(x, x.expand(N, K)), "not a parameter: it depends on inputs"),
        (lambda x, m: x @ m.buffer.t(), "the weight operand is a buffer"),
        (lambda x, m: x @ (m.buffer * x.sum()).t(), "both operands are activations"),
        (lambda x, m: (m.w.mul_(2), F.linear(x, m.w))[1], "the graph writes to it in place"),
        (lambda x, m: torch.vmap(lambda row: F.linear(row, m.w))(x), "inside a transform of torch.func"),
    ],
    ids=["arithmetic", "buffer", "input", "product with a buffer", "product", "written", "vmap"],
)
def test_reasons(function: Any, words: str) -> None:
    (site,) = sites(With(function), torch.randn(1, K))
    assert words in site.refused


NAMES = ["it's", 'a"b', "q'\"x", "back\\slash", "a]b[c", "e x", "tab\t", "é", "parametrizations"]


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_those_of_the_module(name: str) -> None:
    """Whatever a module is called, rules find its weights under the name that `named_parameters` gives."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({name: nn.ModuleDict({"q": nn.Linear(K, N, bias=False)})})

        def forward(self, x: Tensor) -> Any:
            return self.parts[name]["q"](x)

    model = Named()
    assert [site.path for site in sites(model, torch.randn(B, K))] == [path for path, _ in model.named_parameters()]


def test_what_is_behind_a_parametrized_weight_has_its_path() -> None:
    model = nn.Sequential(nn.Linear(K, N))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    assert [site.path for site in sites(model, torch.randn(B, K))] == ["0.weight"]


BUFFERS: dict[str, Callable[[Tensor, With], Tensor]] = {
    "linear": lambda x, m: F.linear(x, m.buffer),
    "matmul": lambda x, m: x @ m.buffer,
    "transposed": lambda x, m: x @ m.buffer.T,
    "computed": lambda x, m: x @ (m.buffer * 2),
    "with a parameter": lambda x, m: x @ (m.buffer + m.v),
    "on the left": lambda x, m: m.buffer @ x.t(),
    "einsum": lambda x, m: torch.einsum("bk,kn->bn", x, m.buffer),
    "bmm": lambda x, m: torch.bmm(x[None], m.buffer[None]),
    "addmm": lambda x, m: torch.addmm(m.v, x, m.buffer),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_strict_refuses_a_buffer_in_every_spelling(name: str) -> None:
    """With the words for `F.linear`; a rule that asks for nothing there is no reason to refuse it."""
    model, x = With(BUFFERS[name]), torch.randn(B, K)
    with pytest.raises(QCError) as caught:
        sites(model, x, strict=True)
    assert (caught.value.code, caught.value.what) == ("site.refused", "linear site cannot be quantized")
    assert caught.value.why == "the weight operand is not a parameter: it depends on buffers"
    large = Recipe((Rule("int8/axis0", min_weights=N * K + 1),))  # type: ignore[arg-type]
    for recipe in ("none", large):
        assert len(sites(model, x, strict=True, recipe=recipe)) == 1


def test_strict_names_what_is_wrong_beside_a_product_of_buffers() -> None:
    model = With(lambda x, m: x @ (m.w * m.v) + (m.buffer @ m.buffer)[:B])
    with pytest.raises(QCError, match="arithmetic on parameters"):
        sites(model, torch.randn(B, K), strict=True)


NO_LINEARS: dict[str, Callable[[Tensor, With], Any]] = {
    "rotary": lambda x, m: m.buffer[:, :1][None].expand(2, -1, 1) @ x[:2, None],
    "outer": lambda x, m: torch.einsum("i,j->ij", x[0], m.buffer[0]),
    "both buffers": lambda x, m: x + (m.buffer @ m.buffer)[:B],
    "a cache": lambda x, m: x @ m.buffer.index_copy_(0, torch.arange(B), x).t(),
    "a bias": lambda x, m: torch.addmm(m.buffer[0], x, x.t() @ x),
}


@pytest.mark.parametrize("name", NO_LINEARS)
def test_strict_lets_pass_what_no_parameter_would_make_a_linear(name: str) -> None:
    assert {site.kind for site in sites(With(NO_LINEARS[name]), torch.randn(B, K), strict=True)} <= {"bmm"}


def test_strict_refuses_a_stacked_weight_as_it_does_a_single_one() -> None:
    model = With(lambda x, m: torch.bmm(x.expand(2, B, K), m.w), 2, K, N).double()
    (first, _) = sites(model, torch.randn(B, K).double())
    assert (first.kind, first.refused) == ("bmm", "the weight has dtype torch.float64")
    with pytest.raises(QCError, match=r"dtype torch\.float64"):
        sites(model, torch.randn(B, K).double(), strict=True)


def test_parameters_that_became_constants_of_the_graph() -> None:
    with torch._inductor.config.patch(freezing=True):
        (site,) = sites(nn.Linear(K, N).eval(), torch.randn(B, K))
    assert "freezing is on" in site.refused


def test_an_einsum_of_activations_counts() -> None:
    (site,) = sites(lambda x: torch.einsum("bik,bjk->bij", x, x), torch.randn(2, 3, K))
    assert (site.kind, site.flops) == ("bmm", 2 * 2 * 3 * 3 * K)


def test_a_graph_without_contractions_says_so() -> None:
    for model, x in ((nn.ReLU(), torch.randn(3)), (nn.Embedding(8, K), torch.arange(3))):
        found = explain(model.eval(), x)
        assert found.coverage == 1.0
        assert any(NO_CONTRACTION in note for note in found.notes)
    assert explain(nn.Linear(K, N).eval(), torch.randn(B, K)).notes == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_torch_does_not_multiply_is_no_site(dtype: torch.dtype) -> None:
    """Without autocast torch raises for mixed dtypes; a kernel that reads both would hide it."""
    model, x = nn.Linear(K, N), torch.randn(B, K).to(dtype)
    with pytest.raises(RuntimeError, match="same dtype"):
        torch.compile(model.eval(), backend="qcompile", options={"recipe": "int8"})(x)
    with torch.autocast("cpu", torch.bfloat16):
        (site,) = sites(model, x)
    assert not site.refused
    (site,) = sites(With(lambda x, module: inside_autocast(x, module.w)), x)
    assert not site.refused


def inside_autocast(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return torch.nn.functional.linear(x, w)


def test_what_is_added_is_no_factor() -> None:
    """addmm of a bias that is a parameter, or a buffer, multiplies two activations."""
    for bias in (nn.Parameter(torch.randn(B)), torch.randn(B)):
        (site,) = sites(Adds(bias), torch.randn(B, K), strict=True)
        assert site.kind == "bmm"
        assert site.refused.startswith("both operands are activations")


class Adds(nn.Module):
    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        if isinstance(bias, nn.Parameter):
            self.bias = bias
        else:
            self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, x.t())
