"""Whole graphs through Inductor's Triton path, every kernel in the interpreter: what is launched, and what comes out."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from torch._dynamo.utils import counters
from torch._inductor.utils import run_and_get_code

from qcompile import Recipe, Rule, convert, explain, load, save
from qcompile.backend import watching
from qcompile.codegen import eager, inductor
from qcompile.codegen.devices import triton
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, expected
from qcompile.codegen.devices.triton_rotate import expected as turned
from qcompile.codegen.spec import KernelSpec
from qcompile.compat.jit import Gpu
from qcompile.errors import QCError
from qcompile.ir import ops
from qcompile.ir.codec import quantize
from qcompile.ir.hadamard import random_signs
from qcompile.ir.matmul import DTYPE_NAMES, MatmulSpec
from qcompile.ir.scheme import Scheme
from qcompile.testing.interpret import interpret
from tests.e2e.support import compiled, decoded, noise_bound

DTYPES = [torch.float16, torch.bfloat16]


class Gated(nn.Module):
    """RMSNorm, linear, silu(gate) * up, linear with a residual: a decoder's feed-forward half."""

    def __init__(self, d: int = 128, h: int = 256) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(d))
        self.first = nn.Linear(d, d)
        self.gate = nn.Linear(d, h, bias=False)
        self.up = nn.Linear(d, h, bias=False)
        self.down = nn.Linear(h, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        y = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * self.scale
        y = F.gelu(self.first(y))
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with torch.no_grad(), interpret():
        yield


def gated(dtype: torch.dtype) -> Gated:
    torch.manual_seed(0)
    return Gated().to(dtype).eval()


def close(got: Tensor, model: Gated, x: Tensor, scheme: str, step: float = 0.0) -> bool:
    """As the float model with the decoded weights, but for roundings: an input of a linear is rounded by the norm (twice),
    the gate (twice) or the result before, an operand of a kernel at most three times, a result once; and by `step`."""
    exact = decoded(copy.deepcopy(model).double(), scheme)
    bound = noise_bound(exact, x, step=step + 8 * ROUNDOFF[DTYPE_NAMES[x.dtype]])
    residual = ROUNDOFF[DTYPE_NAMES[x.dtype]] * float(got.abs().max())
    return float((got.double() - exact(x.double())).abs().max()) <= bound + residual


def launches(code: str) -> list[str]:
    """Kernels that generated code calls, in order: ours, and Inductor's."""
    return re.findall(r"^ *(?:\w+ = )?(qcompile_qmm|triton_\w+?)(?:_\d+)?(?:\.run)?\(", code, re.M)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_kernel_for_each_matmul_with_its_end(dtype: torch.dtype) -> None:
    """Bias and gelu, silu(gate) * up from two accumulators, and the residual are ends of matmul kernels; the norm is one
    kernel of Inductor's; no input of the graph and no buffer in it is a weight in floats."""
    model, x = gated(dtype), torch.randn(5, 128, dtype=dtype)
    out, (code,) = run_and_get_code(compiled(model, "uint4/g32:fp16+m"), x)
    called = launches(code.partition("def call(")[2].partition("return")[0])
    assert [name for name in called if name == "qcompile_qmm"] == ["qcompile_qmm"] * 3
    assert len(called) == 4
    specs = re.findall(r"prepare\('(.*?)'", code)
    assert sorted(re.findall(r"\b(gelu|erf|exp|e0)\b", " ".join(specs))) == ["e0", "e0", "e0", "erf", "exp"]
    floats = re.findall(
        r"(?:rand_strided|empty_strided_cpu)\(\((\d+), (\d+)\).*?torch\.(?:float16|bfloat16|float32)", code
    )
    assert floats
    assert all(5 in map(int, shape) for shape in floats)  # activations; the others are vectors and packed scales
    assert close(out, model, x, "uint4/g32:fp16+m")


def test_gates_in_fp32_are_combined_behind_their_kernel() -> None:
    """No kernel has registers for two sums in fp32; there still is one for gate and up."""
    model, x = gated(torch.float32), torch.randn(5, 128)
    out, (code,) = run_and_get_code(compiled(model, "int4/g64:fp16"), x)
    called = launches(code.partition("def call(")[2].partition("return")[0])
    assert called.count("qcompile_qmm") == 3
    assert len(called) == 5  # norm, and silu(gate) * up
    assert close(out, model, x, "int4/g64:fp16")


@pytest.mark.parametrize("scheme", ["int8/axis0", "e4m3/axis0", "nf4/g64:fp16", "ternary/axis0", "int4/g128:fp16"])
def test_schemes(scheme: str) -> None:
    model, x = gated(torch.bfloat16), torch.randn(7, 128, dtype=torch.bfloat16)
    assert close(compiled(model, scheme)(x), model, x, scheme)


@pytest.mark.parametrize(
    ("scheme", "act", "step"),
    [
        ("int8/axis0", "int8/token", 0.5 / 127),
        ("uint4/g128:fp16+z", "int8/token", 0.5 / 127),
        ("int8/axis0", "uint8/token:fp32+z", 1.0 / 255),
        ("e4m3/axis0", "e4m3/token", 2.0**-4),
        ("e4m3/b128x128:fp32", "e4m3/g128:fp32", 2.0**-4),
    ],
)
def test_activations_are_quantized_where_they_are_made(scheme: str, act: str, step: float) -> None:
    """The norm's kernel also writes codes; gelu's and the gate's results become codes in one kernel each; sums, or codes, of
    the two groups of the last input take another. Rounding moves an input of a linear by half a step of 127, or by half a
    unit of three bits."""
    model, x = gated(torch.bfloat16), torch.randn(7, 128, dtype=torch.bfloat16)
    recipe = Recipe((Rule(scheme, act=act),))
    out, (code,) = run_and_get_code(compiled(model, recipe), x)
    called = launches(code.partition("def call(")[2].partition("return")[0])
    assert len([name for name in called if name == "qcompile_qmm"]) == 3
    assert len(called) == 6 + ("128" in scheme)
    assert close(out, model, x, scheme, step=step)
    for rows in (1, 20):
        x = torch.randn(rows, 128, dtype=torch.bfloat16)
        assert close(compiled(model, recipe, dynamic=True)(x), model, x, scheme, step=step)


@pytest.mark.parametrize("recipe", ["int4", "int8/axis0 int8/token", "e4m3/axis0 e4m3/token"])
def test_verify_compares_the_kernels(recipe: str) -> None:
    with watching() as trace:
        compiled(gated(torch.bfloat16), recipe, verify=True)(torch.randn(5, 128, dtype=torch.bfloat16))
    (note,) = [note for ctx in trace.contexts for note in ctx.plan.notes if "verify" in note]
    assert note.startswith("verify compared 3 of 3 calls")


def test_one_graph_serves_every_number_of_rows() -> None:
    model = gated(torch.bfloat16)
    counters.clear()
    call = compiled(model, "int4/g128:fp16", dynamic=True)
    for rows in (2, 3, 17, 40, 130):
        x = torch.randn(rows, 128, dtype=torch.bfloat16)
        assert close(call(x), model, x, "int4/g128:fp16")
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("recipe", "act"), [("w8a8", "int8/token:fp32"), ("w4a8", "int8/token:fp32"), ("int4", "")])
def test_presets_have_kernels(recipe: str, act: str) -> None:
    report = explain(gated(torch.bfloat16), torch.randn(2, 128, dtype=torch.bfloat16), recipe=recipe)
    assert {row.kernel for row in report.rows} == {"cpu-triton 16x64"}
    assert {row.scheme.partition(" x ")[2] for row in report.rows} == {act}
    assert report.coverage == 1.0


