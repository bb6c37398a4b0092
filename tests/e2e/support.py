"""What the end-to-end tests share: compiling, a plain-torch model to compare with, and error bounds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qcompile import convert
from qcompile.backend import watching
from qcompile.ir.codec import dequantize, quantize
from qcompile.runtime.store import STORE, Entry
from tests.e2e.models import TinyLM

RECIPE = "int8/axis0:fp32"
# Kernels read an exact activation as 16-bit integers, one scale for each 32 values: half a step of absmax / 32767.
DIGITS = 0.5 / 32767
FLOAT = 2.0**-24  # relative error of one fp32 operation
IDS = torch.randint(0, 128, (2, 5), generator=torch.Generator().manual_seed(1))


def compiled(model: Any, recipe: Any = RECIPE, *, dynamic: bool | None = None, **options: Any) -> Any:
    return torch.compile(model, backend="qcompile", dynamic=dynamic, options={"recipe": recipe, **options})


def planned(model: Any, *args: Any, recipe: Any = RECIPE, **options: Any) -> Any:
    """The rewritten graph's result with the plain-torch meaning of every operator; no code is generated."""
    with torch.no_grad(), watching("reference"):
        torch._dynamo.reset()
        result = compiled(model, recipe, **options)(*args)
    torch._dynamo.reset()
    return result


def packed(recipe: str = RECIPE, **settings: Any) -> nn.Module:
    """A small language model with its weights given up; its vocabulary is that of `IDS`."""
    torch.manual_seed(0)
    model = TinyLM(layers=1, **settings).eval()
    convert(model, recipe)
    return model


def decoded(model: nn.Module, scheme: str = RECIPE) -> nn.Module:
    """A float copy of a model whose Linear and Embedding weights are what their packed ones decode to."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            w = module.weight.detach().float()
            module.weight.data.copy_(dequantize(quantize(w, scheme), scheme, *w.shape))
    return model


def noise_bound(model: nn.Module, *args: Tensor, step: float) -> float:
    """How far rounding may move a model's result.

    Every Linear's input is moved by `step` times its row's largest value, with random signs, in float64. The kernels'
    own rounding moves no input by more, and mostly by less (it is spread over the step, where this is always a whole
    one: sqrt(3) more in the mean square), so the largest deviation of three runs bounds it, with a factor 2 left for
    another draw of signs.
    """
    double = copy.deepcopy(model).double()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    generator = torch.Generator().manual_seed(7)

    def move(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = inputs[0]
        signs = torch.randint(0, 2, x.shape, generator=generator).to(x.dtype) * 2 - 1
        return (x + signs * step * x.abs().amax(-1, keepdim=True),)

    with torch.no_grad():
        exact = double(*args)
        for module in double.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(move)
        moved = max(float((double(*args) - exact).abs().max()) for _ in range(3))
    return 2 * moved


def fp32_step(k: int) -> float:
    """Relative movement of a Linear's input that stands for one kernel call: the 16-bit image, and k roundings."""
    return DIGITS + (k + 8) * FLOAT


def entries(before: set[int] | None = None) -> list[Entry]:
    """Entries of the store, without those whose ids are given."""
    return [entry for entry in STORE if before is None or id(entry) not in before]


def encodes_during(call: Callable[[], Any]) -> int:
    """How many weights and constants a call encodes."""
    before = {id(e): e.encodes for e in STORE}
    held = list(STORE)  # so that no id is used twice
    call()
    del held
    return sum(e.encodes - before.get(id(e), 0) for e in STORE)
