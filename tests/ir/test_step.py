"""Steps as data: one spelling, one meaning (numpy's float32), and the same bytes however parameters are cut and grouped."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.errors import QCError
from qcompile.ir import ops, step_reference
from qcompile.ir.rounding import random_bits, round_to_integer
from qcompile.ir.state import Storage
from qcompile.ir.step import StepSpec
from qcompile.ir.stochastic_cast import stochastic_cast
from tests.ir.support import same

ADAMW = (
    "p=bf16~ g=bf16 m=dyn8/g64 v=udyn8/g64 h=keep,w1,b2,w2,size,root,eps "
    "do=p=p*keep;m=m+w1*(g-m);v=v*b2+w2*g*g;p=p-size*m/(sqrt(v)/root+eps)"
)
WEIGHTS = "p=int8/g64~ g=f32 m=dyn4/g32 v=ulin4/g16 h=a,b do=m=a*m+g;v=maximum(v,g*g);p=p-b*sign(m)-b*v"
NUMBERS = {ADAMW: [0.99, 0.1, 0.999, 0.001, 0.01, 0.3, 1e-8], WEIGHTS: [0.9, 0.01]}
STEP = torch.ops.qcompile.step_
specs = pytest.mark.parametrize("spec", [ADAMW, WEIGHTS], ids=["adamw", "weights"])

LEAVES = ["p", "g", "a", "b", "0", "1", "2", "0.5", "1.0000000150474662e+30", "3.0", "0.1249999925494194"]


@st.composite
def programs(draw: st.DrawFn) -> str:
    """A few assignments, the last one to p."""

    def expression(depth: int) -> str:
        kind = draw(st.sampled_from(["leaf", *"+-*/", "call", "where"])) if depth else "leaf"
        if kind == "leaf":
            return draw(st.sampled_from(LEAVES))
        x, y = expression(depth - 1), expression(depth - 1)
        if kind == "where":
            comparison = draw(st.sampled_from("< <= > >= == !=".split()))
            return f"where({x} {comparison} {y}, {expression(depth - 1)}, {expression(depth - 1)})"
        if kind == "call":
            return draw(
                st.sampled_from(["sqrt({})", "abs({})", "sign({})", "-({})", "maximum({}, {})", "minimum({}, {})"])
            ).format(x, y)
        return f"({x} {kind} {y})"

    lines = [f"{draw(st.sampled_from(['p', 'q', 'a2']))} = {expression(2)}" for _ in range(draw(st.integers(0, 3)))]
    return "; ".join([*lines, "p = p + 1"])


TENSORS = (("p", Storage("f32")), ("g", Storage("f32")))


def by_numpy(program: str, names: dict[str, Any]) -> Any:
    """p after the program, by Python itself with numpy's float32: every operation of it rounds correctly."""
    functions: dict[str, Callable[..., Any]] = {
        "sqrt": np.sqrt,
        "abs": np.abs,
        "sign": lambda x: np.where(x > 0, np.float32(1), np.where(x < 0, np.float32(-1), x)),
        "maximum": lambda x, y: np.where((x > y) | np.isnan(x), x, y),
        "minimum": lambda x, y: np.where((x < y) | np.isnan(x), x, y),
        "where": np.where,
    }

    # A number in the text is one of float32 too; to numpy it would be whatever it meets.
    program = re.sub(r"(?<![\w.])\d[\d.]*(e[+-]?\d+)?", r"number(\g<0>)", program)
    known = {**functions, **names, "number": lambda x: np.full(21, x, np.float32)}
    with np.errstate(all="ignore"):
        exec(program, {}, known)
    return known["p"]


@given(programs())
def test_text(program: str) -> None:
    spec = StepSpec((("p", Storage("bf16", stochastic=True)), ("g", Storage("f32"))), ("a", "b"), program + ";p=p+g")
    text = str(spec)
    assert StepSpec.parse(text) == spec
    assert str(StepSpec.parse(text)) == text
    assert len(text.split()) == 4


def test_a_program_has_one_spelling() -> None:
    spec = StepSpec(TENSORS, ("a",), "p = ((p) - (a*g)) - 2.0 ; p = p*(g + .5)")
    assert spec.program == "p=p-a*g-2;p=p*(g+0.5)"
    assert str(spec) == "p=f32 g=f32 h=a do=p=p-a*g-2;p=p*(g+0.5)"
    assert str(StepSpec.parse("p=f32 do=p=p+1")) == "p=f32 do=p=p+1"


