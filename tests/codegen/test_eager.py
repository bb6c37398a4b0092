"""Eager calls of `qmm`: the generated kernel behind the dispatcher, and everything that may be handed to it.

A spec costs a build, so few specs meet many shapes. The kernel itself is tested elsewhere: here its result must be equal
bit for bit however it is called.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.codegen import eager
from qcompile.codegen.devices import cpu
from qcompile.codegen.devices.cpu_bounds import expected
from qcompile.codegen.spec import LONG_K, KernelSpec
from qcompile.errors import QCError
from qcompile.ir.matmul import OUT_DTYPES, MatmulSpec
from qcompile.ir.ops import reference_only
from tests.codegen.sites import FORMS, SCHEMES, W, kernel, site, spec_of

qmm = torch.ops.qcompile.qmm


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    """Build with all cores what most tests share; each of them then finds it on disk or in memory."""

    def build(text: str, compiled: bool) -> None:
        x, parts, extras = site(text, 2)
        (kernel if compiled else qmm)(*((text, x, parts, extras) if compiled else (x, parts, extras, text)))

    jobs = [(FORMS["plain"].format(w=w), False) for w in SCHEMES]
    jobs += [(form.format(w=W), compiled) for form in FORMS.values() for compiled in (False, True)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda job: build(*job), dict.fromkeys(jobs)))


@pytest.mark.parametrize("weight", SCHEMES)
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    lead=st.lists(st.integers(1, 4), max_size=2).map(tuple) | st.tuples(st.integers(5, 40)),
    n=st.integers(1, 50),
    k=st.integers(1, 70) | st.integers(90, 300),
    seed=st.integers(0, 9),
)
def test_any_shape(weight: str, lead: tuple[int, ...], n: int, k: int, seed: int) -> None:
    text = f"{weight} n={n} k={k}"
    x, parts, _ = site(text, *lead, seed=seed)
    y = qmm(x, parts, [], text)
    want = expected(spec_of(text, x, []), x.reshape(-1, k), parts, n, k)
    assert y.shape == (*lead, n)
    assert y.is_contiguous()
    assert weight != W or torch.equal(y, kernel(text, x, parts, []))
    assert ((y.reshape(-1, n) - want.value).abs() <= want.bound).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lead", [(1,), (2, 3), (19,)], ids=str)
def test_forms(form: str, lead: tuple[int, ...]) -> None:
    """Segments, both kinds of extras, activations: bit for bit what compiled code gets of the kernel."""
    text = FORMS[form].format(w=W)
    x, parts, extras = site(text, *lead)
    assert torch.equal(qmm(x, parts, extras, text), kernel(text, x, parts, extras))


@pytest.mark.parametrize(("dtype", "out", "unit"), [(torch.bfloat16, "", 2.0**-8), (torch.float16, "f32", 2.0**-24)])
def test_16_bits_in_and_another_dtype_out(dtype: torch.dtype, out: str, unit: float) -> None:
    text = f"{W} n=37 k=70" + f" out={out}" * bool(out)
    x, parts, _ = site(text, 3, dtype=dtype)
    y = qmm(x, parts, [], text)
    want = expected(spec_of(text, x, []), x, parts, 37, 70)
    assert y.dtype == (OUT_DTYPES[out] if out else dtype)
    assert ((y - want.value).abs() <= want.bound + unit * (want.value.abs() + want.bound)).all()


def strided(x: Tensor) -> Iterator[Tensor]:
    """Equal values in other memory."""
    yield torch.cat([x, x], -1)[..., : x.shape[-1]]  # rows at a distance
    yield x.repeat_interleave(2, -1)[..., ::2]  # gaps in rows
    yield x.transpose(0, 1).contiguous().transpose(0, 1)  # rows at two distances
    yield torch.cat([x[:1], x])[1:]  # an offset


def test_strides_are_honoured() -> None:
    text = FORMS["pair"].format(w=W)
    x, parts, (extra,) = site(text, 2, 3)
    want = qmm(x, parts, [extra], text)
    for other in strided(x):
        assert torch.equal(other, x)
        assert torch.equal(qmm(other, parts, [extra], text), want)
    for other in strided(extra):
        assert torch.equal(qmm(x, parts, [other], text), want)
    spread = [part.repeat_interleave(2, -1)[..., ::2] for part in parts]
    assert torch.equal(qmm(x, spread, [extra], text), want)
    one = x[0, 0].expand(4, 70)  # every row the same memory
    assert torch.equal(qmm(one, parts, [extra[0, :1].expand(4, -1)], text), want[0, :1].expand(4, -1))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_rows(lead: tuple[int, ...]) -> None:
    text = FORMS["bias"].format(w=W)
    y = qmm(*site(text, *lead), text)
    assert y.shape == (*lead, 61)


def test_a_nan_stays_in_its_row() -> None:
    text = FORMS["bias"].format(w=W)
    x, parts, extras = site(text, 5)
    clean = qmm(x, parts, extras, text)
    x[1, 3], x[4, 0] = float("nan"), float("inf")
    y = qmm(x, parts, extras, text)
    assert y[[1, 4]].isnan().all()
    assert torch.equal(y[[0, 2, 3]], clean[[0, 2, 3]])


WRONG: dict[str, Any] = {
    "k": lambda x, p, e: (x[..., :69], p, e),
    "x of no dimension": lambda x, p, e: (x[0, 0], p, e),
    "a part too few": lambda x, p, e: (x, p[:-1], e),
    "a part too many": lambda x, p, e: (x, [*p, p[0]], e),
    "integers": lambda x, p, e: (x.int(), p, e),
    "truth values": lambda x, p, e: (x > 0, p, e),
    "complex numbers": lambda x, p, e: (x.to(torch.complex64), p, e),
    "an extra of integers": lambda x, p, e: (x, p, [e[0].int()]),
    "no part": lambda x, p, e: (x, [], e),
    "parts in another order": lambda x, p, e: (x, p[::-1], e),
    "dtype of a scale": lambda x, p, e: (x, [p[0], p[1].float(), *p[2:]], e),
    "codes of fewer outputs": lambda x, p, e: (x, [p[0][:-1], *p[1:]], e),
    "codes of fewer inputs": lambda x, p, e: (x, [p[0][:, :-1], *p[1:]], e),
    "scales of fewer groups": lambda x, p, e: (x, [p[0], p[1][:, :-1], *p[2:]], e),
    "flat codes": lambda x, p, e: (x, [p[0].flatten(), *p[1:]], e),
    "no extra": lambda x, p, e: (x, p, []),
    "an extra too many": lambda x, p, e: (x, p, [*e, *e]),
    "a short extra": lambda x, p, e: (x, p, [e[0][:-1]]),
    "a scalar extra": lambda x, p, e: (x, p, [e[0][0]]),
}


@pytest.mark.parametrize("shape", [(6, 37), (3, 2, 37), (1, 2, 3, 37), (2, 3, 1)], ids=str)
def test_a_matrix_beside_the_result_has_its_shape(shape: tuple[int, ...]) -> None:
    """As many rows are not enough; the plain-torch meaning says the same."""
    text = FORMS["pair"].format(w=W)
    x, parts, _ = site(text, 2, 3)
    with pytest.raises(QCError, match="extra") as error:
        qmm(x, parts, [torch.zeros(shape)], text)
    assert error.value.code == "matmul.operands"
    with reference_only(), pytest.raises(QCError, match="extra") as error:
        qmm(x, parts, [torch.zeros(shape)], text)
    assert error.value.code == "matmul.operands"


@pytest.mark.parametrize("name", WRONG)
def test_wrong_operands_are_errors(name: str) -> None:
    text = FORMS["bias"].format(w=W)
    good = site(text, 3)
    with pytest.raises(QCError) as error:
        qmm(*WRONG[name](*good), text)
    assert error.value.code == "matmul.operands"
    assert torch.equal(qmm(*good, text), kernel(text, *good))


def test_the_operator_itself_checks_everything() -> None:
    """What the layer above repairs or cannot produce: dtypes, gaps, sizes that do not fit the specification."""
    text = FORMS["pair"].format(w=W)
    spec = KernelSpec.of(MatmulSpec.parse(text), "f32", "f32", ["f32"])
    x, parts, extras = site(text, 4)
    operator = eager.operator_of(spec)
    assert operator is not None
    good = (x, parts, extras, [37, 37], 70)
    assert torch.equal(operator(*good), qmm(x, parts, extras, text))
    wrong: list[tuple[Any, ...]] = [
        (x.double(), *good[1:]),
        (x.repeat_interleave(2, -1)[:, ::2], *good[1:]),
        (x.reshape(2, 2, 70).transpose(0, 1), *good[1:]),
        (x, [p.repeat_interleave(2, -1)[..., ::2] for p in parts], *good[2:]),
        (x, parts, [extras[0].half()], *good[3:]),
        (x, parts, [extras[0][:2]], *good[3:]),
        (x, parts, [extras[0].reshape(2, 2, 37)], *good[3:]),
        (x.reshape(2, 2, 70), *good[1:]),
        (x, parts, [extras[0].T.contiguous().T], *good[3:]),
        (*good[:3], [37], 70),
        (*good[:3], [37, 36], 70),
        (*good[:3], [53, 53], 70),
        (*good[:3], [0, 0], 70),
        (*good[:3], [-1, -1], 70),
        (*good[:3], [2**62, 2**62], 70),
        (*good[:4], 0),
        (*good[:4], -70),
        (*good[:4], LONG_K + 1),
        (*good[:4], 2**62),
    ]
    for operands in wrong:
        with pytest.raises(RuntimeError, match="qmm: "):
            operator(*operands)
    with pytest.raises(NotImplementedError):  # a tensor of another device never reaches the kernel
        operator(x.to("meta"), *good[1:])


def test_what_has_no_kernel_runs_the_reference() -> None:
    for text, dtype in (("int4/g16:fp16 n=20 k=70", torch.float32), ("int4/g32:fp16 n=20 k=70", torch.float64)):
        x, parts, extras = site(text, 3, dtype=dtype)
        with reference_only():
            want = qmm(x, parts, extras, text)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(qmm(x, parts, extras, text), want)


def test_without_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    text = FORMS["plain"].format(w=W)
    x, parts, extras = site(text, 3)
    with reference_only():
        want = qmm(x, parts, extras, text)
    assert not torch.equal(qmm(x, parts, extras, text), want)
    with fresh(monkeypatch):
        monkeypatch.setattr(cpu, "cpp_compiler", lambda: None)
        assert torch.equal(qmm(x, parts, extras, text), want)


@contextmanager
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is known about any spec inside the block."""
    with monkeypatch.context() as patch:
        patch.setattr(eager, "_CALLS", {})
        patch.setattr(eager, "_OPERATORS", {})
        yield


