"""Every kind of kernel by a real launch, on small sizes with ragged ends, within derived bounds.

A family is a function that gives cases. A case compiles ahead by itself and is then called; it returns its error in units
of its bound. New kinds of kernels add a function to `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from gpu_blocks.matmuls import compile_job, rounded, spec_of, sums_of
from gpu_blocks.other_kernels import Case, caches, experts, rotations
from gpu_blocks.session import Session
from qcompile import compat
from qcompile.codegen.devices.triton import Tile, TritonLowering
from qcompile.codegen.devices.triton import run as launch
from qcompile.codegen.devices.triton_bounds import ROUNDOFF, SMALLEST, expected
from qcompile.codegen.devices.triton_decoded import ways
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.formats import FORMATS
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.packing import pack_codes, pack_scales
from qcompile.ir.scheme import Scheme
from qcompile.testing.exact_products import exact_product

LARGE = 19, 70, 600  # rows, outputs, inputs: nothing divides a tile
TINY = 3, 40, 280
MORE = (
    *("int4/g128:fp16", "uint4/g32:fp16+m", "uint4/g64:fp16+z", "uint8/axis0:fp32+z", "int4/g16:int8/g64:fp16"),
    *("e2m1/g32:e8m0", "e2m1/g16:e4m3/tensor:fp32", "int4/g128:int8/axis0:fp32", "ternary/tensor", "int3/g512:bf16"),
)
TILES = (Tile(), Tile(units=2, splits=3), Tile(rows=32, columns=128, warps=8, splits=2))
VENDOR = Tile(way="vendor")
# Our own product of bytes: by descriptors, as one loop over all tiles, by pointers.
OWN = tuple(
    Tile(rows, columns, 1, 1, 3, warps, "own", 128, tma, flat)
    for rows, columns, warps, tma, flat in (
        (128, 128, 8, True, False),
        (64, 128, 4, True, True),
        (128, 64, 4, False, False),
    )
)


def run(session: Session) -> None:
    for family, cases_of in FAMILIES.items():
        named, errors = dict[str, Case](), dict[str, float]()
        with session.guarded({"family": family}):
            named.update((case.name, case) for case in cases_of(session))
        session.compile(case.job for case in named.values() if case.job)
        session.ask([{"family": family, "case": name} for name in named], partial(_case, session, named, errors))
        right = [error for error in errors.values() if error <= 1]
        session.say(
            f"    {family}: {len(right)} of {len(named)} right, the largest error is "
            f"{max(errors.values(), default=0.0):.2f} of its bound"
        )


def _case(session: Session, named: Mapping[str, Case], errors: dict[str, float], config: dict[str, Any]) -> None:
    with compat.float32_sums():
        errors[config["case"]] = error = named[config["case"]].error(session.device.torch)
    if not error <= 1:
        session.say(f"    WRONG {config['case']}: {error:.3g} times the bound")
    session.record(config, {"error": error}, ok=error <= 1)


def products(session: Session) -> Iterator[Case]:
    """Every format under an exact activation: one scale for a row, and groups; kinds of scales, zeros, nesting."""
    schemes = [scheme for i, name in enumerate(FORMATS) for scheme in (f"{name}/axis0", f"{name}/g{16 << i % 4}:fp16")]
    schemes = session.pick(schemes, schemes, schemes[::7]) + session.pick(list(MORE), list(MORE), list(MORE[:3]))
    dtypes = list(OUT_DTYPES)
    for i, scheme in enumerate(schemes):
        for dtype in session.pick(dtypes, dtypes[i % 3 :][:1], dtypes[i % 3 :][:1]):
            yield _product(session, spec_of(scheme, dtype=dtype), TILES[i % len(TILES)])


def bytes_(session: Session) -> Iterator[Case]:
    """What is multiplied as bytes: every format under activations of 8 bits, where there is a kernel."""
    schemes = [f"{name}/axis0{':fp32+z' if name.startswith('u') else ''}" for name in FORMATS]
    schemes += [
        "int4/g128:fp16",
        "uint4/g128:fp16+z",
        "int8/g64:fp16",
        "uint8/g192:bf16+z",
        "int4/g128:int8/axis0:fp32",
    ]
    schemes += ["e4m3/g128:fp32"]
    for act in ("int8/token", "e4m3/token", "e4m3/g128:fp32"):
        specs = [spec_of(scheme, act, ("bf16", "f16", "f32")[i % 3]) for i, scheme in enumerate(schemes)]
        specs = [spec for spec in specs if TritonLowering().supports(spec)]
        for i, spec in enumerate(session.pick(specs, specs, specs[-2:])):
            yield _product(session, spec, TILES[i % len(TILES)])


def decoded(session: Session) -> Iterator[Case]:
    """The other ways: a weight that is decoded once, then our own product of bytes or the vendor's library."""
    plain = [f"{name}/{'axis0' if i % 2 else 'g64:fp16'}" for i, name in enumerate(FORMATS)] + list(MORE)
    for i, scheme in enumerate(session.pick(plain, plain[:: len(TILES)], plain[-2:])):
        spec = spec_of(scheme, dtype=("bf16", "f16")[i % 2])
        yield _product(session, spec, VENDOR)
        if i % 2:  # sums that a second kernel finishes
            yield _product(session, replace(spec, y="f32"), VENDOR)
    for act, schemes in BYTES.items():
        for i, scheme in enumerate(session.pick(schemes, schemes, schemes[:1])):
            for dtype in session.pick(
                ("bf16", "f16"), ("bf16",), ("bf16",)
            ):  # of bf16 a library makes the whole result
                spec = spec_of(scheme, act, dtype)
                owns = session.pick(OWN, OWN[i % len(OWN) :][:1], (replace(OWN[i % len(OWN)], rows=16, columns=32),))
                for tile in (*owns, VENDOR):
                    if tile.way in ways(spec) and TritonLowering().supports(spec):
                        yield _product(session, spec, tile)


