"""Save and load converted models: one safetensors file of plain tensors, one JSON file of schemes.

`load` fills a model that was built without weights (for example under `torch.device("meta")`) tensor by
tensor from the memory-mapped file, so the float weights of the target never exist, all at once or one by one.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from qcompile.conversion import PackedParts, PackedWeight, attach, packed_weights
from qcompile.errors import QCError

VERSION = 1
TENSORS, MANIFEST = "model.safetensors", "qcompile.json"


def save(model: nn.Module, path: str | Path) -> Path:
    """Write a converted model.

    Args:
        model: a model that `convert` went over (a float model works too, and is stored as float).
        path: a folder; made if missing. It receives `model.safetensors` and `qcompile.json`.

    Returns:
        The folder.

    Raises:
        QCError: "save.path" when the path is a file.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise QCError("save.path", f"{folder} is a file", next="name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[object, ...], str] = {}
    stored: set[int] = set()
    for name, tensor in _state(model):
        memory = tensor.untyped_storage().data_ptr()
        key = (memory, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and key in seen:
            aliases[name] = seen[key]
            continue
        seen[key] = name
        dense = tensor.detach().contiguous()
        # The file format refuses tensors that share memory: another view of a stored tensor is stored as a copy.
        tensors[name] = dense.clone() if dense.untyped_storage().data_ptr() in stored else dense
        stored.add(memory)
    schemes = {
        module: {
            "scheme": item.scheme,
            "n": item.n,
            "k": item.k,
            "dtype": str(item.dtype).removeprefix("torch."),
            "transposed": item.transposed,
            "fit": item.fit,
        }
        for module, _, item in packed_weights(model)
    }
    manifest = {"version": VERSION, "weights": schemes, "aliases": aliases}
    # Replaced as whole files: a model that was loaded from this folder still reads the old one.
    with tempfile.TemporaryDirectory(dir=folder) as fresh:
        save_file(tensors, str(Path(fresh, TENSORS)), {"format": "pt"})
        Path(fresh, MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        for file in (TENSORS, MANIFEST):
            os.replace(Path(fresh, file), folder / file)
    return folder


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill a model of the same architecture from what `save` wrote, in place.

    Args:
        model: float, or on the meta device; its own weights are dropped unread.
        path: the folder.

    Returns:
        The model, for chaining. It computes bit for bit what the saved one did.

    Raises:
        QCError: "load.path", "load.version", "load.module" (a module of the file is missing in the model),
            "load.missing" (a tensor of the model is missing in the file) or "load.shape".
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        file = safe_open(str(folder / TENSORS), framework="pt")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise QCError(
            "load.path",
            f"cannot read a saved model from {folder}",
            why=str(error),
            next="give the folder given to save",
        ) from error
    if manifest.get("version") != VERSION:
        raise QCError("load.version", f"{folder} has format version {manifest.get('version')!r}, not {VERSION}")
    with file as tensors:
        reader = _Reader(tensors, manifest["aliases"])
        for name, entry in manifest["weights"].items():
            _attach(model, name, entry, reader)
        made: dict[int, nn.Parameter] = {}
        for name, old in list(_state(model)):
            _assign(model, name, old, reader, made)
    return model


class _Reader:
    """Tensors by name, each read once, aliases resolved to the very same tensor."""

    def __init__(self, file: Any, aliases: dict[str, str]) -> None:
        self.file, self.aliases, self.names = file, aliases, set(file.keys())
        self.read: dict[str, torch.Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return self.aliases.get(name, name) in self.names

    def __call__(self, name: str) -> torch.Tensor:
        name = self.aliases.get(name, name)
        if name not in self.names:
            raise QCError("load.missing", f"the file has no tensor {name!r}", next="was it saved from another model?")
        if name not in self.read:
            self.read[name] = self.file.get_tensor(name)
        return self.read[name]


def _attach(model: nn.Module, path: str, entry: dict[str, Any], reader: _Reader) -> None:
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise QCError(
            "load.module", f"the model has no module {path!r}", next="build the saved architecture"
        ) from error
    prefix = f"{path}.parametrizations.weight.original" if path else "parametrizations.weight.original"
    count = 0
    while f"{prefix}{count}" in reader:
        count += 1
    packed = PackedWeight(
        entry["scheme"], entry["n"], entry["k"], getattr(torch, entry["dtype"]), entry["transposed"], entry["fit"]
    )
    if isinstance(getattr(module, "parametrizations", None), nn.ModuleDict):
        raise QCError("load.module", f"module {path!r} is converted already", next="load into a float or meta model")
    attach(module, packed, [reader(f"{prefix}{i}") for i in range(count)])


def _state(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """All parameters and buffers, tied ones under each name; buffers that `state_dict` leaves out too,
    because a model built on the meta device has no other way to get them."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _assign(model: nn.Module, name: str, old: torch.Tensor, reader: _Reader, made: dict[int, nn.Parameter]) -> None:
    """Put one tensor of the file into the model. `made` keeps tied parameters tied: one file tensor, one parameter."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner, PackedParts):
        return
    tensor = reader(name)
    if tensor.shape != old.shape:
        raise QCError(
            "load.shape",
            f"the file has shape {list(tensor.shape)}, the model {list(old.shape)}",
            where=name,
            next="build the saved architecture",
        )
    if leaf in owner._parameters:
        if id(tensor) not in made:
            grad = old.requires_grad and tensor.is_floating_point()
            made[id(tensor)] = nn.Parameter(tensor, requires_grad=grad)
        owner._parameters[leaf] = made[id(tensor)]
    else:
        owner._buffers[leaf] = tensor
