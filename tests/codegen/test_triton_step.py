"""Optimizer steps by a Triton kernel: the bytes of the plain-torch meaning, for every storage, program and size."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

import qcompile  # noqa: F401  (registers kernels of operators)
from qcompile import compat
from qcompile.codegen.devices import triton_step
from qcompile.codegen.devices.triton_step import step_by_kernel
from qcompile.codegen.devices.triton_step_codes import search
from qcompile.codegen.devices.triton_step_text import TILE, step_text, verdict
from qcompile.errors import QCError
from qcompile.ir import ops
from qcompile.ir.formats import Format
from qcompile.ir.state import BLOCK_SIZES, STATE_FORMATS, Storage, boundaries
from qcompile.ir.step import StepSpec
from qcompile.ir.step_reference import step_reference
from qcompile.optim import AdamW
from qcompile.optim.rules import Rule, adam, lion, sgd
from qcompile.testing.interpret import interpret

SIZES = [[TILE // 2 + 48, 0], [751]]  # by sixteen, and not
ODD = [7, 3, TILE // 2 + 5]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    with interpret():
        yield


def same(got: Tensor, want: Tensor) -> bool:
    """Equal patterns; of plain floats any NaN is a NaN. Scales and codes agree in those too."""
    if got.is_floating_point() and not torch.equal(got.isnan(), want.isnan()):
        return False
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[got.dtype.itemsize]
    return torch.equal(got.nan_to_num().view(integer), want.nan_to_num().view(integer))


def drawn(spec: StepSpec, sizes: Sequence[int], of: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    """State and inputs with something in them: many magnitudes, a block of zeros, a NaN, an infinity, ends of the range."""
    generator = torch.Generator().manual_seed(of)
    lists: tuple[list[Tensor], list[Tensor]] = ([], [])
    for n in sizes:
        for found, group in zip(lists, (spec.state, spec.inputs), strict=True):
            for o in group:
                x = torch.randn(n, generator=generator) * 4.0 ** torch.randint(-9, 3, (n,), generator=generator)
                if n > 700:
                    x[64:400] = 0
                    x[450:456] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.3e38, 1e-45, -0.0])
                    x[600] = torch.inf
                storage = Storage(o.storage.name, o.storage.block)
                x = x if storage.plain or storage.format.signed else x.abs()
                found.extend(t.clone() for t in storage.written(x))
    return lists


def compare(
    text: str,
    sizes: Sequence[int],
    hyper: Tensor | None = None,
    random: Tensor | None = None,
    of: int = 0,
    operands: tuple[list[Tensor], list[Tensor]] | None = None,
) -> None:
    """One step by the kernel and one by the reference."""
    spec = StepSpec.parse(text)
    state, inputs = operands or drawn(spec, sizes, of)
    if hyper is None:
        hyper = torch.rand(len(spec.hyper), generator=torch.Generator().manual_seed(of)) + 0.01
    if spec.stochastic and random is None:
        random = torch.tensor([[-5 + of, 3 + i, 2**32 - 1 - i, 8 * i * (i + 1)] for i in range(len(sizes))])
    want = [t.clone() for t in state]
    step_reference(want, inputs, hyper, random, text)
    step_by_kernel(state, inputs, hyper, random, text)
    width = len(state) // len(sizes)
    for i, (got, expected) in enumerate(zip(state, want, strict=True)):
        assert same(got, expected), f"part {i % width} of a parameter of {sizes[i // width]} elements"


def rules() -> Iterator[tuple[Rule, tuple[bool, ...]]]:
    """Every rule, and whether each of its moments may be negative."""
    off_on = (False, True)
    groups: list[tuple[Any, dict[str, Any]]] = []
    for decoupled, amsgrad, maximize, b1 in itertools.product(off_on, off_on, off_on, (0.9, 0.3)):
        switches = {"decoupled_weight_decay": decoupled, "amsgrad": amsgrad, "maximize": maximize}
        groups.append((adam, {**switches, "betas": (b1, 0.99)}))
    for momentum, nesterov, maximize in itertools.product((0.0, 0.9), off_on, off_on):
        if momentum or not nesterov:
            groups.append((sgd, {"momentum": momentum, "nesterov": nesterov, "maximize": maximize}))
    groups += [(lion, {"maximize": maximize}) for maximize in off_on]
    for make, group in groups:
        rule = make(group)
        yield rule, tuple(moment.signed for moment in rule.moments)


PARAMETERS = ["bf16~", "f32", "f16~", "bf16", "int8/g64~", "f16", "int4/g32~", "uint8/g2048~"]
GRADIENTS = ["bf16", "f32", "f16"]
SIGNED = ["dyn8/g256", "dyn4/g128", "f32", "int8/g16", "bf16", "int4/g1024"]
UNSIGNED = ["udyn8/g256", "ulin4/g128", "f32", "uint8/g512", "f16", "uint4/g64", "udyn8/g32"]


def steps() -> list[str]:
    """Each rule with storages in turn, so that every one of them meets several rules."""
    found = []
    for i, (rule, signs) in enumerate(rules()):
        moments = [(SIGNED if signed else UNSIGNED)[(i + j) % (6 if signed else 7)] for j, signed in enumerate(signs)]
        p, g = PARAMETERS[i % len(PARAMETERS)], GRADIENTS[i % 3]
        found.append(rule.spec(Storage.parse(p), Storage.parse(g), tuple(map(Storage.parse, moments))))
    return found


@pytest.mark.parametrize(("text", "sizes"), [(text, SIZES[(i + i // 8) % 2]) for i, text in enumerate(steps())])
def test_optimizers(text: str, sizes: list[int]) -> None:
    compare(text, sizes)


@pytest.mark.parametrize("name", STATE_FORMATS)
def test_every_boundary(name: str) -> None:
    """Numbers at the boundaries between levels and beside them, in blocks whose scale is 1."""
    fmt = STATE_FORMATS[name]
    if fmt.kind == "int":
        at = torch.arange(-2 * int(fmt.max), 2 * int(fmt.max)) / 2
    else:
        at = torch.tensor([*boundaries(fmt), *fmt.table, 0.0, -0.0, 1e-45])
    every = torch.cat([torch.nextafter(at, torch.tensor(s * torch.inf)) for s in (1, -1)] + [at, -at])
    every = every[every.abs() <= fmt.max]
    blocks = torch.nn.functional.pad(every, (0, -len(every) % 15)).reshape(-1, 15)
    x = torch.cat([torch.full((len(blocks), 1), fmt.max), blocks], 1).reshape(-1)
    codes, scales = (torch.zeros_like(t) for t in Storage(name, 16).written(x))
    compare(f"m={name}/g16 g=f32 do=m=g", [len(x)], operands=([codes, scales], [x]))
    assert (scales == 1).all()
    if fmt.kind != "int":
        low, high = codes & 15, codes >> 4
        assert len((torch.stack((low, high)) if fmt.bits == 4 else codes).unique()) == len(fmt.table)


@pytest.mark.parametrize("name", STATE_FORMATS)
def test_every_code(name: str) -> None:
    """Codes that nobody writes too."""
    codes = torch.arange(256, dtype=torch.uint8)
    n = 256 * 8 // STATE_FORMATS[name].bits
    scales = torch.tensor([1.0, 3e-39, torch.nan, 0.7, 0.0, 1e38, 2.0, 0.1] * (n // 256))
    compare(f"p=f32 m={name}/g32 do=p=m", [n], operands=([torch.zeros(n)], [codes, scales]))


@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_every_size_of_block(block: int) -> None:
    text = f"m=dyn8/g{block} w=int4/g{BLOCK_SIZES[0] * 2048 // block} g=f32 h=a do=m=m+a*(g-m);w=w-a*g"
    compare(text, [TILE + 16, 40], of=block)


@settings(max_examples=8)
@given(
    offset=st.integers(0, 40) | st.sampled_from([2**35 - 8, 2**35 - 3, 2**40 + 5]),
    n=st.integers(1, 100) | st.sampled_from([TILE, TILE + 17]),
    p=st.sampled_from(["bf16~", "f16~", "int8/g16~"]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stream=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1)),
)
def test_random_bits_of_shards(offset: int, n: int, p: str, seed: int, stream: tuple[int, int]) -> None:
    """Wherever a shard begins in its parameter, at blocks of random words or between."""
    compare(f"p={p} g=f32 h=a do=p=p-a*g", [n], random=torch.tensor([[seed, *stream, offset]]), of=n)


def test_a_shard_has_the_bytes_of_the_whole() -> None:
    text, cut = "p=bf16~ g=bf16 m=dyn8/g64 h=a do=m=m+a*(g-m);p=p-a*m", 7 * 64
    (p, codes, scales), (g,) = drawn(StepSpec.parse(text), [3000])
    a, whole = torch.tensor([0.1]), [p.clone(), codes.clone(), scales.clone()]
    step_by_kernel(whole, [g], a, torch.tensor([[1, 2, 3, 5]]), text)
    first, second = [t[:cut] for t in (p, codes, g)], [t[cut:] for t in (p, codes, g)]
    random = torch.tensor([[1, 2, 3, 5], [1, 2, 3, 5 + cut]])
    state = [*first[:2], scales[:7], *second[:2], scales[7:]]
    step_by_kernel(state, [first[2], second[2]], a, random, text)
    assert all(map(same, (p, codes, scales), whole))


def test_tensors_anywhere_in_memory() -> None:
    """Parameters at a distance of a few bytes from multiples of 16, beside one that is aligned. Neighbours stay."""
    text, sizes = "p=bf16 g=f32 m=dyn4/g16 v=udyn8/g16 h=a do=m=m+a*(g-m);v=v+g*g;p=p-a*m-a*v", [TILE + 48, *ODD, 64]
    spec = StepSpec.parse(text)
    state, inputs = drawn(spec, sizes)
    memory = [torch.full((t.numel() + 40,), 77, dtype=torch.int32).to(t.dtype) for t in state]
    moved = []
    for i, (old, space) in enumerate(zip(state, memory, strict=True)):
        at = 16 + (i % 3 if i < 20 else 0)
        moved.append(space[at : at + old.numel()].copy_(old))
    compare(text, sizes, operands=(moved, inputs))
    for i, (old, space) in enumerate(zip(state, memory, strict=True)):
        at = 16 + (i % 3 if i < 20 else 0)
        assert (space[:at] == 77).all()
        assert (space[at + old.numel() :] == 77).all()


def test_each_parameter_has_its_numbers() -> None:
    text = "p=f32 g=f32 h=a,b do=p=a*p+b*g"
    compare(text, ODD, torch.tensor([[1.0, 0.5], [0.0, 3.0], [-2.0, 1e-3]]))
    compare("p=f32 m=f16 h=a do=p=a;m=-0", ODD)
    compare("p=f32 m=f32 do=x=p;p=m;m=x", ODD)
    compare("p=f32 g=bf16 h=a,b do=p=where(a<b,g,p)*sqrt(a/b)", ODD)


LEAVES = [
    "p",
    "g",
    "a",
    "b",
    "0",
    "-0",
    "2",
    "0.5",
    "1.0000000150474662e+30",
    "1.401298464324817e-45",
    "0.1249999925494194",
]


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
            calls = ["sqrt({})", "abs({})", "sign({})", "-({})", "maximum({}, {})", "minimum({}, {})"]
            return draw(st.sampled_from(calls)).format(x, y)
        return f"({x} {kind} {y})"

    lines = [f"{draw(st.sampled_from(['p', 'row', 'tl']))} = {expression(2)}" for _ in range(draw(st.integers(1, 3)))]
    return "; ".join([*lines, "p = p + g"])


@settings(max_examples=25)
@given(programs(), st.integers(0, 99))
def test_programs(program: str, of: int) -> None:
    generator = torch.Generator().manual_seed(of)
    p, g = (
        torch.randn(80, generator=generator) * 2.0 ** torch.randint(-140, 128, (80,), generator=generator) for _ in "pg"
    )
    p[:4] = torch.tensor([0.0, -0.0, torch.inf, torch.nan])
    g[2:6] = torch.tensor([0.0, 1.0, -torch.inf, torch.nan])
    text = str(StepSpec((("p", Storage("f32")), ("g", Storage("f32"))), ("a", "b"), program))
    compare(text, [80], torch.tensor([0.9, -3e-5]), operands=([p], [g]))


def test_the_operator_takes_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = triton_step.step_by_kernel
    monkeypatch.setattr(triton_step, "step_by_kernel", lambda *operands: (seen.append(1), real(*operands)))
    p, g = torch.nn.Parameter(torch.ones(3)), torch.ones(3)
    call = ([p], [g], torch.tensor([1.0]), None, "p=f32 g=f32 h=a do=p=p-a*g")
    with torch.no_grad():
        torch.ops.qcompile.step_(*call)
        assert (p.tolist(), p._version, g._version, seen) == ([0.0] * 3, 1, 0, [1])
        with ops.reference_only():
            torch.ops.qcompile.step_(*call)
        monkeypatch.setattr(compat, "writes_triton", lambda _: False)
        torch.ops.qcompile.step_(*call)
    assert (p.tolist(), seen) == ([-2.0] * 3, [1])
    with pytest.raises(QCError, match=r"step\.operands"):
        step_by_kernel([p], [], *call[2:])


def test_an_optimizer_steps() -> None:
    """Of parameters large and small, once by kernels and once without."""

    def trained() -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        ps = [torch.randn(shape, generator=generator) for shape in ((64, 65), (5,), (16, 300))]
        ps = [
            torch.nn.Parameter(p.to(d)) for p, d in zip(ps, (torch.bfloat16, torch.float32, torch.float16), strict=True)
        ]
        optimizer = AdamW(ps, lr=0.1, state_bits=8)
        for _ in range(2):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
        return [*ps, *(t for p in ps for t in optimizer.state[p].values())]

    by_kernel = trained()
    with ops.reference_only():
        assert all(map(same, by_kernel, trained()))


def test_recorded_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a recording nothing is copied from the host: tables are there already, or kernels write them."""
    text = "p=f32 g=f32 m=dyn8/g16 h=a do=m=m+a*(g-m);p=p-a*m"
    spec, sizes = StepSpec.parse(text), [96] * 17
    first = drawn(spec, sizes)  # it stays: what comes later lies elsewhere
    compare(text, sizes, operands=first)
    monkeypatch.setattr(compat, "capturing", lambda _: True)
    monkeypatch.setattr(compat, "for_ever", lambda *_: pytest.fail("made while a graph is recorded"))
    compare(text, sizes, of=1)
    monkeypatch.undo()
    kept = drawn(spec, sizes, 2)
    compare(text, sizes, operands=kept)
    monkeypatch.setattr(compat, "capturing", lambda _: True)
    monkeypatch.setattr(triton_step, "_written", lambda *_: pytest.fail("the table was there"))
    compare(text, sizes, operands=kept)
    with pytest.raises(QCError, match=r"step\.capture"):
        compare(text, [97, 13])