# By activation: weights with one scale for a row, with zero points, with groups.
BYTES = {
    "int8/token": ("int8/axis0", "uint4/axis0:fp32+z", "uint4/g128:fp16+z", "int4/g128:int8/axis0:fp32"),
    "e4m3/token": ("e4m3/axis0", "int4/g128:fp16", "uint8/axis0:fp32+z"),
    "e4m3/g128:fp32": ("e4m3/g128:fp32", "e4m3/b128x128:fp32"),
}


def _product(session: Session, spec: KernelSpec, tile: Tile) -> Case:
    m, n, k = session.pick(LARGE, LARGE, TINY)

    def error(device: torch.device) -> float:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(m, k, generator=generator).to(OUT_DTYPES[spec.x])
        x[m // 2] = 0
        parts = quantize(torch.randn(n, k, generator=generator) / 8, spec.weight)
        y = launch(spec, x.to(device), [part.to(device) for part in parts], [], [n], k, tile).cpu()
        want = expected(spec, x, parts, n, k, rounded(spec, tile), **sums_of(spec, device))
        return _excess(y, want.value, want.bound, spec.y)

    return Case(f"{spec} {_named(tile)}", error, compile_job(spec, m, n, k, tile))


LONG = 16, 96, 8192


def long_sums(session: Session) -> Iterator[Case]:
    """Sums of thousands of terms without a rounding, where bounds see little: one format after another, each kind of tile."""
    floats = [(f"{name}/axis0", "") for name in FORMATS] + [(scheme, "") for scheme in MORE]
    chosen = floats + [(scheme, act) for act, schemes in BYTES.items() for scheme in schemes]
    for i, (scheme, act) in enumerate(session.pick(chosen, chosen[::2], chosen[-2:])):
        spec = spec_of(scheme, act, ("bf16", "f16")[i % 2])
        tiles = session.pick((*TILES, *OWN, VENDOR), (TILES[i % len(TILES)], OWN[i % len(OWN)], VENDOR), TILES[:1])
        for tile in tiles:
            if tile.way in ways(spec) and TritonLowering().supports(spec):
                yield _long_sum(session, replace(spec, y="f32"), tile)


def _long_sum(session: Session, spec: KernelSpec, tile: Tile) -> Case:
    m, n, k = session.pick(LONG, LONG, TINY)

    def error(device: torch.device) -> float:
        problem = exact_product(spec, m, n, k)
        y = launch(spec, problem.x.to(device), [part.to(device) for part in problem.parts], [], [n], k, tile).cpu()
        return (
            0.0
            if torch.equal(y, problem.want)
            else _excess(y, problem.want.double(), problem.want.new_zeros(()), "f32") + 2
        )

    return Case(f"{spec} {_named(tile)} exactly", error, compile_job(spec, m, n, k, tile))


def _named(tile: Tile) -> str:
    if tile.way == "vendor":
        return "decoded, vendor"
    text = f"{tile.rows}x{tile.columns}"
    if tile.way == "own":
        return f"decoded, {text}{' descriptors' * tile.tma}{' flat' * tile.flat}"
    return f"{text} split{tile.splits}"


# What an epilogue computes; at most three operations, each within 4 units of fp32 of its value, on exact sums.
EPILOGUES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "exp(acc)": torch.exp,
    "log(abs(acc)+1)": lambda v: (v.abs() + 1).log(),
    "tanh(acc)": torch.tanh,
    "erf(acc)": torch.erf,
    "sigmoid(acc)": torch.sigmoid,
    "relu(acc)": torch.relu,
    "silu(acc)": torch.nn.functional.silu,
    "sqrt(abs(acc))": lambda v: v.abs().sqrt(),
    "rsqrt(acc*acc+1)": lambda v: (v * v + 1).rsqrt(),
    "maximum(acc,1.5)/3": lambda v: v.clamp_min(1.5) / 3,
    "minimum(acc,0.5)-2": lambda v: v.clamp_max(0.5) - 2,
}


