"""One of two processes: steps of sharded and of replicated parameters against steps of the whole, bit for bit.

Arguments: the number of the process, a folder for what they share. Prints a line for each thing that holds.
"""

import copy
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from qcompile import optim
from qcompile.errors import QCError, QCWarning
from tests.optim.support import ours

STEPS = 3
RUNS = (
    ("adamw", torch.bfloat16, 8),
    ("adam-max", torch.float32, 4),
    ("momentum", torch.bfloat16, 4),
    ("lion", torch.bfloat16, 8),
)


def model(dtype: torch.dtype) -> nn.Module:
    """Rows of blocks of 64 and of 256 elements, in numbers that two does not divide; vectors."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(192, 257), nn.ReLU(), nn.Linear(257, 256, bias=False), nn.Linear(256, 67)).to(dtype)


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if isinstance(t, DTensor) else t


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for i in steps:
        torch.manual_seed(100 + i)
        x = torch.randn(16, 192, dtype=next(net.parameters()).dtype)
        optimizer.zero_grad()
        net(x).float().square().mean().backward()  # the same batch everywhere: its mean gradient is the gradient
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = [(whole(a.detach()), whole(b.detach())) for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)  # once all are gathered: the other process does the same


def same_state(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    """Where the whole has codes the shard has them too, but for rows that no block divides."""
    found = []
    for mine, theirs in zip(one.state.values(), other.state.values(), strict=True):
        if mine.keys() == theirs.keys():
            found += [torch.equal(whole(mine[key]), whole(theirs[key])) for key in mine]
    return all(found) and len(found) >= 10


def without_odd(net: nn.Module) -> list[nn.Parameter]:
    """The parameters whose state has the same storage sharded and not: 257 columns are no blocks."""
    return [p for p in net.parameters() if p.dim() == 1 or p.shape[1] != 257]


def main(rank: int, folder: Path) -> None:
    """Run everything."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, dtype, bits in RUNS:
        alone, sharded, replicated = model(dtype), model(dtype), model(dtype)
        one = ours(name, without_odd(alone), state_bits=bits)
        train(alone, one, range(STEPS))
        for module in sharded:
            if isinstance(module, nn.Linear):
                fully_shard(module)
        fully_shard(sharded)
        two = ours(name, without_odd(sharded), state_bits=bits)
        train(sharded, two, range(STEPS))
        if same(alone, sharded) and same_state(one, two):
            print(f"{name} fully_shard")
        ddp = DistributedDataParallel(replicated)
        three = ours(name, without_odd(replicated), state_bits=bits)
        train(ddp, three, range(STEPS))
        if same(alone, replicated) and same_state(one, three):
            print(f"{name} ddp")
    odd(rank)
    resume(rank)
    columns(rank)
    codes(rank)
    refused(rank)
    dist.barrier()
    dist.destroy_process_group()


