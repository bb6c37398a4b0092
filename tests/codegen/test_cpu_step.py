"""The C++ kernel of optimizer steps: every byte is that of the plain-torch meaning, on every instruction set.

A spec costs a build, so few specs meet many operands: one with all storages, one with all operations, and one of each kind of
optimizer.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen import eager_step
from qcompile.codegen.devices.cpu import ISAS, detect_isa
from qcompile.codegen.devices.cpu_levels import levels_of
from qcompile.codegen.devices.cpu_step import step_text
from qcompile.codegen.eager_step import Operator, equal, operands
from qcompile.compat import load_operator
from qcompile.errors import QCError, QCWarning
from qcompile.ir.formats import FORMATS
from qcompile.ir.ops import reference_only
from qcompile.ir.state import STATE_FORMATS, Storage, boundaries
from qcompile.ir.step import StepSpec
from qcompile.ir.step_reference import step_reference
from qcompile.optim import rules

BEST = detect_isa()
RUNNABLE = ISAS[ISAS.index(BEST) :]
STEP = torch.ops.qcompile.step_

TABLES = [fmt for fmt in STATE_FORMATS.values() if fmt.kind == "table"]
CODED = "a=dyn8/g16 b=udyn8/g32 c=dyn4/g16 d=ulin4/g128 e=int8/g64 f=uint8/g256 i=int4/g2048 j=uint4/g16"
STORAGES = (
    f"p=f32 x=f32 {CODED} y=bf16 z=f16 h=lr do=p=p-lr*(a+b+c+d+e+f+i+j+y+z);a=x;b=x;c=x;d=x;e=x;f=x;i=x;j=x;y=x;z=x"
)
PROGRAM = (
    "p=int8/g128~ g=bf16 q=f32 h=a,b do=x=p*a-g/b;y=sqrt(abs(g))+sign(x);z=maximum(x,y)-minimum(y,g);"
    "q=where(x<y,z,-x)+where(x<=q,a,y)*where(g>y,z,q)-where(z>=g,x,1)+where(x==y,z,b)*where(q!=g,x,2.5);"
    "p=p+maximum(x,g)+q*0.125"
)


def adamw(p: str, g: str, m: str, v: str, **more: Any) -> str:
    group = {"decoupled_weight_decay": True, "amsgrad": False, "maximize": False, "betas": (0.9, 0.999), **more}
    rule = rules.adam(group)
    moments = [m, v, v][: len(rule.moments)]
    return rule.spec(Storage.parse(p), Storage.parse(g), tuple(map(Storage.parse, moments)))


def momentum(p: str, g: str, m: str) -> str:
    rule = rules.sgd({"momentum": 0.9, "nesterov": True, "maximize": False})
    return rule.spec(Storage.parse(p), Storage.parse(g), (Storage.parse(m),))


def lion(p: str, g: str, m: str) -> str:
    return rules.lion({"maximize": True}).spec(Storage.parse(p), Storage.parse(g), (Storage.parse(m),))


ADAMW = adamw("bf16~", "bf16", "dyn8/g256", "udyn8/g256")
SPECS = {
    "storages": STORAGES,
    "program": PROGRAM,
    "adamw8": ADAMW,
    "momentum": momentum("f16~", "f16", "dyn8/g64"),
    "lion": lion("int8/g256~", "f32", "dyn4/g128"),
}
BUILDS = [("storages", isa) for isa in RUNNABLE]
BUILDS += [(name, BEST) for name in SPECS if (name, BEST) not in BUILDS]
builds = pytest.mark.parametrize(("name", "isa"), BUILDS)


@functools.cache
def kernel(text: str, isa: str = BEST) -> Operator:
    return load_operator(step_text(StepSpec.parse(text), isa))


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Build with all cores what the tests share."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda build: kernel(SPECS[build[0]], build[1]), BUILDS))


Operands = tuple[list[Tensor], list[Tensor], Tensor, Tensor | None]


def drawn(text: str, sizes: Sequence[int], seed: int = 0) -> Operands:
    return operands(StepSpec.parse(text), sizes, torch.Generator().manual_seed(seed))


def run(operator: Operator, made: Operands) -> list[Tensor]:
    """The state after a step of a copy."""
    state, inputs, numbers, random = made
    after = [t.clone() for t in state]
    operator(after, inputs, numbers, numbers if random is None else random)
    return after


def meant(text: str, made: Operands) -> list[Tensor]:
    after = [t.clone() for t in made[0]]
    step_reference(after, made[1], made[2], made[3], text)
    return after


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(bool(equal(x, y).all()) for x, y in zip(a, b, strict=True))


@builds
@settings(max_examples=8)
@given(
    sizes=st.lists(st.integers(0, 40) | st.integers(0, 5000), max_size=4),
    seed=st.integers(0, 2**31),
    shift=st.integers(-30, 30),
)
def test_any_size(name: str, isa: str, sizes: list[int], seed: int, shift: int) -> None:
    made = drawn(SPECS[name], sizes, seed)
    for t in (*made[0], *made[1]):
        if t.is_floating_point():
            t *= 2.0 ** (shift / 2)
    assert same(run(kernel(SPECS[name], isa), made), meant(SPECS[name], made))


# Zeros, subnormals, the ends of float32, what 16 bits cannot hold, infinity and NaN.
STRANGE = [0.0, -0.0, 1e-45, -1e-40, 1.2e-38, 1e-30, 65520.0, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan]


@builds
@pytest.mark.parametrize("kind", ["one of all", "one in each", "zero", "subnormal", "tiny", "huge"])
def test_strange_values(name: str, isa: str, kind: str) -> None:
    made = drawn(SPECS[name], [2048 + 700] if kind != "one of all" else [300] * len(STRANGE))
    for k, t in enumerate((*made[0], *made[1])):
        if not t.is_floating_point():
            continue
        if kind == "one in each":
            t[k % 7 :: 7][: len(STRANGE)] = torch.tensor(STRANGE).to(t.dtype)[: len(t[k % 7 :: 7])]
        elif kind == "one of all":
            t[:1] = STRANGE[k * len(STRANGE) // len((*made[0], *made[1])) % len(STRANGE)]
        else:
            t *= {"zero": 0.0, "subnormal": 1e-41, "tiny": 1e-37, "huge": 1e38}[kind]
    assert same(run(kernel(SPECS[name], isa), made), meant(SPECS[name], made))


@pytest.mark.parametrize("isa", RUNNABLE)
@pytest.mark.parametrize("top", [1.0, 127.0, 255.0, 7.0, 15.0])
def test_beside_every_boundary(isa: str, top: float) -> None:
    """The numbers that a boundary divides, in blocks whose scale is 1 for the formats with this largest level."""
    edges = {b for fmt in TABLES for b in boundaries(fmt)} | {k / 2 for k in range(520)}
    sizes = np.array(sorted({abs(b) for b in edges if abs(b) < top}), np.float32)
    near = np.maximum(sizes.view(np.int32)[:, None] + np.arange(-3, 4, dtype=np.int32), 0)
    x = torch.from_numpy(near.view(np.float32).reshape(-1))
    x = torch.cat([x, -x])
    x = x[x.abs() < top]
    x = torch.nn.functional.pad(x, (0, -len(x) % 15)).view(-1, 15)
    x = torch.nn.functional.pad(x, (1, 0), value=top).reshape(-1)
    made = drawn(STORAGES, [len(x)])
    made[1][0].copy_(x)
    assert same(run(kernel(STORAGES, isa), made), meant(STORAGES, made))


@builds
def test_numbers_between_boundaries(name: str, isa: str) -> None:
    """So many that some come out beside a whole number and are looked for."""
    made = drawn(SPECS[name], [1 << 16], 3)
    assert same(run(kernel(SPECS[name], isa), made), meant(SPECS[name], made))


@pytest.mark.parametrize("fmt", TABLES, ids=str)
def test_tables_have_lines(fmt: Any) -> None:
    levels = levels_of(fmt)
    assert levels.lines is not None
    assert levels.lines.near <= 2**-11
    assert levels.buckets <= 1 << 13


def test_a_table_without_symmetry_is_refused() -> None:
    with pytest.raises(QCError, match="symmetric"):
        levels_of(FORMATS["nf4"])


def cut(spec: StepSpec, made: Operands, at: int) -> tuple[Operands, Operands]:
    """The operands of two shards of one parameter."""
    shards: list[list[list[Tensor]]] = [[[], []], [[], []]]
    for which, (group, tensors) in enumerate(((spec.state, made[0]), (spec.inputs, made[1]))):
        every = iter(tensors)
        for operand in group:
            for part in operand.parts(at):
                t = next(every)
                shards[0][which].append(t[: part.shape[0]].clone())
                shards[1][which].append(t[part.shape[0] :].clone())
    later = None if made[3] is None else made[3] + torch.tensor([0, 0, 0, at])
    (state0, inputs0), (state1, inputs1) = shards
    return (state0, inputs0, made[2], made[3]), (state1, inputs1, made[2], later)


@pytest.mark.parametrize("name", SPECS)
def test_a_shard_has_the_bytes_of_the_whole(name: str) -> None:
    spec, operator = StepSpec.parse(SPECS[name]), kernel(SPECS[name])
    n, at = 2048 * 9 + 123, 2048 * 8
    for offset in (0, 3, 2**40 + 5):
        made = drawn(SPECS[name], [n])
        if made[3] is not None:
            made[3][0, 3] = offset
        one, two = (run(operator, half) for half in cut(spec, made, at))
        assert same(run(operator, made), [torch.cat(pair) for pair in zip(one, two, strict=True)])


@pytest.mark.parametrize("name", SPECS)
def test_threads_do_not_matter(name: str) -> None:
    made = drawn(SPECS[name], [20000, 5, 33333, 0, 17])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(kernel(SPECS[name]), made))
    finally:
        torch.set_num_threads(before)
    assert all(same(results[0], other) for other in results)
    assert same(results[0], meant(SPECS[name], made))


def test_subnormals_count_whatever_the_process_set() -> None:
    made = drawn(STORAGES, [500])
    for t in (*made[0], *made[1]):
        if t.is_floating_point():
            t *= 1e-38
    want = meant(STORAGES, made)
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor has no such switch")
        got = run(kernel(STORAGES), made)
        flushed = bool((torch.tensor([1e-39]) * torch.tensor([1.0]) == 0).all())
    finally:
        torch.set_flush_denormal(False)
    assert same(got, want)
    assert flushed  # and the switch is where it was


# ------------------------------------------------------------------------------------------------------------- dispatch


def call(made: Operands, text: str) -> list[Tensor]:
    after = [t.clone() for t in made[0]]
    STEP(after, made[1], made[2], made[3], text)
    return after


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels that are asked for, from an empty table on."""
    asked: list[str] = []

    def load(source: str) -> Operator:
        asked.append(source)
        operator: Operator = load_operator(source)
        return operator

    monkeypatch.setattr(eager_step, "_OPERATORS", {})
    monkeypatch.setattr(eager_step, "_WAITED", {})
    monkeypatch.setattr(eager_step, "load_operator", load)
    return asked


