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
from typing import Any, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.errors import QCError, warn
from qcompile.ir.codec import QParams, clamped, dequantize, quantize
from qcompile.ir.estimators import estimator_of
from qcompile.ir.noise import ratio_db
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
        estimator: whose learned scales the weight has, "" where they are chosen; the expression then gives the float
            weight and the learned tensors.
    """

    expression: WeightExpression
    scheme: Scheme | None
    fit: str = "minmax"
    seed: int = 0
    min_sqnr: float = -math.inf
    estimator: str = ""

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Equal for encodings that give the same packed tensors."""
        random = self.scheme is not None and self.scheme.rounding == "stochastic"
        return self.expression.text, str(self.scheme), self.estimator or self.fit, self.seed if random else 0

    def weight(self, roots: Sequence[torch.Tensor]) -> tuple[torch.Tensor, QParams | None]:
        """The float weight that parameters stand for, and its scales where they are learned."""
        value: Any = self.expression.evaluate(*(root.detach() for root in roots))
        if not self.estimator:
            return value, None
        assert self.scheme is not None
        weight, *learned = value
        return weight, estimator_of(self.estimator).learned_qparams(self.scheme, learned, weight.dim())


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
        chosen: whether some compile chose the scheme for this very weight; else it got that of a weight whose code it runs.
    """

    def __init__(self, roots: Sequence[torch.Tensor], encoding: Encoding, *, later: bool = False) -> None:
        self.encoding = encoding
        self.shape: tuple[int, ...] = ()
        self.parts: list[torch.Tensor] = []
        self.encodes = 0
        self.error: QCError | None = None
        self.users: weakref.WeakSet[User] = weakref.WeakSet()
        self.uncounted = any(root.is_inference() for root in roots)
        self.chosen = False
        self._roots = [weakref.ref(root) for root in roots]
        self._seen: tuple[Stamp, ...] = ()
        # Encodings whose `min_sqnr` the weight keeps as it is now, and those whose users were told that it does not.
        self._kept: weakref.WeakSet[Encoding] = weakref.WeakSet()
        self._told: weakref.WeakSet[Encoding] = weakref.WeakSet()
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
            weight, qparams = self.encoding.weight(roots)
            failed: QCError | None = None
            if self.scheme is None:
                fresh = [weight.contiguous().clone()]
            else:
                try:
                    fresh = quantize(
                        weight, self.scheme, qparams=qparams, fit=self.encoding.fit, seed=self.encoding.seed
                    )
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
            self._kept.clear()
        if self.error is None and self.scheme is not None:
            warn_clamped(self.parts, self.scheme, self.shape[0], self.expression.where)

    def check_sqnr(self, encoding: Encoding) -> None:
        """Warn when the weight that is packed now is not one for which its scheme would have been chosen: once for each
        encoding that asks, which is one for each graph that is compiled."""
        if encoding.min_sqnr == -math.inf or encoding in self._kept or encoding in self._told or self.error is not None:
            return
        found = self.sqnr_db()
        if found is None or found >= encoding.min_sqnr:
            self._kept.add(encoding)
            return
        self._told.add(encoding)
        what = f"{self.scheme} keeps only {found:.1f} dB of this weight, the recipe asks for {encoding.min_sqnr:g}"
        why = "The scheme was chosen for other values, and compiled code keeps it"
        advice = "call torch.compiler.reset() and compile again." if self.chosen else SHARED
        warn(f"{self.expression.where}: {what}. {why}: {advice}")

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
            weight, _ = self.encoding.weight([root for root in roots if root is not None])
            return ratio_db(self.decoded(), weight)


SHARED = (
    "they were another layer's, which runs the same code (behind a graph break, or layers compiled one by one), so a reset "
    "changes nothing. Compile the model without the break, or name a scheme for these layers in a rule without min_sqnr."
)


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
    death: weakref.finalize[..., torch.Tensor] | None = None


class Store:
    """Entries by (parameters, encoding). Holds parameters weakly: an entry dies with its first parameter.

    `epoch` moves whenever an entry was marked stale, encoded again or dropped, so that a frozen graph sees with one
    integer comparison that it has to look. That happens on request (`mark`), when a parameter or the storage behind
    it dies (another one may then get the same address, and look unchanged to a stamp), and when a graph that was
    compiled for other strides of a parameter wrote to the packed tensors.

    Attributes:
        tables: tensors that embeddings read, of all graphs so far: a linear layer that shares one is a head, also where a
            graph break lies between the two. They survive `torch.compiler.reset()`, so that what was met too late the first
            time is known the second.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.epoch = 0
        self._entries: dict[Key, Entry] = {}
        self._roots: dict[int, _Root] = {}
        self.tables = WeakIdKeyDictionary()
        self._visitors = 0

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
            fresh = entry is not None and not entry.stale(roots)
            if entry is None:
                entry = self._entries[key] = Entry(roots, encoding, later=later)
            elif not fresh:
                entry.encode(roots, later=later)
                self.epoch += 1
            if later:  # this compile's graph will ask with this very object
                entry.encoding, entry.chosen = encoding, True
            entry.check_sqnr(encoding)
            if not fresh:
                for root in roots:
                    self._watch(root, key)
            return entry

    def made_from(self, tensors: Sequence[torch.Tensor]) -> list[Entry]:
        """The entries that have one of these tensors among their parameters."""
        with self.lock:
            keys = [key for tensor in tensors if (root := self._roots.get(id(tensor))) for key in root.keys]
            return [self._entries[key] for key in dict.fromkeys(keys)]

    def mark(self, tensors: Sequence[torch.Tensor]) -> int:
        """Mark every entry made from these tensors stale; returns how many there were.

        What a sharded parameter (FSDP2's DTensor) is gathered into, and graphs read, is another tensor, whose version does
        not count the gathering: then all entries are stale.
        """
        if any(type(tensor) is not torch.nn.Parameter and hasattr(tensor, "full_tensor") for tensor in tensors):
            return self._forget(list(self._roots))
        return self._forget([id(tensor) for tensor in tensors])

    def drop_unused(self, entries: Iterable[Entry]) -> None:
        """Let go of those entries that no compiled graph reads. A graph that is being compiled meanwhile encodes its
        weight again."""
        with self.lock:
            self._let_go([entry for entry in entries if not entry.users])

    def drop(self, entries: Iterable[Entry]) -> None:
        """Let go of entries whatever reads them (a graph that is called after all encodes its weight again): Dynamo keeps
        code with graph breaks alive over `torch.compiler.reset()`. Does nothing while the store must stay unchanged."""
        with self.lock:
            dropped = [] if self._visitors else list(entries)
            self._let_go(dropped)
            for user in [user for entry in dropped for user in entry.users]:
                user.forget()

    def _let_go(self, entries: Sequence[Entry]) -> None:
        gone = set(map(id, entries))
        for key in [key for key, entry in self._entries.items() if id(entry) in gone]:
            self._entries.pop(key, None)  # a parameter may die just now, and take its entries with it
            for root in key[0]:
                self._leave(root, key)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Let go of everything that was added inside the block, but for what compiled graphs read; drop nothing else."""
        held, tables = list(self), list(self.tables)  # held, so that no id is used twice
        known, known_tables = set(map(id, held)), set(map(id, tables))
        with self.lock:
            self._visitors += 1
        try:
            yield
        finally:
            with self.lock:
                self._visitors -= 1
            self.drop_unused([entry for entry in self if id(entry) not in known])
            with self.lock:
                for tensor in [tensor for tensor in self.tables if id(tensor) not in known_tables]:
                    del self.tables[tensor]

    def _leave(self, root: int, key: Key) -> None:
        """An entry is gone; the weak references to a parameter go with its last one."""
        known = self._roots.get(root, _Root())
        known.keys.discard(key)
        if not known.keys and known.death is not None:
            del self._roots[root]
            known.death.detach()

    def _watch(self, root: torch.Tensor, key: Key) -> None:
        known = self._roots.get(id(root))
        if known is None:
            known = self._roots[id(root)] = _Root()
            known.death = weakref.finalize(root, self._drop, id(root))
            known.death.atexit = False
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
                    self._leave(other, key)
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
