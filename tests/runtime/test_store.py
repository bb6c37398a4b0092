"""The packed-weight store, without graphs."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import QCError
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.scheme import Scheme
from qcompile.runtime.frozen import FrozenCall, Slot
from qcompile.runtime.store import Store, WeightExpression

SCHEME = Scheme.parse("int8/axis0:fp32")
SAME = WeightExpression("p0", lambda w: w, "layer.weight")
JOIN = WeightExpression("cat", lambda a, b: torch.cat([a, b]), "joined")


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (8, 32))))


def test_one_entry_per_parameter_function_and_scheme() -> None:
    store, a, b = Store(), weight(), weight()
    first = store.entry([a], SAME, SCHEME)
    assert store.entry([a], SAME, SCHEME) is first
    others = [
        store.entry([b], SAME, SCHEME),
        store.entry([a], SAME, Scheme.parse("int4/g32:fp16")),
        store.entry([a], WeightExpression("other", lambda w: w * 2), SCHEME),
    ]
    assert len({id(entry) for entry in [first, *others]}) == 4 == len(list(store))
    assert first.encodes == 1
    assert store.nbytes == sum(entry.nbytes for entry in store)
    assert torch.equal(first.decoded(), dequantize(quantize(a.detach(), SCHEME), SCHEME, 8, 32))


def test_in_place_while_the_weight_keeps_its_kind() -> None:
    store, a = Store(), weight()
    entry = store.entry([a], SAME, SCHEME)
    parts = list(entry.parts)
    with torch.no_grad():
        a.mul_(2)
    assert store.entry([a], SAME, SCHEME) is entry
    assert entry.encodes == 2
    assert all(new is old for new, old in zip(entry.parts, parts, strict=True))
    a.data = torch.randn(24, 32)
    store.entry([a], SAME, SCHEME)
    assert entry.parts[0].shape == quantize(a.detach(), SCHEME)[0].shape
    assert entry.shape == (24, 32)


def test_a_dead_parameter_takes_its_entries_along() -> None:
    store, a, b = Store(), weight(), weight()
    store.entry([a, b], JOIN, None)
    kept = store.entry([b], SAME, SCHEME)
    epoch = store.epoch
    del a
    gc.collect()
    assert list(store) == [kept]
    assert store.epoch > epoch
    # What is left of the dead entry must not disturb those who live.
    assert store.mark([b]) == 1
    del b
    gc.collect()
    assert not list(store)
    assert not store._roots


def test_mark_counts_entries_once() -> None:
    store, a, b = Store(), weight(), weight()
    store.entry([a, b], JOIN, None)
    epoch = store.epoch
    assert store.mark([a, b]) == 1
    assert store.epoch == epoch + 1
    assert store.mark([weight()]) == 0
    assert store.epoch == epoch + 1


def test_sqnr_of_a_dead_parameter_is_unknown() -> None:
    store, a = Store(), weight()
    entry = store.entry([a], SAME, SCHEME)
    error = entry.decoded() - a.detach()
    want = 10 * torch.log10(a.detach().square().sum() / error.square().sum())
    assert entry.sqnr_db() == pytest.approx(float(want), rel=1e-6)  # one fp32 log10
    del a
    gc.collect()
    assert entry.sqnr_db() is None


def test_a_bad_weight_names_its_module_and_leaves_the_old_parts() -> None:
    store, a = Store(), weight()
    entry = store.entry([a], SAME, SCHEME)
    codes = entry.parts[0].clone()
    with torch.no_grad():
        a[2, 3] = float("inf")
    for _ in range(2):
        with pytest.raises(QCError, match=r"layer\.weight: index \[2, 3\]") as caught:
            store.entry([a], SAME, SCHEME)
        assert caught.value.code == "codec.nonfinite-weight"
    assert torch.equal(entry.parts[0], codes)


def frozen(store: Store, a: nn.Parameter) -> FrozenCall:
    """A graph `(weight, x) -> (codes, x)` whose weight is packed."""
    entry = store.entry([a], SAME, SCHEME)
    return FrozenCall(lambda *args: args, [Slot(entry, 0, (0,))], [1], store)


def test_frozen_call_keeps_the_calling_convention() -> None:
    store, a, x = Store(), weight(), torch.randn(2)
    codes, got = frozen(store, a)(a, x)
    assert got is x
    assert torch.equal(codes, quantize(a.detach(), SCHEME)[0])


def test_frozen_call_follows_every_change() -> None:
    store, a, x = Store(), weight(), torch.randn(2)
    call = frozen(store, a)

    def now(a: Tensor) -> None:
        assert torch.equal(call(a, x)[0], quantize(a.detach(), SCHEME)[0])

    now(a)
    with torch.no_grad():
        a.mul_(torch.randn(8, 32))
        now(a)
        for _ in range(20):
            a.data = a.data * torch.randn(8, 32)
            a.data = a.data * torch.randn(8, 32)
            now(a)
        for _ in range(20):
            a = weight()
            a = weight()  # takes the place of the first one, maybe at the very same addresses
            now(a)
        a.data.copy_(torch.randn(8, 32))
        store.mark([a])
        now(a)
    assert len(list(store)) == 1
