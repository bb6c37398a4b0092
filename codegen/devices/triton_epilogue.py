"""Epilogue expressions to Triton text.

`qcompile.ir.matmul` owns the language (a checked Python expression); here its tree becomes one expression over fp32
blocks. Every function follows torch's: NaN goes through `relu`, `maximum` and `minimum`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

import numpy as np

from qcompile.ir.matmul import epilogue_tree

_ALL = "propagate_nan=tl.PropagateNan.ALL"
FUNCTIONS: Mapping[str, str] = {
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "tanh": "libdevice.tanh({0})",
    "erf": "libdevice.erf({0})",
    "sigmoid": "tl.sigmoid({0})",
    "relu": f"tl.maximum({{0}}, 0.0, {_ALL})",
    "silu": "({0}) * tl.sigmoid({0})",
    "abs": "tl.abs({0})",
    "sqrt": "tl.sqrt_rn({0})",
    "rsqrt": "(1.0 / tl.sqrt_rn({0}))",
    "maximum": f"tl.maximum({{0}}, {{1}}, {_ALL})",
    "minimum": f"tl.minimum({{0}}, {{1}}, {_ALL})",
}
_OPERATORS: Mapping[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


def literal(value: float) -> str:
    """A number as Triton reads it, rounded to fp32."""
    with np.errstate(over="ignore"):
        number = float(np.float32(value))
    return repr(number) if abs(number) < float("inf") else f'float("{number}")'


def block_expression(epilogue: str, names: Mapping[str, str]) -> str:
    """Triton text of an fp32 block. `names` gives the spelling of each operand (`acc`, `a0`, `e0`, ...)."""

    def text(node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                return names[name]
            case ast.Constant(value=int() | float() as value):
                return literal(value)
            case ast.UnaryOp(operand=operand):
                return f"(-{text(operand)})"
            case ast.BinOp(left=left, op=op, right=right):
                return f"({text(left)} {_OPERATORS[type(op)]} {text(right)})"
            case ast.Call(func=ast.Name(id=name), args=args):
                return FUNCTIONS[name].format(*map(text, args))
        raise AssertionError(ast.dump(node))  # epilogue_tree admits nothing else

    return text(epilogue_tree(epilogue))
