"""A CPU kernel as an operator of torch: the kernel's text and, after it, a function for the dispatcher.

Compiled code calls kernels with raw addresses that Inductor has checked once, at compile time. Eager code calls with
tensors that nobody has looked at, so this function owns, checks and allocates. It speaks torch's stable C ABI, declared
by hand in `templates/cpu/operator.h`: building it takes as long as the kernel alone.
"""

from __future__ import annotations

from qcompile.codegen.devices.cpu_text import fragment
from qcompile.codegen.registry import Kernel
from qcompile.codegen.spec import LONG_K, KernelSpec

_FLOATS = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_SCALES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "e8m0": "uint8", "pow2": "int8"}


def _dtype(name: str) -> str:
    return f"&Torch::aoti_torch_dtype_{name}"


def _boxed(spec: KernelSpec, argtypes: tuple[str, ...]) -> str:
    """The boxed function: arguments from the stack, checks, the entry, the result onto the stack."""
    scale = _SCALES[spec.weight.scale.format.name]
    parts = ["uint8", scale]
    if spec.weight.scale.zero:
        parts.append("uint8" if spec.weight.scale.zero == "z" else scale)
    mats = [i for i, (kind, _) in enumerate(spec.extras) if kind == "mat"]
    data = ["call.x.data"]
    data += [f"call.parts[{i}].data" for i in range(spec.segments * len(parts))]
    data += [f"call.extras[{i}].data" for i in range(len(spec.extras))]
    data.append("y.data")
    numbers = ["call.m", "call.k", "call.ldx", *(f"(int64_t)call.n[{i}]" for i in range(spec.segments))]
    numbers += [f"call.distance[{i}]" for i in range(len(mats))] + ["call.columns"]
    arguments = ", ".join(f"({kind}){value}" for kind, value in zip(argtypes, [*data, *numbers], strict=True))
    kinds = ", ".join(f"{{{_dtype(_FLOATS[d])}, {str(k == 'mat').lower()}}}" for k, d in spec.extras)
    longest = "LONGEST" if spec.long_k else str(LONG_K)
    return (
        "namespace {\n"
        "void boxed(Slot* stack, uint64_t, uint64_t) {\n"
        "  List parts(stack[1]), extras(stack[2]), n(stack[3]);\n"
        "  Call call(stack, parts, extras, n);\n"
        f"  call.check({_dtype(_FLOATS[spec.x])}, {{{', '.join(map(_dtype, parts))}}}, {{{kinds}}}, {longest});\n"
        f"  Tensor y = call.result({_dtype(_FLOATS[spec.y])});\n"
        f"  kernel({arguments});\n"
        "  stack[0] = (Slot)y.handle;\n"
        "  y.handle = nullptr;\n"
        "}\n}  // namespace\n"
    )


def operator_head(name: str, arguments: str) -> str:
    """What a translation unit needs to register a function `boxed`: `name` begins the text of its errors."""
    constants = f'constexpr char OPERATION[] = "{name}", ARGUMENTS[] = "{arguments}";'
    return f"namespace {{\n{constants}\n}}  // namespace\n" + fragment("templates", "operator")


def operator_text(kernel: Kernel) -> str:
    """The translation unit that `compat.abi.load_operator` builds: the kernel and its registration."""
    head = operator_head("qmm", "(Tensor x, Tensor[] parts, Tensor[] extras, int[] n, int k) -> Tensor")
    return kernel.source + head + fragment("templates", "operator_qmm") + _boxed(kernel.spec, kernel.argtypes)