def test_operations_of_a_step() -> None:
    spec = StepSpec.parse("p=f32 g=bf16 m=dyn8/g64 n=f32 h=a,b do=m=a*m+g;q=a*m;n=g;p=p-q/(a*m)-b*(-p)")
    assert [o.name for o in spec.state] == ["p", "m", "n"]
    assert [o.name for o in spec.inputs] == ["g"]
    assert [o.read for o in spec.operands] == [True, True, True, False]
    seen = {"p", "g", "m", "a", "b"}
    for i, (result, _, args) in enumerate(spec.operations):
        assert result == f"t{i}"
        assert seen.issuperset(arg for arg in args if isinstance(arg, str))
        seen.add(result)
    assert len(set(spec.operations)) == len({operation[1:] for operation in spec.operations})  # a*m, the new m, once
    assert spec.results["n"] == "g"
    assert spec.blocks == (64,)


@given(programs(), st.integers(0, 99))
def test_meaning(program: str, of: int) -> None:
    """Bit for bit what numpy computes, for ordinary numbers and the ends of the range."""
    generator = torch.Generator().manual_seed(of)
    p, g = (
        torch.randn(21, generator=generator) * 2.0 ** torch.randint(-140, 128, (21,), generator=generator) for _ in "pg"
    )
    p[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    g[2:6] = torch.tensor([0.0, 1.0, -torch.inf, torch.nan])
    a, b = np.float32(0.9), np.float32(-3e-5)
    full = {"p": p.numpy().copy(), "g": g.numpy(), "a": np.full(21, a), "b": np.full(21, b)}
    text = str(StepSpec(TENSORS, ("a", "b"), program + ";p=p+g"))
    want = torch.from_numpy(by_numpy(program + ";p=p+g", full))
    STEP([p], [g], torch.tensor([a, b]), None, text)
    assert torch.equal(p.isnan(), want.isnan())
    assert same(p.nan_to_num(), want.nan_to_num())


def test_roots_are_rounded_correctly() -> None:
    """torch's own are not, for float32 on CPUs: the last place of one in five is off."""
    x = torch.rand(5000, generator=torch.Generator().manual_seed(0)) * 2.0 ** torch.arange(-149, 128).repeat(19)[:5000]
    want = torch.from_numpy(np.sqrt(x.numpy()))
    STEP([x], [], torch.zeros(0), None, "p=f32 do=p=sqrt(p)")
    assert same(x, want)


def operands(spec: str, sizes: list[int], of: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """State and inputs of parameters of those sizes, with something in them."""
    generator = torch.Generator().manual_seed(of)
    what = StepSpec.parse(spec)
    lists: tuple[list[Tensor], list[Tensor]] = ([], [])
    for n in sizes:
        for found, group in zip(lists, (what.state, what.inputs), strict=True):
            for operand in group:
                x = torch.randn(n, generator=generator)
                plain = Storage(operand.storage.name, operand.storage.block)
                x = x if plain.plain or plain.format.signed else x.square()
                found.extend(t.clone() for t in plain.written(x))
    return lists


def run(
    spec: str, state: list[Tensor], inputs: list[Tensor], random: list[list[int]], h: list[float] | None = None
) -> None:
    STEP(state, inputs, torch.tensor(h or NUMBERS[spec]), torch.tensor(random, dtype=torch.int64).reshape(-1, 4), spec)


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(same, a, b))


@specs
def test_many_parameters_are_one_by_one(spec: str) -> None:
    sizes = [300, 1, 0, 64, 129]
    state, inputs = operands(spec, sizes)
    random = [[7, 3 + i, i, 1000 * i] for i in range(len(sizes))]
    one, width = [t.clone() for t in state], len(state) // len(sizes)
    run(spec, state, inputs, random)
    rows = torch.tensor([NUMBERS[spec]] * len(sizes))
    for i in range(len(sizes)):
        run(spec, one[i * width : (i + 1) * width], inputs[i : i + 1], random[i : i + 1])
    assert equal(state, one)
    by_rows = operands(spec, sizes)[0]
    STEP(by_rows, inputs, rows, torch.tensor(random), spec)
    assert equal(state, by_rows)


def test_each_parameter_may_have_its_numbers() -> None:
    spec = "p=f32 g=f32 h=a,b do=p=a*p+b*g"
    p, g = [torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]
    STEP(p, g, torch.tensor([[2.0, 1.0], [0.0, 5.0]]), None, spec)
    assert [t[0].item() for t in p] == [3.0, 5.0]


@specs
@settings(max_examples=12)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**40))
def test_a_shard_has_the_bytes_of_the_whole(spec: str, cut: int, more: int, offset: int) -> None:
    n, at = 512 + more, 64 * cut
    state, inputs = operands(spec, [n])
    what = StepSpec.parse(spec)
    lengths = [(o.parts(at), o.parts(n - at)) for o in what.state]
    pieces = [[], []]  # type: list[list[Tensor]]
    tensors = iter(state)
    for first, second in lengths:
        for one, two in zip(first, second, strict=True):
            left, right = next(tensors).clone().split([one.shape[0], two.shape[0]])
            pieces[0].append(left.clone())
            pieces[1].append(right.clone())
    run(spec, state, inputs, [[5, 6, 7, offset]])
    run(spec, pieces[0], [inputs[0][:at]], [[5, 6, 7, offset]])
    run(spec, pieces[1], [inputs[0][at:].clone()], [[5, 6, 7, offset + at]])
    assert equal(state, [torch.cat(pair) for pair in zip(*pieces, strict=True)])


