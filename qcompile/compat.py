"""The only file that names torch._dynamo, torch._inductor and triton privates.

Private names move between releases. With all of them here, a new torch release is answered in one place, and
the rest of the package is written against the small typed functions below. The names are imported inside the
functions: importing this module costs nothing, and a name that went away fails with the feature that needs it
and not with the package.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import fx


# ----------------------------------------------------------------------------------------- Inductor's options
@functools.cache
def inductor_options() -> Mapping[str, object]:
    """Inductor's settings: dotted name -> declared type (a class, a union or a generic alias)."""
    from torch._inductor import config

    return {name: config.get_type(name) for name in config.get_config_copy()}  # type: ignore[attr-defined]


@functools.cache
def inductor_modes() -> Mapping[str, Mapping[str, object]]:
    """`mode=` of `torch.compile`: name -> the settings it stands for."""
    from torch._inductor import list_mode_options

    return list_mode_options()


# ------------------------------------------------------------------------------------------ the C++ toolchain
def inductor_cache_dir() -> Path:
    """The folder under which Inductor keeps generated code; the folder is made if it is missing."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would call, or None when it finds none (it honours `CXX`)."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return get_cpp_compiler()
    except InvalidCxxCompiler:
        return None


def cpp_isa() -> str | None:
    """The vector instruction set Inductor builds for ("avx512", "avx2", "asimd" ...), or None for scalar
    code."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    isa = pick_vec_isa()
    return str(isa) if isa else None


def cpp_build(name: str, source: Path, folder: Path) -> Path:
    """Build one C++ file to a shared library with Inductor's own flags (no torch headers); returns its path.

    Raises whatever the builder raises: the text holds the command line and what the compiler said.
    """
    from torch._inductor.cpp_builder import CppBuilder, CppTorchOptions
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    options = CppTorchOptions(vec_isa=pick_vec_isa(), include_pytorch=False)
    builder = CppBuilder(name=name, sources=[str(source)], BuildOption=options, output_dir=str(folder))
    builder.build()
    return Path(builder.get_target_file_path())


# -------------------------------------------------------------------------------------------- Dynamo's graphs
def size_hint(size: object) -> int | None:
    """A size as an integer: itself, the example value behind a `SymInt`, `None` when it has none
    (unbacked)."""
    if isinstance(size, int):
        return size
    if not isinstance(size, torch.SymInt):
        return None
    try:
        return int(size.node.hint) if size.node.has_hint() else None
    except Exception:  # an unbacked symbol: releases differ in what they raise
        return None


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


# ------------------------------------------------------------------------------------------- Inductor's entry
class Fingerprint:
    """Makes Inductor's and AOTAutograd's disk caches see our passes, recipe and kernels.

    Both caches key on Inductor's configuration, so the fingerprint rides there as a post-grad pass that does
    nothing but carry a `uuid`.
    """

    @staticmethod
    def patch(text: str, config: Mapping[str, object]) -> dict[str, object]:
        """`config` with an entry that carries `text`; a pass of the user's in that place still runs and still
        counts."""
        from torch._inductor.custom_graph_pass import CustomGraphPass

        class Carrier(CustomGraphPass):
            def __init__(self, text: str) -> None:
                self.text = text

            def __call__(self, graph: fx.Graph) -> None:
                if theirs is not None:
                    theirs(graph)

            def uuid(self) -> Any:
                if theirs is None:
                    return self.text
                own = getattr(theirs, "uuid", lambda: None)()
                return (
                    None if own is None else f"{self.text} {own}"
                )  # None: not cacheable, as for the user's pass alone

        theirs = cast("Any", config.get(name := "post_grad_custom_post_pass"))
        return {**config, name: Carrier(text)}


