"""Run in a process of its own: are steps those of torch.optim, bit for bit, where torch rounds every operation by itself?

ATEN_CPU_CAPABILITY=default keeps its kernels from contracting products and sums; it has to be set before torch is loaded.
Its square root is not rounded correctly (a vector library's): it is replaced by one that is.
"""

import sys

import torch

from tests.optim.support import STOCK, ours, parameters, stock, train


def main() -> None:
    """Print the names of optimizers that agree."""
    root = torch.Tensor.sqrt
    torch.Tensor.sqrt = lambda x: root(x.double()).to(x.dtype)  # type: ignore[method-assign,assignment]
    for name in STOCK:
        mine, theirs = parameters(), parameters()
        one, other = ours(name, mine, state_bits=32), stock(name, theirs, foreach=False)
        train(one, mine, range(12))
        train(other, theirs, range(12))
        same = all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        stocked, wanted = one.stock_state_dict()["state"], other.state_dict()["state"]
        for index, values in wanted.items():
            same &= all(torch.equal(stocked[index][key], t) for key, t in values.items() if t is not None)
        if same:
            print(name)


if __name__ == "__main__":
    sys.exit(main())
