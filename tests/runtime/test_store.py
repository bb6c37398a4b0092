"""The packed-weight store, without graphs."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from torch import Tensor, nn

from qcompile.errors import QCError, QCWarning
from qcompile.ir.codec import dequantize, quantize
from qcompile.ir.scheme import Scheme
from qcompile.runtime.frozen import FrozenCall, Slot
from qcompile.runtime.store import Encoding, Store, WeightExpression

SCHEME = Scheme.parse("int8/axis0:fp32")
SAME = WeightExpression("p0", lambda w: w, "layer.weight")
PACKED = Encoding(SAME, SCHEME)
JOIN = WeightExpression("cat", lambda a, b: torch.cat([a, b]), "joined")
JOINED = Encoding(JOIN, None)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*(shape or (8, 32))))


def test_one_entry_per_parameter_function_and_scheme() -> None:
    store, a, b = Store(), weight(), weight()
    first = store.entry([a], PACKED)
    assert store.entry([a], PACKED) is first
    others = [
        store.entry([b], PACKED),
        store.entry([a], Encoding(SAME, Scheme.parse("int4/g32:fp16"))),
        store.entry([a], Encoding(WeightExpression("other", lambda w: w * 2), SCHEME)),
    ]
    assert len({id(entry) for entry in [first, *others]}) == 4 == len(list(store))
    assert first.encodes == 1
    assert store.nbytes == sum(entry.nbytes for entry in store)
    assert torch.equal(first.decoded(), dequantize(quantize(a.detach(), SCHEME), SCHEME, 8, 32))


def test_in_place_while_the_weight_keeps_its_kind() -> None:
    store, a = Store(), weight()
    entry = store.entry([a], PACKED)
    parts = list(entry.parts)
    with torch.no_grad():
        a.mul_(2)
    assert store.entry([a], PACKED) is entry
    assert entry.encodes == 2
    assert all(new is old for new, old in zip(entry.parts, parts, strict=True))
    a.data = torch.randn(24, 32)
    store.entry([a], PACKED)
    assert entry.parts[0].shape == quantize(a.detach(), SCHEME)[0].shape
    assert entry.shape == (24, 32)


def test_a_dead_parameter_takes_its_entries_along() -> None:
    store, a, b = Store(), weight(), weight()
    store.entry([a, b], JOINED)
    kept = store.entry([b], PACKED)
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
    store.entry([a, b], JOINED)
    epoch = store.epoch
    assert store.mark([a, b]) == 1
    assert store.epoch == epoch + 1
    assert store.mark([weight()]) == 0
    assert store.epoch == epoch + 1


def test_sqnr_of_a_dead_parameter_is_unknown() -> None:
    store, a = Store(), weight()
    entry = store.entry([a], PACKED)
    error = entry.decoded() - a.detach()
    want = 10 * torch.log10(a.detach().square().sum() / error.square().sum())
    assert entry.sqnr_db() == pytest.approx(float(want), rel=1e-6)  # one fp32 log10
    del a
    gc.collect()
    assert entry.sqnr_db() is None


def test_a_bad_weight_names_its_module_and_leaves_the_old_parts() -> None:
    store, a = Store(), weight()
    entry = store.entry([a], PACKED)
    codes = entry.parts[0].clone()
    with torch.no_grad():
        a[2, 3] = float("inf")
    for _ in range(2):
        with pytest.raises(QCError, match=r"layer\.weight: index \[2, 3\]") as caught:
            store.entry([a], PACKED)
        assert caught.value.code == "codec.nonfinite-weight"
    assert torch.equal(entry.parts[0], codes)


def frozen(store: Store, a: nn.Parameter) -> FrozenCall:
    """A graph `(weight, x) -> (codes, x)` whose weight is packed."""
    entry = store.entry([a], PACKED)
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


def test_packed_tensors_die_with_their_parameter() -> None:
    """Compiled code lives on in Dynamo's caches: it must not hold them."""
    store, a, b, x = Store(), weight(), weight(), torch.randn(2)
    call = frozen(store, a)
    want = call(b, x)[0].clone()
    old = [weakref.ref(part) for part in store.entry([a], PACKED).parts]
    call(a, x)
    del a
    gc.collect()
    assert [ref() for ref in old] == [None, None]
    assert torch.equal(call(b, x)[0], want)


def test_strides_that_change_and_change_back() -> None:
    """Dynamo compiles another graph for other strides, and returns to the first one when they do."""
    store, a, x = Store(), weight(32, 32), torch.randn(2)
    first = frozen(store, a)
    codes = first(a, x)[0].clone()
    a.data = a.data.t()
    second = frozen(store, a)
    turned = second(a, x)[0].clone()
    assert torch.equal(turned, quantize(a.detach(), SCHEME)[0])
    assert not torch.equal(turned, codes)
    for call, want in ((first, codes), (second, turned), (first, codes)):
        a.data = a.data.t()
        assert torch.equal(call(a, x)[0], want)


def test_a_seed_counts_where_rounding_is_random() -> None:
    store, a = Store(), weight(16, 64)
    random = Scheme.parse("int4/g32:fp16~stochastic")
    one, other = (store.entry([a], Encoding(SAME, random, seed=seed)) for seed in (1, 2))
    assert not torch.equal(one.parts[0], other.parts[0])
    assert torch.equal(one.parts[0], quantize(a.detach(), random, seed=1)[0])
    assert store.entry([a], Encoding(SAME, SCHEME, seed=1)) is store.entry([a], Encoding(SAME, SCHEME, seed=2))