@pytest.mark.parametrize("recipe", ["int4", "w8a8"])
def test_converted_models_run_the_same_kernels(recipe: str, tmp_path: Path) -> None:
    """What was converted for a GPU is packed as its kernels read it, files hold no device's layout, and what is loaded from
    them here is laid out again."""
    model, x = gated(torch.bfloat16), torch.randn(4, 128, dtype=torch.bfloat16)
    want = compiled(copy.deepcopy(model), recipe)(x)
    convert(model, recipe)
    report = explain(model, x, recipe=recipe)
    assert {row.kernel for row in report.rows} == {"cpu-triton 16x64"}
    assert torch.equal(compiled(model, recipe)(x), want)
    save(model, tmp_path)
    assert "mma" not in (tmp_path / "qcompile.json").read_text()
    again = load(gated(torch.bfloat16), tmp_path)
    assert torch.equal(again.down.parametrizations.weight.original0, model.down.parametrizations.weight.original0)
    assert torch.equal(compiled(again, recipe)(x), want)


@pytest.mark.parametrize(
    ("scheme", "kernels"), [("int8/g64:fp16", 1), ("uint4/g32:fp16+m", 2), ("e3m2/g32:e8m0", 3), ("nf4/g64:fp16", 2)]
)
def test_a_lookup_is_decoded_with_what_follows(scheme: str, kernels: int) -> None:
    """Codes are decoded, normalized and scaled in one kernel of Inductor's, after one for each plane that gathers them, where
    a byte holds several."""
    table = nn.Embedding(50, 128)

    def lookup(ids: Tensor) -> Tensor:
        return F.layer_norm(table(ids), (128,)) * 2

    ids = torch.tensor([[0, 49, 7], [7, 16, 33]])
    out, (code,) = run_and_get_code(compiled(lookup, scheme), ids)
    assert len(launches(code.partition("def call(")[2].partition("return")[0])) == kernels
    want = F.layer_norm(decoded(copy.deepcopy(table).double(), scheme)(ids), (128,)) * 2
    # Values are exact but for their rounding to fp32; the norm of 128 rounds fewer than 300 times.
    assert (out.double() - want).abs().max() <= 300 * 2.0**-23 * want.abs().max()


