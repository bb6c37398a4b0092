"""Static scales of activations: observed in training and held as buffers, or learned; evaluation keeps them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qcompile import QCError, QCWarning, convert, learned_scales, load, prepare, save
from qcompile.backend import watching
from qcompile.ir.codec import choose_qparams
from qcompile.plan.recipe import Recipe, Rule
from tests.e2e.support import FLOAT, compiled

SIGNED, SHIFTED = "int8/tensor:fp32", "uint8/tensor:fp32+z"


def recipe(act: str) -> Recipe:
    return Recipe((Rule("int8/axis0:fp32", act=act),), "static")


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32))


@pytest.mark.parametrize("act", [SIGNED, SHIFTED])
def test_observed_ranges(act: str) -> None:
    """The compiled step moves the average as the definition does; evaluation leaves it, and rounds by it."""
    net = model()
    report = prepare(net, recipe(act), estimator="ste", activations="observed")
    assert [path for path, _ in report.inputs] == ["0.weight", "2.weight"]
    assert report.weights == ()
    assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    twin, xs = copy.deepcopy(net), torch.randn(3, 9, 64)
    run = compiled(net, recipe(act), policy="memory")
    low = high = 0.0
    for step, x in enumerate(xs):
        with watching() as trace:
            run(x).square().mean().backward()
        twin(x).square().mean().backward()
        share = 1.0 if step == 0 else 0.01
        low, high = low + share * (float(x.min()) - low), high + share * (float(x.max()) - high)
        if trace.contexts:
            assert [d.act for d in trace.contexts[0].plan] == [None, None]
            assert all("the model rounds its input" in d.reason for d in trace.contexts[0].plan)
    held = net[0].input_rounding
    assert torch.allclose(held.range.double(), torch.tensor([low, high], dtype=torch.float64), rtol=8 * FLOAT, atol=0)
    assert torch.equal(held.calls, torch.tensor(3))
    net.eval()
    before = held.range.clone()
    with torch.no_grad():
        x = xs[0] * 3  # beyond the range: clipped
        y = run(x)
        scale, zero, *_ = choose_qparams(before.view(1, 2), act)
        assert torch.equal(held.range, before)
        shift = 0.0 if zero is None else float(zero)
        low, high = (-127, 127) if act == SIGNED else (0, 255)
        inside = ((x / scale).round() + shift).clamp(low, high) - shift
        assert torch.allclose(held(x), inside * scale, rtol=4 * FLOAT, atol=0)
        twin.load_state_dict(net.state_dict())
        want = twin.eval()(x)  # weights are float there: half a step of 127 of each row, in both layers
        assert (y - want).norm() <= 4 / 127 * want.norm()


def test_gradients_stop_where_the_range_clips() -> None:
    net = nn.Sequential(nn.Linear(64, 8, bias=False))
    prepare(net, recipe(SIGNED), estimator="ste", activations="observed", inputs=[torch.randn(4, 64).clamp(-1, 1)])
    net.eval()  # the range stays
    x = torch.linspace(-2, 2, 64).repeat(3, 1).requires_grad_()
    run = compiled(net, recipe(SIGNED), policy="memory")
    run(x).sum().backward()
    scale = choose_qparams(net[0].input_rounding.range.view(1, 2), SIGNED).scale
    y = x.detach() / scale.view(1, 1)
    outside = y.abs() > 127.5
    assert outside.any()
    assert x.grad is not None
    assert (x.grad[outside] == 0).all()
    assert (x.grad[~outside] != 0).all()


@pytest.mark.parametrize("estimator", ["lsq", "pact"])
def test_learned_scales_of_inputs(estimator: str) -> None:
    net, x = model(), torch.randn(9, 64)
    report = prepare(net, recipe(SIGNED), estimator="lsq", activations=estimator, inputs=[x, (x,), {"input": x}])
    assert len(report.inputs) == len(report.weights) == 2
    names = [name for name, _ in net.named_parameters() if "input_rounding" in name]
    learned = {"lsq": "step", "pact": "clip"}[estimator]
    assert names == [f"0.input_rounding.{learned}", f"2.input_rounding.{learned}"]
    grads = []
    for mode in ("reference", "compiled"):
        torch._dynamo.reset()
        net.zero_grad()
        with watching(mode):
            compiled(net, recipe(SIGNED), policy="memory")(x).square().mean().backward()
        grads.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
    assert len(grads[0]) == len(list(net.parameters()))
    for a, b in zip(*grads, strict=True):
        # Sums of up to 9 * 96 products in other orders, two layers deep.
        assert (a - b).abs().max() <= 2 * 9 * 96 * 2.0**-23 * (b.abs().max() + 1)
    first = net[0].input_rounding
    with torch.no_grad():
        getattr(first, learned).mul_(0.5)
        assert first(x).abs().max() < x.abs().max()


def test_state_round_trips() -> None:
    net, x = model(), torch.randn(9, 64)
    prepare(net, recipe(SIGNED), estimator="ste", activations="observed", inputs=[x])
    other = model()
    prepare(other, recipe(SIGNED), estimator="ste", activations="observed")
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), net.eval()(x))


def test_refusals() -> None:
    net = model()
    for inputs in ([], [torch.randn(2, 63)]):
        with pytest.raises(Exception, match=r"begin with|shapes cannot") as caught:
            prepare(net, recipe(SIGNED), activations="lsq", inputs=inputs)
        assert isinstance(caught.value, QCError) == (not inputs)
        assert net.state_dict().keys() == model().state_dict().keys()  # as it was
        assert torch.equal(net(torch.ones(1, 64)), model()(torch.ones(1, 64)))
    with pytest.raises(QCError, match=r"uint8/tensor.*train\.scheme"):
        prepare(model(), recipe(SHIFTED), activations="lsq", inputs=[torch.randn(2, 64)])
    with pytest.raises(QCError, match=r"'ste' learns nothing"):
        prepare(model(), recipe(SIGNED), activations="ste")


def test_a_second_time_keeps_what_is_there() -> None:
    net, x = model(), torch.randn(9, 64)
    prepare(net, recipe(SIGNED), activations="observed", inputs=[x])
    want = net.eval()(x)
    again = prepare(net, recipe(SIGNED), activations="observed", inputs=[2 * x])
    assert again.weights == again.inputs == ()
    assert [path for path, _ in again.kept] == ["0.weight", "0.weight", "2.weight", "2.weight"]
    assert torch.equal(net(x), want)


def test_what_is_no_range_is_not_observed() -> None:
    net = model()
    prepare(net, recipe(SIGNED), estimator="ste", activations="observed")
    with pytest.raises(QCError) as caught:
        net.eval()(torch.randn(2, 64))
    assert caught.value.code == "train.unobserved"
    with torch.no_grad(), watching("reference"):
        assert compiled(net, recipe(SIGNED), policy="memory")(torch.randn(2, 64)).isnan().all()
    torch._dynamo.reset()
    net.train()(torch.randn(4, 64))
    kept = net[0].input_rounding.range.clone()
    for value in (float("inf"), float("nan")):
        net(torch.full((2, 64), value))
    net(torch.empty(0, 64))
    assert torch.equal(net[0].input_rounding.range, kept)
    assert int(net[0].input_rounding.calls) == 1
    assert torch.equal(net.eval()[0](input=torch.ones(2, 64)), net[0](torch.ones(2, 64)))


def test_examples_leave_the_model_as_it_is() -> None:
    net = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Dropout(0.5), nn.Linear(96, 32))
    before, drawn = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    net[1].eval()
    prepare(net, recipe(SIGNED), estimator="ste", activations="observed", inputs=[torch.ones(4, 64)])
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [m.training for m in net] == [True, False, True, True]
    assert net[0].input_rounding.training
    assert int(net[3].input_rounding.calls) == 1


class Wrapped(nn.Module):
    """One block, used twice, each time in a gradient checkpoint if at all."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.block, self.reentrant = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)), reentrant

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.block(x) if self.reentrant is None else checkpoint(self.block, x, use_reentrant=self.reentrant)
        return x


