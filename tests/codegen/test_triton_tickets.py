"""Counters that kernels share: who gets which, without a GPU."""

from __future__ import annotations

import functools
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: torch's builds for CPUs come without it")

from qcompile import QCWarning, compat
from qcompile.codegen.devices import triton_tickets
from qcompile.codegen.devices.triton_tickets import LEAST, SLAB, tickets
from qcompile.compat import jit

CPU = torch.device("cpu")


class Device:
    """What the module asks a device for."""

    stream, capturing = 0, False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> type[Device]:
    class Own(Device):
        pass

    monkeypatch.setattr(triton_tickets, "_SLABS", {})
    monkeypatch.setattr(triton_tickets, "_OF_STREAM", {})
    monkeypatch.setattr(triton_tickets, "_KEPT", [])
    monkeypatch.setattr(compat, "stream", lambda _: Own.stream)
    monkeypatch.setattr(compat, "capturing", lambda _: Own.capturing)
    return Own


def place(zeros: torch.Tensor) -> range:
    assert zeros.dtype == torch.int32
    assert (zeros == 0).all()
    return range(zeros.data_ptr(), zeros.data_ptr() + 4 * zeros.numel())


def apart(*places: range) -> bool:
    ordered = sorted(places, key=lambda r: r.start)
    return all(a.stop <= b.start for a, b in pairwise(ordered))


def test_a_stream_has_its_own(device: type[Device]) -> None:
    first = place(tickets(3, CPU))
    assert place(tickets(LEAST, CPU)) == first
    device.stream = 7
    second = place(tickets(3, CPU))
    larger = place(tickets(LEAST + 1, CPU))
    assert apart(first, second, larger)
    assert place(tickets(5, CPU)) == larger
    device.stream = 0
    assert place(tickets(5, CPU)) == first


def test_recorded_calls_share_with_nobody(device: type[Device]) -> None:
    """Graphs may be replayed at the same time; nothing is filled in a graph, as a call before has made room."""
    eager = place(tickets(3, CPU))
    device.capturing = True
    slab = triton_tickets._SLABS[CPU].zeros
    recorded = [tickets(count, CPU) for count in (1, 40, 3, 3)]
    assert all(t.untyped_storage().data_ptr() == slab.untyped_storage().data_ptr() for t in recorded)
    assert apart(eager, *map(place, recorded))
    assert len({t.data_ptr() // 128 for t in recorded}) == 4


def test_a_graph_never_makes_a_slab(device: type[Device], monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> torch.Tensor:
        raise AssertionError("its memory would be the graph's")

    monkeypatch.setattr(compat, "for_ever", never)
    device.capturing = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tickets(5, CPU).numel() >= 5  # recorded with a fill
    assert not triton_tickets._SLABS


def test_more_than_a_slab(device: type[Device]) -> None:
    places = [place(tickets(3, CPU))]
    for device.stream in range(1, 4):
        places.append(place(tickets(SLAB // 2 - 64, CPU)))
    assert apart(*places)


@pytest.mark.parametrize("count", [SLAB // 2, SLAB])
def test_a_large_call_leaves_room_for_a_recording(count: int, device: type[Device]) -> None:
    """What it keeps for its stream is as much as a slab has; a recording behind it still finds some."""
    tickets(count, CPU)
    device.capturing = True
    recorded = tickets(count, CPU)
    assert recorded.untyped_storage().data_ptr() in {slab.untyped_storage().data_ptr() for slab in triton_tickets._KEPT}


def test_a_call_before_each_recording_makes_room(device: type[Device]) -> None:
    """However many graphs are recorded: none has a fill, and all slabs stay, as graphs know addresses only."""
    places = []
    for _ in range(40):
        device.capturing = False
        tickets(128, CPU)
        device.capturing = True
        places += [tickets(SLAB // 64, CPU) for _ in range(8)]
    slabs = {slab.untyped_storage().data_ptr() for slab in triton_tickets._KEPT}
    assert {t.untyped_storage().data_ptr() for t in places} <= slabs
    assert apart(*map(place, places))
    assert len(slabs) > 4


def test_a_recording_without_room_says_so(device: type[Device]) -> None:
    device.capturing = True
    triton_tickets._warn_filled.cache_clear()
    with pytest.warns(QCWarning, match="call the function once outside"):
        assert place(tickets(SLAB, CPU)) is not None


def test_threads(device: type[Device]) -> None:
    """Recorded calls of many threads get counters of their own."""
    tickets(1, CPU)
    device.capturing = True
    with ThreadPoolExecutor(8) as pool:
        assert apart(*pool.map(lambda _: place(tickets(33, CPU)), range(200)))


def test_kernels_are_loaded_once_by_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import triton\n\n\n@triton.jit\ndef kernel(X):\n    pass\n"
    gate, interval = threading.Barrier(8), sys.getswitchinterval()

    def load(i: int) -> list[object]:
        gate.wait()
        return [compat.triton_kernel(f"{source}# {n}\n") for n in range(20)]

    # As in a process that has loaded none: the folder of this one keeps the texts of kernels that other tests use.
    monkeypatch.setattr(jit, "_folder", functools.cache(jit._folder.__wrapped__))
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            first, *others = pool.map(load, range(8))
    finally:
        sys.setswitchinterval(interval)
    assert all(a is b for other in others for a, b in zip(first, other, strict=True))
