"""One of two processes that train a model through its roundings: replicated, and sharded.

Arguments: the number of the process, a folder for what they share. Prints a line for each thing that holds.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import qcompile
from qcompile.backend import watching
from qcompile.optim import AdamW

SCHEME = "int4/g32:fp16"
WHOLE = StateDictOptions(full_state_dict=True)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def sharded(net: nn.Module) -> nn.Module:
    for block in net.blocks:
        fully_shard(block)
    return fully_shard(net)


class Run:
    """A model under the backend, and its optimizer."""

    def __init__(self, wrap: Callable[[nn.Module], nn.Module], learned: bool) -> None:
        torch._dynamo.reset()
        net = Net()
        if learned:
            qcompile.prepare(net, SCHEME)
        self.net = wrap(net)
        self.call = torch.compile(self.net, backend="qcompile", options={"recipe": SCHEME, "policy": "memory"})
        self.optimizer = AdamW(self.net.parameters(), lr=0.01)

    def train(self, steps: range) -> None:
        """Every process sees the same batch: the mean of their gradients is the gradient of one."""
        for step in steps:
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(100 + step))
            self.call(x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def evaluate(self) -> Tensor:
        with torch.no_grad():
            result: Tensor = self.call(torch.randn(4, 64, generator=torch.Generator().manual_seed(7)))
        return result

    def weights(self) -> list[Tensor]:
        found = [p.detach() for p in self.net.parameters()]
        return [p.full_tensor() if isinstance(p, DTensor) else p.clone() for p in found]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) > 0 and all(map(torch.equal, one, other))


def main(rank: int, folder: Path) -> None:
    """Run everything. The plain-torch meaning of each graph runs: kernels have their own tests, in one process."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for learned in (False, True):
        name = "learned" if learned else "chosen"
        with watching("reference"):
            one = Run(lambda net: net, learned)
            one.train(range(3))
            want, weights = one.evaluate(), one.weights()
        for how, wrap in (("ddp", DistributedDataParallel), ("fully_shard", sharded)):
            with watching("reference") as trace:
                run = Run(wrap, learned)
                run.train(range(2))
                before = run.evaluate()
                kept: Any = get_state_dict(run.net, run.optimizer, options=WHOLE)
                kept = [{key: copied(value) for key, value in part.items()} for part in kept]
                run.train(range(2, 3))
                after = run.evaluate()
            decisions = [d for ctx in trace.contexts for d in ctx.plan]
            rounded = decisions and all(d.quantized for d in decisions) and any(d.trained for d in decisions)
            if rounded and same(run.weights(), weights) and torch.equal(after, want) and not torch.equal(before, after):
                print(f"{name} {how}")
            with watching("reference"):
                again = Run(wrap, learned)
                set_state_dict(
                    again.net, again.optimizer, model_state_dict=kept[0], optim_state_dict=kept[1], options=WHOLE
                )
                qcompile.refresh(again.net)
                loaded = again.evaluate()
                again.train(range(2, 3))
            if torch.equal(loaded, before) and same(again.weights(), weights):
                print(f"{name} {how} resumed")
    dist.barrier()
    dist.destroy_process_group()


def copied(value: Any) -> Any:
    """State as it is now: a state dict shows what the next step changes."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(v) for key, v in value.items()}
    return [copied(v) for v in value] if isinstance(value, list) else value


EXPECTED = [
    f"{name} {how}{end}" for name in ("chosen", "learned") for how in ("ddp", "fully_shard") for end in ("", " resumed")
]

if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
