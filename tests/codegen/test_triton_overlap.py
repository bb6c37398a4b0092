"""Kernels that begin before the one before them has ended: what they touch before they have waited for it.

Interpreted, that is seen by a kernel before that "ends" when a block waits: until then everything that the launch was given
holds something else. Compiled, every way through the machine code is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices import triton_overlap
from qcompile.codegen.devices.triton import Tile, run, text_of
from qcompile.codegen.devices.triton_attention import Block, block_for, decode_attention
from qcompile.codegen.devices.triton_attention_text import AttentionSpec, attention_text
from qcompile.codegen.devices.triton_grouped import grouped_text, run_grouped
from qcompile.codegen.devices.triton_overlap import Overlap, ahead, begin, begin_with_weights, can_overlap, overlapping
from qcompile.codegen.devices.triton_rotate import Rotation, rotate
from qcompile.codegen.devices.triton_rotate import text_of as rotation_text
from qcompile.codegen.devices.triton_text import Text, decode_text, finish_text
from qcompile.codegen.spec import KernelSpec
from qcompile.compat import assembly
from qcompile.errors import QCError
from qcompile.ir.codec import quantize
from qcompile.ir.hadamard import random_signs
from qcompile.ir.kvcache import Cache, CacheLayout, extend
from qcompile.ir.matmul import OUT_DTYPES
from qcompile.ir.scheme import Scheme
from qcompile.testing.compile_for import Report, compile_kernel
from qcompile.testing.interpret import interpret

LINE = 128


def spec_of(weight: str, act: str = "", **more: object) -> KernelSpec:
    scheme = Scheme.parse(f"{weight}@{'mma8' if act else 'mma16'}")
    return KernelSpec(scheme, Scheme.parse(act) if act else None, **{"x": "bf16", "y": "bf16", **more})  # type: ignore[arg-type]


@dataclass
class Before:
    """A kernel that ends when a block waits for it.

    Attributes:
        blocks: that began. early: what they did before they had waited, in words. asked: addresses that they asked L2 for.
        memory, poison, saved: of the launch, its operands' bytes; what they hold until a block has waited, and after.
        running: whether the kernel before still runs, for the current block.
    """

    blocks: int = 0
    early: list[str] = field(default_factory=list)
    asked: set[int] = field(default_factory=set)
    memory: list[Tensor] = field(default_factory=list)
    saved: list[Tensor] = field(default_factory=list)
    poison: list[Tensor] = field(default_factory=list)
    running: bool = False

    def launched(self, tensors: list[Tensor]) -> None:
        """A launch with these operands, and the end of the launch before."""
        self.returned()
        storages = {t.untyped_storage().data_ptr(): t for t in tensors if t.numel()}
        self.memory, self.poison = [], []
        for t in storages.values():
            whole = torch.tensor([], dtype=torch.uint8).set_(t.untyped_storage())  # type: ignore[call-overload]
            self.memory.append(whole)
            # A number that spoils sums and comes out of none; of integers one that leads nowhere else.
            self.poison.append(torch.full_like(whole, 0x5A if t.is_floating_point() else 0))

    def began(self) -> None:
        """A block."""
        self.returned()
        self.blocks, self.running = self.blocks + 1, True
        self.saved = [whole.clone() for whole in self.memory]
        for whole, poison in zip(self.memory, self.poison, strict=True):
            whole.copy_(poison)

    def waited(self) -> None:
        """The block."""
        if not self.running:
            self.early.append("waited twice")
            return
        for whole, poison, saved in zip(self.memory, self.poison, self.saved, strict=True):
            if not torch.equal(whole, poison):
                self.early.append("wrote before it waited")
            whole.copy_(saved)
        self.running = False

    def released(self) -> None:
        """The next kernel, by the block."""
        if self.running:
            self.early.append("let the next begin before it waited")

    def returned(self) -> None:
        """The block."""
        if self.running:
            self.early.append("returned before it waited")
        self.running = False


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, times: int = 1) -> Iterator[Before]:
    """Inside, every kernel begins early."""
    before = Before()
    with interpret(), overlapping(Overlap(ahead=times)), monkeypatch.context() as patch:
        from triton.language.extra import cuda
        from triton.runtime import interpreter

        call, place, block = (
            interpreter.GridExecutor.__call__,
            interpreter.InterpreterBuilder.set_grid_idx,
            assembly.run,
        )

        def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
            before.launched([arg for arg in args if isinstance(arg, Tensor)])
            call(self, *args, **kwargs)
            before.returned()

        def begin_block(self: Any, x: int, y: int, z: int) -> None:
            before.began()
            place(self, x, y, z)

        def run_assembly(text: str, outputs: int, inputs: list[Any]) -> list[Any]:
            if text.startswith("prefetch"):
                before.asked |= set(inputs[0].reshape(-1).tolist())
            return block(text, outputs, inputs)

        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        patch.setattr(interpreter.InterpreterBuilder, "set_grid_idx", begin_block)
        patch.setattr(assembly, "run", run_assembly)
        patch.setattr(cuda, "gdc_wait", before.waited)
        patch.setattr(cuda, "gdc_launch_dependents", before.released)
        yield before


def product(spec: KernelSpec, tile: Tile, m: int = 5, n: int = 70, k: int = 600) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    parts = [part for _ in range(spec.segments) for part in quantize(torch.randn(n, k) / 8, spec.weight)]
    columns = n if spec.paired else n * spec.segments
    extras = [torch.randn(columns if kind == "row" else (m, columns)).to(OUT_DTYPES[d]) for kind, d in spec.extras]  # type: ignore[arg-type]
    x = torch.randn(m, k).to(OUT_DTYPES[spec.x])
    return lambda: run(spec, x, parts, extras, [n] * spec.segments, k, tile)


def experts(spec: KernelSpec, counts: list[int], tile: Tile) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    each = [quantize(torch.randn(40, 520) / 8, spec.weight) for _ in counts]
    parts = [torch.stack(list(part)) for part in zip(*each, strict=True)]
    x, offs = torch.randn(sum(counts), 520).to(OUT_DTYPES[spec.x]), torch.tensor(counts).cumsum(0).int()
    return lambda: run_grouped(spec, x, offs, parts, [], [40], 520, tile)


def attended(lengths: list[int], splits: int) -> Callable[[], Tensor]:
    torch.manual_seed(0)
    layout = CacheLayout.of("int8/token:fp16", 32)
    cache = Cache.empty(layout, 4 * len(lengths), 2)
    table = torch.arange(4 * len(lengths), dtype=torch.int32).reshape(len(lengths), 4)
    for row, length in zip(table, lengths, strict=True):
        extend(cache, torch.randn(length, 2, 32), torch.randn(length, 2, 32), row, 0)
    q = torch.randn(len(lengths), 6, 32).half()
    return lambda: decode_attention(q, cache, table, torch.tensor(lengths, dtype=torch.int32), None, Block(splits))


def rotated(**more: Any) -> Callable[[], Tensor]:
    x = torch.randn(40, 512, generator=torch.Generator().manual_seed(0)).half()
    return lambda: rotate(x, 64, **more)


PAIR = {"segments": 2, "epilogue": "silu(a0)*a1+e0", "extras": (("row", "f32"),)}
CALLS: dict[str, Callable[[], Callable[[], Tensor]]] = {
    "plain": lambda: product(spec_of("int4/g128:fp16"), Tile()),
    "split": lambda: product(spec_of("uint4/g64:fp16+z"), Tile(splits=3, columns=32, units=2)),
    "more splits than units": lambda: product(spec_of("int4/g128:fp16"), Tile(splits=4), k=260),
    "bytes": lambda: product(spec_of("int8/axis0", "int8/token"), Tile(splits=2)),
    "sums of x": lambda: product(spec_of("uint4/g128:fp16+z", "e4m3/g128:fp32"), Tile(columns=16)),
    "pair": lambda: product(spec_of("int3/g512:fp16", **PAIR), Tile(), k=1024),
    "segments": lambda: product(spec_of("int8/axis0", segments=3), Tile(splits=2)),
    "decoded": lambda: product(spec_of("int4/g128:fp16"), Tile(way="vendor")),
    "decoded, with an end": lambda: product(spec_of("int4/g128:fp16", **PAIR), Tile(way="vendor")),
    "experts": lambda: experts(spec_of("int4/g128:fp16"), [3, 0, 20, 1], Tile()),
    "split experts": lambda: experts(spec_of("int8/axis0"), [0, 0, 33], Tile(splits=3, columns=16)),
    "attention": lambda: attended([300, 5], 1),
    "split attention": lambda: attended([300, 0, 130], 4),
    "rotation": lambda: rotated(),
    "rotation with signs": lambda: rotated(signs=random_signs(512, 1)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_nothing_before_the_wait(call: Callable[[], Callable[[], Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of every launch waits, once, before it reads, writes or returns; what comes out is the same."""
    made = call()
    with interpret():
        want = made()
    with watched(monkeypatch) as before:
        got = made()
    assert before.blocks > 1
    assert before.early == []
    assert torch.equal(got, want)
    assert not want.isnan().any()


