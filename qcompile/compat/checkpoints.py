"""Marks that tell AOTAutograd's partitioner to compute a node again in the backward pass instead of keeping its result.

They are what `torch.utils.checkpoint` leaves on a graph, and travel with a node's metadata from Dynamo's graph to the joint
one: a policy, and the number of the checkpointed region. What a region hands to a later one, of a higher number, is kept.
"""

from __future__ import annotations

from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

RECOMPUTE_MARKS = ("recompute", "ac_graph_id")
_ALONE = -1  # below every region: nothing that a region hands to such a node is kept for its sake


def mark_checkpoint(node: fx.Node, region: int) -> None:
    """Mark a node as one of a checkpointed region, numbered in the order of execution from 0."""
    node.meta["recompute"], node.meta["ac_graph_id"] = CheckpointPolicy.PREFER_RECOMPUTE, region


def mark_recomputed(node: fx.Node) -> None:
    """Mark a node by itself: what it computes is never kept. A node of a region keeps that mark."""
    if checkpoint_of(node) is None:
        node.meta["recompute"], node.meta["ac_graph_id"] = CheckpointPolicy.MUST_RECOMPUTE, _ALONE


def mark_kept(node: fx.Node, region: int) -> None:
    """Mark a node of a checkpointed region as one whose result is kept all the same."""
    node.meta["recompute"], node.meta["ac_graph_id"] = CheckpointPolicy.MUST_SAVE, region


def checkpoint_of(node: fx.Node) -> int | None:
    """The region that a node belongs to, `None` outside of all."""
    region = node.meta.get("ac_graph_id", _ALONE)
    return None if region == _ALONE else int(region)


def is_selective(body: fx.GraphModule) -> bool:
    """Whether the body of a checkpoint decides node by node what is kept (`context_fn`)."""
    return "_checkpoint_context_fn" in body.meta
