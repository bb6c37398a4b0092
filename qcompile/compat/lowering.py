"""Inductor's lowerings and IR: how one of our operators becomes a call of a kernel whose text is ours.

These names are the least stable of all: they are Inductor's inside, and nothing there is meant for others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from qcompile.compat.cpp import framed


def inductor_lowerings() -> Mapping[object, object]:
    """Operators that Inductor knows how to lower."""
    from torch._inductor.lowering import lowerings

    return cast("Mapping[object, object]", lowerings)


def register_lowering(op: object, lower: Callable[..., object]) -> None:
    """Tell Inductor how to lower one operator."""
    from torch._inductor.lowering import register_lowering as register

    register(op, type_promotion_kind=None)(lower)


def register_fallback(op: object, contiguous: bool = False) -> None:
    """Tell Inductor to call the operator itself, without a warning.

    Args:
        contiguous: whether operands have to be; else Inductor, which chooses the strides of what it computes, may give a
            contiguous clone the strides of what it is a clone of.
    """
    from torch._inductor.lowering import make_fallback, require_contiguous

    make_fallback(op, layout_constraint=require_contiguous if contiguous else None, warn=False)


def fallback(op: object) -> Callable[..., object]:
    """A lowering that calls the operator at run time."""
    from torch._inductor.lowering import fallback_handler

    return cast("Callable[..., object]", fallback_handler(op, add_to_fallback_set=False))


def cpp_wrapper_active() -> bool:
    """Whether Inductor is writing a C++ wrapper instead of a Python one."""
    from torch._inductor.virtualized import V

    return bool(V.graph.cpp_wrapper)


def inlined(function: Callable[..., Sequence[torch.Tensor]], *values: Any) -> Sequence[Any]:
    """What a functional torch function makes of IR values, as IR: Inductor fuses it with what is around.

    Args:
        function: traced with fake tensors, once per use.
    """
    from torch._inductor import ir
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.lowering import process_subgraph_nodes
    from torch._inductor.virtualized import V
    from torch.fx.experimental.proxy_tensor import make_fx

    with V.fake_mode:
        graph = make_fx(function, decomposition_table=select_decomp_table())(*map(ir.ir_node_to_tensor, values))
    graph.graph.eliminate_dead_code()
    return cast("Sequence[Any]", process_subgraph_nodes(graph, list(values)))


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


def cpp_binding(argtypes: Sequence[str], source: str) -> str:
    """The expression that builds `extern "C" void kernel(...)` with Inductor's C++ builder: once per distinct text, in
    parallel with Inductor's own kernels."""
    return f"async_compile.cpp_pybinding({list(argtypes)!r}, r'''{framed(source)}''')\n"


def extern_kernel(
    *,
    name: str,
    make: str,
    inputs: Sequence[Any],
    scalars: Callable[[], Sequence[Any]],
    size: Sequence[Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """An IR node that calls `(make)(inputs..., output, scalars...)` from the generated wrapper.

    Args:
        make: a Python expression for the callable, evaluated once when the generated code is loaded.
    """
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    class Call(ir.ExternKernelOut):
        def codegen(self, wrapper: Any) -> None:
            kernel = wrapper.src_to_kernel.get(make)
            if kernel is None:
                kernel = wrapper.src_to_kernel[make] = f"{name}_{wrapper.next_kernel_suffix()}"
                wrapper.define_kernel(kernel, make, gpu=False)
            nodes: list[Any] = [*self.inputs, self]
            tensors = [item.codegen_reference() for item in nodes]
            numbers = [wrapper.codegen_python_sizevar(V.graph.sizevars.simplify(_expr(s))) for s in scalars()]
            wrapper.writeline(f"{kernel}({', '.join([*tensors, *numbers])})")

    def _expr(value: Any) -> Any:
        import sympy

        return sympy.sympify(value)

    stride = ir.FlexibleLayout.contiguous_strides(list(size))
    layout = ir.FixedLayout(device, dtype, list(size), stride)
    return ir.TensorBox.create(Call(layout=layout, inputs=list(inputs), python_kernel_name=name))