def test_tables_do_not_pile_up() -> None:
    for _ in range(triton_step.KEPT + 5):
        p = torch.ones(4)
        step_by_kernel([p], [], torch.tensor([2.0]), None, "p=f32 h=a do=p=a*p")
        assert p.tolist() == [2.0] * 4
    assert len(triton_step._ADDRESSES) <= triton_step.KEPT


def test_nothing_to_do() -> None:
    step_by_kernel([], [], torch.tensor([2.0]), None, "p=f32 h=a do=p=a*p")
    step_by_kernel([torch.empty(0)], [], torch.tensor([2.0]), None, "p=f32 h=a do=p=a*p")


def test_few_lines_find_every_level() -> None:
    assert {name: len(found.lines) for name, fmt in STATE_FORMATS.items() if (found := search(fmt))} == LINES
    crooked = Format("crooked", "table", 4, signed=False, table=tuple(1 - (1 - i / 16) ** 3 for i in range(1, 17)))
    assert search(crooked) is None
    assert verdict(StepSpec.parse("m=dyn8/g16 g=f32 do=m=g"))
    assert step_text(StepSpec.parse("m=int8/g16 g=f32 do=m=g")).levels == ()


LINES = {"dyn8": 6, "udyn8": 7, "dyn4": 2, "ulin4": 1}