def test_large_steps_have_a_kernel(counted: list[str]) -> None:
    small, large = drawn(ADAMW, [1000, 7]), drawn(ADAMW, [eager_step.WORTH_BUILDING // 2, 9])
    want = meant(ADAMW, small)
    assert same(call(small, ADAMW), want)
    assert counted == []
    with reference_only():
        call(large, ADAMW)
    assert counted == []
    assert same(call(large, ADAMW), meant(ADAMW, large))
    assert same(call(small, ADAMW), want)  # now that it is there
    assert len(counted) == 1


def test_small_steps_that_add_up_have_a_kernel(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(ADAMW, [1000, 7])
    monkeypatch.setattr(eager_step, "WORTH_WAITING", 1e-9)
    for built in (0, 1, 1):
        assert same(call(made, ADAMW), meant(ADAMW, made))
        assert len(counted) == built


def test_a_kernel_that_fails_its_trial_is_refused(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = drawn(ADAMW, [eager_step.WORTH_BUILDING // 2])
    want = meant(ADAMW, made)

    def broken(source: str) -> Operator:
        operator = load_operator(source)

        def one_bit(state: Any, *rest: Any) -> None:
            operator(state, *rest)
            state[1][-1] ^= 1

        return one_bit

    for replacement in (broken, lambda _: 1 / 0):
        monkeypatch.setattr(eager_step, "_OPERATORS", {})
        monkeypatch.setattr(eager_step, "load_operator", replacement)
        with pytest.warns(QCWarning, match="plain-torch"):
            assert same(call(made, ADAMW), want)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once is enough
            assert same(call(made, ADAMW), want)


def test_no_compiler(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_step, "cpp_compiler", lambda: None)
    made = drawn(ADAMW, [eager_step.WORTH_BUILDING // 2])
    with pytest.warns(QCWarning, match="no C\\+\\+ compiler"):
        assert same(call(made, ADAMW), meant(ADAMW, made))
    assert counted == []


def wrong(made: Operands) -> dict[str, tuple[Any, ...]]:
    state, inputs, numbers, random = made
    assert random is not None
    return {
        "too few": (state[:-1], inputs, numbers, random),
        "no gradients": (state, [], numbers, random),
        "dtype": (state, [inputs[0].float(), inputs[1]], numbers, random),
        "size": (state, [inputs[0][:-1], inputs[1]], numbers, random),
        "order": (state[1:] + state[:1], inputs, numbers, random),
        "gaps": ([state[0].repeat_interleave(2)[::2], *state[1:]], inputs, numbers, random),
        "scales": ([*state[:2], state[2][:1], *state[3:]], inputs, numbers, random),
        "a number too few": (state, inputs, numbers[:, :-1], random),
        "rows": (state, inputs, numbers[:1], random),
        "doubles": (state, inputs, numbers.double(), random),
        "columns": (state, inputs, numbers.t().contiguous().t(), random),
        "random": (state, inputs, numbers, random.int()),
        "random rows": (state, inputs, numbers, random[:1]),
        "no random": (state, inputs, numbers, None),
        "last": ([*state[:-1], state[-1][:0]], inputs, numbers, random),
    }


@pytest.mark.parametrize("name", wrong(drawn(ADAMW, [300, 40])))
def test_operands_that_do_not_fit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is written."""
    monkeypatch.setattr(eager_step, "_OPERATORS", {ADAMW: kernel(ADAMW)})
    made = drawn(ADAMW, [300, 40])
    before = [t.clone() for t in made[0]]
    with pytest.raises(QCError, match=r"step\.operands"):
        STEP(*wrong(made)[name], ADAMW)
    assert same(made[0], before)


def test_one_row_of_numbers_and_any_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager_step, "_OPERATORS", {ADAMW: kernel(ADAMW)})
    state, inputs, numbers, random = drawn(ADAMW, [600, 30])
    flat: Operands = (state, inputs, numbers[:1].expand(2, -1).contiguous(), random)
    want = meant(ADAMW, flat)
    shaped = [t.clone() for t in state]
    for i, shape in ((0, (3, 20, 10)), (1, (3, 200)), (5, (30, 1))):
        shaped[i] = shaped[i].view(shape)
    p = torch.nn.Parameter(shaped[0])
    version = p._version
    with torch.no_grad():
        STEP([p, *shaped[1:]], [inputs[0].view(20, 30), inputs[1]], numbers[0].clone(), random, ADAMW)
    assert p._version > version
    assert same([t.view(-1) for t in shaped], want)
    STEP([], [], numbers[0].clone(), random[:0] if random is not None else None, ADAMW)
