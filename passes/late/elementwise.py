"""What a functional graph computes element by element, as a program of a `StepSpec`.

Read backwards from the values that are stored: each node on the way has the parameter's shape and is one of the operations that
`ir/step.py` knows, or the region cannot be written down and says why. Tensors without dimensions are numbers, whatever computes
them. Lists (`_foreach_*`) are read entry by entry. `prims.fma` is a product and a sum: its own meaning in torch.
"""

from __future__ import annotations

import math
import operator
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.matmul import DTYPE_NAMES
from qcompile.passes.match import op_name, value_of

_TEXT: Mapping[str, str] = {
    "mul": "{0}*{1}",
    "div": "{0}/{1}",
    "true_divide": "{0}/{1}",
    "neg": "-{0}",
    "sqrt": "sqrt({0})",
    "rsqrt": "1/sqrt({0})",
    "reciprocal": "1/{0}",
    "square": "{0}*{0}",
    "abs": "abs({0})",
    "sign": "sign({0})",
    "sgn": "sign({0})",
    "relu": "maximum({0},0)",
    "maximum": "maximum({0},{1})",
    "minimum": "minimum({0},{1})",
    "clamp_min": "maximum({0},{1})",
    "clamp_max": "minimum({0},{1})",
    "fma": "{0}*{1}+{2}",
}
_FACTOR: Mapping[str, str] = {  # with a last argument alpha= or value=, which is 1 mostly
    "add": "{0}+{f}{1}",
    "sub": "{0}-{f}{1}",
    "rsub": "{1}-{f}{0}",
    "addcmul": "{0}+{f}({1}*{2})",
    "addcdiv": "{0}+{f}({1}/{2})",
}
_COMPARE: Mapping[str, str] = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_SAME = frozenset("clone alias convert_element_type _to_copy detach contiguous view reshape".split())
_CONSTANT = frozenset("full full_like zeros_like ones_like zeros ones".split())
_POWERS: Mapping[float, str] = {1.0: "{0}", 2.0: "{0}*{0}", 3.0: "{0}*{0}*{0}", 0.5: "sqrt({0})", -1.0: "1/{0}"}
_EXACT = (-1.0, 0.0, 0.5, 1.0, 2.0)  # said in the text; every other number comes with the call
MAX_OPERATIONS = 96


class Unreadable(Exception):
    """A value is none that a step can compute; the message says which."""


