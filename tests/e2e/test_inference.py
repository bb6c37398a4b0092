"""`backend="qcompile"` on small models: right in every spelling, mode, dtype and shape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qcompile import explain
from qcompile.backend import watching
from tests.e2e.models import SPELLINGS, Spelled

RECIPE = "int8/axis0:fp32"


def compiled(model: nn.Module, recipe: str = RECIPE, **options: object) -> nn.Module:
    return torch.compile(model, backend="qcompile", options={"recipe": recipe, **options})  # type: ignore[return-value]


def reference(model: nn.Module, *args: Tensor, recipe: str = RECIPE, **options: object) -> Tensor:
    """The same rewritten graph, run with the plain-torch meaning of every operator."""
    with watching(only_plan=True):
        torch._dynamo.reset()
        result: Tensor = compiled(model, recipe, **options)(*args)
    torch._dynamo.reset()
    return result


def bound(y: Tensor) -> float:
    """Absolute error allowed between kernel and reference on these sizes.

    A matmul of k <= 128 terms accumulates k roundings of fp32 (2^-24 each), and the kernel's 16-bit image of the
    activation adds half a step of absmax/32767 per term; both relative to sum|x||w| <= 16 * max|y| for random data. Depth
    multiplies it by the number of layers (<= 8 here).
    """
    return float(y.abs().max()) * 16 * 8 * (128 * 2**-24 + 0.5 / 32767)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling: str) -> None:
    torch.manual_seed(0)
    model = Spelled(spelling).eval()
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        found = explain(model, x, recipe=RECIPE)
        assert found.coverage == 1.0, str(found)
        want = reference(model, x)
        got = compiled(model)(x)
        exact = model(x)
    torch.testing.assert_close(got, want, rtol=0, atol=bound(want))
    # 8-bit rows: half a step is absmax/254 of each weight, so the result moves by well under 3 % of its range.
    assert (got - exact).abs().max() < 0.03 * exact.abs().max()
    assert (got - exact).abs().max() > 0, "nothing was quantized"