def moved(source: str, marker: str) -> str:
    """A text that waits at another place, or once more (with no marker)."""
    wait = "        tl.extra.cuda.gdc_wait()\n"
    assert source.count(wait) == source.count(marker or wait) == 1
    if not marker:
        return source.replace(wait, wait + wait)
    return source.replace(wait, "        pass\n").replace(marker, marker + "    tl.extra.cuda.gdc_wait()\n")


PLACES = {
    "after the loop": ("    inside = (m < M) & (n < N)\n", {"let"}, {"returned"}),
    "at the end": ("column, y, mask=inside)\n", {"let", "wrote"}, {"returned"}),
    "twice": ("", {"waited"}, {"waited"}),
}


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "experts"])
@pytest.mark.parametrize("place", PLACES)
def test_what_would_be_seen(place: str, grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that wait elsewhere. With experts these read `offs` before, where there are no rows then, and return."""
    spec, original = spec_of("int4/g128:fp16"), compat.triton_kernel
    made = experts(spec, [3, 0, 20, 1], Tile()) if grouped else product(spec, Tile())
    marker, *words = PLACES[place]
    monkeypatch.setattr(compat, "triton_kernel", lambda source: original(moved(source + "\n", marker)))
    with watched(monkeypatch) as before:
        made()
    assert {entry.partition(" ")[0] for entry in before.early} == words[grouped]


WHOLE = [
    "int4/g128:fp16",
    "uint4/g64:fp16+z",
    "uint4/g32:fp16+m",
    "int3/g512:bf16",
    "e3m2/g32:e8m0",
    "int8/axis0",
    "int4/g16:int8/g64:fp16",
    "e2m1/g16:e4m3/tensor:fp32",
]


@pytest.mark.parametrize("tile", [Tile(), Tile(splits=2, columns=32)], ids=["one", "split"])
@pytest.mark.parametrize("scheme", WHOLE)
def test_weights_that_are_asked_for(scheme: str, tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """With enough ahead, every line of every part, and nothing else."""
    spec, (n, k) = spec_of(scheme), (70, 1024)
    parts = quantize(torch.randn(n, k) / 8, spec.weight)
    with watched(monkeypatch, times=8) as before:
        run(spec, torch.randn(2, k).bfloat16(), parts, [], [n], k, tile)
    wanted, places = set(), {}
    for i, part in enumerate(parts):
        size = part.numel() * part.element_size()
        wanted |= {(i, line) for line in range(-(-size // LINE))}
        places[i] = range(part.data_ptr(), part.data_ptr() + size)
    asked = {(i, (at - place[0]) // LINE) for at in before.asked for i, place in places.items() if at in place}
    assert asked == wanted
    assert all(any(at in place for place in places.values()) for at in before.asked)


@pytest.mark.parametrize(("times", "units"), [(0, 0), (1, 4), (2, 8)])
def test_no_more_than_asked(times: int, units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three stages of a unit, 128 columns of 16 rows, which are 1 KB; then the next power of two."""
    spec, (n, k) = spec_of("int4/axis0"), (70, 4096)
    codes, scales = quantize(torch.randn(n, k) / 8, spec.weight)
    with watched(monkeypatch, times) as before:
        run(spec, torch.randn(2, k).bfloat16(), [codes, scales], [], [n], k, Tile())
    asked = {at - codes.data_ptr() for at in before.asked if at - codes.data_ptr() in range(codes.numel())}
    panels = range(0, codes.numel(), 1024 * k // 128)
    assert asked == {panel + at for panel in panels for at in range(0, 1024 * units, LINE)}


def test_experts_ask_for_nothing() -> None:
    """Whose weight it will be is not known before the wait."""
    assert "prefetch" in text_of(spec_of("int4/g128:fp16")).source
    assert "prefetch" not in grouped_text(spec_of("int4/g128:fp16")).source


def built(text: str | Text, pointers: dict[str, str], sizes: list[str], target: str, **constants: Any) -> Report:
    source = text if isinstance(text, str) else text.source
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(sizes, "i32")
    signature |= {"scale": "fp32"} if "scale" in sizes else {}
    constants |= {"PDL": can_overlap(target)}
    return compile_kernel(
        compat.triton_kernel(source),
        signature,
        constants,
        targets=[target],
        aligned=set(signature) - {"M", "scale"},
    )[target]


def matmul(target: str, text: Text, **more: Any) -> Report:
    tile = Tile(splits=4)
    more |= {} if "EXPERTS" in more else {"AHEAD": ahead(tile)}
    return built(text, dict(text.pointers), list(text.sizes), target, EVEN=True, **tile.constants, **more)


def attention(target: str) -> Report:
    text = attention_text(AttentionSpec(CacheLayout.of("int8/token:fp16", 128), "bf16"))
    natural = block_for(CacheLayout.of("int8/token:fp16", 128), target, 99 * 1024).natural
    return built(text.source, dict(text.pointers), [*text.sizes, "scale"], target, NH=8, NATURAL=natural, STAGES=2)


def rotation(target: str) -> Report:
    sizes = {"R": 16, "P": 128, "USED": 128, "STAGES": 2, "EVEN": True, "FULL": True}
    pointers = {"X": "bf16", "H": "bf16", "SIGNS": "i32", "Y": "bf16"}
    text = rotation_text(Rotation(128, "bf16", "bf16", signed=True), 1)
    return built(text, pointers, ["M", "K", "ldx", "scale"], target, **sizes)


def decoding(target: str) -> Report:
    pointers = {"D": "bf16", "W0": "i32", "S0": "fp16", "Z0": "u8"}
    return built(decode_text(spec_of("uint4/g64:fp16+z")), pointers, ["N", "K", "ldd"], target, BN=64, KC=1)


def finishing(target: str) -> Report:
    pointers = {"A": "fp32", "E0": "fp32", "Y": "bf16"}
    return built(
        finish_text(spec_of("int4/g128:fp16", **PAIR)), pointers, ["M", "N", "lda", "ldy"], target, BM=32, BN=64
    )


# Kernels, and parts that they ask for: codes, scales, zero points.
KERNELS: dict[str, tuple[Callable[[str], Report], int]] = {
    "matmul": (lambda target: matmul(target, text_of(spec_of("uint4/g128:fp16+z"))), 3),
    "pair": (lambda target: matmul(target, text_of(spec_of("int4/g128:fp16", **PAIR))), 4),
    "bytes": (lambda target: matmul(target, text_of(spec_of("int8/axis0", "int8/token"))), 2),
    "experts": (lambda target: matmul(target, grouped_text(spec_of("int4/g128:fp16")), EXPERTS=32), 0),
    "attention": (attention, 0),
    "rotation": (rotation, 0),
    "decoding": (decoding, 0),
    "finishing": (finishing, 0),
}


@pytest.mark.parametrize("target", ["sm_89", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.parametrize("name", KERNELS)
def test_machine_code(name: str, target: str) -> None:
    """Where there are such instructions, no way through a kernel leads to memory or out of it but by the wait."""
    build, parts = KERNELS[name]
    report = build(target)
    if not can_overlap(target):
        assert (report.whole.waits, report.whole.releases, report.whole.prefetches) == (0, 0, 0)
        assert "EXIT" in report.unwaited or "s_endpgm" in report.unwaited
        return
    assert report.unwaited == ()
    assert report.whole.waits == 1
    assert report.whole.releases >= 1
    assert bool(report.whole.prefetches) == bool(parts)
    assert report.whole.prefetches >= parts
    assert report.sass.rfind("CCTL.E.PF") < report.sass.find("ACQBULK")
    assert (report.loop.waits, report.loop.releases, report.loop.prefetches) == (0, 0, 0)
    assert report.spill_bytes == 0


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("architecture", "early"),
    [("sm_89", False), ("sm_90", True), ("sm_103", True), ("sm_120", True), ("gfx950", False)],
)
def test_what_a_launch_says(architecture: str, early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The constant and the option, always both: a kernel that began early and did not wait would read what is not there."""
    monkeypatch.setattr(compat, "architecture", lambda device: architecture if device.type == "cuda" else "")
    assert begin(CUDA) == ({"PDL": True, "launch_pdl": True} if early else {"PDL": False})
    assert begin_with_weights(CUDA, Tile(16, 64, units=2)) == begin(CUDA) | {"AHEAD": 8}
    assert begin_with_weights(CUDA, Tile(64, 128, units=2)) == begin(CUDA) | {"AHEAD": 0}
    with overlapping(Overlap(early=False)):
        assert begin(CUDA) == {"PDL": False}
    with overlapping(Overlap(ahead=0)):
        assert begin_with_weights(CUDA, Tile(16, 64, units=2)) == begin(CUDA) | {"AHEAD": 0}
        assert begin(CPU) == {"PDL": True}
    assert begin(CPU) == {"PDL": False}


@pytest.mark.parametrize(("said", "early"), [("", True), ("1", True), ("0", False), ("no", None)])
def test_a_variable_turns_it_off(said: str, early: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "architecture", lambda _: "sm_90")
    monkeypatch.setenv("QCOMPILE_PDL", said)
    triton_overlap._usual.cache_clear()
    try:
        if early is None:
            with pytest.raises(QCError, match="QCOMPILE_PDL='no'"):
                begin(CUDA)
        else:
            assert begin(CUDA)["PDL"] == early
    finally:
        triton_overlap._usual.cache_clear()
