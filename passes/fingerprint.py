"""What a pass does, as text: the part of a cache key that sees a user's code change.

A compiled graph on disk is only as good as the key it was stored under. This package's own sources are hashed as a
whole; a pass from elsewhere is described here by its class, its attributes and everything that these name: functions,
classes, modules, constants, tensors. The text is a table of objects that point to each other by number, so that two
names of one object are told from two equal objects, and nothing is told by an address.

The kinds of object that are read here are a closed list of exact types. Any other object, a subclass of `dict` too, is
what it says of itself when it is pickled, together with its class. What cannot say it (a lock, a generator, an open
file), or raises, makes the whole text one that is never found again: a cache is missed, and nothing breaks.
"""

from __future__ import annotations

import copyreg
import dis
import functools
import hashlib
import importlib.util
import os
import sys
import sysconfig
import types
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy
import torch

Parts = tuple[str, Iterable[object]]  # a line of the table: its text, and the objects that it points to
_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_OPERATORS = (torch._ops.OperatorBase, torch._ops.OpOverloadPacket)
# Packages that are told by name alone: their code is hashed elsewhere, or told by a version.
_KNOWN = {"qcompile": "ours", "torch": torch.__version__}
_STDLIB = (os.path.dirname(os.__file__) + os.sep, sysconfig.get_path("platstdlib") + os.sep)
_INSTALLED = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_MADE_IN_PYTHON = 1 << 9  # the heap-type flag: classes without it are an extension's or the interpreter's own
_MOST = 1 << 16  # an object may give out new ones for ever
# Members of a class that differ between processes, and mean nothing or are said elsewhere.
_PLAIN = frozenset(
    "__module__ __dict__ __weakref__ __firstlineno__ __static_attributes__ __annotations_cache__ _abc_impl "
    "_value2member_map_ __slotnames__".split()
)


def describe(value: object) -> str:
    """Text for a value and all that it names: equal in two processes only for equal meaning. A value that cannot be
    described gets another text at every call. Never raises."""
    try:
        return _table(value, (), [_MOST])
    except Exception:
        return f"never found: {uuid.uuid4().hex}"


def _table(value: object, outer: tuple[object, ...], left: list[int]) -> str:
    """The table of all objects that `value` reaches; those of `outer` are sets on the way to it, and not read again.

    Args:
        left: how many objects may be read yet, by all tables together: items of sets may hold sets, over and over.
    """
    objects: list[object] = []  # held, so that no address is used twice
    numbers = {id(item): f"outer {index}" for index, item in enumerate(outer)}

    def pointer(item: object) -> str:
        if type(item) in _ATOMS or (type(item) is tuple and all(type(part) in _ATOMS for part in item)):
            return repr(item)
        if id(item) not in numbers:
            numbers[id(item)] = f"#{len(objects)}"
            objects.append(item)
        return numbers[id(item)]

    lines = [pointer(value)]
    for item in objects:  # grows on the way
        left[0] -= 1
        if left[0] < 0:
            raise OverflowError
        text, parts = _set(item, outer, left) if isinstance(item, set | frozenset) else _parts(item)
        lines.append(f"{text} {' '.join(map(pointer, parts))}")
    return "\n".join(lines)


def _parts(value: Any) -> Parts:
    """One object, without what it points to."""
    read = _EXACT.get(type(value))
    if read is not None:
        return read(value)
    if isinstance(value, types.ModuleType):
        version = _version(value.__name__)
        return f"module {value.__name__!r} {version or _source(value)}", () if version else (type(value), vars(value))
    if isinstance(value, type):
        return _class(value)
    if isinstance(value, _OPERATORS):
        name = str(value)
        if " at 0x" in name:
            raise TypeError
        return f"operator {type(value).__qualname__} {name!r}", ()
    if is_dataclass(value) and type(value).__module__.partition(".")[0] == "qcompile":
        return "ours", (type(value), *(getattr(value, item.name) for item in fields(value)))  # no cached properties
    return _object(value)


def _set(value: set[object] | frozenset[object], outer: tuple[object, ...], left: list[int]) -> Parts:
    """A set in the order of its items' own tables: the set's own order depends on hashes."""
    items = sorted((_table(item, (*outer, value), left), index, item) for index, item in enumerate(value))
    kind: Any = type(value)
    extra = () if kind in (set, frozenset) else (kind, value.__getstate__())
    return f"{kind.__name__!r} {len(items)}", (*(item for *_, item in items), *extra)


