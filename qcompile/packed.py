"""A packed weight as ordinary module state: integer buffers, and a parametrization that decodes them.

No tensor subclass and no module class is swapped: torch's own parametrizations make `module.weight` a function of plain
buffers, so state dicts, copies, devices and other backends know what to do with it. The layout of the codes is that of the
kernels of the device that they are on: moving a model lays them out anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.weak import WeakIdKeyDictionary

import qcompile.ir.ops  # noqa: F401  (registers the operators)
from qcompile.codegen import inductor
from qcompile.errors import QCError, warn
from qcompile.ir.codec import quantize
from qcompile.ir.packing import repack_codes
from qcompile.ir.scheme import Packing, Scheme
from qcompile.runtime.store import ordinary_tensors

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class PackedWeight(nn.Module):
    """The parametrization: `decode(parts)`, seen as the module's `weight`.

    Attributes:
        scheme: canonical spelling.
        n: rows of the packed matrix (output features).
        k: its columns (input features).
        dtype: dtype of the weight it stands for.
        transposed: the module keeps its weight as `[k, n]` (HF `Conv1D`).
        fit: how scales are chosen when a float weight is assigned.
        path: where the weight was when it was packed, for messages.
        act: the scheme of activations that it was packed for, "" for none: it decides the layout on a GPU.
    """

    def __init__(
        self,
        scheme: str,
        n: int,
        k: int,
        dtype: torch.dtype,
        transposed: bool = False,
        fit: str = "minmax",
        path: str = "weight",
        act: str = "",
    ) -> None:
        super().__init__()
        self.scheme, self.n, self.k, self.dtype, self.transposed, self.fit = scheme, n, k, dtype, transposed, fit
        self.path, self.act = path, act
        self._given: list[torch.Tensor] | None = None

    @property
    def packing(self) -> Packing:
        """The layout of the codes."""
        return Scheme.parse(self.scheme).packing

    def layout_on(self, device: torch.device) -> Packing:
        """The layout that the kernels of a device read; a layout that is of no device stays."""
        if self.packing == "rows" or device.type == "meta":
            return self.packing
        return inductor.packing(device, Scheme.parse(self.act) if self.act else None)

    def laid_out(self, codes: torch.Tensor, packing: Packing, old: Packing | None = None) -> torch.Tensor:
        """Codes in another layout; `old` is that of `packing` when it is not given."""
        bits = Scheme.parse(self.scheme).format.bits
        return repack_codes(codes, bits, self.n, self.k, old or self.packing, packing)

    def give(self, parts: Sequence[torch.Tensor]) -> None:
        """Parts that the next `right_inverse` returns instead of encoding."""
        self._given = list(parts)

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = torch.ops.qcompile.decode(list(parts), self.scheme, self.n, self.k, self.dtype)
        return weight.t() if self.transposed else weight

    @ordinary_tensors()
    def right_inverse(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Assigning `module.weight = w` encodes `w`.

        Raises:
            QCError: "weight.assign" for another shape, no floats or no data, "codec.nonfinite-weight" for NaN or Inf; they
                name the module, which keeps its weight.
        """
        given, self._given = self._given, None
        if given is not None:
            return tuple(given)
        shape = [self.k, self.n] if self.transposed else [self.n, self.k]
        if list(weight.shape) != shape or weight.dtype not in (*FLOATS, torch.float64) or weight.is_meta:
            raise QCError(
                "weight.assign",
                f"{weight.dtype} {list(weight.shape)} on {weight.device} cannot be assigned",
                where=self.path,
                why=f"the weight is {self.dtype} {shape}, packed as {self.scheme}",
                next=f"assign floats of shape {shape}; for another shape make a new module and convert that",
            )
        try:
            return tuple(quantize(weight.t() if self.transposed else weight, Scheme.parse(self.scheme), fit=self.fit))
        except QCError as error:
            raise error.at(self.path) from error

    def extra_repr(self) -> str:
        return f"{self.scheme}, n={self.n}, k={self.k}, {self.dtype}" + (", transposed" if self.transposed else "")


