"""A Triton kernel's text: what the template needs to know, derived from the spec.

The template has the shape of the computation (tiles, the loop over K, split K, the end); the lines that depend on
formats, scales and the epilogue are made here and in `triton_lines`. The text of a spec is always the same, sizes and
tile shapes are arguments of the kernel, so one text serves every matrix and every configuration.

The transposed product is computed, `y^T[N, M] = W[N, K] x^T[K, M]`: the decoded weight is then the operand that tensor
cores take from registers, and it never passes through shared memory.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import jinja2

from qcompile.codegen.devices.triton_bytes import Stored
from qcompile.codegen.devices.triton_floats import Exact
from qcompile.codegen.devices.triton_instructions import HELPERS as INSTRUCTIONS
from qcompile.codegen.devices.triton_lines import Codes, Layout, Lines, storage
from qcompile.codegen.devices.triton_numbers import Bytes, IntegerDecode, Numbers, byte_operand
from qcompile.codegen.devices.triton_order import HELPERS as ORDER
from qcompile.codegen.devices.triton_overlap import FEW, SMALL, ahead_lines
from qcompile.codegen.devices.triton_overlap import HELPERS as OVERLAP
from qcompile.codegen.spec import KernelSpec
from qcompile.ir.scheme import Scheme

TYPES = {"f32": "fp32", "bf16": "bf16", "f16": "fp16"}
BYTE_TYPES = {"i8": "i8", "e4m3": "fp8e4nv"}


# Device functions: a text has those that it calls.
HELPERS = {
    **OVERLAP,
    **INSTRUCTIONS,
    **ORDER,
    "wide": '''@triton.jit
def wide(values, DT: tl.constexpr):
    """Values with two new last dimensions, (1, 1)."""
    return tl.expand_dims(tl.expand_dims(values, -1), -1)''',
    "lane_by_lane": '''@triton.jit
def lane_by_lane(at):
    """Offsets [unit, half, panel, lane], with a new last dimension, that lanes of a warp and panels of its warps load."""
    # Lanes get what is called contiguous, and no load becomes wider where nothing is called aligned. Without a word of it each
    # version of Triton has its own way, and one makes lanes trade scales through shared memory.
    at = tl.multiple_of(tl.expand_dims(at, 4), (1, 1, 1, 1, 1))
    return tl.max_contiguous(at, (1, 1, 2, 4, 1))''',
    "for_rows": '''@triton.jit
def for_rows(pointers, THREADS: tl.constexpr):
    """What is loaded for each row of x."""
    BM: tl.constexpr = pointers.shape[0]
    COPIES: tl.constexpr = THREADS // BM
    if COPIES < 2:
        return tl.load(pointers)
    # What has less numbers than a block has threads, Triton 3.6 loads in every thread that needs some, a quarter of all. So
    # there are copies of each number, for so many threads, and one is read. The hints: see `lane_by_lane`.
    copies = tl.multiple_of(pointers[None, :] + tl.zeros((COPIES, 1), tl.int32), (1, 1))
    values = tl.permute(tl.load(tl.max_contiguous(copies, (1, 2))), (1, 0))
    for i in tl.static_range(6):
        if COPIES >> i > 1:
            values, _ = tl.split(tl.reshape(values, (BM, COPIES >> (i + 1), 2)))
    return tl.reshape(values, (BM,))''',
    "octets": '''@triton.jit
def octets(words):
    """The four bytes of 32-bit words, the lowest first, in two new last dimensions."""
    even = tl.join(words.to(tl.int8), (words >> 16).to(tl.int8))
    return tl.join(even, tl.join((words >> 8).to(tl.int8), (words >> 24).to(tl.int8)))''',
}


@dataclass(frozen=True)
class Text:
    """A kernel's source and its arguments.

    Attributes:
        source: defines `kernel`. pointers: (name, Triton type of the elements) in order, the workspace's two last.
        sizes: names of the run-time integers, in order. layout: see there. inputs: how many pointers x has.
    """

    source: str
    pointers: tuple[tuple[str, str], ...]
    sizes: tuple[str, ...]
    layout: Layout
    inputs: int


def kernel_text(spec: KernelSpec, decode: IntegerDecode = "subnormal", *, experts: bool = False) -> Text:
    """The kernel of a spec.

    Args:
        decode: how integers become floats (see `triton_numbers`).
        experts: that rows of x are sorted by expert, and every expert has its own weight: parts and "row" extras lie one
            after the other, and a pointer OFFS, where each expert's rows end, follows those of x.
    """
    layout, parts = Layout.of(spec.weight, spec.act), _parts(spec.weight)
    lines: Exact | Codes
    if spec.act is None:
        operand = spec.x if spec.x != "f32" else "f16"
        lines = Exact(
            spec, layout, Numbers.of(spec.weight.format, operand, exact=layout.mode == "operand", decode=decode)
        )
        pointers, name = [("X", TYPES[spec.x])], lines.numbers.operand.name
    else:
        lines = Codes(spec, layout, Bytes.of(spec.weight.format, byte_operand(spec.act)))
        sums = [("XG", "i32" if lines.integers else "fp32")] if lines.corrected else []
        sums += [("XZ", "i32")] if layout.shifted else []
        pointers, name = [("X", BYTE_TYPES[lines.numbers.operand]), ("XS", "fp32"), *sums], ""
    inputs = len(pointers)
    pointers += [("OFFS", "i32")] if experts else []
    pointers += [(f"{name}{i}", kind) for i in range(spec.segments) for name, kind in parts]
    pointers += [(f"E{i}", TYPES[dtype]) for i, (_, dtype) in enumerate(spec.extras)] + [("Y", TYPES[spec.y])]
    sizes = ["experts"] if experts else []
    sizes += ["ldx", *(f"N{i}" for i in range(spec.segments)), *_strides(spec)]
    text = {"before": lines.before(), "body": lines.loop(), "after": lines.after(), "epilogue": lines.epilogue()}
    lanes = spec.act is None and (layout.mode == "operand" or spec.weight.scale.zero is not None)
    text["closing"] = lines.closing()
    # Which expert's weight a block reads, a kernel before tells: it cannot ask for any before it has waited.
    text["ahead"] = [] if experts else ahead_lines(lines, parts)
    source = template("matmul").render(
        **_places(spec, layout, lines),
        helpers=_helpers(text | {"addresses": ["lane_by_lane("] if lanes else []}),
        pointers=[name for name, _ in pointers],
        sizes=sizes,
        experts=experts,
        of_expert=_of_expert(spec, layout, lines.names) if experts else [],
        operand=_OPERANDS[name],
        segments=spec.segments,
        few=FEW,
        small=SMALL,
        choose=[name for name, _ in parts] if spec.segments > 1 and not spec.paired else [],
        mode=layout.mode,
        lanes=lanes,
        accumulators=lines.accumulators,
        sums=lines.sums,
        # The workspace is of fp32: sums of integers lie there as they are.
        as_float=".to(tl.float32, bitcast=True)" if lines.sums == "tl.int32" else "",
        as_sum=".to(tl.int32, bitcast=True)" if lines.sums == "tl.int32" else "",
        **text,
    )
    pointers += [("WORK", "fp32"), ("TICKETS", "i32")]
    return Text(source, tuple(pointers), ("M", "K", *sizes), layout, inputs)


def decode_text(spec: KernelSpec) -> str:
    """The kernel that writes a segment's weight in rows: pointers D and the packed parts, then N, K and the row stride of D; a
    block for BN rows and KC units.

    Without activation scheme D is `[N, K]` in the type of x, else `[N, K padded to the unit]` bytes as words of four, and
    scales stay where they are.
    """
    if spec.act is not None:
        return _decode_bytes(spec)
    layout = replace(Layout.of(spec.weight), mode="operand", cell=0)
    lines = Exact(replace(spec, segments=1, epilogue=""), layout, Numbers.of(spec.weight.format, spec.x, exact=True))
    text = {"before": lines.before(), "body": lines.decode()}
    return str(
        template("decode").render(
            **_places(spec, layout, lines),
            **text,
            helpers=_helpers(text | {"addresses": ["lane_by_lane("]}),
            pointers=["D", *(f"{name}0" for name, _ in _parts(spec.weight))],
            operand=_OPERANDS[lines.numbers.operand.name],
            lanes=True,
        )
    )


def _decode_bytes(spec: KernelSpec) -> str:
    lines = Stored.of(replace(spec, segments=1, epilogue=""))
    return str(
        template("decode").render(
            **_places(spec, lines.layout, lines),
            before=[],
            body=lines.decode(),
            helpers=[],
            pointers=["D", *(f"{name}0" for name, _ in _parts(spec.weight))],
            operand="",
            lanes=False,
        )
    )


BAND = 8  # tiles of rows that go together over all columns


def bytes_text(spec: KernelSpec, *, given: bool = False) -> Text:
    """The kernel of a spec with an activation scheme over its weight as `decode_text` leaves it, all segments' rows one after
    the other: pointers X and D (or descriptors), scales and sums of x, parts but codes, extras, Y.

    Args:
        given: that a library has made the sums of bytes, `[M, columns of all segments]`, int32 or fp32: they come as A, in
            place of X and D, with a row stride in place of that of X.
    """
    lines = Stored.of(spec)
    layout, parts, kind = lines.layout, _parts(spec.weight)[1:], BYTE_TYPES[lines.numbers.operand]
    pointers = [("A", "i32" if lines.whole else "fp32")] if given else [("X", kind), ("D", kind)]
    pointers += [("XS", "fp32")] + ([("XG", "i32" if lines.integers else "fp32")] if lines.corrected else [])
    inputs = len(pointers)
    pointers += [(f"{name}{i}", stored) for i in range(spec.segments) for name, stored in parts]
    pointers += [(f"E{i}", TYPES[dtype]) for i, (_, dtype) in enumerate(spec.extras)] + [("Y", TYPES[spec.y])]
    sizes = ["lda" if given else "ldx", *(f"N{i}" for i in range(spec.segments)), *_strides(spec)]
    text = {"body": [] if given else lines.loop(), "after": lines.after(), "epilogue": lines.epilogue()}
    source = template("bytes").render(
        **_places(spec, layout, lines),
        **text,
        helpers=_helpers(text),
        given=given,
        band=BAND,
        pointers=[name for name, _ in pointers],
        sizes=sizes,
        segments=spec.segments,
        choose=[name for name, _ in parts] if spec.segments > 1 and not spec.paired else [],
        pairs=lines.pairs,
        left_of=lines.left_of,
        sums=lines.sums,
        before=[] if given else lines.before(),
    )
    return Text(source, tuple(pointers), ("M", "K", *sizes), layout, inputs)


def finish_text(spec: KernelSpec) -> str:
    """The kernel from sums in fp32, `[M, columns of all segments]`, to the result: pointers A, extras and Y, then M, the
    columns of Y, the row strides of A, of "mat" extras and of Y; a block for BM x BN results."""
    layout = Layout.of(spec.weight)
    lines = Exact(spec, layout, Numbers.of(spec.weight.format, "f16"))
    extras = [f"E{i}" for i in range(len(spec.extras))]
    return str(
        template("finish").render(
            spec=spec,
            pointers=["A", *extras, "Y"],
            sizes=_strides(spec),
            accumulators=lines.accumulators,
            epilogue=lines.epilogue(),
        )
    )


_OPERANDS = {"fp16": "float16", "bf16": "bfloat16", "": ""}


def _strides(spec: KernelSpec) -> list[str]:
    return [f"lde{i}" for i, (kind, _) in enumerate(spec.extras) if kind == "mat"] + ["ldy"]


def _helpers(text: Mapping[str, Sequence[str]]) -> list[str]:
    """The device functions that lines call, and those that these call."""
    said = "\n".join(line for group in text.values() for line in group)
    said += "".join(source for name, source in HELPERS.items() if f"{name}(" in said)
    return [source for name, source in HELPERS.items() if f"{name}(" in said]


def _of_expert(spec: KernelSpec, layout: Layout, names: Sequence[str]) -> list[str]:
    """Moves pointers to an expert's operands: so many panels of codes and scales, so many columns of "row" extras."""
    outer = f"tl.cdiv(K, {layout.group * layout.ratio}) * 16" if layout.ratio else "16"
    sizes = {"W": f"units * {_panel_words(spec)}", "O": outer}
    scales = "groups * 16" if layout.group else "16"
    lines = ["panels = expert.to(tl.int64) * (last_panel + 1)"]
    for i in names:
        lines += [f"{name}{i} += panels * ({sizes.get(name, scales)})" for name, _ in _parts(spec.weight)]
    columns = " + ".join(f"N{i}" for i in range(1 if spec.paired else spec.segments))
    rows = [i for i, (kind, _) in enumerate(spec.extras) if kind == "row"]
    return lines + [f"E{i} += expert.to(tl.int64) * ({columns})" for i in rows]