def _object(value: Any) -> Parts:
    """An object as `pickle` would store it. Those of the interpreter that hide their state raise here."""
    kind = type(value)
    own = getattr(value, "__dict__", None)  # first: some make it when they are asked, and then store it
    reduce = copyreg.dispatch_table.get(kind)
    found = reduce(value) if reduce else value.__reduce_ex__(2)
    if isinstance(found, str):
        owner = getattr(value, "__self__", None)  # of an extension's function: its module
        module = str(getattr(value, "__module__", None) or getattr(owner, "__name__", kind.__module__))
        if not _leads_to(value, module, found):
            raise TypeError
        return f"global {module}.{found} {_origin(module)}", ()
    make, args, state, items, pairs, *more = (*found, None, None, None, None)[:7]
    content = (state, None if items is None else [*items], None if pairs is None else [*pairs], more)
    # Reductions that are not made for this class forget what a subclass adds.
    return "object", (kind, make, args, *content, None if _says_all(kind) else own)


def _says_all(kind: type) -> bool:
    """Whether a class is itself pickled by the methods that were written for it: a package's, or a user's own."""
    owner = next(cls for cls in kind.__mro__ if vars(cls).keys() & {"__reduce__", "__reduce_ex__", "__getstate__"})
    return _by_name(kind) or not _by_name(owner)


def _by_name(cls: type) -> bool:
    known = _version(cls.__module__) and _leads_to(cls, cls.__module__, cls.__qualname__)
    return bool(known) or not cls.__flags__ & _MADE_IN_PYTHON


def _function(value: types.FunctionType) -> Parts:
    space = value.__globals__
    module = str(space.get("__name__"))
    version = _version(module) if space is getattr(sys.modules.get(module), "__dict__", None) else ""
    name = f"function {module}.{value.__qualname__} {version}"
    if version and _leads_to(value, module, value.__qualname__):
        return name, ()
    notes = {key: item for key, item in vars(value).items() if key != "_torchdynamo_wrapper_id"}  # an address
    own = (value.__code__, value.__defaults__, value.__kwdefaults__, value.__closure__, notes)
    hints = getattr(value, "__annotate__", None) if sys.version_info >= (3, 14) else value.__annotations__
    names, values = ((), ()) if version else _names(value)
    return f"{name} {value.__module__!r} {value.__name__!r} {names}", (*own, hints, *values)


def _names(function: types.FunctionType) -> tuple[tuple[str, ...], tuple[object, ...]]:
    """What a function's code names: globals, and members of a user's modules that are globals or that it imports."""
    codes = [function.__code__]
    for code in codes:
        codes += [item for item in code.co_consts if isinstance(item, types.CodeType)]
    names = sorted({name for code in codes for name in code.co_names})
    modules = [*chain.from_iterable(_imports(code, function.__globals__) for code in codes)]
    found: dict[str, object] = {}

    def enter(name: str, item: object) -> None:
        found[name] = item
        if isinstance(item, types.ModuleType) and not _version(item.__name__):
            found[name] = f"module {item.__name__} {_source(item)}"
            modules.extend([item] if item not in modules else [])

    for name in names:
        if name in function.__globals__:
            enter(name, function.__globals__[name])
    for module in modules:
        found.setdefault(f"{module.__name__}:", _source(module))
        for name in names:
            if name in vars(module):
                enter(f"{module.__name__}:{name}", vars(module)[name])
    return tuple(found), tuple(found.values())


def _imports(code: types.CodeType, space: dict[str, Any]) -> Iterator[types.ModuleType]:
    """A user's modules that a function imports when it runs. Raises ImportError for one not imported yet: it can only
    be described by importing it."""
    steps = list(dis.get_instructions(code))
    for level, wanted, step in zip(steps, steps[1:], steps[2:], strict=False):
        if step.opname != "IMPORT_NAME":
            continue
        name = importlib.util.resolve_name("." * (level.argval or 0) + step.argval, space.get("__package__"))
        if name not in sys.modules and name.partition(".")[0] in sys.stdlib_module_names:
            importlib.import_module(name)
        if not _version(name):
            module = sys.modules.get(name)
            if module is None or any(not hasattr(module, item) for item in wanted.argval or ()):
                raise ImportError(name)
            yield module


def _class(value: type) -> Parts:
    """A package's class by name, another one by its members, its bases and its metaclass."""
    name = f"class {value.__module__}.{value.__qualname__}"
    if _by_name(value):
        return f"{name} {_origin(value.__module__)}", ()
    members = {key: item for key, item in vars(value).items() if key not in _PLAIN}
    return f"{name} {tuple(members)}", (type(value), value.__bases__, *members.values())