def compile_fx(
    gm: fx.GraphModule,
    inputs: Sequence[object],
    *,
    inner_compile: Callable[..., Any] | None = None,
    config: Mapping[str, object] = MappingProxyType({}),
) -> Callable[..., Any]:
    """Inductor on a Dynamo graph; `config` holds for forward and (lazily compiled) backward."""
    from torch._inductor import compile_fx as module

    values: Any = list(inputs)
    compiled = module.compile_fx(
        gm, values, inner_compile=inner_compile or module.compile_fx_inner, config_patches=dict(config)
    )
    return cast("Callable[..., Any]", compiled)


def inner_compile() -> Callable[..., Any]:
    """Inductor's compiler of one functional graph."""
    from torch._inductor.compile_fx import compile_fx_inner

    return cast("Callable[..., Any]", compile_fx_inner)


# --------------------------------------------------------------------------------------- Inductor's lowerings
def inductor_lowerings() -> Mapping[object, object]:
    """Operators that Inductor knows how to lower."""
    from torch._inductor.lowering import lowerings

    return cast("Mapping[object, object]", lowerings)


def register_lowering(op: object, lower: Callable[..., object]) -> None:
    """Tell Inductor how to lower one operator."""
    from torch._inductor.lowering import register_lowering as register

    register(op, type_promotion_kind=None)(lower)


def register_fallback(op: object) -> None:
    """Tell Inductor to call the operator itself, without a warning."""
    from torch._inductor.lowering import make_fallback

    make_fallback(op, warn=False)


def fallback(op: object) -> Callable[..., object]:
    """A lowering that calls the operator at run time."""
    from torch._inductor.lowering import fallback_handler

    return cast("Callable[..., object]", fallback_handler(op, add_to_fallback_set=False))


def cpp_wrapper_active() -> bool:
    """Whether Inductor is writing a C++ wrapper instead of a Python one."""
    from torch._inductor.virtualized import V

    return bool(V.graph.cpp_wrapper)


def contiguous(value: Any) -> Any:
    """An IR value in memory, contiguous (copied only if it is not)."""
    from torch._inductor import ir

    return ir.ExternKernel.require_contiguous(ir.ExternKernel.realize_input(value))


def rows_with_one_stride(value: Any) -> Any:
    """An IR value in memory whose rows are dense and lie at one common distance; copied only if they do
    not."""
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    realized = ir.ExternKernel.realize_input(value)
    if ir.is_storage_and_layout(realized):
        _, layout = ir.as_storage_and_layout(realized, freeze=False)
        if isinstance(layout, (ir.FixedLayout, ir.NonOwningLayout)):
            size, stride, known = layout.size, layout.stride, V.graph.sizevars.statically_known_equals
            dense = len(size) >= 2 and known(stride[-1], 1)
            if dense and all(known(stride[i], stride[i + 1] * size[i + 1]) for i in range(len(size) - 2)):
                return realized
    return ir.ExternKernel.require_contiguous(realized)


def row_stride(value: Any) -> Any:
    """Distance between rows, in elements (what `rows_with_one_stride` made sure exists)."""
    size, stride = value.get_size(), value.get_stride()
    return stride[-2] if len(size) >= 2 else size[-1]


