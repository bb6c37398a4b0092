"""What an einsum says: its operands and their letters, in every way that torch lets users write it.

"..." stands for dimensions that operands share from the right; the result may be left out; operands and numbers may be
given in place of an equation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from string import ascii_letters
from typing import Any

from torch import fx

from qcompile.passes.match import hint, shape_of


def einsum_terms(node: fx.Node) -> tuple[list[Any], list[str]] | None:
    """The operands of an einsum, and their letters with those of the result; `None` where they do not say it."""
    equation, *operands = node.args
    if not isinstance(equation, str):  # einsum(x, [0, 1], w, [1, 2], [0, 2])
        equation, operands = _equation(list(node.args))
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    inputs, arrow, out = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    shapes = [shape_of(operand) for operand in operands]
    if not arrow:  # what stands there once, in the order of the alphabet
        out = "..." * ("..." in inputs) + "".join(sorted(c for c in set(inputs) - set(",.") if inputs.count(c) == 1))
    if len(terms) != len(shapes) or None in shapes:
        return None
    spelled = _without_dots([*terms, out], [len(shape or ()) for shape in shapes])
    known = all(len(term) == len(shape or ()) for term, shape in zip(spelled, shapes, strict=False))
    return (operands, spelled) if known else None


def _equation(arguments: list[Any]) -> tuple[str, list[Any]]:
    """An einsum given as operands and lists of numbers, as an equation."""

    def spelled(numbers: Sequence[Any]) -> str:
        return "".join("..." if number is Ellipsis else ascii_letters[number] for number in numbers)

    out = f"->{spelled(arguments.pop())}" if len(arguments) % 2 else ""
    return ",".join(map(spelled, arguments[1::2])) + out, arguments[::2]


def _without_dots(terms: list[str], dims: Sequence[int]) -> list[str]:
    """Terms with letters in the place of "...", which stands for the last ones of as many as the longest has."""
    free = "".join(c for c in ascii_letters if not any(c in term for term in terms))
    hidden = [size - len(term) + 3 if "..." in term else 0 for term, size in zip(terms, dims, strict=False)]
    most = max(hidden, default=0)
    letters = free[:most]
    shown = [term.replace("...", letters[most - count :]) for term, count in zip(terms, hidden, strict=False)]
    return [*shown, terms[-1].replace("...", letters)]


def einsum_flops(node: fx.Node) -> int:
    """Of the products of the first two operands, of that and the third, and so on."""
    found = einsum_terms(node)
    if found is None:
        return 0
    operands, (first, *terms, out) = found
    sizes = {
        c: hint(size) or 0
        for operand, term in zip(operands, (first, *terms), strict=True)
        for c, size in zip(term, shape_of(operand) or (), strict=True)
    }
    flops, held = 0, set(first)
    for index, term in enumerate(terms):
        held |= set(term)
        flops += 2 * math.prod(sizes[c] for c in held)
        held &= set(out).union(*terms[index + 1 :])
    return flops
