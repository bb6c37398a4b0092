"""Gradients of codes under `DistributedDataParallel`, which averages over processes what can require a gradient.

Integers cannot, so the codes' gradients are averaged here: in one sweep at the end of the backward pass, in the order of the
model's parameters, which is that of all processes. What makes the sweep happen everywhere or nowhere is the replica itself: the
scales beside the codes do require a gradient, and `DistributedDataParallel` refuses a pass in which one of its parameters was
not used. What switches that check off is refused.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from qcompile import compat
from qcompile.errors import QCError

# Of each replica, the backward pass and the codes that got a gradient in it, by identity. A pass that failed leaves its own.
_waiting: WeakKeyDictionary[DistributedDataParallel, tuple[int, dict[int, Tensor]]] = WeakKeyDictionary()


def syncing() -> DistributedDataParallel | None:
    """The replica whose forward pass runs and whose backward pass is to average gradients.

    Raises:
        QCError: "optim.replicas" for one whose processes may differ in the weights that they use.
    """
    ddp = compat.replicated_by()
    if ddp is None or not ddp.require_backward_grad_sync:  # no_sync(): gradients are summed up here until the next pass
        return None
    if ddp.find_unused_parameters or compat.joins(ddp):
        raise QCError(
            "optim.replicas",
            "a weight in few bits cannot be replicated with find_unused_parameters=True, nor under join()",
            why="a process without a gradient of it would leave the others waiting for one",
            next="use every layer on every process, or leave the layers that are not out of low_bit_weights",
        )
    return ddp


def average_later(ddp: DistributedDataParallel, codes: Tensor) -> None:
    """Average the gradient of `codes` over the processes of `ddp` when the backward pass that runs is over."""
    number = compat.backward_pass()
    if ddp not in _waiting or _waiting[ddp][0] != number:
        _waiting[ddp] = (number, {})
        compat.after_backward(lambda: _average(ddp))
    _waiting[ddp][1][id(codes)] = codes


def _average(ddp: DistributedDataParallel) -> None:
    _, arrived = _waiting.pop(ddp)
    grads = [p.grad for p in ddp.module.parameters() if id(p) in arrived and p.grad is not None]
    works = []
    for grad in grads:
        grad /= ddp.process_group.size()  # first, as there: a sum of halves does not overflow
        works.append(dist.all_reduce(grad, group=ddp.process_group, async_op=True))
    for work in works:
        work.wait()
