"""The low-bit matmul as data: one spelling shared by graph passes, the reference and every kernel.

`qmm` is the border between `passes` and `codegen`.  Its last argument is the canonical string of a `MatmulSpec`, so an
FX graph prints what it computes, caches key on it, and a kernel author needs nothing else.  The epilogue is a small
Python expression over the accumulator; this module parses it once into an `ast` tree that the reference evaluates with
torch and that kernel generators translate.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from qcompile.errors import QCError
from qcompile.ir.codec import choose_qparams, dequantize
from qcompile.ir.elements import round_element
from qcompile.ir.granularity import PerGroup, PerTensor, PerToken
from qcompile.ir.qparams import QParams, effective_scale
from qcompile.ir.scales import spread
from qcompile.ir.scheme import Scheme

EPILOGUE_FUNCTIONS: Mapping[str, Callable[..., torch.Tensor]] = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "abs": torch.abs,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}
BINARY_FUNCTIONS = ("maximum", "minimum")  # the others take one argument
EXTRA_KINDS = ("row", "mat")
OUT_DTYPES: Mapping[str, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in OUT_DTYPES.items()}
_OPERATORS: Mapping[type[ast.operator], Callable[..., torch.Tensor]] = {
    ast.Add: torch.add,
    ast.Sub: torch.sub,
    ast.Mult: torch.mul,
    ast.Div: torch.div,
}


@dataclass(frozen=True)
class MatmulSpec:
    """What one `qmm` computes, apart from tensors.

    Attributes:
        weight: scheme of every segment's weight, each logically `[n_i, k]`.
        n: output features of each segment (one segment per merged weight), so `sum(n)` columns before the epilogue.
        k: input features.
        act: scheme of the activation (`None`: used exactly).
        static: that its scale was chosen before, and comes as a last part, fp32 `[1]`, and its zero point as another, uint8
            `[1]`; for one scale of all values.
        epilogue: "" or an expression over `acc` (all columns), or over `a0, a1` (a *pair*: both segments have equal
            `n`, and the result has `n` columns), and `e0, e1, ...`.
        extras: kind of each extra operand: "row" is a vector over the columns, "mat" has the output's shape.
        out: name of the output dtype, "" for the dtype of x.
    """

    weight: Scheme
    n: tuple[int, ...]
    k: int
    act: Scheme | None = None
    epilogue: str = ""
    extras: tuple[str, ...] = ()
    out: str = ""
    static: bool = False

    def __post_init__(self) -> None:
        if self.static and (self.act is None or self.act.granularity != PerTensor()):
            raise QCError(
                "matmul.spec",
                f"an activation scheme {self.act} cannot be static",
                next="write act=int8/tensor:fp32 or act=uint8/tensor:fp32+z",
            )
        if bad := [kind for kind in self.extras if kind not in EXTRA_KINDS]:
            raise QCError(
                "matmul.spec",
                f"an extra cannot be {bad[0]!r}",
                why="its dtype is that of the tensor that a call gives, and not part of the spec",
                next="write e=row or e=mat, or e=row,mat for two",
            )
        if not self.n or min(self.n) < 1 or self.k < 1 or (self.out and self.out not in OUT_DTYPES):
            raise QCError(
                "matmul.spec",
                f"not a matmul: n={self.n} k={self.k} out={self.out!r}",
                next="sizes are positive, out is f32, bf16 or f16",
            )
        names = epilogue_names(self.epilogue)
        allowed = {"acc", *(f"a{i}" for i in range(len(self.n))), *(f"e{i}" for i in range(len(self.extras)))}
        if names - allowed:
            raise QCError(
                "matmul.epilogue",
                f"unknown name(s) {sorted(names - allowed)} in epilogue {self.epilogue!r}",
                next=f"use {sorted(allowed)}",
            )
        if self.paired and (len(set(self.n)) != 1 or "acc" in names):
            raise QCError("matmul.epilogue", f"pair epilogue {self.epilogue!r} needs segments of equal n, got {self.n}")

    @property
    def paired(self) -> bool:
        """Whether the epilogue combines segments column by column."""
        return any(name[0] == "a" and name != "acc" for name in epilogue_names(self.epilogue))

    @property
    def columns(self) -> int:
        """Columns of the result."""
        return self.n[0] if self.paired else sum(self.n)

    @property
    def parts_per_segment(self) -> int:
        """How many packed tensors describe one weight."""
        return 2 + (self.weight.scale.zero is not None) + self.weight.nested

    @property
    def act_parts(self) -> int:
        """How many of the last parts are of the activation."""
        return 1 + (self.act is not None and not self.act.symmetric) if self.static else 0

    def shapes(self, lead: Sequence[int]) -> list[tuple[int, ...]]:
        """Shapes of x and of each extra where x has the leading sizes `lead`."""
        kinds = {"row": (self.columns,), "mat": (*lead, self.columns)}
        return [(*lead, self.k), *(kinds[kind] for kind in self.extras)]

    def __str__(self) -> str:
        fields = [str(self.weight), "n=" + ",".join(map(str, self.n)), f"k={self.k}"]
        if self.act is not None:
            fields.append(f"act={self.act}" + " static" * self.static)
        if self.epilogue:
            fields.append("y=" + self.epilogue.replace(" ", ""))
        if self.extras:
            fields.append("e=" + ",".join(self.extras))
        if self.out:
            fields.append(f"out={self.out}")
        return " ".join(fields)

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> MatmulSpec:
        """Read the canonical string. Raises `QCError` ("matmul.spec") when it is none."""
        head, *rest = text.split()
        fields = dict(item.partition("=")[::2] for item in rest)
        unknown = set(fields) - {"n", "k", "act", "static", "y", "e", "out"}
        if unknown or "n" not in fields or "k" not in fields:
            raise QCError(
                "matmul.spec",
                f"cannot read matmul spec {text!r}",
                why=f"fields {sorted(fields)}",
                next="write for example 'int8/axis0 n=64 k=128 act=int8/token y=acc+e0 e=row'",
            )
        return MatmulSpec(
            weight=Scheme.parse(head),
            n=tuple(int(v) for v in fields["n"].split(",")),
            k=int(fields["k"]),
            act=Scheme.parse(fields["act"]) if "act" in fields else None,
            epilogue=fields.get("y", ""),
            extras=tuple(fields["e"].split(",")) if "e" in fields else (),
            out=fields.get("out", ""),
            static="static" in fields,
        )


@lru_cache(maxsize=4096)
def epilogue_tree(epilogue: str) -> ast.expr:
    """Parse and check an epilogue; every node is a name, a number, `+ - * /`, unary minus or a known function.

    Raises `QCError` ("matmul.epilogue") for anything else.
    """
    try:
        tree = ast.parse(epilogue or "acc", mode="eval").body
    except SyntaxError as error:
        raise QCError("matmul.epilogue", f"epilogue {epilogue!r} is not an expression", why=str(error)) from error
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in EPILOGUE_FUNCTIONS:
                if len(args) == 1 + (name in BINARY_FUNCTIONS):
                    continue
            case ast.Constant(value=int() | float()) | ast.Name() | ast.Load() | ast.USub():
                continue
            case ast.BinOp(op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div()) | ast.UnaryOp(op=ast.USub()):
                continue
            case ast.Add() | ast.Sub() | ast.Mult() | ast.Div():
                continue
        raise QCError(
            "matmul.epilogue",
            f"epilogue {epilogue!r} uses {ast.unparse(node) if isinstance(node, ast.expr) else type(node).__name__}",
            next=f"allowed: + - * /, numbers, names and {', '.join(EPILOGUE_FUNCTIONS)}; {' and '.join(BINARY_FUNCTIONS)} "
            "take two arguments, the others one",
        )
    return tree


@lru_cache(maxsize=4096)
def epilogue_names(epilogue: str) -> frozenset[str]:
    """Operands that an epilogue reads (`acc`, `a0`, `e0`, ...)."""
    functions = {id(n.func) for n in ast.walk(epilogue_tree(epilogue)) if isinstance(n, ast.Call)}
    return frozenset(
        n.id for n in ast.walk(epilogue_tree(epilogue)) if isinstance(n, ast.Name) and id(n) not in functions
    )


def evaluate_epilogue(epilogue: str, names: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate in fp32. `names` maps `acc` / `a0` / `e0`... to broadcastable fp32 tensors."""
    like = next(iter(names.values()))

    def value(node: ast.expr) -> torch.Tensor:
        match node:
            case ast.Name(id=name):
                return names[name]
            case ast.Constant(value=int() | float() as number):
                return like.new_full((), float(number))
            case ast.UnaryOp(operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return _OPERATORS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=args):
                return EPILOGUE_FUNCTIONS[name](*map(value, args))
        raise AssertionError(ast.dump(node))  # epilogue_tree admits nothing else

    return value(epilogue_tree(epilogue))