def extern_cpp_kernel(
    *,
    name: str,
    argtypes: Sequence[str],
    source: str,
    inputs: Sequence[Any],
    scalars: Callable[[], Sequence[Any]],
    size: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """An IR node that calls `extern "C" void kernel(inputs..., output, scalars...)` from the generated
    wrapper.

    The text is built with Inductor's C++ builder, once per distinct text, in parallel with Inductor's own
    kernels.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    class CppCall(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            body = f"async_compile.cpp_pybinding({list(argtypes)!r}, r'''{framed(source)}''')\n"
            kernel = wrapper.src_to_kernel.get(body)
            if kernel is None:
                kernel = wrapper.src_to_kernel[body] = f"{name}_{wrapper.next_kernel_suffix()}"
                wrapper.define_kernel(kernel, body, gpu=False)
            nodes: list[Any] = [*self.inputs, self]
            tensors = [item.codegen_reference() for item in nodes]
            numbers = [wrapper.codegen_python_sizevar(V.graph.sizevars.simplify(_expr(s))) for s in scalars()]
            wrapper.writeline(f"{kernel}({', '.join([*tensors, *numbers])})")

    def _expr(value: Any) -> Any:
        import sympy

        return sympy.sympify(value)

    stride = ir.FlexibleLayout.contiguous_strides(list(size))
    layout = ir.FixedLayout(device, dtype, list(size), stride)
    return ir.TensorBox.create(CppCall(layout=layout, inputs=list(inputs), python_kernel_name=name))


# ------------------------------------------------------------------------------------------------ CPU kernels
def cpu_has_vnni() -> bool:
    """Whether this machine has AVX-512 with the 8-bit dot product."""
    return bool(torch.cpu._is_vnni_supported())


def framed(source: str) -> str:
    """Kernel text as the generated wrapper hands it to the code cache: equal text finds the same built
    file."""
    return f"\n{source}\n"


def load_cpp_kernel(argtypes: Sequence[str], source: str, flags: Sequence[str] = ()) -> Callable[..., None]:
    """Build (or find on disk) C++ text whose `extern "C" void kernel(...)` is called with tensors and
    integers."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    loaded = CppPythonBindingsCodeCache.load_pybinding(list(argtypes), source, extra_flags=tuple(flags))
    return cast("Callable[..., None]", loaded)


def uncompiled(model: Any) -> Any:
    """The user's own callable behind `torch.compile`, or the thing itself."""
    return getattr(model, "_orig_mod", getattr(model, "_torchdynamo_orig_callable", model))


# --------------------------------------------------------------------------- functional graphs, for outlining
def size_expression(size: object) -> Any:
    """What a symbolic size, float or boolean stands for: a sympy expression. A plain number is returned as it
    is."""
    return size.node.expr if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) else size


def size_symbols(value: object) -> frozenset[Any]:
    """The size symbols that a value mentions: a size, a tensor's sizes, strides and offset, or a tuple of
    such."""
    if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return frozenset(value.node.expr.free_symbols)
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        parts = (*value.shape, *value.stride(), value.storage_offset())
        return frozenset[Any]().union(*(size_symbols(s) for s in parts if not isinstance(s, int)))
    if isinstance(value, tuple | list):
        return frozenset[Any]().union(*(size_symbols(v) for v in value))
    return frozenset()


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


def trim_memory() -> None:
    """Return freed heap pages to the system where the C library can (glibc)."""
    import ctypes

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return


def skip_module_guards(guards: Sequence[Any]) -> list[bool]:
    """A guard filter that keeps checks on inputs and drops those on modules, as `torch.compiler` offers
    it."""
    return list(torch.compiler.skip_guard_on_all_nn_modules_unsafe(guards))


def stride_hints(value: object) -> tuple[int, ...] | None:
    """A tensor's strides as integers (the example values behind symbols), or None for what is no strided
    tensor."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return None
    found = [size_hint(s) for s in value.stride()]
    return None if None in found else cast("tuple[int, ...]", tuple(found))


def unlimited_recompiles() -> AbstractContextManager[object]:
    """No limit on how often Dynamo may compile one piece of code."""
    from torch._dynamo import config

    many = 1 << 30
    return cast("AbstractContextManager[object]", config.patch(recompile_limit=many, accumulated_recompile_limit=many))


@functools.cache
def warm_cpp() -> None:
    """Start in the background what Inductor does when it meets the process's first CPU kernel.

    It tries which vector instructions the compiler can build for and precompiles a header: seconds of waiting
    for the C++ compiler (with an empty cache) that fit into the time the graph is still being traced. Nothing
    depends on it: an error is raised again, in the foreground, by the first real kernel.
    """
    from torch._inductor.codecache import CppPythonBindingsCodeCache

    def build() -> None:
        with suppress(Exception):
            CppPythonBindingsCodeCache.load_pybinding(["float*"], 'extern "C" void kernel(float* x) { x[0] = 0; }')

    threading.Thread(target=build, name="qcompile-warm-cpp", daemon=True).start()
