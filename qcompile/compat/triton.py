"""Triton without a device: its kernels, and Inductor's, run by Triton's interpreter over CPU tensors.

Triton decides once, while it is imported and while kernels are decorated, whether to interpret, and Inductor asks the
environment. `interpreted` switches both inside a running process and puts everything back: the environment, the
active driver, Inductor's settings and caches, Triton's own modules. The repairs of the interpreter's arithmetic are
in `interpreter`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from qcompile.compat.assembly import replace_assembly
from qcompile.compat.interpreter import repair_atomics, repair_floats, replace, replace_libdevice
from qcompile.errors import QCError


def triton_modules() -> tuple[Any, Any]:
    """`triton` and `triton.language`."""
    import triton
    import triton.language as tl

    return triton, tl


@contextmanager
def interpreted() -> Iterator[None]:
    """Inside, every Triton kernel runs in the interpreter, with bf16 arithmetic and libdevice repaired.

    Compiled functions are forgotten on both ends: Dynamo would otherwise answer a call inside with the C++ of a call
    before, and a call after with kernels that only the interpreter can run. Not for use in two threads at once.
    """
    # Imported while a kernel runs interpreted, it would keep the interpreter's functions for ever.
    import triton.compiler.code_generator  # noqa: F401
    from triton.runtime import interpreter

    torch.compiler.reset()
    with ExitStack() as stack:
        stack.callback(torch.compiler.reset)
        _inductor(stack)
        stack.enter_context(np.errstate(all="ignore"))  # a device says nothing about an overflow
        _driver(stack)
        _language_once(stack, interpreter)
        _decorated_before(stack, interpreter)
        _globals_of_users(stack, interpreter)
        repair_floats(stack, interpreter)
        repair_atomics(stack, interpreter)
        replace_libdevice(stack, interpreter)
        replace_assembly(stack, interpreter)
        yield


def _inductor(stack: ExitStack) -> None:
    """Inductor emits Triton for CPU tensors; its caches are empty, on disk and in memory, in the context and after."""
    from torch._functorch import config as functorch
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.utils import fresh_cache

    old = os.environ.get("TRITON_INTERPRET")
    stack.callback(lambda: os.environ.pop("TRITON_INTERPRET", None) if old is None else _setenv(old))
    _setenv("1")
    settings = {"cpu_backend": "triton", "fx_graph_cache": False, "fx_graph_remote_cache": False}
    stack.enter_context(config.patch(settings))
    stack.enter_context(functorch.patch(enable_autograd_cache=False))
    # Generated code asks for Triton's CPU backend, which is not needed here, and warns that there is none.
    replace(stack, triton_helpers, "set_driver_to_cpu", lambda: None)
    cache = fresh_cache()
    cache.__enter__()
    # An exception of the caller's is none of the cache's: told of one, it would warn and keep its folder.
    stack.callback(cache.__exit__, None, None, None)


def _setenv(value: str) -> None:
    os.environ["TRITON_INTERPRET"] = value


def _driver(stack: ExitStack) -> None:
    """A driver that names a target and can launch nothing; what was derived from it is forgotten at the end."""
    from torch.utils import _triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver

    class NoDevice(DriverBase):  # type: ignore[misc]
        def __init__(self) -> None:
            self.utils = None

        @classmethod
        def is_active(cls) -> bool:
            return True

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Callable[..., list[float]]:
            return lambda function, **_: [0.0, 0.0, 0.0]  # every configuration is as fast: the first one is taken

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cpu

    for name in ("triton_backend", "triton_hash_with_backend"):
        if clear := getattr(getattr(_triton, name, None), "cache_clear", None):
            clear()
            stack.callback(clear)
    replace(stack, driver, "_active", NoDevice())


def _language_once(stack: ExitStack, interpreter: Any) -> None:
    """Triton replaces the functions of `triton.language` while a kernel runs; it does so again for every device
    function that is called, and does not put those back. Here the kernel's own replacement covers them."""
    _, tl = triton_modules()
    original, running = interpreter._patch_lang, False

    def patch(fn: Any) -> Any:
        nonlocal running
        if running:
            return interpreter._LangPatchScope()
        scope = original(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        # A scalar is an array of one element here, which numpy takes for an int no longer (Triton 3.6 asks it to).
        scope.set_attr(tl.core.tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))
        restore = scope.restore
        running = True

        def done() -> None:
            nonlocal running
            running = False
            restore()

        scope.restore = done
        return scope

    replace(stack, interpreter, "_patch_lang", patch)


def _decorated_before(stack: ExitStack, interpreter: Any) -> None:
    """Kernels that were decorated outside (the user's, Inductor's helpers, `tl.sum`) run interpreted as well."""
    from triton.runtime.jit import JITFunction

    @functools.cache
    def twin(fn: Any) -> Any:
        return interpreter.InterpretedFunction(fn)

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = twin(self.fn)
        kernel.pre_run_hooks = self.pre_run_hooks
        return kernel.run(*args, grid=grid, warmup=warmup, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        return twin(self.fn)(*args, **kwargs)

    launch, call_inside, running = interpreter.InterpretedFunction.run, interpreter.InterpretedFunction.__call__, 0

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal running
        running += 1
        try:
            return launch(self, *args, **kwargs)
        finally:
            running -= 1

    def within_a_kernel(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The interpreter puts its own functions into triton.language here, and only a launch takes them out again.
        if not running:
            raise QCError(
                "testing.launch",
                f"The kernel {self.fn.__name__} was called without a grid.",
                next=f"launch it, {self.fn.__name__}[grid](...), or give a function that does",
            )
        return call_inside(self, *args, **kwargs)

    # Dynamo is to break the graph at a kernel of the user's and not to trace the interpreter.
    replace(stack, JITFunction, "run", torch.compiler.disable(run))
    replace(stack, interpreter.InterpretedFunction, "run", torch.compiler.disable(counted))
    replace(stack, interpreter.InterpretedFunction, "__call__", within_a_kernel)
    replace(stack, JITFunction, "__call__", call)


def _globals_of_users(stack: ExitStack, interpreter: Any) -> None:
    """The interpreter rewrites a kernel and leaves its own names in the kernel's module: they are taken out again,
    and the rewritten kernels, which need them, go with them."""
    rewriter = interpreter.FunctionRewriter
    original = rewriter._compile_and_exec

    def compile_and_exec(self: Any, tree: Any) -> Any:
        names = self.fn.__globals__
        before = set(names)
        try:
            return original(self, tree)
        finally:
            stack.callback(_remove, names, set(names) - before)

    replace(stack, rewriter, "_compile_and_exec", compile_and_exec)
    replace(stack, interpreter.InterpretedFunction, "rewritten_fn", {})


def _remove(names: dict[str, Any], added: set[str]) -> None:
    for name in added:
        names.pop(name, None)
