"""What a pass does, as text: the part of a cache key that sees a user's code change.

A compiled graph on disk is only as good as the key it was stored under. This package's own sources are hashed as a
whole; a pass from elsewhere is described here by its methods, its attributes and, recursively, everything they name:
functions, classes, modules, constants, tensors. Text is equal in every process exactly when the meaning is, as far as
Python lets one see. Objects that can only be told by their address are never found equal, which is the safe side.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType

import torch

Seen = dict[int, object]
# Packages whose code is known by version or hashed elsewhere.
_KNOWN = ("torch", "qcompile")
_MADE_IN_PYTHON = 1 << 9  # the heap-type flag: classes without it are the interpreter's own
# What Python puts into every class, and what differs between processes without meaning anything.
_PLAIN = frozenset(
    "__module__ __doc__ __dict__ __weakref__ __firstlineno__ __static_attributes__ __annotations__ "
    "__abstractmethods__ _abc_impl".split()
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
    if isinstance(value, tuple | list):
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
    if type(value).__repr__ is object.__repr__ and hasattr(value, "__dict__") and not _known(type(value).__module__):
        return f"{describe(type(value), seen)} {describe(vars(value), seen)}"
    return repr(value)


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