class Region:
    """The program behind some values of one shape.

    Args:
        like: the parameter's example value.

    Attributes:
        tensors: names by leaf, in the order in which they were met.
        numbers: names by leaf, a node without dimensions or a float.
        lines: assignments to local names.
    """

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.tensors: dict[fx.Node, str] = {}
        self.numbers: dict[fx.Node | float, str] = {}
        self.lines: list[str] = []
        self._known: dict[Any, str] = {}

    def leaf(self, node: fx.Node) -> str:
        """The name of a tensor that comes into the region."""
        value = value_of(node)
        if tuple(value.shape) != tuple(self.like.shape) or value.device != self.like.device:
            raise Unreadable(f"{node.name} has another shape or device")
        if value.dtype not in DTYPE_NAMES:
            raise Unreadable(f"{node.name} is {value.dtype}")
        return self.tensors.setdefault(node, f"a{len(self.tensors)}")

    def value(self, node: Any) -> str:
        """The name of a value, or its text when it is a simple number."""
        if isinstance(node, bool) or not isinstance(node, int | float | fx.Node):
            raise Unreadable(f"{node!r} is no number")
        if isinstance(node, int | float):
            return self._number(float(node))
        key = _entry(node)
        if key not in self._known:
            self._known[key] = self._read(node)
        return self._known[key]

    def _read(self, node: fx.Node) -> str:
        value = value_of(node)
        if not isinstance(value, Tensor):
            raise Unreadable(f"{node.name} is no tensor")
        if value.dim() == 0:
            return self.numbers.setdefault(node, f"h{len(self.numbers)}")
        if node.op == "placeholder":
            return self.leaf(node)
        if tuple(value.shape) != tuple(self.like.shape):
            raise Unreadable(f"{node.name} has another shape")
        name, args, kwargs = operation(node)
        if name in _CONSTANT:
            return self._number(float(args[1] if name.startswith("full") else name.startswith("ones")))
        if name in _SAME or name == "copy":
            source = args[name == "copy"]
            if isinstance(source, fx.Node) and source.op == "placeholder" and value.dtype == torch.float32:
                return self.leaf(source)
            self._float32(source)
            if value.dtype != torch.float32:
                raise Unreadable(f"{node.name} is rounded to {value.dtype} on the way")
            return self.value(source)
        self._float32(node)
        text = self._expression(name, args, kwargs, node)
        if len(self.lines) >= MAX_OPERATIONS:
            raise Unreadable("it has too many operations")
        self.lines.append(f"x{len(self.lines)}={text}")
        return self.lines[-1].partition("=")[0]

    def _float32(self, node: Any) -> None:
        dtype = getattr(value_of(node), "dtype", None)
        if dtype != torch.float32:
            raise Unreadable(f"{node} is {dtype}")

    def _expression(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], node: fx.Node) -> str:
        if name == "where" and len(args) == 3:
            return f"where({self._condition(args[0])},{self.value(args[1])},{self.value(args[2])})"
        if name == "pow" and len(args) == 2 and isinstance(args[1], int | float):
            text = _POWERS.get(float(args[1]))
            if text is not None:
                return text.format(self.value(args[0]))
        if name == "clamp":
            low, high = [*args[1:], None, None][:2]
            text = self.value(args[0])
            for bound, function in ((kwargs.get("min", low), "maximum"), (kwargs.get("max", high), "minimum")):
                text = text if bound is None else f"{function}({text},{self.value(bound)})"
            return text
        if name in _FACTOR:
            count = 3 if name.startswith("addc") else 2
            factor = kwargs.get("alpha", kwargs.get("value", args[count] if len(args) > count else 1))
            one = isinstance(factor, int | float) and factor == 1
            f = "" if one else f"{self.value(factor)}*"
            return _FACTOR[name].format(*map(self.value, args[:count]), f=f)
        text = _TEXT.get(name)
        if text is None or kwargs.get("rounding_mode") is not None:
            raise Unreadable(f"{name or node.op} is no operation of a step")
        return text.format(*map(self.value, args[: 1 + max(i for i in range(3) if f"{{{i}}}" in text)]))

    def _condition(self, node: Any) -> str:
        if not isinstance(node, fx.Node):
            raise Unreadable(f"a condition is {node!r}")
        if isinstance(value_of(node), Tensor) and value_of(node).dim() == 0:
            return f"{self.value(node)}!=0"
        name, args, _ = operation(node)
        if name == "isnan":
            return f"{self.value(args[0])}!={self.value(args[0])}"
        if name not in _COMPARE:
            raise Unreadable(f"a condition is {name or node.op}")
        for arg in args:
            if isinstance(arg, fx.Node) and value_of(arg).dim():
                self._float32(arg)
        return f"{self.value(args[0])}{_COMPARE[name]}{self.value(args[1])}"

    def _number(self, number: float) -> str:
        if not math.isfinite(number):
            raise Unreadable(f"{number} is a constant")
        number = struct.unpack("f", struct.pack("f", number))[0]
        if number in _EXACT:
            return f"({number:g})"
        return self.numbers.setdefault(number, f"h{len(self.numbers)}")


def operation(node: fx.Node) -> tuple[str, list[Any], dict[str, Any]]:
    """Name and arguments of what computes a node; of a list's entry, those of the entry."""
    source, index = _entry(node)
    name, pick = op_name(source), _picker(index)
    args, kwargs = [pick(arg) for arg in source.args], {key: pick(arg) for key, arg in source.kwargs.items()}
    return name.removeprefix("_foreach_"), args, kwargs


def _entry(node: fx.Node) -> tuple[fx.Node, int]:
    """The operation behind a node, and which of its results that is; -1 for the only one."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        if op_name(source).startswith("_foreach_") and isinstance(node.args[1], int):
            return source, node.args[1]
    return node, -1


def _picker(index: int) -> Callable[[Any], Any]:
    return lambda arg: arg[index] if index >= 0 and isinstance(arg, list | tuple) else arg


__all__ = ["Region", "Unreadable", "operation"]
