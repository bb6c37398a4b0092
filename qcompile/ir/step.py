"""An optimizer's step as data: what it computes for one element, in one line that prints and parses back.

The last argument of the operator `step_` is the canonical string of a `StepSpec`. The plain-torch meaning evaluates it, kernel
generators translate it, and caches key on it; a new optimizer is a new line of text. AdamW, a bf16 parameter rounded
stochastically, moments in 8 bits:

    p=bf16~ g=bf16 m=dyn8/g256 v=udyn8/g256 h=keep,w1,b2,w2,size,root,eps
    do=p=p*keep;m=m+w1*(g-m);v=v*b2+w2*g*g;p=p-size*m/(sqrt(v)/root+eps)

(one line, fields separated by a blank). `name=storage` are the tensors, in order (see `ir/state.py` for storages). `h=` names
numbers that a call brings: nothing that changes between steps stands in the text, so that a schedule compiles nothing. `do=` is
the program: assignments in order of execution, separated by `;`.

**What it means.** For each element of each parameter: the tensors that the program reads become float32; the assignments
run; the tensors that it assigned to are written back as their storages say. A name stands for what was last assigned to it, in
float32 as computed, not as it will be stored; assigned names that are no tensors are local. Every operation is float32 and
rounds by itself, to nearest even: no contraction to FMA, division and square root correctly rounded, subnormals kept.
Expressions have

    + - * /   -x   sqrt(x) abs(x) sign(x) maximum(x,y) minimum(x,y)   where(x<y,a,b), also with <= > >= == !=

numbers that are float32 numbers, names and parentheses, as in Python; `a-b-c` and `a*b/c` go from left to right.
maximum(x,y) is x where x > y or x is NaN, else y (so NaN when either is, and y of two zeros); minimum the same with <. sign(x)
is 1, -1, or x itself where x is 0 or NaN. Comparisons with NaN are false, but != is true.

**Random bits** of the stochastic tensor (there may be one) are those of `ir/rounding.py` for the element's global index, with
`stream = (step, id of the parameter)`, `key = seed`: they depend on nothing else.

`StepSpec.operations` lists the program as single operations; `state` and `inputs` name the tensors in the order of operands.
"""

from __future__ import annotations

import ast
import math
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

from qcompile.errors import QCError
from qcompile.ir.packing import Part
from qcompile.ir.state import Storage