def odd(rank: int) -> None:
    """Rows that no block divides: float32 state when sharded, said once for each moment, and the steps of float32 state."""
    alone, sharded = model(torch.bfloat16), fully_shard(model(torch.bfloat16))
    one, two = ours("adamw", alone.parameters(), state_bits=32), ours("adamw", sharded.parameters())
    train(alone, one, range(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(sharded, two, range(1))
    p, q = list(alone.parameters())[2], list(sharded.parameters())[2]
    texts = [str(w.message) for w in caught if w.category is QCWarning]
    if (
        len(texts) == 2
        and "[256, 257]" in texts[0]
        and torch.equal(one.state[p]["exp_avg"], whole(two.state[q]["exp_avg"]))
    ):
        print("odd rows")


def resume(rank: int) -> None:
    """A checkpoint of shards, gathered and read again; and one of torch.optim."""
    options = StateDictOptions(full_state_dict=True)
    alone, sharded = model(torch.bfloat16), fully_shard(model(torch.bfloat16))
    one, two = (ours("adamw", net.parameters(), rounding="stochastic") for net in (alone, sharded))
    train(sharded, two, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(sharded, two, options=options))
    weights = {name: whole(p.detach()).clone() for name, p in sharded.named_parameters()}
    train(sharded, two, range(2, 4))
    again = model(torch.bfloat16)
    again.load_state_dict(weights)
    fully_shard(again)
    three = ours("adamw", again.parameters())
    set_optimizer_state_dict(again, three, saved, options=options)
    train(again, three, range(2, 4))
    if same(sharded, again) and same_state(two, three):
        print("resumed")
    train(alone, one, range(2))
    four = ours("adamw", fully_shard(model(torch.bfloat16)).parameters())
    four.load_state_dict(one.stock_state_dict())
    stocked = four.stock_state_dict()["state"]
    exact = one.stock_state_dict()["state"]
    if all(
        # Decoded and encoded again. Below zero the map ends at -0.993, within 2**-7 of what was the largest of a block.
        ((whole(stocked[i][key]) - exact[i][key]).abs() <= exact[i][key].abs().max() * 2.0**-7).all()
        for i in stocked
        for key in ("exp_avg", "exp_avg_sq")
    ):
        print("stock")


def columns(rank: int) -> None:
    """Cut along columns: state is that of the whole, random bits are those of other elements, and of no two the same."""
    mesh = dist.init_device_mesh("cpu", (2,))
    values, grad = torch.randn(64, 512, generator=torch.Generator().manual_seed(1)), torch.ones(64, 512)
    results = []
    for cut in (False, True):
        p = nn.Parameter(distribute_tensor(values, mesh, [Shard(1)]) if cut else values.clone())
        p.grad = distribute_tensor(grad, mesh, [Shard(1)]) if cut else grad
        optimizer = optim.AdamW([p])
        optimizer.step()
        results.append([whole(p.detach()), *(whole(t) for t in optimizer.state[p].values())])
    if all(map(torch.equal, *results)) and len(results[0]) == 6:
        print("columns")
    p = nn.Parameter(distribute_tensor(torch.ones(64, 512).bfloat16(), mesh, [Shard(1)]))
    p.grad = distribute_tensor(grad.bfloat16(), mesh, [Shard(1)])
    optim.SGD([p], lr=2.0**-9).step()
    left, right = whole(p.detach()).chunk(2, 1)
    if not torch.equal(left, right):
        print("columns random")


def codes(rank: int) -> None:
    """Weights of codes, replicated, on halves of a batch: the codes of one process on the batch.

    The loss is linear in weights, inputs are small integers, batches are powers of two: gradients are exact in any order.
    """
    torch.manual_seed(0)
    alone = nn.Sequential(nn.Linear(64, 128), nn.Linear(64, 128))  # side by side
    optim.low_bit_weights(alone)
    halved = copy.deepcopy(alone)
    beside = Beside(halved)
    ddp = DistributedDataParallel(beside)
    one, two = optim.AdamW(alone.parameters(), lr=1e-2), optim.AdamW(halved.parameters(), lr=1e-2)
    start = halved[0].parametrizations.weight.original0.clone()
    mine = []
    for _ in range(STEPS):
        batches = [(torch.randint(-2, 3, (16, 64)).float(), torch.randint(-2, 3, (16, 256)).float()) for _ in range(2)]
        for i, (x, t) in enumerate(batches):
            (Beside(alone)(x) * t).sum(1).mean().backward()
            here = slice(8 * rank, 8 * rank + 8)
            with ddp.no_sync() if i == 0 else nullcontext():
                (ddp(x[here]) * t[here]).sum(1).mean().backward()
        mine.append(all(torch.equal(p.grad, q.grad) for p, q in zip(*map(codes_of, (alone, halved)), strict=True)))
        for optimizer in (one, two):
            optimizer.step()
            optimizer.zero_grad()
    if all(mine) and same(alone, halved) and not torch.equal(start, codes_of(halved)[0]):
        print("codes ddp")


class Beside(nn.Module):
    """Two layers side by side; the first is computed again in the backward pass, if it is told so."""

    def __init__(self, layers: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.layers, self.reentrant = layers, reentrant

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layers
        return torch.cat([checkpoint(first, x, use_reentrant=self.reentrant), second(x)], 1)


def codes_of(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.dtype == torch.uint8]


def refused(rank: int) -> None:
    """What would leave gradients of codes on the process that computed them."""

    def made() -> nn.Sequential:
        net = nn.Sequential(nn.Linear(64, 128), nn.Linear(64, 128))
        optim.low_bit_weights(net)
        return net

    def unused(x: Tensor) -> Tensor:
        return DistributedDataParallel(Beside(made()), find_unused_parameters=True)(x)

    def joined(x: Tensor) -> Tensor:
        ddp = DistributedDataParallel(Beside(made()))
        with ddp.join():
            return ddp(x)

    def again(x: Tensor) -> Tensor:
        return DistributedDataParallel(Beside(made(), reentrant=True))(x.requires_grad_()).sum().backward()

    def sharded(x: Tensor) -> Tensor:
        return fully_shard(Beside(made()))(x)

    def stepped(x: Tensor) -> optim.AdamW:
        return optim.AdamW(fully_shard(made()).parameters())

    def late(x: Tensor) -> list[str]:
        return optim.low_bit_weights(fully_shard(nn.Sequential(nn.Linear(64, 128))))

    for case in (unused, joined, again, sharded, stepped, late):
        try:
            case(torch.ones(8, 64))
        except QCError as error:
            print(f"{case.__name__} {error.code}")


EXPECTED = [f"{name} {how}" for name, *_ in RUNS for how in ("fully_shard", "ddp")]
EXPECTED += ["odd rows", "resumed", "stock", "columns", "columns random", "codes ddp", "unused optim.replicas"]
EXPECTED += [
    "joined optim.replicas",
    "again optim.replicas",
    "sharded optim.sharding",
    "stepped optim.dtype",
    "late optim.sharding",
]

if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
