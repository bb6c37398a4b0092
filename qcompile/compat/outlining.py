"""What a compiler owes its caller when it compiles a functional graph in pieces.

Inductor compiles a graph whole. Outlining stands in its place, so it has to know when that is not allowed, to report
what Inductor reports, and to call what Inductor built the way Inductor does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch


def constant_bytes(tensor: torch.Tensor) -> bytes:
    """The contents of a real CPU tensor, read outside of whatever tracing modes are active."""
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes(), torch.no_grad():
        return bytes(tensor.detach().contiguous().flatten().view(torch.uint8).tolist())


def is_fake(tensor: object) -> bool:
    """Whether a tensor has no storage of its own (it belongs to a trace)."""
    from torch._subclasses.fake_tensor import is_fake as fake

    return bool(fake(tensor))


def why_whole(options: Mapping[str, Any]) -> str:
    """Why a graph has to be handed to Inductor in one piece, judged by what its inner compile is called with,
    or ""."""
    from torch._functorch import config as functorch
    from torch._inductor import config
    from torch._inductor.virtualized import V

    tests = {
        "a training graph": not options.get("is_inference") or options.get("is_backward"),
        "an ahead-of-time compile": V.aot_compilation,
        "CUDA graphs record the graph as a whole": options.get("cudagraphs"),
        "freezing makes weights constants": config.freezing,
        "a bundled autograd cache stores one object": functorch.bundled_autograd_cache,
        "compiled regions are wrapped": getattr(config, "wrap_inductor_compiled_regions", False),
    }
    return next((why for why, holds in tests.items() if holds), "")


@contextmanager
def segment_strides() -> Iterator[list[Any]]:
    """Catch what a compile inside reports of its outputs' strides; the list is empty when nobody asked.

    AOTAutograd gives its compiler one list to report into, and Inductor asserts that it finds it empty.
    """
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is None or context.output_strides is None:
        yield []
        return
    outer, context.output_strides = context.output_strides, []
    try:
        yield context.output_strides
    finally:
        context.output_strides = outer


def report_strides(strides: Sequence[tuple[int, ...] | None]) -> None:
    """Report the strides of the graph's outputs, as the compiler of a whole graph does."""
    from torch._guards import TracingContext

    context = TracingContext.try_get()
    if context is not None and context.output_strides is not None:
        context.output_strides.extend(strides)


def direct_callable(compiled: Any) -> Callable[[list[Any]], Sequence[Any]]:
    """What a compiled graph calls after its bookkeeping: valid once the object itself was called once."""
    from torch._inductor.output_code import CompiledFxGraph

    found = compiled.current_callable if type(compiled) is CompiledFxGraph else None
    return cast("Callable[[list[Any]], Sequence[Any]]", found or compiled)


def profiling() -> bool:
    """Whether the profiler records, so that compiled graphs should announce themselves."""
    return bool(torch.autograd.profiler._is_profiler_enabled)
