"""Sites: the contractions and lookups of a graph, described without the graph.

`detect` writes them, rules match on them, the ledger prints them. Keeping them free of FX nodes lets a plan
be stored, compared and tested without a compiler.
"""

from __future__ import annotations

from dataclasses import dataclass

DEVICES = ("cpu", "gpu")
KINDS = ("linear", "head", "embedding", "bmm", "conv", "attention", "other")


@dataclass(frozen=True)
class Site:
    """One contraction or lookup.

    Attributes:
        index: position in the graph; the identity of the site inside one plan.
        kind: one of `KINDS`. A *head* is a linear that shares an embedding's weight or is far wider than deep.
            *other*: an operator that reads a weight in a way that is not handled.
        path: module path of the weight ("model.layers.0.mlp.up_proj.weight"), or "" when no module owns it.
        source: user's line, "file.py:12", or "".
        n: output features (rows of an embedding table), 0 when it has no weight.
        k: input features (width of an embedding), 0 when it has no weight.
        m: rows of the activation for the example input; `None` when symbolic without a hint.
        flops: multiply-adds times two for the example input; 0 for lookups.
        dtype: activation dtype, "float32".
        weight_dtype: dtype of the float weight.
        batch: number of stacked weights (1 for a plain linear).
        bias: whether a bias is added.
        refused: why no scheme can apply here ("" when one can).
        device: "cpu" or "gpu", by who writes the kernels.
        trained: whether autograd records there and may ask for the weight's gradient: it stays float, and is rounded anew in
            every step.
    """

    index: int
    kind: str
    path: str
    source: str
    n: int
    k: int
    m: int | None
    flops: int
    dtype: str
    weight_dtype: str = "float32"
    batch: int = 1
    bias: bool = False
    refused: str = ""
    device: str = "cpu"
    trained: bool = False

    @property
    def weights(self) -> int:
        """Number of weight elements."""
        return self.n * self.k * self.batch
