"""The packed-weight store: one encoded copy of each weight, shared by every graph that reads it.

Prefill and decode graphs, recompiles and graph breaks all ask for the same (parameters, expression, scheme)
and get the same entry, so a weight is encoded once. An entry notices when its parameters changed (torch's
version counter, a moved pointer, an optimizer step) and re-encodes in place: graphs hold the packed tensors
themselves and see the new contents without recompiling.

What torch tells nobody (`param.data.copy_()`, writing through `numpy()`) an entry cannot notice: `refresh` is
for that. An entry that is encoded again keeps what was decided when the graph was compiled, and warns where the
new weight would have been decided otherwise.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.errors import QCError, warn
from qcompile.ir.codec import clamped, dequantize, quantize
from qcompile.ir.packing import packed_parts
from qcompile.ir.scheme import Scheme

Stamp = tuple[int, int, int, tuple[int, ...]]


def stamp(tensor: torch.Tensor) -> Stamp:
    """Identity, version, address and strides: what can be seen of a write. Inference tensors have no version."""
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), version, tensor.data_ptr(), tensor.stride()


@dataclass(frozen=True)
class WeightExpression:
    """A weight as a pure function of parameters: views, casts, concatenations.

    Attributes:
        text: canonical text; equal text means equal function.
        evaluate: maps the parameters to the tensor, `[n, k]` for a weight, any shape for a constant.
        where: module path for messages.
    """

    text: str
    evaluate: Callable[..., torch.Tensor]
    where: str = ""


@dataclass(frozen=True)
class Encoding:
    """What a graph wants to read: a function of parameters, packed in a certain way.

    Attributes:
        expression: the weight.
        scheme: `None` for a constant that is computed and not packed.
        fit: how scales are chosen.
        seed: key of stochastic rounding; other schemes ignore it.
        min_sqnr: the signal-to-noise ratio (dB) for whose sake the scheme was chosen.
    """

    expression: WeightExpression
    scheme: Scheme | None
    fit: str = "minmax"
    seed: int = 0
    min_sqnr: float = -math.inf

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Equal for encodings that give the same packed tensors."""
        random = self.scheme is not None and self.scheme.rounding == "stochastic"
        return self.expression.text, str(self.scheme), self.fit, self.seed if random else 0


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Packed tensors are made in here: one made under inference_mode could neither be rewritten in normal mode later nor
    be used while autograd records."""
    with torch.inference_mode(False), torch.no_grad():
        yield


class User(Protocol):
    """A compiled graph that holds packed tensors of entries."""

    def forget(self) -> None:
        """Let go of all packed tensors; the next call asks for them again."""


class Entry:
    """One encoded weight (or, with no scheme, one constant computed from parameters).

    Attributes:
        parts: the packed tensors; rewritten in place as long as the weight keeps its shape, dtype and device.
        shape: shape of the float weight.
        encodes: how often it was encoded (1 unless the weight changed).
        error: why there is nothing in the parts yet; whoever asks for the entry again gets it raised.
        users: the compiled graphs that read it, as long as they live.
        uncounted: whether some parameter was made under inference_mode, so that writes to it cannot be seen.
    """

    def __init__(self, roots: Sequence[torch.Tensor], encoding: Encoding, *, later: bool = False) -> None:
        self.encoding = encoding
        self.min_sqnr = encoding.min_sqnr
        self.shape: tuple[int, ...] = ()
        self.parts: list[torch.Tensor] = []
        self.encodes = 0
        self.error: QCError | None = None
        self.users: weakref.WeakSet[User] = weakref.WeakSet()
        self.uncounted = any(root.is_inference() for root in roots)
        self._roots = [weakref.ref(root) for root in roots]
        self._seen: tuple[Stamp, ...] = ()
        self._warned = False
        self.encode(roots, later=later)

    @property
    def expression(self) -> WeightExpression:
        return self.encoding.expression

    @property
    def scheme(self) -> Scheme | None:
        return self.encoding.scheme

    def stale(self, roots: Sequence[torch.Tensor]) -> bool:
        return self._seen != tuple(map(stamp, roots))

    def forget(self) -> None:
        """Make the next look find the entry stale."""
        self._seen = ()

    def encode(self, roots: Sequence[torch.Tensor], *, later: bool = False) -> None:
        """Encode from the parameters' present contents, in place when already encoded.

        Args:
            later: keep the error of a weight with NaN or Inf as `error`, next to parts without contents: code can be
                compiled for them, and the weight may be mended before it runs.
        """
        with ordinary_tensors():
            seen = tuple(map(stamp, roots))
            weight = self.expression.evaluate(*(root.detach() for root in roots))
            failed: QCError | None = None
            if self.scheme is None:
                fresh = [weight.contiguous().clone()]
            else:
                try:
                    fresh = quantize(weight, self.scheme, fit=self.encoding.fit, seed=self.encoding.seed)
                except QCError as error:
                    failed, seen = error.at(self.expression.where), ()
                    if not (later and error.code == "codec.nonfinite-weight"):
                        raise failed from error
                    n, k = weight.shape
                    kinds = packed_parts(self.scheme, n, k)
                    fresh = [torch.zeros(kind.shape, dtype=kind.dtype, device=weight.device) for kind in kinds]
            if len(self.parts) == len(fresh) and all(map(_alike, self.parts, fresh)):
                for old, new in zip(self.parts, fresh, strict=True):
                    old.copy_(new)
            else:  # first time, or `param.data` became a tensor of another kind: those graphs recompile anyway
                self.parts = fresh
            self.shape, self._seen, self.error = tuple(weight.shape), seen, failed
            self.encodes += failed is None
        if self.error is None and self.scheme is not None:
            warn_clamped(self.parts, self.scheme, self.shape[0], self.expression.where)
            self.check_sqnr()

    def want_sqnr(self, decibels: float) -> None:
        """Another graph chose the scheme for the sake of a higher ratio."""
        if decibels > self.min_sqnr:
            self.min_sqnr = decibels
            self.check_sqnr()

    def check_sqnr(self) -> None:
        """Warn, once, when the weight that is packed now is not one for which the scheme would have been chosen."""
        if self.min_sqnr == -math.inf or self._warned or self.error is not None:
            return
        found = self.sqnr_db()
        if found is not None and found < self.min_sqnr:
            self._warned = True
            warn(
                f"{self.expression.where}: {self.scheme} keeps only {found:.1f} dB of this weight, the recipe asks for "
                f"{self.min_sqnr:g}. The scheme was chosen for other values, and compiled code keeps it: call "
                "torch.compiler.reset() and compile again."
            )

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self.parts)

    def decoded(self) -> torch.Tensor:
        """The float weight that the packed parts stand for, fp32 `[n, k]`."""
        if self.scheme is None:
            return self.parts[0]
        n, k = self.shape
        return dequantize(self.parts, self.scheme, n, k)

    def sqnr_db(self) -> float | None:
        """Signal-to-noise ratio of the packed weight against its parameters, `None` when those are gone."""
        roots = [ref() for ref in self._roots]
        if self.scheme is None or any(root is None for root in roots):
            return None
        with torch.no_grad():
            weight = self.expression.evaluate(*(r.detach() for r in roots if r is not None)).to(torch.float32)
            noise = float((self.decoded() - weight).square().sum())
            signal = float(weight.square().sum())
        return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf


def warn_clamped(parts: Sequence[torch.Tensor], scheme: Scheme, n: int, where: str) -> None:
    """Warn when a weight of `n` rows is too large or too small for the format of its scales."""
    if clamped(parts, scheme, n):
        warn(
            f"{where}: the weight is larger or smaller than the scales of {scheme} can express, so it decodes to other "
            "values. Use a scheme with fp32 scales for it, or a rule that keeps it float."
        )


Key = tuple[tuple[int, ...], str, str, str, int]


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


@dataclass
class _Root:
    """A parameter that entries are made from: their keys, and the storage it had when they were encoded."""

    keys: set[Key] = field(default_factory=set)
    storage: weakref.ref[torch.UntypedStorage] | None = None


class Store:
    """Entries by (parameters, encoding). Holds parameters weakly: an entry dies with its first parameter.

    `epoch` moves whenever an entry was marked stale, encoded again or dropped, so that a frozen graph sees with one
    integer comparison that it has to look. That happens on request (`mark`), when a parameter or the storage behind
    it dies (another one may then get the same address, and look unchanged to a stamp), and when a graph that was
    compiled for other strides of a parameter wrote to the packed tensors.

    Attributes:
        tables: tensors that embeddings read, of all graphs so far: a linear layer that shares one is a head, also where a
            graph break lies between the two.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.epoch = 0
        self._entries: dict[Key, Entry] = {}
        self._roots: dict[int, _Root] = {}
        self.tables = WeakIdKeyDictionary()

    def __iter__(self) -> Iterator[Entry]:
        return iter(list(self._entries.values()))

    def entry(self, roots: Sequence[torch.Tensor], encoding: Encoding, *, later: bool = False) -> Entry:
        """The entry of a weight, encoded now if it is new or stale.

        Args:
            later: a graph is only being compiled; a weight with NaN or Inf is an error of the call (`Entry.error`).

        Raises:
            QCError: from the codec (NaN or Inf in the weight, ...), naming the module path.
        """
        key = (tuple(map(id, roots)), *encoding.key)
        with self.lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = Entry(roots, encoding, later=later)
            else:
                fresh = not entry.stale(roots)
                if not fresh:
                    entry.encode(roots, later=later)
                    self.epoch += 1
                entry.want_sqnr(encoding.min_sqnr)
                if fresh:
                    return entry
            for root in roots:
                self._watch(root, key)
            return entry

    def mark(self, tensors: Sequence[torch.Tensor]) -> int:
        """Mark every entry made from these tensors stale; returns how many there were."""
        return self._forget([id(tensor) for tensor in tensors])

    def drop_unused(self, entries: Iterable[Entry]) -> None:
        """Let go of those entries that no compiled graph reads. A graph that is being compiled meanwhile encodes its
        weight again."""
        with self.lock:
            unused = {id(entry) for entry in entries if not entry.users}
            for key in [key for key, entry in self._entries.items() if id(entry) in unused]:
                self._entries.pop(key, None)  # a parameter may die just now, and take its entries with it
                for root in key[0]:
                    self._roots.get(root, _Root()).keys.discard(key)

    def _watch(self, root: torch.Tensor, key: Key) -> None:
        known = self._roots.get(id(root))
        if known is None:
            known = self._roots[id(root)] = _Root()
            weakref.finalize(root, self._drop, id(root)).atexit = False
        known.keys.add(key)
        storage = root.untyped_storage()
        if known.storage is None or known.storage() is not storage:
            known.storage = weakref.ref(storage, partial(self._moved, id(root)))

    def _moved(self, root: int, _: object) -> None:
        self._forget([root])

    def _forget(self, roots: Sequence[int]) -> int:
        with self.lock:
            keys = {key for root in roots if (known := self._roots.get(root)) for key in known.keys}
            for key in keys:
                self._entries[key].forget()
            self.epoch += bool(keys)
        return len(keys)

    def _drop(self, root: int) -> None:
        """The parameter is gone, and with it every entry made from it. Compiled graphs live on in Dynamo's caches: they
        must not keep its packed tensors."""
        with self.lock:
            for key in self._roots.pop(root, _Root()).keys:
                entry = self._entries.pop(key, None)
                for user in list(entry.users) if entry is not None else ():
                    user.forget()
                for other in key[0]:
                    if other in self._roots:
                        self._roots[other].keys.discard(key)
            self.epoch += 1

    @property
    def nbytes(self) -> int:
        """Bytes of all packed tensors held."""
        return sum(entry.nbytes for entry in self)


STORE = Store()


def _after_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # Fused optimizers write parameters without moving their version counter.
    if STORE._roots:
        STORE.mark([p for group in optimizer.param_groups for p in group["params"]])


register_optimizer_step_post_hook(_after_step)