@specs
def test_pieces_are_not_seen(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, inputs = operands(spec, [1000, 77])
    small = [t.clone() for t in state]
    run(spec, state, inputs, [[1, 2, 3, 4], [1, 2, 4, 0]])
    monkeypatch.setattr(step_reference, "PIECE", 128)
    run(spec, small, inputs, [[1, 2, 3, 4], [1, 2, 4, 0]])
    assert equal(state, small)


@pytest.mark.parametrize("name", ["bf16", "f16", "int8/g64"])
def test_random_bits_are_those_of_the_element(name: str) -> None:
    n, offset, stream = 200, 12345678901, (2**31 + 5, 9)
    spec = f"p={name}~ g=f32 h=a do=p=p-a*g"
    (*p, g), bits = [*operands(spec, [n])[0], torch.randn(n)], random_bits(n, -77, offset, stream)
    storage = Storage.parse(name)
    x = storage.read(p, n) - torch.tensor(0.01) * g
    STEP(p, [g], torch.tensor([0.01]), torch.tensor([[-77, *stream, offset]]), spec)
    if storage.plain:
        assert same(p[0], stochastic_cast(x, p[0].dtype, bits))
    else:
        scale = p[1].repeat_interleave(64)[:n]
        want = round_to_integer(x * (1.0 / scale), "stochastic", bits).clamp(-127, 127) + 128
        assert torch.equal(p[0], want.to(torch.uint8))


def test_state_may_change_places() -> None:
    p, m = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    STEP([p, m], [], torch.tensor([0.0]), None, "p=f32 m=f32 h=a do=x=p;p=m;m=x")
    assert (p.tolist(), m.tolist()) == ([3.0, 4.0], [1.0, 2.0])
    STEP([p, m], [], torch.tensor([7.0]), None, "p=f32 m=f32 h=a do=p=a;m=2")
    assert (p.tolist(), m.tolist()) == ([7.0, 7.0], [2.0, 2.0])


def test_writes_are_noticed() -> None:
    p, g = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    before = p._version, g._version
    with torch.no_grad():
        STEP([p], [g], torch.tensor([1.0]), None, "p=f32 g=f32 h=a do=p=p-a*g")
    assert p._version > before[0]
    assert g._version == before[1]
    assert p.tolist() == [0.0] * 3


@specs
def test_it_is_an_operator(spec: str) -> None:
    state, inputs = operands(spec, [130, 64])
    random = torch.tensor([[1, 2, 3, 4], [1, 2, 4, 0]])
    torch.library.opcheck(STEP.default, (state, inputs, torch.tensor(NUMBERS[spec]), random, spec))
    STEP([], [], torch.tensor(NUMBERS[spec]), random[:0], spec)
    with ops.reference_only():
        run(spec, state, inputs, random.tolist())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "p=f32 g=f32",
        "p=f32 do=",
        "p=f32 g=f32 do=p=p+1",  # g is not used
        "p=f32 p=f32 do=p=p+1",
        "p=f32 h=p do=p=p+1",
        "p=f32 t0=f32 do=p=p+t0",
        "p=f32 sqrt=f32 do=p=p+1",
        "P=f32 do=P=P+1",
        "p=f32 h=a do=q=p+a",
        "m=dyn8/g64 do=m=m*0.5",  # how many elements?
        "p=bf16~ m=bf16~ do=p=m;m=p",
        "p=f32 g=bf16~ do=p=p+g",
        "do=p=p+1 p=f32",
    ],
)
def test_what_is_no_step(text: str) -> None:
    with pytest.raises(QCError, match=r"step\.spec"):
        StepSpec.parse(text)


