"""What a pass does, as text: the part of a cache key that sees a user's code change.

A compiled graph on disk is only as good as the key it was stored under. This package's own sources are hashed as a
whole; a pass from elsewhere is described here by its methods, its attributes and, recursively, everything they name:
functions, classes, modules, constants, tensors. Text is equal in every process exactly when the meaning is, as far as
Python lets one see. An object is what its class and its attributes are, not what its `repr` shows of it: that may be
shortened. Objects that can only be told by their address are never found equal in two processes, which is the safe side.
"""

from __future__ import annotations

import enum
import hashlib
import os
import re
import sys
import uuid
from collections import deque
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch

Seen = dict[int, object]
# Packages whose code is known by version or hashed elsewhere.
_KNOWN = ("torch", "qcompile")
_OPERATORS = (torch._ops.OperatorBase, torch._ops.OpOverloadPacket)
_PROCESS = uuid.uuid4().hex
_MADE_IN_PYTHON = 1 << 9  # the heap-type flag: classes without it are the interpreter's own
# What Python puts into every class, and what differs between processes without meaning anything.
_PLAIN = frozenset(
    "__module__ __doc__ __dict__ __weakref__ __firstlineno__ __static_attributes__ __annotations__ "
    "__abstractmethods__ _abc_impl __dataclass_fields__ __dataclass_params__".split()
)


def describe(value: object, seen: Seen | None = None) -> str:
    """Text for a value and all that it names. `seen` holds what stands in the text already, by id, and so alive: an id
    must not come back for another object."""
    seen = {} if seen is None else seen
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        return repr(value)
    if isinstance(value, staticmethod | classmethod):
        return describe(value.__func__, seen)
    if isinstance(value, property):
        return describe((value.fget, value.fset), seen)
    if isinstance(value, CodeType):
        return f"{value.co_code!r} {value.co_names} {_all(value.co_consts, seen)}"
    if id(value) in seen:
        return "again"
    seen[id(value)] = value
    if isinstance(value, frozenset | set):
        return f"{{{sorted(describe(item, seen) for item in value)}}}"
    if isinstance(value, tuple | list | deque):
        return _all(value, seen)
    if isinstance(value, Mapping):
        return f"{{{_all(value.items(), seen)}}}"
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return f"tensor {value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    if isinstance(value, partial):
        return f"partial {_all((value.func, value.args, value.keywords), seen)}"
    if isinstance(value, MethodType):
        return f"method {_all((value.__func__, value.__self__), seen)}"
    if isinstance(value, ModuleType):
        return f"module {value.__name__}" if _known(value.__name__) else f"module {value.__name__} {_source(value)}"
    if isinstance(value, FunctionType):
        return _function(value, seen)
    if isinstance(value, type):
        return _class(value, seen)
    if isinstance(value, enum.Enum):
        return f"{type(value).__module__}.{type(value).__qualname__}.{value.name} {describe(value.value, seen)}"
    if isinstance(value, re.Pattern):
        return f"pattern {_all((value.pattern, value.flags), seen)}"
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        content = value.tolist() if value.dtype.hasobject else hashlib.sha256(value.tobytes()).hexdigest()
        return f"array {value.dtype!r} {value.shape} {describe(content, seen)}"
    return _object(value, seen, "numpy" if numpy is not None and isinstance(value, numpy.ufunc | numpy.generic) else "")


def _object(value: object, seen: Seen, package: str) -> str:
    """Any other object. Ours, torch's operators and constants, and those of the standard library and `package` are told
    by their text, where they have one: they hold locks, caches and the like."""
    kind = type(value)
    root = kind.__module__.partition(".")[0]
    complete = not hasattr(value, "__dict__") or isinstance(value, _OPERATORS) if root == "torch" else _known(root)
    trusted = complete or root in (*sys.stdlib_module_names, package)
    text = repr(value)
    if trusted and " at 0x" not in text and not isinstance(value, SimpleNamespace):
        return text
    state = _state(value)
    if state is None and kind is not object:
        return f"{text} {_PROCESS}"
    return f"{describe(kind, seen)} {describe(state, seen)}"


def _state(value: object) -> dict[str, object] | None:
    """An object's attributes, `None` when it is of C and hides them."""
    members = [item for cls in type(value).__mro__ for item in vars(cls).items()]
    slots = {name: slot.__get__(value) for name, slot in members if _filled(slot, value)}
    return slots | getattr(value, "__dict__", {}) if slots or hasattr(value, "__dict__") else None


def _filled(slot: object, value: object) -> bool:
    """Whether a member of a class is a slot, and the object has something in it."""
    try:
        return isinstance(slot, MemberDescriptorType) and slot.__get__(value) is not slot
    except AttributeError:
        return False


def _all(values: Iterable[object], seen: Seen) -> str:
    return f"[{', '.join(describe(item, seen) for item in values)}]"


def _function(value: FunctionType, seen: Seen) -> str:
    if _known(value.__module__ or ""):
        return f"{value.__module__}.{value.__qualname__}"
    names = _names(value.__code__)
    found = {name: value.__globals__[name] for name in names if name in value.__globals__}
    for module in [item for item in found.values() if isinstance(item, ModuleType) and not _known(item.__name__)]:
        found |= {f"{module.__name__}.{name}": vars(module)[name] for name in names if name in vars(module)}
    cells = [cell.cell_contents for cell in value.__closure__ or ()]
    parts = (value.__code__, value.__defaults__, value.__kwdefaults__, cells, sorted(found.items()))
    return _all(parts, seen)


def _class(value: type, seen: Seen) -> str:
    """A class with the members of it and of all its bases that are not torch's or ours."""
    parts = []
    for cls in value.__mro__:
        name = f"{cls.__module__}.{cls.__qualname__}"
        theirs = not _known(cls.__module__) and cls.__flags__ & _MADE_IN_PYTHON
        members = {k: v for k, v in vars(cls).items() if k not in _PLAIN} if theirs else {}
        parts.append(f"class {name} {describe(members, seen)}")
    return " ".join(parts)


def _known(module: str) -> bool:
    return module.partition(".")[0] in _KNOWN


def _names(code: CodeType) -> set[str]:
    inner = [_names(item) for item in code.co_consts if isinstance(item, CodeType)]
    return set(code.co_names).union(*inner)


def _source(module: ModuleType) -> str:
    """Hash of a module's file, "" for one without (an interactive session: its values are described one by one)."""
    file = getattr(module, "__file__", None)
    return _file_hash(file, os.stat(file).st_mtime_ns) if file and os.path.isfile(file) else ""


@lru_cache(maxsize=256)
def _file_hash(file: str, _changed: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
