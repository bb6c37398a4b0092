"""What moves into the matmul, what may not, and that the result is the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import qcompile.ir.ops  # noqa: F401  (registers the operators)
from qcompile.ir.matmul import MatmulSpec
from qcompile.passes.late.epilogue import Epilogue
from tests.passes.graphs import Functional, post_graph, run

FLOAT = 2.0**-24
QMM = torch.ops.qcompile.qmm.default
M, N = 5, 16


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def specs(gm: torch.fx.GraphModule) -> list[MatmulSpec]:
    return [MatmulSpec.parse(node.args[3]) for node in gm.graph.nodes if node.target is QMM]


def calls(gm: torch.fx.GraphModule) -> int:
    return sum(node.op == "call_function" for node in gm.graph.nodes)


def mat(*shape: int) -> Tensor:
    return torch.randn(*(shape or (M, N)))


# function, outputs of the linears, bias, further inputs, roundings of the function; slope: how much it may enlarge an error
Case = tuple[Callable[..., Tensor], tuple[int, ...], bool, tuple[Tensor, ...]]
torch.manual_seed(0)
FUSED: dict[str, Case] = {
    "bias and relu": (F.relu, (N,), True, ()),
    "residual": (lambda y, r: r + y, (N,), False, (mat(),)),
    "residual and bias": (lambda y, r: r + y, (N,), True, (mat(),)),
    "transposed residual": (lambda y, r: y + r, (N,), False, (mat(N, M).t(),)),
    "gelu": (F.gelu, (N,), True, ()),
    "gelu tanh": (lambda y: F.gelu(y, approximate="tanh"), (N,), True, ()),
    "silu": (F.silu, (N,), False, ()),
    "sigmoid": (torch.sigmoid, (N,), False, ()),
    "scale": (lambda y: y * 0.25 - 1.5, (N,), False, ()),
    "reverse": (lambda y: 2.0 - y, (N,), False, ()),
    "row": (lambda y, g: y * g, (N,), False, (mat(N),)),
    "square": (lambda y: y.pow(2) + y.pow(3), (N,), False, ()),
    "silu gate": (lambda g, u: F.silu(g) * u, (N, N), False, ()),
    "gelu gate": (lambda g, u, r: F.gelu(g) * u + r, (N, N), False, (mat(),)),
    "sum": (lambda a, b: a + b, (N, N), False, ()),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused(name: str) -> None:
    function, n, bias, extras = FUSED[name]
    x = mat(M, 32)
    gm, inputs, ctx = post_graph(Functional(function, n, bias=bias), x, *extras)
    (before,) = gm(*inputs)
    run([Epilogue()], gm, ctx)
    assert calls(gm) == 1, str(gm.graph)
    (spec,) = specs(gm)
    assert spec.epilogue
    assert spec.paired == (len(n) == 2)
    (after,) = gm(*inputs)
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    # Both evaluate the same operations in fp32. They may differ where a function has two spellings (x / (1 + exp(-x)) and
    # silu): every one of at most 24 operations rounds by 2^-24 of values below |y| + |y|^3 + the extras, and none of these
    # functions enlarges an error by more than 3 max(1, y^2).
    top = max(float(t.abs().max()) for t in (before, *extras, torch.ones(1)))
    assert (after - before).abs().max() <= 24 * FLOAT * 3 * (top + top**3)


KEPT: dict[str, Case] = {
    "reduction": (lambda y: y.sum(-1), (N,), False, ()),
    "softmax": (lambda y: y.softmax(-1), (N,), False, ()),
    "norm of itself": (lambda y: y * y.mean(-1, keepdim=True), (N,), False, ()),
    "cumulative": (lambda y: y.cumsum(-1), (N,), False, ()),
    "column": (lambda y, c: y * c, (N,), False, (mat(M, 1),)),
    "one row of a matrix": (lambda y, r: y + r, (N,), False, (mat(1, N),)),
    "more dimensions": (lambda y, r: y + r, (N,), False, (mat(3, M, N),)),
    "scalar tensor": (lambda y, s: y * s, (N,), False, (torch.tensor(2.0),)),
    "integers": (lambda y, i: y + i, (N,), False, (torch.ones(M, N, dtype=torch.int64),)),
    "comparison": (lambda y: y > 0, (N,), False, ()),
    "to integers": (lambda y: y.to(torch.int32), (N,), False, ()),
    "double": (lambda y: y.double() + 1, (N,), False, ()),
    "clamp": (lambda y: y.clamp(-1, 1), (N,), False, ()),
    "alpha": (lambda y, r: torch.add(y, r, alpha=2), (N,), False, (mat(),)),
    "infinity": (lambda y: y + math.inf, (N,), False, ()),
    "random": (lambda y: F.dropout(y, 0.5), (N,), False, ()),
    "reshaped": (lambda y: y.reshape(-1) + 1, (N,), False, ()),
}


@pytest.mark.parametrize("name", KEPT)
def test_kept(name: str) -> None:
    function, n, bias, extras = KEPT[name]
    gm, _, ctx = post_graph(Functional(function, n, bias=bias), mat(M, 32), *extras)
    before = str(gm.graph)
    assert run([Epilogue()], gm, ctx) == before
    assert [spec.epilogue for spec in specs(gm)] == [""]


def test_a_value_with_another_reader_stays() -> None:
    """The region must have one exit: here the matmul itself, then its relu, are read twice."""

    def relu_read_twice(y: Tensor) -> tuple[Tensor, Tensor]:
        z = F.relu(y)
        return z, z.sum(-1)

    for function in (lambda y: (y, F.relu(y)), relu_read_twice):
        gm, inputs, ctx = post_graph(Functional(function, (N,)), mat(M, 32))
        before = gm(*inputs)
        run([Epilogue()], gm, ctx)
        for a, b in zip(gm(*inputs), before, strict=True):
            assert torch.equal(a, b)
    # The relu is absorbed: it is the exit, and what follows reads it.
    assert [spec.epilogue for spec in specs(gm)] == ["relu((acc))"]


def test_what_the_region_reads_back_stays_outside() -> None:
    """softmax(y) has the right shape for an operand, but depends on the matmul."""
    gm, inputs, ctx = post_graph(Functional(lambda y: y + y.softmax(-1), (N,)), mat(M, 32))
    before = gm(*inputs)[0]
    run([Epilogue()], gm, ctx)
    assert torch.equal(gm(*inputs)[0], before)


def test_long_regions_end_somewhere() -> None:
    def long(y: Tensor, *extras: Tensor) -> Tensor:
        for extra in extras:
            y = F.gelu(y) * extra
        return y

    extras = [mat() for _ in range(7)]
    gm, inputs, ctx = post_graph(Functional(long, (N,)), mat(M, 32), *extras)
    before = gm(*inputs)[0]
    run([Epilogue()], gm, ctx)
    (spec,) = specs(gm)
    assert 1 <= len(spec.extras) <= 4
    assert len(spec.epilogue) <= 1000
    top = float(torch.stack(extras).abs().max())
    # gelu enlarges an error by at most 1.13, an extra by at most `top`; about 10 roundings a step.
    assert (gm(*inputs)[0] - before).abs().max() <= 7 * 10 * FLOAT * (1.13 * max(top, 1)) ** 7 * 10


HALF_PAIRS: dict[str, Callable[..., Tensor]] = {
    "clamped gate": lambda a, b: a.clamp(-1, 1) * b,
    "relu6 gate": lambda a, b: F.relu6(a) * b,
    "leaky gate": lambda a, b: F.leaky_relu(a) * b,
    "clamped both": lambda a, b: F.gelu(a.clamp(max=7)) * (b.clamp(-7, 7) + 1),
    "one of two outputs": lambda a, b: torch.cat([a * b, a], -1),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", HALF_PAIRS)
def test_pairs_that_cannot_be_fused_whole(name: str, bias: bool) -> None:
    """What growing a pair has tried leaves nothing behind."""
    gm, inputs, ctx = post_graph(Functional(HALF_PAIRS[name], (N, N), bias=bias), mat(M, 32))
    (before,) = gm(*inputs)
    count = len(gm.graph.nodes)
    run([Epilogue()], gm, ctx)
    gm.graph.lint()
    assert len(gm.graph.nodes) <= count
    (after,) = gm(*inputs)
    # The functions may be absorbed in part: see test_fused for the bound.
    top = max(1.0, float(before.abs().max()))
    assert (after - before).abs().max() <= 24 * FLOAT * 3 * (top + top**3)


def test_twice_is_once() -> None:
    for function, n, bias, extras in FUSED.values():
        gm, _, ctx = post_graph(Functional(function, n, bias=bias), mat(M, 32), *extras)
        assert run([Epilogue()], gm, ctx) == run([Epilogue()], gm, ctx)
