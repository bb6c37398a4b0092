"""Epilogue expressions to vector code.

`qcompile.ir.matmul` owns the language (a checked Python expression); here its tree becomes one C++ expression over
16-lane vectors. The functions it names live in the fragment `mathfun.h`, one per entry of `FUNCTIONS`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

import numpy as np

from qcompile.ir.matmul import EPILOGUE_FUNCTIONS, epilogue_tree

FUNCTIONS: Mapping[str, str] = {name: f"v_{name}" for name in EPILOGUE_FUNCTIONS}
_OPERATORS: Mapping[type[ast.operator], str] = {
    ast.Add: "fadd",
    ast.Sub: "fsub",
    ast.Mult: "fmul",
    ast.Div: "fdiv",
}


def literal(value: float) -> str:
    """A C++ float literal with exactly the fp32 value nearest to `value`."""
    with np.errstate(over="ignore"):
        number = float(np.float32(value))
    if number != number or number in (float("inf"), float("-inf")):
        sign = "-" if number < 0 else ""
        return f"{sign}std::numeric_limits<float>::{'quiet_NaN' if number != number else 'infinity'}()"
    return f"{number.hex()}f"


def vector_expression(epilogue: str, names: Mapping[str, str]) -> str:
    """C++ text of type VF. `names` gives the C++ spelling of each operand (`acc`, `a0`, `e0`, ...)."""

    def text(node: ast.expr) -> str:
        match node:
            case ast.Name(id=name):
                return names[name]
            case ast.Constant(value=int() | float() as value):
                return f"fset({literal(value)})"
            case ast.UnaryOp(operand=operand):
                return f"fneg({text(operand)})"
            case ast.BinOp(left=left, op=op, right=right):
                return f"{_OPERATORS[type(op)]}({text(left)}, {text(right)})"
            case ast.Call(func=ast.Name(id=name), args=args):
                return f"{FUNCTIONS[name]}({', '.join(map(text, args))})"
        raise AssertionError(ast.dump(node))  # epilogue_tree admits nothing else

    return text(epilogue_tree(epilogue))