class PackedParts(parametrize.ParametrizationList):
    """The buffers behind a `PackedWeight`. Their dtypes are part of the scheme: `model.to(torch.bfloat16)` and its like
    move them, and change the dtype that they are decoded to instead.

    A state dict holds one tensor more, the text of what the buffers mean: bytes of two schemes may look alike.
    """

    @property
    def _weight(self) -> PackedWeight:
        return next(item for item in self if isinstance(item, PackedWeight))

    @property
    def _meaning(self) -> str:
        return f"{self._weight.scheme} [{self._weight.n}, {self._weight.k}]"

    def forward(self) -> torch.Tensor:
        """The weight. Dynamo guards what it meets on the way to a weight, for every weight and on every call, so the way
        is short: no more is looked at than a single `PackedWeight` needs."""
        if len(self._modules) > 1:  # somebody has put another parametrization on top
            return super().forward()
        return cast("PackedWeight", self._modules["0"]).forward(
            *cast("dict[str, torch.Tensor]", self._buffers).values()
        )

    def get_extra_state(self) -> torch.Tensor:
        """UTF-8 bytes of "scheme [n, k]", uint8: every format that keeps tensors keeps it."""
        return torch.tensor(list(self._meaning.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Raises `QCError` ("load.scheme") when the state is of another scheme or size."""
        found = _text(state)
        if found != self._meaning:
            raise QCError(
                "load.scheme",
                f"the state dict holds {found}, the module {self._meaning}",
                next="convert both models with one recipe",
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        name = f"{prefix}_extra_state"
        if name in state_dict:  # before a buffer is overwritten
            self._adopt(state_dict, prefix)
            try:
                self.set_extra_state(state_dict[name])
            except QCError as error:
                raise error.at(prefix.removesuffix(".")) from error
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _adopt(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Lay the codes of a state out as the module has them, when that is all they differ in."""
        item, codes = self._weight, f"{prefix}original0"
        old = _text(state_dict[f"{prefix}_extra_state"]).partition(" ")[0]
        try:
            scheme = Scheme.parse(old)
        except QCError:
            return
        if codes in state_dict and str(replace(scheme, packing=item.packing)) == item.scheme != old:
            state_dict[codes] = item.laid_out(state_dict[codes], item.packing, scheme.packing)
            state_dict[f"{prefix}_extra_state"] = self.get_extra_state()

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> PackedParts:
        for item in self:
            if isinstance(item, PackedWeight):
                item.dtype = fn(torch.empty(0, dtype=item.dtype)).dtype

        codes = self._buffers["original0"]

        def keep(part: torch.Tensor) -> torch.Tensor:
            bits = part.view(_BITS[part.element_size()])
            moved = fn(bits)
            if moved is bits:
                return part
            # Tied weights stay tied: another module may have moved this very tensor just now.
            known: Callable[[], torch.Tensor | None]
            known, versions = _MOVED.get(part, (lambda: None, ()))
            before = known()
            if before is not None and before.device == moved.device and versions == (_version(part), _version(before)):
                return before
            made = moved.view(part.dtype)
            if part is codes:
                made = weight.laid_out(made, weight.layout_on(made.device))
            _MOVED[part] = (weakref.ref(made), (_version(part), _version(made)))
            return made

        weight = self._weight
        super()._apply(keep, recurse)  # type: ignore[no-untyped-call]
        device = cast("torch.Tensor", self._buffers["original0"]).device
        weight.scheme = str(replace(Scheme.parse(weight.scheme), packing=weight.layout_on(device)))
        return self


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _text(state: torch.Tensor) -> str:
    return bytes(state.tolist()).decode(errors="replace")


_MOVED: Any = WeakIdKeyDictionary()  # tensors of packed weights: what they were last moved to, and versions of both
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def attach(module: nn.Module, packed: PackedWeight, parts: Sequence[torch.Tensor], name: str = "weight") -> None:
    """Make `parts` the module's weight. Tied modules are given the very same tensors."""
    # Integer parameters cannot require grad. The user's own parameter keeps its flag: somebody else may hold it.
    module._parameters[name] = nn.Parameter(getattr(module, name).detach(), requires_grad=False)
    packed.give(parts)
    parametrize.register_parametrization(module, name, packed, unsafe=True)
    made = cast("nn.ModuleDict", module.parametrizations)
    made.train(module.training)  # new modules are in training mode
    originals = made[name]
    originals.__class__ = PackedParts
    for index, part in enumerate(parts):
        # Plain buffers: an optimizer over model.parameters() must not meet integer tensors.
        delattr(originals, f"original{index}")
        originals.register_buffer(f"original{index}", part)
    module.register_load_state_dict_pre_hook(_tell_of_float)


def _tell_of_float(module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """torch names every buffer that is missing, or, when not strict, none. It does not tell a hook which it is."""
    for name, item in parametrized(module).items():
        if isinstance(item, PackedParts) and f"{prefix}{name}" in state_dict:
            warn(
                "the state dict holds float weights that are packed in the model, and they are not loaded: call "
                "load_state_dict before qcompile.convert, or assign each module.weight"
            )
    scale = f"{prefix}input_rounding."
    if "input_rounding" not in module._modules and any(name.startswith(scale) for name in state_dict):
        warn(
            f"the state dict holds a static scale, {scale}*, and the module has none: call qcompile.prepare(model, recipe, "
            "activations=...) before qcompile.convert, or use qcompile.save and qcompile.load, which need neither"
        )


def packed_weights(model: nn.Module) -> list[tuple[str, nn.Module, PackedWeight]]:
    """Every packed weight: (path of its module, the module, the parametrization)."""
    found = []
    for path, module in model.named_modules():
        for weights in parametrized(module).values():
            found += [(path, module, item) for item in weights if isinstance(item, PackedWeight)]
    return found


def parametrized(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    """The parametrized tensors of a module. A user's own module may be called "parametrizations" too."""
    lists = module._modules.get("parametrizations")
    if not isinstance(lists, nn.ModuleDict):
        return {}
    return {name: item for name, item in lists.items() if isinstance(item, parametrize.ParametrizationList)}