def micro_batches(reentrant: bool | None, around: bool, compile: bool) -> tuple[list[Tensor], Tensor, Tensor]:
    """Gradients of two steps of three calls each, and what was observed. `around`: the checkpoint is around the model."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    net = Wrapped(None if around else reentrant)
    prepare(net, recipe(SIGNED), estimator="ste", activations="observed")
    run = compiled(net, recipe(SIGNED), policy="memory") if compile else net
    for step in range(2):
        xs = [(torch.randn(9, 64) * (1 + i + step)).requires_grad_() for i in range(3)]
        checked = around and reentrant is not None
        ys = [checkpoint(run, x, use_reentrant=reentrant) if checked else run(x) for x in xs]
        sum(y.square().mean() for y in ys).backward()
    held = net.block[0].input_rounding
    return [p.grad for p in net.parameters() if p.grad is not None], held.range, held.calls


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_round_by_the_range_of_the_forward_pass(reentrant: bool, around: bool) -> None:
    """Computed again after other calls have moved the average."""
    (want, observed, calls), (got, again, count) = (micro_batches(r, around, False) for r in (None, reentrant))
    assert len(got) == len(want) == 4
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 12 * 12 * FLOAT * b.abs().max()  # 12 terms each, maybe summed in another order
    assert torch.equal(observed, again)
    assert int(calls) == int(count) == 2 * 3 * 2


@pytest.mark.parametrize(("around", "mode"), [(False, "compiled"), (True, "reference")])
def test_compiled_checkpoints_too(around: bool, mode: Any) -> None:
    """Inside of the graph it is the compiler that computes again; a checkpoint around it runs the graph again."""
    with watching("reference"):
        want, observed, _ = micro_batches(None, around, True)
    with watching(mode) as trace:
        got, again, count = micro_batches(False, around, True)
    assert all(d.trained for ctx in trace.contexts for d in ctx.plan)
    for a, b in zip(got, want, strict=True):
        # A code on the edge between two may fall to either side: one step of 127, in two layers used twice.
        assert (a - b).norm() <= 4 / 127 * b.norm()
        assert (a - b).abs().median() <= 64 * FLOAT * b.abs().max()
    # Averages of least and most elements that are sums of 96 products, in another order.
    assert (observed - again).abs().max() <= 96 * 2 * FLOAT * again.abs().max()
    assert int(count) == 2 * 3 * 2


@pytest.mark.parametrize("activations", ["observed", "lsq"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_files_hold_static_scales(activations: str, device: str, tmp_path: Path) -> None:
    """A model as it is built, that nobody has prepared, is enough; one that was prepared in another way gives way."""
    net, x = model(), torch.randn(9, 64)
    prepare(net, recipe(SIGNED), estimator="lsq", activations=activations, inputs=[x])
    convert(net, recipe(SIGNED))
    want = net.eval()(2 * x)
    save(net, tmp_path)
    with torch.device(device):
        fresh = model()
    assert torch.equal(load(fresh, tmp_path).eval()(2 * x), want)
    assert fresh.state_dict().keys() == net.state_dict().keys()
    assert [m.requires_grad for m in learned_scales(fresh).values()] == [True] * (0 if activations == "observed" else 2)
    assert fresh.train()(x).isfinite().all()  # and can be observed further
    other = model()
    prepare(other, recipe(SHIFTED), estimator="ste", activations="observed")
    assert torch.equal(load(other, tmp_path).eval()(2 * x), want)
    assert len(other[0]._forward_pre_hooks) == 1


def test_files_with_impossible_static_scales(tmp_path: Path) -> None:
    net = model()
    prepare(net, recipe(SIGNED), estimator="ste", activations="observed", inputs=[torch.randn(9, 64)])
    with pytest.warns(QCWarning, match="saved in float"):
        save(net, tmp_path)
    file = tmp_path / "qcompile.json"
    manifest = json.loads(file.read_text())
    for change, code in (
        ({"scheme": "int9/tensor"}, "scheme.unknown-format"),
        ({"scheme": "int8/token:fp32"}, "load.manifest"),
        ({"momentum": "much"}, "load.manifest"),
        ({"estimator": "none"}, "estimator.unknown"),
    ):
        file.write_text(json.dumps(manifest | {"inputs": manifest["inputs"] | {"0": manifest["inputs"]["0"] | change}}))
        fresh = model()
        with pytest.raises(QCError, match="0") as caught:
            load(fresh, tmp_path)
        assert caught.value.code == code
        assert fresh.state_dict().keys() == model().state_dict().keys()  # as it was


def test_a_state_dict_says_what_its_model_needs() -> None:
    net, fresh = model(), model()
    prepare(net, recipe(SIGNED), estimator="ste", activations="observed", inputs=[torch.randn(9, 64)])
    for item in (net, fresh):
        convert(item, recipe(SIGNED))
    with pytest.warns(QCWarning, match=r"qcompile\.prepare.*before qcompile\.convert, or use"):
        fresh.load_state_dict(net.state_dict(), strict=False)
    prepared = model()
    prepare(prepared, recipe(SIGNED), estimator="ste", activations="observed")
    convert(prepared, recipe(SIGNED))
    prepared.load_state_dict(net.state_dict())
    assert torch.equal(prepared.eval()(torch.ones(2, 64)), net.eval()(torch.ones(2, 64)))


def test_ranges_stay_float32() -> None:
    net = model()
    prepare(net, recipe(SIGNED), estimator="ste", activations="observed")
    net.to(torch.bfloat16)
    held = net[0].input_rounding
    assert {t.dtype for t in (held.range, held.lines)} == {torch.float32}
    for high in (1.0, 1.125):
        net(torch.linspace(-1, high, 64, dtype=torch.bfloat16).expand(2, 64))
    assert held.range[1].item() == pytest.approx(1.00125, abs=2 * FLOAT)  # bfloat16 has no number between 1 and 1.0078
