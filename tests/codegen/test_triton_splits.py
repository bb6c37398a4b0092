"""Sums that blocks share: what they owe each other shows on a device only, so the machine code is read; and what a launch that
ends between two blocks leaves behind."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import compat
from qcompile.codegen.devices.triton import Tile, run, text_of
from qcompile.codegen.devices.triton_attention import Block, decode_attention
from qcompile.codegen.devices.triton_attention_text import AttentionSpec, attention_text
from qcompile.codegen.devices.triton_grouped import run_grouped
from qcompile.codegen.devices.triton_tickets import tickets
from qcompile.ir.codec import quantize
from qcompile.ir.kvcache import Cache, CacheLayout, extend
from qcompile.testing.compile_for import Report, compile_kernel
from qcompile.testing.interpret import interpret
from tests.codegen.products import spec_of, weight

CPU = torch.device("cpu")


def matmul() -> Callable[[], Tensor]:
    spec, x = spec_of("int4/g64:fp16"), torch.randn(3, 512).half()
    parts = quantize(weight(40, 512, 0), spec.weight)
    return lambda: run(spec, x, parts, [], [40], 512, Tile(splits=4))


def experts() -> Callable[[], Tensor]:
    spec, x = spec_of("int8/axis0"), torch.randn(4, 512).half()
    each = [quantize(weight(40, 512, seed), spec.weight) for seed in range(2)]
    parts, offs = [torch.stack(list(part)) for part in zip(*each, strict=True)], torch.tensor([3, 4]).int()
    return lambda: run_grouped(spec, x, offs, parts, [], [40], 512, Tile(splits=4))


def attention() -> Callable[[], Tensor]:
    layout = CacheLayout.of("int8/token:fp16", 16)
    cache, table = Cache.empty(layout, 4, 1), torch.arange(4, dtype=torch.int32)[None]
    extend(cache, torch.randn(500, 1, 16), torch.randn(500, 1, 16), table[0], 0)
    q, length = torch.randn(1, 4, 16).half(), torch.tensor([500], dtype=torch.int32)
    return lambda: decode_attention(q, cache, table, length, None, Block(splits=4))


@pytest.mark.parametrize("make", [matmul, experts, attention])
def test_a_launch_that_ends_early_leaves_zeros(
    make: Callable[[], Callable[[], Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    call, counted = make(), 0
    with interpret():
        from triton.runtime.interpreter import InterpreterBuilder

        want, count = call(), InterpreterBuilder.create_atomic_rmw

        def interrupted(self: Any, *args: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == 3:
                raise KeyboardInterrupt
            return count(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(InterpreterBuilder, "create_atomic_rmw", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call()
        assert counted == 3
        # A sum that ends too early may still be right, where its memory holds the parts of the one before.
        assert not tickets(1, CPU).any()
        assert torch.equal(call(), want)


def test_the_interpreter_begins_with_zeros() -> None:
    """Whatever a kernel that was at fault has left before."""
    with interpret():
        tickets(8, CPU)[:8] = 3
        with interpret():
            assert tickets(8, CPU)[0] == 3  # an inner one begins nothing
    with interpret():
        assert not tickets(8, CPU).any()


def of_matmul() -> Report:
    text, tile = text_of(spec_of("int8/axis0")), Tile(splits=2)
    constants = tile.constants | {"EVEN": True}
    return built(text.source, dict(text.pointers), [*text.sizes], constants, **tile.options)


def of_attention() -> Report:
    text = attention_text(AttentionSpec(CacheLayout.of("int8/token:fp16", 16), "f16"))
    return built(text.source, dict(text.pointers), text.sizes, {"NH": 8, "NATURAL": True, "STAGES": 2, "scale": 0.25})


def built(source: str, pointers: dict[str, str], sizes: Any, constants: dict[str, Any], **options: Any) -> Report:
    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(sizes, "i32")
    (report,) = compile_kernel(
        compat.triton_kernel(source), signature, constants, targets=["sm_90"], **options
    ).values()
    return report


@pytest.mark.parametrize("build", [of_matmul, of_attention])
def test_the_last_block_sees_what_all_have_left(build: Callable[[], Report]) -> None:
    """The thread that counts speaks for its block: all its threads have stored their parts before, and none reads before it has
    counted. What it says is ordered for the whole device; parts are read from where blocks meet, the cache of the device."""
    report = build()
    # Triton has barriers of its own around what lanes trade, one of them here by chance: that the kernel asks for one is read
    # where there are no others yet.
    asked = re.findall(r"\b(tt\.store|tt\.atomic_rmw|\w+\.(?:local_)?barrier)\b", report.ttgir)
    at = asked.index("tt.atomic_rmw")
    assert asked[at - 2] == "tt.store"
    assert asked[at - 1].endswith("barrier")
    said = r"^\s*(?:@%\w+\s+)?(st\.global|bar\.sync|atom\.\S+|ld\.global(?:\.cg)?)"
    order = [name for name, _ in groupby(re.findall(said, report.ptx, re.M))]
    (at,) = [i for i, name in enumerate(order) if name.startswith("atom.")]
    assert order[at].startswith("atom.global.gpu.acq_rel.add.")
    assert order[at - 2 : at] == ["st.global", "bar.sync"]
    # The counter goes back to zero; the first load is that of a part.
    assert order[at + 1 : at + 4] == ["bar.sync", "st.global", "ld.global.cg"]
    assert report.whole.operands["WORK"]
    assert all(name.endswith(".STRONG.GPU") for name in report.whole.operands["WORK"])
