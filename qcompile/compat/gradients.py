"""Autograd and replicas from inside: gradients of another type than their parameter, the backward pass that runs, its end.

A parameter of integers may hold a float gradient since torch 2.10 (`Tensor.grad_dtype`). That a pass runs, and what is called
when it is over, is how `torch.utils.checkpoint` and `DistributedDataParallel` themselves work; neither is public.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


def hold_any_gradient(p: Tensor) -> None:
    """Let `p.grad` be of any type; its shape stays that of `p`."""
    p.grad_dtype = None


def backward_pass() -> int:
    """The number of the backward pass that this thread runs, -1 outside of all."""
    return int(torch._C._current_graph_task_id())


def within_backward() -> bool:
    """Whether this thread runs a backward pass, where a forward pass is one that a checkpoint computes again."""
    return backward_pass() != -1


def after_backward(call: Callable[[], None]) -> None:
    """Call once when the backward pass that runs is over, after what was asked for before."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def replicated_by() -> DistributedDataParallel | None:
    """The `DistributedDataParallel` whose forward pass runs."""
    active: DistributedDataParallel | None = DistributedDataParallel._get_active_ddp_module()
    return active


def joins(ddp: DistributedDataParallel) -> bool:
    """Whether it runs under `join()`, where processes that ran out of inputs answer for gradients that only it knows of."""
    return bool(ddp._join_config.enable)
