"""What Dynamo offers and expects: its graphs, the names of its inputs, its settings.

The graph that Dynamo hands to a backend stays Dynamo's: it reads the placeholders again after the backend returned.
So a pass works on a copy, and an input that a pass adds has to look like one that Dynamo made.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import fx


def uncompiled(model: Any) -> Any:
    """The user's own callable behind `torch.compile`, or the thing itself."""
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


def skip_module_guards(guards: Sequence[Any]) -> list[bool]:
    """A guard filter that keeps checks on inputs and drops those on modules, as `torch.compiler` offers
    it."""
    return list(torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards))


@contextmanager
def eager_parts() -> Iterator[list[str]]:
    """Collect, by the end of the block, why code inside it ran without being compiled: first lines of Dynamo's reasons,
    and one of ours for code it skipped without giving any."""
    from torch._dynamo.utils import counters

    def state() -> tuple[dict[str, int], int]:
        frames = counters["frames"]
        return dict(counters["graph_break"]), frames["total"] - frames["ok"]

    breaks, skipped = state()
    found: list[str] = []
    yield found
    after, skipped_after = state()
    found += [str(reason).splitlines()[0] for reason, count in after.items() if count > breaks.get(reason, 0)]
    if skipped_after > skipped:
        found.append(f"Dynamo could not trace {skipped_after - skipped} function(s)")


def unlimited_recompiles() -> AbstractContextManager[object]:
    """No limit on how often Dynamo may compile one piece of code."""
    from torch._dynamo import config

    many = 1 << 30
    return cast("AbstractContextManager[object]", config.patch(recompile_limit=many, accumulated_recompile_limit=many))


def is_tracing() -> bool:
    """Whether Dynamo, or what compiles its graph, is at work in this thread."""
    return torch._guards.TracingContext.try_get() is not None


def leave_room() -> int:
    """Let Dynamo compile the frame that it compiles now at least once more, for good: it stops at `recompile_limit`, and the
    code then runs as it was written. Returns how often it was compiled before."""
    from torch._dynamo import config
    from torch._guards import CompileContext

    current = CompileContext.current_compile_id()
    done = 0 if current is None or current.frame_compile_id is None else current.frame_compile_id
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(config, name, max(getattr(config, name), done + 2))
    return done


def graph_mode(graph: fx.Graph) -> Any:
    """The fake-tensor mode that the graph's example values live in (not the one a compile runs in), or
    None."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("example_value"), "fake_mode", None)
        if mode is not None:
            return mode
    return None


def fake_mode(graph: fx.Graph) -> AbstractContextManager[object]:
    """`graph_mode` as a context; a null context for a graph without fake values."""
    return cast("AbstractContextManager[object]", graph_mode(graph) or nullcontext())


def compile_example(tensor: torch.Tensor) -> torch.Tensor:
    """What `compile_fx` should see of a packed tensor: static sizes, in the mode that the compile runs in."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode()
    return tensor if mode is None else cast("torch.Tensor", mode.from_tensor(tensor, static_shapes=True))


def placeholder_source(node: fx.Node) -> str:
    """Dynamo's name of what a placeholder stands for: "L['self']._modules['fc']._parameters['weight']", or
    ""."""
    source = getattr(node, "_dynamo_source", None)
    if source is None:
        return ""
    name = source.name
    return str(name() if callable(name) else name)  # a method up to 2.11, a property after it


def add_placeholder(graph: fx.Graph, name: str, tensor: torch.Tensor) -> fx.Node:
    """A new graph input at the insert point for a tensor that the backend supplies: no user source, no
    guards."""
    node = graph.placeholder(name)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    mode = graph_mode(graph)
    node.meta["example_value"] = tensor if mode is None else mode.from_tensor(tensor, static_shapes=True)
    return node


def clone_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that may be edited. Dynamo reads its own graph's placeholders after the backend returns."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    result = fx.GraphModule(gm, graph)
    result.meta = gm.meta
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(result, name, getattr(gm, name))
    return result


def without_levels(value: torch.Tensor) -> torch.Tensor:
    """The tensor inside of those that transforms of `torch.func` put around it, which have no storage."""
    functorch: Any = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    return value


def traced_optimizer(parameters: Collection[torch.Tensor]) -> torch.optim.Optimizer | None:
    """The optimizer in the frame that Dynamo is compiling which holds one of `parameters`, or None."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx()
    except AttributeError:  # nothing is being traced
        return None
    wanted = set(map(id, parameters))
    found: list[Any] = list(frame.f_locals.values())
    found += [item for value in found if isinstance(value, tuple | list) for item in value]
    for value in found:
        owner = getattr(value, "__self__", value)  # a bound step()
        groups = owner.param_groups if isinstance(owner, torch.optim.Optimizer) else []
        if any(id(p) in wanted for group in groups for p in group["params"]):
            return cast("torch.optim.Optimizer", owner)
    return None


def trace_again_with_numbers(key: str) -> None:
    """Have Dynamo trace the frame that it compiles once more, with the floats that it found under `key` (of a dictionary) as
    inputs of the graph; once: a second call for the same frame returns.

    By itself Dynamo would do so at the first call that brings another value, after compiling for nothing.
    """
    from torch._dynamo import pgo
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        frame = InstructionTranslator.current_tx()
    except AttributeError:
        return
    known = pgo.get_code_state()[pgo.CodeId.make(frame.f_code, frame.closure)].automatic_dynamic
    fixed = [entry for name, entry in known.items() if name.endswith(f"[{key!r}]") and isinstance(entry.scalar, float)]
    for entry in fixed:
        entry.scalar = pgo.auto_dynamic
    if fixed:
        frame.speculation_log.clear()  # with numbers for constants another path may be traced
        raise TensorifyScalarRestartAnalysis(restart_reason=f"{key} may change")


@contextmanager
def floats_that_stay_tensors(graph: fx.Graph) -> Iterator[None]:
    """Inside, AOTAutograd leaves alone a graph that computes with no float of Python any more.

    It would turn floats into tensors, and make constants of all that it did not turn itself, even where nothing is left.
    """
    module: Any = importlib.import_module("torch.fx.passes._tensorify_python_scalars")
    if any(isinstance(node.meta.get("example_value"), torch.SymFloat) for node in graph.nodes):
        yield
        return
    enabled = module._is_tensorify_enabled
    module._is_tensorify_enabled = lambda: False
    try:
        yield
    finally:
        module._is_tensorify_enabled = enabled