def quantize_rows(
    x: torch.Tensor, act: Scheme, static: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations in fp32, rounded to nearest even; see `quantize_values`, of which this is the number less the zero point.

    Returns:
        `(q, s)`: values of the format, less the zero point, held in fp32 `[..., k]`, and scales `[..., groups]`, one group per
        token, or `[1, ...]` for a tensor.
    """
    q, scale, zero = quantize_values(x, act, static)
    return (q if zero is None else q - zero), scale


def quantize_values(
    x: torch.Tensor, act: Scheme, static: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Activations in fp32, rounded to nearest even with `s = absmax / Q`, Q the format's largest value.

    Per token `q = round(x * (Q / absmax))`, the form that costs a kernel no division; otherwise, and with a zero point,
    `q = round(x / s) + z`, as the codec encodes everything else.

    Args:
        x: `[..., k]` fp32, finite.
        act: a scheme of integers or of floats, per token, in groups along k, or for all of x; integers without a sign have a
            zero point.
        static: scale `[1]`, and zero point `[1]`, that were chosen before, for a scheme of all of x.

    Returns:
        `(q, s, z)`: values of the format held in fp32 `[..., k]`; scales as `quantize_rows` has them; zero points, fp32, as
        they meet values, or None.
    """
    known = isinstance(act.granularity, PerToken | PerGroup | PerTensor) and act.format.kind in ("int", "float")
    with_zero = act.scale.zero == "z" and not act.format.signed and not isinstance(act.granularity, PerGroup)
    if not known or not (act.symmetric or with_zero) or act.rounding != "nearest":
        raise QCError(
            "matmul.act",
            f"activation scheme {act} is not supported",
            next="use int8/token, uint8/token:fp32+z (one scale per row), int8/g32:fp32 (one for each 32 values) or "
            "int8/tensor:fp32, to nearest",
        )
    top = act.format.max
    if static or not act.symmetric or not isinstance(act.granularity, PerToken):
        qparams = QParams(*(t.reshape([1] * x.dim()) for t in static)) if static else choose_qparams(x, act)
        scale = effective_scale(qparams, act, x.dim())
        zero = None if qparams.zero is None else qparams.zero.to(torch.float32)
        return round_element((x / over_values(scale, act, x.shape)).nan_to_num(0.0), act.format, zero), scale, zero
    absmax = x.abs().amax(-1, keepdim=True)
    # One rounding, as in the kernels: a Python number divided by a tensor is its reciprocal times the number.
    inverse = torch.where(absmax > 0, torch.full_like(absmax, top) / absmax, torch.zeros_like(absmax))
    # A row whose absmax is subnormal makes 127/absmax overflow; clamping keeps its codes in range.
    scaled = (x * inverse).nan_to_num(0.0).clamp(-top, top)
    return round_element(scaled, act.format), absmax / top, None


def over_values(scale: torch.Tensor, act: Scheme, shape: Sequence[int]) -> torch.Tensor:
    """The scales of `quantize_rows` as they meet values of a shape: `[..., k]` in groups, as they are otherwise."""
    return spread(scale, act.granularity.cell(len(shape)), shape) if isinstance(act.granularity, PerGroup) else scale


def check_operands(
    x: torch.Tensor, parts: Sequence[torch.Tensor], extras: Sequence[torch.Tensor], spec: MatmulSpec
) -> None:
    """Refuse operands of another number, or of types that a product would cut. Raises `QCError` ("matmul.operands")."""
    wanted = spec.parts_per_segment * len(spec.n) + spec.act_parts
    if len(parts) != wanted or len(extras) != len(spec.extras):
        raise QCError(
            "matmul.operands",
            f"qmm got {len(parts)} packed parts and {len(extras)} extras, and takes {wanted} and {len(spec.extras)}",
            where=str(spec),
            why=f"each of {len(spec.n)} weights has {spec.parts_per_segment} parts"
            + (f", a static activation {spec.act_parts}" if spec.act_parts else ""),
            next="give what quantize(...) returned, one weight after the other, and a tensor for each word of e=",
        )
    check_float("qmm", "x", x.dtype)
    for i, extra in enumerate(extras):
        check_float("qmm", f"extra {i}", extra.dtype)


def check_float(operator: str, what: str, dtype: torch.dtype) -> None:
    """Refuse a type that is no real float. Raises `QCError` ("matmul.operands")."""
    if not dtype.is_floating_point:
        raise QCError(
            "matmul.operands",
            f"{operator} has no {what} in {dtype}",
            why="decoded weights are real numbers with a fraction",
            next="use torch.float32, torch.float16 or torch.bfloat16",
        )


def check_static(parts: Sequence[torch.Tensor], spec: MatmulSpec) -> None:
    """Refuse parts that are no scale and zero point of a static activation. Raises `QCError` ("matmul.operands")."""
    for name, part, dtype in zip(("scale", "zero point"), parts, (torch.float32, torch.uint8), strict=False):
        if tuple(part.shape) != (1,) or part.dtype != dtype:
            raise QCError(
                "matmul.operands",
                f"a static activation's {name} of {part.dtype} {list(part.shape)}",
                why=f"{spec} wants {dtype} [1] as its last part, or the one before",
            )


def reference_qmm(
    x: torch.Tensor, parts: Sequence[torch.Tensor], extras: Sequence[torch.Tensor], spec: MatmulSpec
) -> torch.Tensor:
    """The meaning of `qmm`: decode, multiply in fp32, epilogue in fp32, one cast at the end.

    Args:
        x: `[..., k]` floating point.
        parts: the packed parts of each segment, one after the other.
        extras: "row" `[columns]` or "mat" `[..., columns]`.

    Returns:
        Contiguous `[..., spec.columns]` of dtype `spec.out` or x's.  A row of x holding NaN or Inf gives a NaN row and
        leaves the other rows alone.

    Raises:
        QCError: "matmul.operands" when operands are missing or have other shapes.
    """
    check_operands(x, parts, extras, spec)
    step, lead = spec.parts_per_segment, x.shape[:-1]
    shapes, wanted = [tuple(t.shape) for t in (x, *extras)], spec.shapes(lead)
    if shapes != wanted:
        raise QCError("matmul.operands", f"qmm got x and extras of {shapes}, and takes {wanted}", where=str(spec))
    check_static(parts[step * len(spec.n) :], spec)
    wide = x.to(torch.float32)
    finite = torch.isfinite(wide).all(-1, keepdim=True)
    wide = torch.where(finite, wide, torch.zeros_like(wide))
    scale = None
    if spec.act is not None:
        wide, scale = quantize_rows(wide, spec.act, parts[step * len(spec.n) :])
        if isinstance(spec.act.granularity, PerGroup):
            wide, scale = wide * over_values(scale, spec.act, wide.shape), None
    segments = []
    for i, n in enumerate(spec.n):
        weight = dequantize(list(parts[i * step : (i + 1) * step]), spec.weight, n, spec.k, torch.float32)
        product = wide @ weight.t()
        segments.append(product if scale is None else product * scale)
    names = {f"e{i}": extra.to(torch.float32) for i, extra in enumerate(extras)}
    if spec.paired:
        names = {f"a{i}": segment for i, segment in enumerate(segments)} | names
    else:
        names = {"acc": segments[0] if len(segments) == 1 else torch.cat(segments, -1)} | names
    # An epilogue may read nothing of x's shape ("e0", "1.0"), and its strides are those of what it reads.
    y = evaluate_epilogue(spec.epilogue, names).expand(*lead, spec.columns)
    y = torch.where(finite, y, torch.full_like(y, float("nan")))
    return y.to(OUT_DTYPES[spec.out] if spec.out else x.dtype).contiguous()
