"""A kernel's source, read: machine code says what is loaded and where in the source that was; this says from which pointer.

What an operand costs can only be said when its loads are told from those of the others. A compiler keeps lines and
columns, no names; the names are found in the syntax tree.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable, Collection

from qcompile.testing.sass import Place


def pointers_of(file: str, first: int, source: str, pointers: Collection[str]) -> Callable[[Place | None], str]:
    """Tell which of a kernel's pointer arguments a place in its source loads from.

    Args:
        file, first, source: the kernel's file without folders, the line it starts in, and its text from there.
        pointers: the names of the arguments.

    Returns:
        A function for `count`. It finds the load (or the call of a helper) around the place, and names the arguments
        that its address is made of, through assignments: `"a"`, `"a, b"` when there are several, `""` for none.
    """
    indent = len(source) - len(source.lstrip(" "))
    tree = ast.parse(textwrap.dedent(source))
    made_of: dict[str, set[str]] = {name: {name} for name in pointers}

    def origins(*nodes: ast.AST) -> set[str]:
        found: set[str] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if isinstance(node, ast.Name):
                found |= made_of.get(node.id, set())
            if not _is_load(node):  # what was loaded is no address any more
                pending += ast.iter_child_nodes(node)
        return found

    assigned = [pair for node in ast.walk(tree) for pair in _assignments(node)]
    size = -1
    while size != (size := sum(map(len, made_of.values()))):
        for target, value in assigned:
            new = origins(value)
            for name in [at.id for at in ast.walk(target) if isinstance(at, ast.Name)]:
                made_of[name] = made_of.get(name, set()) | new
    spans = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and node.end_lineno is not None and node.end_col_offset is not None:
            address = [node.func, *node.args[:1]] if _is_load(node) else [*node.args, *(k.value for k in node.keywords)]
            start = (node.lineno + first - 1, node.col_offset + indent)
            end = (node.end_lineno + first - 1, node.end_col_offset + indent)
            if names := origins(*address):
                spans.append((start, end, ", ".join(sorted(names))))
    spans.reverse()  # inner calls come after outer ones in a walk

    def named(place: Place | None) -> str:
        if place is None or place[0] != file:
            return ""
        return next((names for start, end, names in spans if start <= place[1:] <= end), "")

    return named


def opening(source: str) -> str:
    """What a kernel's text says of it first: the first line of its docstring, or the comment that its body begins with."""
    function = next(
        (node for node in ast.parse(textwrap.dedent(source)).body if isinstance(node, ast.FunctionDef)), None
    )
    if function is None:
        return ""
    if said := ast.get_docstring(function):
        return said.splitlines()[0]
    lines = textwrap.dedent(source).splitlines()[: function.body[0].lineno - 1]
    comments = [line.strip() for line in lines if line.strip()]
    return comments[-1].removeprefix("#").strip() if comments and comments[-1].startswith("#") else ""


def _assignments(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """Targets and values; those of `a, b = c, d` one by one."""
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        return [(node.target, node.value)] if node.value else []
    pairs = [(target, node.value) for target in node.targets] if isinstance(node, ast.Assign) else []
    for target, value in list(pairs):
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            pairs.remove((target, value))
            pairs += zip(target.elts, value.elts, strict=True)
    return pairs


def _is_load(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "load"