def test_a_bad_weight_can_wait_for_the_call() -> None:
    store, a, x = Store(), weight(), torch.randn(2)
    with torch.no_grad():
        a[2, 3] = float("nan")
    entry = store.entry([a], PACKED, later=True)
    assert entry.error is not None
    assert (entry.error.__traceback__, entry.error.__cause__) == (None, None)
    assert entry.encodes == 0
    call = FrozenCall(lambda *args: args, [Slot(entry, 0, (0,))], [1], store)
    for _ in range(2):
        with pytest.raises(QCError, match=r"layer\.weight: index \[2, 3\]"):
            call(a, x)
    b = weight()
    assert torch.equal(call(b, x)[0], quantize(b.detach(), SCHEME)[0])
    with torch.no_grad():
        a[2, 3] = 0
    assert torch.equal(call(a, x)[0], quantize(a.detach(), SCHEME)[0])
    assert entry.error is None


def test_a_minimum_that_a_later_weight_misses_is_said_once() -> None:
    """The scheme was chosen because a weight was representable; another one that uses the same code is not."""
    coarse = Encoding(SAME, Scheme.parse("int4/g32:fp16"), min_sqnr=30.0)
    exact = nn.Parameter((torch.randn(8, 32) > 0).float())
    store, a, x = Store(), exact, torch.randn(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        entry = store.entry([a], coarse)
        call = FrozenCall(lambda *args: args, [Slot(entry, 0, (0,))], [1], store)
        call(a, x)
    with pytest.warns(QCWarning, match=r"layer\.weight: int4/g32:fp16 keeps only \d\d\.\d dB .* asks for 30\."):
        call(b := weight(), x)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        b.mul_(2)
        call(b, x)
    with torch.no_grad():
        a.copy_(b)
    with pytest.warns(QCWarning, match="dB"):
        call(a, x)


def test_a_higher_minimum_of_another_graph_is_checked() -> None:
    store, a, scheme = Store(), weight(), Scheme.parse("int4/g32:fp16")
    store.entry([a], Encoding(SAME, scheme))
    with pytest.warns(QCWarning, match="asks for 90"):
        store.entry([a], Encoding(SAME, scheme, min_sqnr=90.0))


def test_a_weight_beyond_its_scales_is_named() -> None:
    store, a = Store(), nn.Parameter(torch.randn(8, 32) * 1e7)
    with pytest.warns(QCWarning, match=r"layer\.weight: .* fp32 scales"):
        store.entry([a], Encoding(SAME, Scheme.parse("int4/g32:fp16")))


def test_parameters_without_a_version_counter_are_named() -> None:
    store = Store()
    with torch.inference_mode():
        a = weight()
    with pytest.warns(QCWarning, match=r"layer\.weight was made under .*refresh"):
        frozen(store, a)


def test_the_ratio_of_weights_whose_squares_leave_fp32() -> None:
    usual = torch.randn(8, 32)
    store, want = Store(), None
    for scale in (1.0, 2.0**74, 2.0**-80):  # powers of two: the same mantissas
        a = nn.Parameter(usual * scale)
        found = store.entry([a], PACKED).sqnr_db()
        want = found if want is None else want
        assert found == pytest.approx(want, abs=1e-6)  # float64 sums
    assert 30 < (want or 0) < 60


def test_every_compile_is_told_about_a_missed_minimum() -> None:
    store, a = Store(), nn.Parameter((torch.randn(8, 32) > 0).float())
    scheme, x, others = Scheme.parse("int4/g32:fp16"), torch.randn(2), [weight(), weight()]
    for _ in range(2):
        expression = WeightExpression("p0", lambda w: w, "layer.weight")  # each compile makes its own
        entry = store.entry([a], Encoding(expression, scheme, min_sqnr=30.0), later=True)
        call = FrozenCall(lambda *args: args, [Slot(entry, 0, (0,))], [1], store)
        for other in others:
            with pytest.warns(QCWarning, match="another layer's.* a reset changes nothing"):
                call(other, x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for parameter in (a, *others):
                call(parameter, x)
            store.mark(others)
            for parameter in (a, *others):
                call(parameter, x)
    with torch.no_grad():
        a.copy_(others[0])
    with pytest.warns(QCWarning, match="compile again"):
        call(a, x)


def test_a_recipe_without_a_minimum_is_not_told_of_an_earlier_one() -> None:
    store, a, scheme = Store(), weight(), Scheme.parse("int4/g32:fp16")
    with pytest.warns(QCWarning, match="asks for 90"):
        store.entry([a], Encoding(SAME, scheme, min_sqnr=90.0), later=True)
    later = WeightExpression("p0", lambda w: w, "layer.weight")
    entry = store.entry([a], Encoding(later, scheme), later=True)
    call = FrozenCall(lambda *args: args, [Slot(entry, 0, (0,))], [1], store)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        call(a.mul_(2), torch.randn(2))


def test_what_is_asked_for_in_passing_leaves_no_trace() -> None:
    """Not even a weak reference, which `torch.utils.swap_tensors` refuses."""
    store, a, b = Store(), weight(), weight()
    kept = store.entry([a], PACKED)
    store.tables[a] = None
    with store.unchanged():
        store.entry([a, b], JOINED)
        store.entry([b], PACKED)
        store.tables[b] = None
        store.drop([kept])
    assert list(store) == [kept]
    assert list(store.tables) == [a]
    assert not weakref.getweakrefs(b)
    del a
    gc.collect()
    assert not list(store)
    assert not store._roots


def test_a_dropped_entry_comes_back_when_its_graph_is_called() -> None:
    store, a, x = Store(), weight(), torch.randn(2)
    call = frozen(store, a)
    want = call(a, x)[0].clone()
    old = weakref.ref(call(a, x)[0])
    store.drop(store.made_from([a]))
    assert (list(store), old()) == ([], None)
    assert torch.equal(call(a, x)[0], want)
    assert len(store.made_from([a])) == 1