def epilogues(session: Session) -> Iterator[Case]:
    """Functions at the end of a kernel."""
    for text in session.pick(list(EPILOGUES), list(EPILOGUES), list(EPILOGUES)[::3]):
        spec = KernelSpec(spec_of("int4/axis0").weight, x="f16", y="f32", epilogue=text)
        yield Case(text, _epilogue(spec, EPILOGUES[text]), compile_job(spec, 3, 16, 128, Tile()))


def _epilogue(spec: KernelSpec, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.device], float]:
    def error(device: torch.device) -> float:
        codes = torch.randint(0, 16, (16, 128), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
        parts = [pack_codes(codes, 4, "mma16"), pack_scales(torch.full((16, 1), 0.125), "mma16")]
        x = torch.zeros(3, 128, dtype=torch.float16)
        x[:, :8] = torch.tensor([[1.0], [-0.5], [0.25]])
        want = function(x.double() @ ((codes.double() - 8) * 0.125).T)
        y = launch(spec, x.to(device), [part.to(device) for part in parts], [], [16], 128, Tile()).cpu()
        return _excess(y, want, 12 * 2.0**-23 * (want.abs() + 1e-3), spec.y)

    return error


def merged(session: Session) -> Iterator[Case]:
    """Several weights in one launch: side by side with a bias, and gate and up with silu(gate) * up."""
    pairs = {"": "uint4/g32:fp16+m", "int8/token": "uint4/g128:fp16+z"}
    for act, scheme in pairs.items():
        one = spec_of(scheme, act)
        for tile in (*session.pick(TILES, TILES, TILES[1:2]), *session.pick(OWN, OWN[:1], ()), VENDOR):
            if tile.way not in ways(one):
                continue
            for epilogue, extras in (("silu(a0)*a1", ()), ("acc+e0", (("row", "f32"),))):
                spec = KernelSpec(one.weight, one.act, 2, epilogue, extras, "bf16", "bf16")
                yield _merged(session, spec, tile)


def _merged(session: Session, spec: KernelSpec, tile: Tile) -> Case:
    m, n, k = session.pick(LARGE, LARGE, TINY)

    def error(device: torch.device) -> float:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(m, k, generator=generator).bfloat16()
        parts = [quantize(torch.randn(n, k, generator=generator) / 8, spec.weight) for _ in range(2)]
        bias = [torch.randn(2 * n, generator=generator)] if spec.extras else []
        one, other = (expected(spec, x, part, n, k, rounded(spec, tile)) for part in parts)
        flat = [part.to(device) for each in parts for part in each]
        y = launch(spec, x.to(device), flat, [part.to(device) for part in bias], [n, n], k, tile).cpu()
        if bias:  # one more rounding to fp32
            sums, bound = torch.cat((one.value, other.value), 1), torch.cat((one.bound, other.bound), 1)
            want = sums + bias[0].double()
            return _excess(y, want, bound + 2.0**-24 * (sums.abs() + bias[0].abs() + bound), spec.y)
        # |silu'| < 1.1; silu is good to 4 units of fp32, then a product.
        silu = torch.nn.functional.silu(one.value)
        want = silu * other.value
        bound = 1.1 * other.value.abs() * one.bound + silu.abs() * other.bound + 1.1 * one.bound * other.bound
        return _excess(y, want, bound + 6 * 2.0**-23 * want.abs(), spec.y)

    return Case(f"{spec} {_named(tile)}", error, compile_job(spec, m, n, k, tile))


def encoding(session: Session) -> Iterator[Case]:
    """What the device packs and decodes is what the CPU does, to the bit."""
    names = (
        "int8/axis0@mma8",
        "uint4/g32:fp16+m@mma16",
        "nf4/g64:fp16@mma16",
        "e4m3/axis0@mma16",
        "int4/g128:fp16@mma16",
    )
    for name in session.pick(names, names, names[:2]):
        yield Case(name, _same_codes(Scheme.parse(name)))


def _same_codes(scheme: Scheme) -> Callable[[torch.device], float]:
    def error(device: torch.device) -> float:
        n, k = LARGE[1:]
        w = torch.randn(n, k, generator=torch.Generator().manual_seed(4))
        here, there = quantize(w, scheme), quantize(w.to(device), scheme)
        same = all(torch.equal(a, b.cpu()) for a, b in zip(here, there, strict=True))
        same &= torch.equal(dequantize(here, scheme, n, k), dequantize(there, scheme, n, k).cpu())
        return 0.0 if same else float("inf")

    return error


def _excess(y: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, dtype: str) -> float:
    """The largest error in units of what is allowed: the bound of the sums and the rounding to the result's type."""
    allowed = bound + ROUNDOFF[dtype] * (want.abs() + bound) + SMALLEST[dtype]
    return float(((y.double() - want).abs() / allowed).nan_to_num(float("inf")).max())


FAMILIES: Mapping[str, Callable[[Session], Iterator[Case]]] = {
    "products of floats": products,
    "products of bytes": bytes_,
    "decoded weights": decoded,
    "long sums": long_sums,
    "epilogues": epilogues,
    "merged weights": merged,
    "encoding on the device": encoding,
    "experts": experts,
    "rotations": rotations,
    "attention over a cache": caches,
}