def _code(value: types.CodeType) -> Parts:
    names = "co_name co_names co_varnames co_freevars co_cellvars co_flags co_argcount co_posonlyargcount"
    names += " co_kwonlyargcount co_code co_exceptiontable"
    return "code", (*(getattr(value, name) for name in names.split()), value.co_consts)


def _tensor(value: torch.Tensor) -> Parts:
    if value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise TypeError
    plain = value.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format).view(-1)
    data = plain.view(torch.uint8).numpy().tobytes() if value.numel() else b""
    where = f"{value.device} {value.dtype} {tuple(value.shape)} {value.stride()}"
    return f"{type(value).__name__} {where} {hashlib.sha256(data).hexdigest()}", (vars(value),)


def _array(value: numpy.ndarray[Any, Any]) -> Parts:
    content = value.tolist() if value.dtype.hasobject else hashlib.sha256(value.tobytes()).digest()
    return f"array {value.shape} {value.strides}", (value.dtype, content)


def _cell(value: types.CellType) -> Parts:
    try:
        return "cell", (value.cell_contents,)
    except ValueError:
        return "empty cell", ()


_EXACT: dict[type, Callable[[Any], Parts]] = {
    tuple: lambda v: ("tuple", v),
    list: lambda v: ("list", v),
    dict: lambda v: ("dict", chain.from_iterable(v.items())),
    types.MappingProxyType: lambda v: ("proxy", (dict(v),)),
    types.FunctionType: _function,
    types.MethodType: lambda v: ("method", (v.__func__, v.__self__)),
    types.CodeType: _code,
    types.CellType: _cell,
    property: lambda v: ("property", (v.fget, v.fset, v.fdel)),
    staticmethod: lambda v: ("static", (v.__func__, vars(v))),
    classmethod: lambda v: ("class method", (v.__func__, vars(v))),
    functools.cached_property: lambda v: ("cached", (v.func, v.attrname)),  # holds a lock in Python 3.11
    functools._lru_cache_wrapper: lambda v: ("cache", (v.__wrapped__, v.cache_parameters())),
    type(os.environ): lambda v: ("environment", ()),  # equal however it is reached: `os` is told by name
    numpy.ndarray: _array,
    torch.Tensor: _tensor,
    torch.nn.Parameter: _tensor,
    torch.Size: lambda v: ("size", tuple(v)),
    **dict.fromkeys((torch.dtype, torch.device, torch.layout, torch.memory_format), lambda v: (repr(v), ())),
}


def _leads_to(value: object, module: str, name: str) -> bool:
    """Whether a module's name is this very object, not another one that says so."""
    try:
        return attrgetter(name)(sys.modules[module]) is value
    except (KeyError, AttributeError):
        return False


def _version(name: str) -> str:
    """Version of a module that is told by its name: of torch, the standard library or an installed package."""
    root = name.partition(".")[0]
    if root in _KNOWN:
        return _KNOWN[root]
    package, module = sys.modules.get(root), sys.modules.get(name)
    file = getattr(package, "__file__", None) or ""
    installed = any(folder in file for folder in _INSTALLED)
    if root in sys.stdlib_module_names:  # a user's file may have such a name too
        frozen = getattr(getattr(package, "__spec__", None), "origin", None) in ("built-in", "frozen")
        return sys.version if frozen or (file.startswith(_STDLIB) and not installed) else ""
    version = getattr(package, "__version__", None)
    return f"{version} {_files(root, file)}" if installed and module and isinstance(version, str) else ""


def _origin(name: str) -> str:
    """Version or source of a module, which must have one."""
    found = _version(name) or _source(sys.modules[name])
    if not found:
        raise TypeError
    return found


@functools.lru_cache(maxsize=1024)
def _files(root: str, file: str) -> str:
    """Hash of the sizes and times of an installed package's files: who works on one installs it under one version again."""
    places = sorted(Path(file).parent.rglob("*")) if os.path.basename(file).startswith("__init__.") else [Path(file)]
    stats = [(path, path.stat()) for path in places if path.suffix in (".py", ".so", ".pyd")]
    text = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()


def _source(module: types.ModuleType) -> str:
    """Hash of a module's file, "" for one without (an interactive session)."""
    file = getattr(module, "__file__", None)
    return _file_hash(file, os.stat(file).st_mtime_ns) if file and os.path.isfile(file) else ""


@functools.lru_cache(maxsize=1024)
def _file_hash(file: str, _changed: int) -> str:
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
