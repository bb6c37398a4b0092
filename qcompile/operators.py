"""The operators `torch.ops.qcompile.*` are there as soon as torch and this package are, whichever is imported first.

A saved program names operators and nothing else of this package, so `import qcompile` has to be enough to load and run it.
But `import qcompile` does not load torch: the command line answers without it, `doctor` even where torch is broken. So where
torch is not there yet, registering waits for it. Kernels wait for the first call: they bring the code generator with them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from qcompile.errors import warn

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")


def arrange() -> None:
    """Register the operators, or see to it that they are when torch is imported."""
    if "torch" in sys.modules:
        _try_to_register()
    elif not any(type(finder).__module__ == __name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Finds torch as the others do, and registers when it was imported. Who only asks where torch is changes nothing."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        finds = [finder.find_spec for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((spec for find in finds if (spec := find(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # the loader is as it was
                run(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _try_to_register()

            loader.exec_module = exec_module
        return spec


def _try_to_register() -> None:
    try:
        _register()
    except Exception as error:  # a torch that lacks something: `qcompile doctor` has more to say about it
        warn(f"the operators torch.ops.qcompile.* are not there: {type(error).__name__}: {error}")


@functools.cache
def _register() -> None:
    from qcompile.ir import ops

    ops.LIBRARY.impl("qmm", _from_the_first_call(_on_cpu), "CPU")
    ops.LIBRARY.impl("qmm", _from_the_first_call(_on_gpu), "CUDA")
    ops.LIBRARY.impl("fit_qparams", _from_the_first_call(_fit_on_cpu), "CPU")
    ops.LIBRARY.impl("step_", _from_the_first_call(_step_on_cpu), "CPU")
    ops.LIBRARY.impl("step_", _from_the_first_call(_step_by_triton), "CUDA")


def _fit_on_cpu() -> Callable[..., list[Tensor]]:
    from qcompile.codegen.eager_fit import fit_on_cpu

    return fit_on_cpu


def _step_on_cpu() -> Callable[..., None]:
    from qcompile import compat
    from qcompile.codegen.devices.triton_step import step_
    from qcompile.codegen.eager_step import step_on_cpu

    def step(state: Any, inputs: Any, hyper: Tensor, random: Tensor | None, spec: str) -> None:
        """C++, or Triton's interpreter where it is asked for."""
        (step_ if compat.writes_triton(hyper.device) else step_on_cpu)(state, inputs, hyper, random, spec)

    return step


def _step_by_triton() -> Callable[..., None]:
    from qcompile.codegen.devices.triton_step import step_

    return step_


def _on_cpu() -> Callable[..., Tensor]:
    from qcompile.codegen.eager import qmm_on_cpu

    return qmm_on_cpu


def _on_gpu() -> Callable[..., Tensor]:
    from qcompile.codegen.eager import qmm_on_gpu

    return qmm_on_gpu


def _from_the_first_call(find: Callable[[], Callable[..., Result]]) -> Callable[..., Result]:
    """A function that is looked for when it is first called."""
    kernel: Callable[..., Result] | None = None

    def call(*operands: Any) -> Result:
        nonlocal kernel
        if kernel is None:
            kernel = find()
        return kernel(*operands)

    return call
