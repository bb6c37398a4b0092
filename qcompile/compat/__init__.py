"""The only package that names torch._dynamo, torch._inductor and triton privates.

Private names move between releases. With all of them here, a new torch release is answered in one place, and
the rest of qcompile is written against the small typed functions below. The names are imported inside the
functions: importing this package costs nothing, and a name that went away fails with the feature that needs it
and not with the package.

Callers say `compat.name()`: the modules inside are by subject and may change, the names are the interface.
"""

from qcompile.compat.abi import load_operator, processor
from qcompile.compat.cpp import (
    cpp_build,
    cpp_compiler,
    cpp_isa,
    cpu_has_bf16,
    cpu_has_vnni,
    framed,
    load_cpp_kernel,
    trim_memory,
    warm_cpp,
)
from qcompile.compat.dynamo import (
    add_placeholder,
    clone_graph,
    compile_example,
    eager_parts,
    fake_mode,
    graph_mode,
    placeholder_source,
    skip_module_guards,
    uncompiled,
    unlimited_recompiles,
    without_levels,
)
from qcompile.compat.flops import EagerFlops
from qcompile.compat.inductor import (
    Fingerprint,
    compile_fx,
    inductor_cache_dir,
    inductor_modes,
    inductor_options,
    inner_compile,
)
from qcompile.compat.jit import (
    architecture,
    capturing,
    gpu,
    mm_float32,
    stream,
    triton_kernel,
    triton_version,
    writes_triton,
)
from qcompile.compat.lowering import (
    contiguous,
    cpp_binding,
    cpp_wrapper_active,
    extern_kernel,
    fallback,
    inductor_lowerings,
    inlined,
    register_fallback,
    register_lowering,
    row_stride,
    rows_with_one_stride,
)
from qcompile.compat.outlining import (
    constant_bytes,
    direct_callable,
    is_fake,
    profiling,
    report_strides,
    segment_strides,
    why_whole,
)
from qcompile.compat.sizes import size_expression, size_hint, size_symbols, stride_hints

__all__ = [
    "EagerFlops",
    "Fingerprint",
    "add_placeholder",
    "architecture",
    "capturing",
    "clone_graph",
    "compile_example",
    "compile_fx",
    "constant_bytes",
    "contiguous",
    "cpp_binding",
    "cpp_build",
    "cpp_compiler",
    "cpp_isa",
    "cpp_wrapper_active",
    "cpu_has_bf16",
    "cpu_has_vnni",
    "direct_callable",
    "eager_parts",
    "extern_kernel",
    "fake_mode",
    "fallback",
    "framed",
    "gpu",
    "graph_mode",
    "inductor_cache_dir",
    "inductor_lowerings",
    "inductor_modes",
    "inductor_options",
    "inlined",
    "inner_compile",
    "is_fake",
    "load_cpp_kernel",
    "load_operator",
    "mm_float32",
    "placeholder_source",
    "processor",
    "profiling",
    "register_fallback",
    "register_lowering",
    "report_strides",
    "row_stride",
    "rows_with_one_stride",
    "segment_strides",
    "size_expression",
    "size_hint",
    "size_symbols",
    "skip_module_guards",
    "stream",
    "stride_hints",
    "trim_memory",
    "triton_kernel",
    "triton_version",
    "uncompiled",
    "unlimited_recompiles",
    "warm_cpp",
    "why_whole",
    "without_levels",
    "writes_triton",
]