@pytest.mark.parametrize(
    "program",
    [
        "p=",
        "p+=1",
        "p+1",
        "p=q",
        "p=p**2",
        "p=0.1*p",  # no float32 number
        "p=1e60",
        "p=True",
        "p=exp(p)",
        "p=p<g",
        "p=where(p,g,g)",
        "p=where(p<g<a,g,p)",
        "p=where(p<g,g)",
        "p=maximum(p)",
        "p=p@g",
        "p=+p",
        "a=p",
        "t1=p",
        "p=m;m=p",
        "p=p.T",
        "for=1",
        "p=g=a",
    ],
)
def test_what_is_no_program(program: str) -> None:
    with pytest.raises(QCError, match=r"step\.program"):
        StepSpec(TENSORS, ("a",), program)


def wrong_operands() -> dict[str, Callable[[dict[str, Any]], None]]:
    return {
        "too few": lambda c: c["state"].pop(),
        "no gradients": lambda c: c["inputs"].clear(),
        "dtype": lambda c: c["inputs"].__setitem__(0, c["inputs"][0].double()),
        "size": lambda c: c["inputs"].__setitem__(0, c["inputs"][0][:5]),
        "strides": lambda c: c["state"].__setitem__(0, c["state"][0].repeat_interleave(2)[::2]),
        "scales": lambda c: c["state"].__setitem__(2, c["state"][2][:1]),
        "device": lambda c: c["inputs"].__setitem__(0, c["inputs"][0].to("meta")),
        "numbers": lambda c: c.__setitem__("hyper", c["hyper"][:1]),
        "doubles": lambda c: c.__setitem__("hyper", c["hyper"].double()),
        "rows": lambda c: c.__setitem__("hyper", c["hyper"].repeat(3, 1)),
        "no random": lambda c: c.__setitem__("random", None),
        "random": lambda c: c.__setitem__("random", c["random"].int()),
        "random rows": lambda c: c.__setitem__("random", c["random"].repeat(2, 1)),
        "no spec": lambda c: c.__setitem__("spec", "adamw"),
    }


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("name", wrong_operands())
def test_operands_that_do_not_fit(name: str, fake: bool) -> None:
    state, inputs = operands(ADAMW, [130])
    call = {
        "state": state,
        "inputs": inputs,
        "hyper": torch.tensor(NUMBERS[ADAMW]),
        "random": torch.tensor([[1, 2, 3, 4]]),
        "spec": ADAMW,
    }
    wrong_operands()[name](call)
    if fake:
        with FakeTensorMode() as mode:
            for key, value in call.items():
                if isinstance(value, list):
                    call[key] = [mode.from_tensor(t) for t in value]
                elif isinstance(value, Tensor):
                    call[key] = mode.from_tensor(value)
            with pytest.raises(QCError, match=r"step\.(operands|spec)"):
                STEP(**call)
    else:
        with pytest.raises(QCError, match=r"step\.(operands|spec)"):
            STEP(**call)


def test_random_for_nothing_is_refused() -> None:
    with pytest.raises(QCError, match="nothing is stochastic"):
        STEP([torch.ones(2)], [], torch.tensor([1.0]), torch.zeros(1, 4).long(), "p=f32 h=a do=p=a*p")
