"""A step's program in a device's language: one line for each operation, in order.

`qcompile.ir.step` owns the language and lists a program as single operations; a device says how it spells each of them. Nothing
is reordered, merged or contracted: each line rounds once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from qcompile.ir.step import Operation, StepSpec, Value

COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")


@dataclass(frozen=True)
class Spelling:
    """How a device writes a program.

    Attributes:
        functions: name of a function for each operation of `Operation.op` but comparisons; `where_lt(a, b, yes, no)` and so on
            for `where` of a comparison.
        number: of a float32 number.
        line: of a result and its expression.
        prefix: of names of tensors and hyper, so that they are no words of the device's language.
    """

    functions: Mapping[str, str]
    number: Callable[[float], str]
    line: Callable[[str, str], str]
    prefix: str = "x_"

    def value(self, value: Value, spec: StepSpec) -> str:
        """A number, a result or a name."""
        if isinstance(value, float):
            return self.number(value)
        names = {name for name, _ in spec.tensors} | set(spec.hyper)
        return self.prefix + value if value in names else value


def program_lines(spec: StepSpec, spelling: Spelling) -> Iterator[str]:
    """The program. Results are named as in `spec.operations`."""
    compared: dict[str, Operation] = {}
    for operation in spec.operations:
        if operation.op in COMPARISONS:
            compared[operation.result] = operation
            continue
        name, args = operation.op, operation.args
        if name == "where":
            test = compared[str(args[0])]
            name, args = f"where_{test.op}", (*test.args, *args[1:])
        written = ", ".join(spelling.value(arg, spec) for arg in args)
        yield spelling.line(operation.result, f"{spelling.functions[name]}({written})")
