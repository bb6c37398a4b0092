"""Save and load converted models: one safetensors file of plain tensors, one JSON file of schemes.

`load` fills a model that was built without weights (for example under `torch.device("meta")`) tensor by
tensor from the memory-mapped file, so the float weights of the target never exist, all at once or one by one.
Compiled code trusts the sizes it was generated for, so whatever a file says is compared with the model and with its
scheme first, and nothing in the model changes before everything fits.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from qcompile.conversion import keeps_transposed, module_of
from qcompile.errors import QCError, warn
from qcompile.ir.codec import check_parts, part_names
from qcompile.ir.estimators import estimator_of
from qcompile.ir.fit import FITS
from qcompile.ir.granularity import PerTensor
from qcompile.ir.scheme import PACKINGS, Packing, Scheme
from qcompile.packed import FLOATS, PackedWeight, attach, packed_weights
from qcompile.rounded import RoundedInput, attach_input, detach_input, has_rounded_input, rounded_inputs
from qcompile.runtime.store import ordinary_tensors

VERSION = 1
TENSORS, MANIFEST = "model.safetensors", "qcompile.json"


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a converted model.

    Args:
        model: a model that `convert` went over (a float model works too, and is stored as float, with a `QCWarning`).
        path: a folder; made if missing. It receives `model.safetensors` and `qcompile.json`.

    Returns:
        The folder.

    Raises:
        QCError: "model.none" for a function, "save.path" when the path is a file or cannot be made or written.
    """
    model, folder = module_of(model), Path(path)
    if folder.exists() and not folder.is_dir():
        raise QCError("save.path", f"{folder} is a file", next="name a folder")
    packed = packed_weights(model)
    if not packed:
        warn(
            "no weight of this model is packed: it is saved in float. Call qcompile.convert(model, recipe) first; what "
            "torch.compile packs belongs to the compiled code, not to the model."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise QCError("save.path", f"{folder} cannot be made", why=str(error), next="name another folder") from error
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    stored: set[int] = set()
    codes = {f"{_prefix(path)}0": item for path, _, item in packed}
    for name, tensor in _state(model):
        memory = tensor.untyped_storage().data_ptr()
        key = (memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        dense = tensor.detach().contiguous()
        if name in codes:  # files are of no device
            dense = codes[name].laid_out(dense, _neutral(codes[name].packing))
        # The file format refuses tensors that share memory: another view of a stored tensor is stored as a copy.
        tensors[name] = dense.clone() if dense.untyped_storage().data_ptr() in stored else dense
        stored.add(memory)
    schemes = {
        module: {
            "scheme": str(replace(Scheme.parse(item.scheme), packing=_neutral(item.packing))),
            "act": item.act,
            "n": item.n,
            "k": item.k,
            "dtype": str(item.dtype).removeprefix("torch."),
            "transposed": item.transposed,
            "fit": item.fit,
        }
        for module, _, item in packed
    }
    manifest: dict[str, Any] = {"version": VERSION, "weights": schemes, "aliases": aliases}
    if inputs := rounded_inputs(model):
        manifest["inputs"] = {
            module: {"scheme": item.scheme, "estimator": item.estimator, "momentum": item.momentum}
            for module, _, item in inputs
        }
    # Replaced as whole files: a model that was loaded from this folder still reads the old one.
    try:
        with tempfile.TemporaryDirectory(dir=folder) as fresh:
            save_file(tensors, str(Path(fresh, TENSORS)), {"format": "pt"})
            Path(fresh, MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
            for file in (TENSORS, MANIFEST):
                os.replace(Path(fresh, file), folder / file)
    except (OSError, SafetensorError) as error:
        raise QCError("save.path", f"{folder} cannot be written", why=str(error), next="name another folder") from error
    return folder


@ordinary_tensors()
def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill a model of the same architecture from what `save` wrote, in place.

    Args:
        model: float, or on the meta device, in the dtypes of the saved one; its own weights are dropped unread. Static scales
            of inputs come with the file: it need not be prepared.
        path: the folder.

    Returns:
        The model, for chaining, on the device that it was on. It computes bit for bit what the saved one did there.

    Raises:
        QCError: "model.none", "load.path", "load.version", "load.manifest" (an entry is missing or impossible),
            "load.module" (a module of the file is missing in the model, or is none with such a weight), "load.missing"
            (a tensor of the model is missing in the file), "load.surplus" (the other way round), "load.shape",
            "load.dtype" (of a tensor, or of the weight that packed ones stand for), or "packing.shape"
            (packed tensors that do not fit their scheme). The model is as it was then.
    """
    target, folder = module_of(model), Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        file = safe_open(str(folder / TENSORS), framework="pt")
    except (OSError, ValueError, SafetensorError) as error:
        damaged = TENSORS if isinstance(error, SafetensorError) else MANIFEST if isinstance(error, ValueError) else ""
        raise QCError(
            "load.path",
            f"cannot read a saved model from {folder}",
            where=str(folder / damaged),
            why=str(error),
            next="the file is damaged: save or copy the model again" if damaged else "give the folder given to save",
        ) from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else manifest
        raise QCError(
            "load.version",
            f"{folder} has format version {version!r}, not {VERSION}",
            where=str(folder / MANIFEST),
            why=f"this version of qcompile reads format version {VERSION}",
            next="load it with the version of qcompile that saved it, or convert and save the model again",
        )
    with file as tensors:
        aliases, weights = (_entry(manifest, key, dict, str(folder / MANIFEST)) for key in ("aliases", "weights"))
        reader = _Reader(tensors, {name: _entry(aliases, name, str, "aliases") for name in aliases})
        packed = [_packed(target, name, entry, reader) for name, entry in weights.items()]
        inputs = _entry(manifest, "inputs", dict, str(folder / MANIFEST), {})
        rounded = [_rounded(target, name, entry, reader) for name, entry in inputs.items()]
        plain = _plain(target, packed, rounded, reader)
    for _, module, rounding in rounded:
        if has_rounded_input(module):
            detach_input(module)
        attach_input(module, rounding)
    for item in packed:
        attach(item.module, item.weight, item.parts)
    made: dict[int, nn.Parameter] = {}
    for name, (old, tensor) in plain.items():
        _assign(target, name, old, tensor, made)
    return model


def _neutral(packing: Packing) -> Packing:
    return packing if packing == "rows" else PACKINGS[0]


class _Reader:
    """Tensors by name, each read once, aliases resolved to the very same tensor."""

    def __init__(self, file: Any, aliases: dict[str, str]) -> None:
        self.file, self.aliases, self.names = file, aliases, set(file.keys())
        self.read: dict[str, torch.Tensor] = {}
        self.made: dict[tuple[object, ...], torch.Tensor] = {}
        self.asked: set[str] = set()

    @property
    def surplus(self) -> list[str]:
        """Names that nobody asked for."""
        return sorted((self.names | self.aliases.keys()) - self.asked)

    def placed(
        self,
        tensor: torch.Tensor,
        device: torch.device,
        layout: Packing | None = None,
        weight: PackedWeight | None = None,
    ) -> torch.Tensor:
        """A tensor of the file on a device, codes of a weight in a layout: one for one."""
        key = (id(tensor), device, layout)
        if key not in self.made:
            moved = tensor.to(device)
            self.made[key] = weight.laid_out(moved, layout) if weight is not None and layout is not None else moved
        return self.made[key]

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.names

    def __call__(self, name: str) -> torch.Tensor:
        self.asked.add(name)
        name = self.aliases.get(name, name)
        if name not in self.names:
            raise QCError("load.missing", f"the file has no tensor {name!r}", next="was it saved from another model?")
        if name not in self.read:
            self.read[name] = self.file.get_tensor(name)
        return self.read[name]


@dataclass(frozen=True)
class _Packed:
    """A packed weight of the file, found to fit its module."""

    path: str
    module: nn.Module
    weight: PackedWeight
    parts: tuple[torch.Tensor, ...]


_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*FLOATS, torch.float64)}
_NO_DEFAULT = object()


def _entry(table: dict[str, Any], key: str, kind: type, where: str, default: Any = _NO_DEFAULT) -> Any:
    value = table.get(key, default)
    if type(value) is not kind:
        found = "no" if value is _NO_DEFAULT else f"{value!r} as"
        raise QCError(
            "load.manifest", f"{found} {key!r}", where=where, why=f"it is of type {kind.__name__}", next="save it again"
        )
    return value


def _packed(model: nn.Module, path: str, entry: Any, reader: _Reader) -> _Packed:
    """Read one packed weight and compare it with its module and its scheme."""
    where = path or "the model itself"
    if type(entry) is not dict:
        raise QCError("load.manifest", f"{entry!r} instead of a weight's entry", where=where, next="save it again")
    module = _module(model, path)
    n, k = (_entry(entry, size, int, where) for size in "nk")
    transposed = _entry(entry, "transposed", bool, where)
    dtype, fit = _entry(entry, "dtype", str, where), _entry(entry, "fit", str, where, "minmax")
    act = _entry(entry, "act", str, where, "")
    for value, known in ((dtype, _DTYPES), (fit, FITS)):
        if value not in known:
            raise QCError("load.manifest", f"unknown {value!r}", where=where, next=f"one of: {', '.join(known)}")
    if isinstance(getattr(module, "parametrizations", None), nn.ModuleDict):
        raise QCError("load.module", f"module {path!r} is converted already", next="load into a float or meta model")
    old = module._parameters.get("weight")
    if old is None or keeps_transposed(module) != transposed:
        kind = "[k, n]" if transposed else "[n, k]"
        raise QCError(
            "load.module",
            f"a {type(module).__name__} has no weight {kind}",
            where=where,
            next="build the saved architecture",
        )
    _compare(f"{path}.weight" if path else "weight", (k, n) if transposed else (n, k), _DTYPES[dtype], old)
    try:
        scheme = Scheme.parse(_entry(entry, "scheme", str, where))
        parts = tuple(reader(f"{_prefix(path)}{index}") for index in range(len(part_names(scheme))))
        check_parts(parts, scheme, n, k)
    except QCError as error:
        raise error.at(where) from error
    name = f"{path}.weight" if path else "weight"
    weight = PackedWeight(str(scheme), n, k, _DTYPES[dtype], transposed, fit, name, act)
    device = _device(old)
    layout = weight.layout_on(device)
    placed = (reader.placed(parts[0], device, layout, weight), *(reader.placed(p, device) for p in parts[1:]))
    weight.scheme = str(replace(scheme, packing=layout))
    return _Packed(path, module, weight, placed)


def _module(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise QCError(
            "load.module", f"the model has no module {path!r}", next="build the saved architecture"
        ) from error


def _rounded(model: nn.Module, path: str, entry: Any, reader: _Reader) -> tuple[str, nn.Module, RoundedInput]:
    """A module and the static scale of its input, of the file's kind, whose numbers are still to be filled in."""
    where, module = path or "the model itself", _module(model, path)
    if type(entry) is not dict:
        raise QCError("load.manifest", f"{entry!r} instead of an input's entry", where=where, next="save it again")
    scheme, name = (_entry(entry, key, str, where) for key in ("scheme", "estimator"))
    try:
        if Scheme.parse(scheme).granularity != PerTensor():
            raise QCError("load.manifest", f"{scheme} is no scheme of one static scale", next="save it again")
        made = RoundedInput(scheme, _entry(entry, "momentum", float, where))
        made.estimator, learned = name, estimator_of(name).learned
    except QCError as error:
        raise error.at(where) from error
    for parameter in learned:
        dtype = reader(f"{path}.input_rounding.{parameter}".lstrip(".")).dtype  # that of the saved model
        made.register_parameter(parameter, nn.Parameter(torch.ones(1, dtype=dtype)))
    made.train(module.training)
    old = next(module.parameters(), torch.empty(0))
    return path, module, made.to(_device(old))


def _device(old: torch.Tensor) -> torch.device:
    """Where a tensor of the file goes: a model without data gets it on the CPU."""
    return torch.device("cpu") if old.is_meta else old.device


def _prefix(path: str) -> str:
    return f"{path}.parametrizations.weight.original" if path else "parametrizations.weight.original"


def _plain(
    model: nn.Module, packed: list[_Packed], rounded: list[tuple[str, nn.Module, RoundedInput]], reader: _Reader
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What stays as it is: (the model's tensor, the file's) by name. The file must hold these, the packed ones, and
    nothing else."""
    converted = {f"{item.path}.weight" if item.path else "weight" for item in packed}
    given = [(f"{path}.input_rounding.".lstrip("."), rounding) for path, _, rounding in rounded]
    theirs = tuple(prefix for prefix, _ in given)
    wanted = {name: old for name, old in _state(model) if name not in converted and not name.startswith(theirs)}
    wanted |= {f"{prefix}{name}": old for prefix, rounding in given for name, old in _state(rounding)}
    found = {name: (old, reader(name)) for name, old in wanted.items()}
    if surplus := reader.surplus:
        shown = ", ".join(surplus[:5]) + (", ..." if len(surplus) > 5 else "")
        raise QCError(
            "load.surplus",
            f"the model has no place for {len(surplus)} tensors of the file: {shown}",
            next="the saved model has learned scales: give them to this one by qcompile.prepare with the same recipe"
            if any(".parametrizations." in f".{name}" for name in surplus)
            else "build the saved architecture",
        )
    for name, (old, tensor) in found.items():
        _compare(name, tuple(tensor.shape), tensor.dtype, old)
    return found


def _compare(name: str, shape: tuple[int, ...], dtype: torch.dtype, old: torch.Tensor) -> None:
    """Refuse a tensor of the file, or the weight that packed ones stand for, that is not like the model's."""
    if tuple(old.shape) != shape:
        what = f"the file has shape {list(shape)}, the model {list(old.shape)}"
        raise QCError("load.shape", what, where=name, next="build the saved architecture")
    if old.dtype != dtype:
        raise QCError(
            "load.dtype",
            f"the file has {dtype}, the model {old.dtype}",
            where=name,
            why="the loaded model computes what the saved one did, in its dtypes",
            next=f"build the model in {dtype} (on the meta device too); call model.to({old.dtype}) after load",
        )


def _state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers, tied ones under each name; buffers that `state_dict` leaves out too,
    because a model built on the meta device has no other way to get them."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _assign(
    model: nn.Module, name: str, old: torch.Tensor, tensor: torch.Tensor, made: dict[int, nn.Parameter]
) -> None:
    """Put one tensor of the file into the model. `made` keeps tied parameters tied: one file tensor, one parameter."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if leaf in owner._parameters:
        if id(tensor) not in made:
            grad = old.requires_grad and tensor.is_floating_point()
            made[id(tensor)] = nn.Parameter(tensor.to(_device(old)), requires_grad=grad)
        owner._parameters[leaf] = made[id(tensor)]
    else:
        owner._buffers[leaf] = tensor.to(_device(old))