def test_callers_in_threads_get_their_own_results() -> None:
    text = FORMS["pair"].format(w=W)
    cases = [site(text, rows, seed=rows) for rows in (1, 3, 17, 30)]
    wants = [qmm(*case, text) for case in cases]
    wrong: list[int] = []

    def work(first: int) -> None:
        for i in range(first, first + 40):
            with torch.no_grad():
                if not torch.equal(qmm(*cases[i % 4], text), wants[i % 4]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_reference_only_holds_for_its_thread_alone() -> None:
    text = FORMS["plain"].format(w=W)
    x, parts, extras = site(text, 3)
    want = qmm(x, parts, extras, text)
    with reference_only(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(qmm, x, parts, extras, text).result(), want)
        assert not torch.equal(qmm(x, parts, extras, text), want)
    assert torch.equal(qmm(x, parts, extras, text), want)


def test_gradient_autocast_modes_and_fakes() -> None:
    """The other ways into the operator end in the same kernel, or do not reach it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    text = FORMS["bias"].format(w=W)
    x, parts, (bias,) = site(text, 4)
    want = qmm(x, parts, [bias], text)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(qmm(x, parts, [bias], text), want)
    x, bias = x.requires_grad_(), bias.requires_grad_()
    y = qmm(x, parts, [bias], text)
    assert torch.equal(y, want)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), grad)
    weights = [torch.ops.qcompile.decode(parts[i : i + 2], W, n, 70, torch.float32) for i, n in ((0, 21), (2, 40))]
    assert torch.equal(got[0], grad[:, :21] @ weights[0] + grad[:, 21:] @ weights[1])
    assert torch.equal(got[1], grad.sum(0))
    x, bias = x.detach(), bias.detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = qmm(x, parts, [bias], text)
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, qmm(x.bfloat16(), parts, [bias], text))
    with FakeTensorMode() as fake:
        y = qmm(*(fake.from_tensor(x), [fake.from_tensor(p) for p in parts], [fake.from_tensor(bias)]), text)
    assert (type(y).__name__, tuple(y.shape)) == ("FakeTensor", (4, 61))
    assert qmm(x.to("meta"), [p.to("meta") for p in parts], [bias.to("meta")], text).is_meta


def test_the_first_call_may_come_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Building and trying a kernel does not see the caller's modes."""
    text = FORMS["plain"].format(w=W)
    x, parts, extras = site(text, 3)
    want = qmm(x, parts, extras, text)
    modes = [torch.inference_mode(), torch.device("meta"), torch.autocast("cpu", enabled=False)]
    for mode in modes:
        with fresh(monkeypatch), warnings.catch_warnings(), mode:
            warnings.simplefilter("error")
            assert torch.equal(qmm(x, parts, extras, text), want)
    state = torch.get_rng_state()
    with fresh(monkeypatch):
        qmm(x, parts, extras, text)
    assert torch.equal(torch.get_rng_state(), state)