def _panel_words(spec: KernelSpec) -> int:
    """Words of codes that 16 rows have in a unit."""
    return 256 * spec.weight.format.bits // min(spec.weight.format.planes)


def _places(spec: KernelSpec, layout: Layout, lines: Lines) -> dict[str, Any]:
    """Where codes and scales lie."""
    return {
        "spec": spec,
        "unit": layout.unit,
        "span": layout.span,
        "group": layout.group,
        "grouped": bool(layout.group),
        "nested": spec.weight.outer is not None,
        "outer_group": layout.group * layout.ratio,
        "panel_words": _panel_words(spec),
        "planes": lines.planes(),
    }


@functools.cache
def template(name: str) -> Any:
    """A template of `codegen/templates/triton`."""
    folder = resources.files("qcompile.codegen").joinpath("templates", "triton")
    loader = jinja2.FunctionLoader(lambda file: folder.joinpath(file).read_text())
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False, loader=loader)
    return environment.get_template(f"{name}.jinja")


def _parts(weight: Scheme) -> list[tuple[str, str]]:
    """Names and element types of the operands of one segment, as `packed_parts` orders them."""
    scale = storage(weight.scale.format)
    found = [("W", "i32"), ("S", scale)]
    if weight.scale.zero is not None:
        found.append(("Z", "u8" if weight.scale.zero == "z" else scale))
    if weight.outer is not None:
        found.append(("O", storage(weight.outer.format)))
    return found