def test_the_ledger_names_the_kernels() -> None:
    """With the tile for so many rows."""
    for rows, tile in ((2, "16x64"), (40, "64x64"), (300, "64x128")):
        torch.compiler.reset()  # as another number of rows would leave the number open
        report = explain(gated(torch.float16), torch.randn(rows, 128, dtype=torch.float16), recipe="int4")
        assert {row.kernel for row in report.rows} == {f"cpu-triton {tile}"}
        assert report.coverage == 1.0


def test_plans_of_a_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many rows get their weight decoded once."""
    monkeypatch.setattr(triton.compat, "gpu", lambda _: Gpu("sm_90", 132, 232448))
    triton.choose_tile.cache_clear()
    device = torch.device("meta")
    floats = KernelSpec(Scheme.parse("int4/g128:fp16@mma16"), x="bf16", y="bf16")
    bytes_ = KernelSpec(Scheme.parse("int8/axis0@mma8"), Scheme.parse("int8/token"), x="bf16", y="bf16")
    said = [triton.plan(spec, (4096,), 4096, m, device) for spec in (floats, bytes_) for m in (1, 1024, 4096)]
    triton.choose_tile.cache_clear()
    assert said == ["16x64", "128x128", "decoded, library", "16x64", "128x128", "decoded, 256x128"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rotation_is_one_kernel(dtype: torch.dtype) -> None:
    """Rows at a distance are read where they lie, any number of them by the same code."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = nn.Linear(192, 32, bias=False)
            self.register_buffer("signs", random_signs(192, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.ops.qcompile.rotate(x[..., :192], 96, self.signs))

    torch.manual_seed(0)
    model, x = Turned().to(dtype).eval(), torch.randn(2, 5, 200, dtype=dtype)
    run = compiled(model, "int8/axis0", dynamic=True)
    out, (code,) = run_and_get_code(run, x)
    called = re.findall(r"^ *(qcompile_\w+?|triton_\w+?)(?:_\d+)?(?:\.run)?\(", code.partition("def call(")[2], re.M)
    assert called == ["qcompile_rotate", "qcompile_qmm"]
    for rows in (x, torch.randn(1, 9, 200, dtype=dtype)):
        out = run(rows)
        bound = turned(rows[..., :192], 96, model.signs)
        weight = decoded(copy.deepcopy(model.down).double(), "int8/axis0").weight
        want = bound.value @ weight.T
        # The rotation's own bound through the weight; sums of 192 products and the result are rounded.
        error = bound.bound @ weight.abs().T + 200 * 2.0**-23 * (bound.value.abs() @ weight.abs().T)
        name = DTYPE_NAMES[dtype]
        error = error + 2 * ROUNDOFF[name] * (want.abs() + error)
        # Each weight is rounded on its way: the code to dtype exactly, its scale once.
        assert ((out.double() - want).abs() <= error).all()


def test_eager_calls() -> None:
    """Outside of compiled code the same kernel is launched; where there is none, or it is not wanted, plain torch runs."""
    torch.manual_seed(0)
    x, bias, weight = torch.randn(2, 3, 70).half(), torch.randn(40), torch.randn(40, 70)
    for scheme, has_kernel in (("int4/g32:fp16@mma16", True), ("int4/g8:fp16@mma16", False)):
        text, parts = f"{scheme} n=40 k=70 y=acc+e0 e=row", quantize(weight, scheme)
        y = eager.qmm_on_gpu(x, parts, [bias], text)
        with ops.reference_only():
            plain = eager.qmm_on_gpu(x, parts, [bias], text)
        assert torch.equal(plain, ops.qmm_reference(x, parts, [bias], text))
        if has_kernel:
            spec = KernelSpec.of(MatmulSpec.parse(text), x.dtype, x.dtype, [bias.dtype])
            assert torch.equal(y, triton.run(spec, x, parts, [bias], [40], 70))
        else:
            assert torch.equal(y, plain)
    with pytest.raises(QCError, match=r"matmul\.operands"):
        eager.qmm_on_gpu(x, parts, [], text)
    with pytest.raises(QCError, match=r"packing\.shape|codec\.parts"):
        eager.qmm_on_gpu(x, [parts[0][:1], parts[1]], [bias], text)


@pytest.mark.parametrize("act", ["int8/tensor:fp32", "uint8/tensor:fp32+z"])
def test_static_activations(act: str) -> None:
    """Scale and zero point are operands of the graph: codes are made by one kernel of Inductor's, without a reduction."""
    torch.manual_seed(0)
    text, x = f"int8/axis0@mma8 n=32 k=128 act={act} static", torch.randn(7, 128).bfloat16()
    parts = quantize(torch.randn(32, 128), "int8/axis0@mma8")
    static = [torch.tensor([0.03])] + [torch.tensor([90], dtype=torch.uint8)] * ("+z" in act)

    def call(x: Tensor, *parts: Tensor) -> Tensor:
        y: Tensor = torch.ops.qcompile.qmm(x * 2, list(parts), [], text)
        return y

    inductor.install()
    out, (code,) = run_and_get_code(torch.compile(call), x, *parts, *static)
    called = launches(code.partition("def call(")[2].partition("return")[0])
    assert called[-1] == "qcompile_qmm"
    assert len(called) <= 3
    spec = KernelSpec.of(MatmulSpec.parse(text), x.dtype, x.dtype)
    want = expected(spec, x * 2, parts, 32, 128, static=static)
    bound = want.bound + ROUNDOFF["bf16"] * (want.value.abs() + want.bound)
    assert ((out.double() - want.value).abs() <= bound).all()
    assert torch.equal(eager.qmm_on_gpu(x * 2, [*parts, *static], [], text), out)
    plain = ops.qmm_reference(x * 2, [*parts, *static], [], text)
    # Both are within the bound of sums of integers, and round once.
    assert ((plain.double() - want.value).abs() <= bound + 130 * 2.0**-24 * want.value.abs().amax()).all()
    with pytest.raises(QCError, match=r"matmul\.operands"):
        eager.qmm_on_gpu(x, parts, [], text)