FUNCTIONS: Mapping[str, int] = {"sqrt": 1, "abs": 1, "sign": 1, "maximum": 2, "minimum": 2, "where": 3}
_BINARY: Mapping[type[ast.operator], str] = {ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div"}
_COMPARISONS: Mapping[type[ast.cmpop], str] = {
    ast.Lt: "lt",
    ast.LtE: "le",
    ast.Gt: "gt",
    ast.GtE: "ge",
    ast.Eq: "eq",
    ast.NotEq: "ne",
}
_RESERVED = {"h", "do", *FUNCTIONS}

Value = str | float


class Operation(NamedTuple):
    """One rounding: `result = op(*args)`.

    Attributes:
        result: `t0`, `t1`, ...: each is assigned once.
        op: `add sub mul div neg sqrt abs sign maximum minimum`; a comparison `lt le gt ge eq ne`, whose result is true or
            false, for `where` alone; `where` of a comparison's result and two values.
        args: results of operations above, names of tensors (their value before the step) and of `hyper`, and numbers.
    """

    result: str
    op: str
    args: tuple[Value, ...]


@dataclass(frozen=True)
class Operand:
    """A tensor of the program: its name, its storage and what the program does with it."""

    name: str
    storage: Storage
    read: bool
    written: bool

    def parts(self, n: int) -> tuple[Part, ...]:
        """The flat tensors that hold it for a parameter of `n` elements."""
        return self.storage.parts(n)


@dataclass(frozen=True)
class StepSpec:
    """What one optimizer step computes; see the module.

    Attributes:
        tensors: (name, storage) in the order of operands; one is plain at least, and one stochastic at most.
        hyper: names of the numbers of a call.
        program: assignments separated by `;`. It is kept in canonical form.

    Raises:
        QCError: "step.spec" for what is no step, "step.program" for a program that cannot be read, "step.storage".
    """

    tensors: tuple[tuple[str, Storage], ...]
    hyper: tuple[str, ...]
    program: str

    def __post_init__(self) -> None:
        names = [name for name, _ in self.tensors] + list(self.hyper)
        if bad := [name for name in names if not _is_name(name)]:
            raise _spec_error(f"{bad[0]!r} is no name", _NAMES)
        if len(set(names)) != len(names):
            raise _spec_error(
                f"a name stands twice in {' '.join(names)}", "tensors and numbers have names of their own"
            )
        if not any(storage.plain for _, storage in self.tensors):
            raise _spec_error("no tensor is plain", "a parameter's size is that of its first plain tensor")
        if sum(storage.stochastic for _, storage in self.tensors) > 1:
            raise _spec_error("two tensors are rounded stochastically", "they would have the same random bits")
        text = ";".join(f"{name}={_text(tree)}" for name, tree in _assignments(self.program))
        object.__setattr__(self, "program", text)
        tensors = dict(self.tensors)
        read = {arg for operation in self.operations for arg in operation.args} | set(self.results.values())
        if not self.results:
            raise _spec_error("nothing is written", "a program assigns to one tensor at least")
        if unused := [name for name in tensors if name not in read and name not in self.results]:
            raise _spec_error(
                f"{unused[0]!r} is neither read nor written", "a tensor that nobody needs costs its bytes"
            )
        if useless := [name for name, s in self.tensors if s.stochastic and name not in self.results]:
            raise _spec_error(f"{useless[0]!r} is stochastic and never written", "only what is written is rounded")

    @cached_property
    def _flow(self) -> tuple[tuple[Operation, ...], dict[str, Value]]:
        """The operations, and the last value of each tensor that was assigned to."""
        tensors = [name for name, _ in self.tensors]
        values: dict[str, Value] = {name: name for name in (*tensors, *self.hyper)}
        found: list[Operation] = []
        known: dict[tuple[str, tuple[Value, ...]], str] = {}

        def add(op: str, *args: Value) -> str:
            # An expression of the same values is computed once.
            if (op, args) not in known:
                known[op, args] = f"t{len(found)}"
                found.append(Operation(known[op, args], op, args))
            return known[op, args]

        def value(node: ast.expr) -> Value:
            match node:
                case ast.Name(id=name) if name in values:
                    return values[name]
                case ast.Name(id=name):
                    raise _program_error(f"{name!r} is unknown", f"known here: {' '.join(values)}")
                case ast.Constant(value=int() | float() as number):
                    return float(number)
                case ast.UnaryOp(operand=ast.Constant(value=int() | float() as number)):
                    return -float(number)
                case ast.UnaryOp(operand=operand):
                    return add("neg", value(operand))
                case ast.BinOp(left=left, op=op, right=right):
                    return add(_BINARY[type(op)], value(left), value(right))
                case ast.Compare(left=left, ops=[comparison], comparators=[right]):
                    return add(_COMPARISONS[type(comparison)], value(left), value(right))
                case ast.Call(func=ast.Name(id=name), args=args):
                    return add(name, *map(value, args))
            raise AssertionError(ast.dump(node))  # _allowed admits nothing else

        for name, tree in _assignments(self.program):
            if name in self.hyper:
                raise _program_error(f"{name!r} is assigned to", "the numbers of a call stay as they are")
            values[name] = value(tree)
        assigned = {name for name, _ in _assignments(self.program)}
        return tuple(found), {name: values[name] for name in tensors if name in assigned}

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The program in an order in which it can run; no expression is computed twice."""
        return self._flow[0]

    @property
    def results(self) -> Mapping[str, Value]:
        """For each tensor that is written the value that is stored: a result, a tensor's old value, a number."""
        return self._flow[1]

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """All tensors, in order."""
        used = {arg for operation in self.operations for arg in operation.args} | set(self.results.values())
        return tuple(Operand(name, storage, name in used, name in self.results) for name, storage in self.tensors)

    @property
    def state(self) -> tuple[Operand, ...]:
        """The tensors that are written: operands of `step_`'s first list, for each parameter, part by part."""
        return tuple(operand for operand in self.operands if operand.written)

    @property
    def inputs(self) -> tuple[Operand, ...]:
        """The tensors that are only read: operands of `step_`'s second list."""
        return tuple(operand for operand in self.operands if not operand.written)

    @property
    def stochastic(self) -> bool:
        """Whether a call needs random bits."""
        return any(storage.stochastic for _, storage in self.tensors)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Sizes of blocks, ascending; each is a power of two, so the last one is a multiple of all."""
        return tuple(sorted({storage.block for _, storage in self.tensors if storage.block}))

    def __str__(self) -> str:
        fields = [f"{name}={storage}" for name, storage in self.tensors]
        return " ".join([*fields, *(["h=" + ",".join(self.hyper)] if self.hyper else []), "do=" + self.program])

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> StepSpec:
        """Read the canonical string. Raises `QCError` ("step.spec", "step.program", "step.storage")."""
        *fields, last = [item.partition("=")[::2] for item in text.split()] or [("", "")]
        if last[0] != "do":
            raise _spec_error(f"cannot read {text!r}", "the program stands last, after do=, and has no blanks")
        hyper = fields.pop()[1] if fields and fields[-1][0] == "h" else ""
        return StepSpec(
            tuple((name, Storage.parse(storage)) for name, storage in fields),
            tuple(hyper.split(",")) if hyper else (),
            last[1],
        )


@lru_cache(maxsize=4096)
def _assignments(program: str) -> tuple[tuple[str, ast.expr], ...]:
    """The assignments of a program, checked for everything but the names in expressions."""
    return tuple(_read(program))


def _read(program: str) -> Iterator[tuple[str, ast.expr]]:
    try:
        statements = ast.parse(program).body
    except SyntaxError as error:
        raise _program_error(f"cannot read {program!r}", str(error)) from error
    for statement in statements:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=tree):
                if not _is_name(name):
                    raise _program_error(f"{name!r} is no name", _NAMES)
                if not _allowed(tree):
                    raise _program_error(
                        f"{ast.unparse(tree)!r} cannot be computed",
                        "there are float32 numbers, names, + - * /, -x, sqrt abs sign maximum minimum and where(x<y,a,b); "
                        "a number that is none of float32 comes with a call, in h=",
                    )
                yield name, tree
            case _:
                raise _program_error(f"{ast.unparse(statement)!r} is no assignment", "write name=expression")


def _is_name(name: str) -> bool:
    return bool(re.fullmatch(r"(?!t\d+$)[a-z][a-z0-9]*", name)) and name not in _RESERVED


_NAMES = "a name is a small letter, then small letters and digits; t0, t1, ..., h, do and functions are taken"


def _allowed(node: ast.expr) -> bool:
    match node:
        case ast.Name():
            return True
        case ast.Constant(value=int() | float() as number):
            return not isinstance(number, bool) and _is_float32(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _allowed(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _allowed(left) and _allowed(right)
        case ast.Call(func=ast.Name(id="where"), args=[ast.Compare() as test, yes, no], keywords=[]):
            known = [type(op) in _COMPARISONS for op in test.ops]
            return known == [True] and all(map(_allowed, (test.left, *test.comparators, yes, no)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return name != "where" and len(args) == FUNCTIONS.get(name) and all(map(_allowed, args))
    return False


def _text(tree: ast.expr) -> str:
    """The one spelling of an expression: what Python prints, without blanks; whole numbers without a fraction."""

    class Whole(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            number = float(node.value)  # type: ignore[arg-type]  # _allowed admits numbers alone
            return ast.Constant(int(number) if number.is_integer() and number < 1 << 24 else number)

    copy = Whole().visit(ast.parse(ast.unparse(tree), mode="eval").body)
    return ast.unparse(copy).replace(" ", "")


def _is_float32(number: float) -> bool:
    try:
        return math.isfinite(number) and bool(struct.unpack("f", struct.pack("f", number))[0] == number)
    except OverflowError:
        return False


def _spec_error(what: str, why: str) -> QCError:
    return QCError("step.spec", f"No step: {what}", why=why, next="write for example p=f32 g=f32 h=lr do=p=p-lr*g")


def _program_error(what: str, why: str) -> QCError:
    return QCError(
        "step.program", f"No program of a step: {what}", why=why, next="see qcompile/ir/step.py for the language"
    )
