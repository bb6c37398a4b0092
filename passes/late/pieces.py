"""Read the pieces of a merged matmul where they lie.

`freeze` copies each member's columns out of a merged result, because the user's graph may ask for what only a
tensor of its own has: contiguous rows to `view`, a place to write into. On the functional graph nobody can ask any
more, except through the results that leave it, and Inductor's views work on any strides. So the other copies go.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from torch import fx

from qcompile.passes.base import Pass, PassContext, Stage
from qcompile.passes.match import op_name


class Pieces(Pass):
    """Drop copies of a merged matmul's pieces that no output needs."""

    name: ClassVar[str] = "pieces"
    stage: ClassVar[Stage] = "post"

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        for node in list(gm.graph.nodes):
            copies = node.target is torch.ops.aten.clone.default and _is_piece(node.args[0])
            if copies and not any(user.op == "output" for user in node.users):
                node.replace_all_uses_with(node.args[0])
                gm.graph.erase_node(node)


def _is_piece(node: object) -> bool:
    """Whether a node picks one member's columns out of a `qmm`."""
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return False
    split = node.args[0]
    if not isinstance(split, fx.Node) or op_name(split) not in ("split_with_sizes", "split"):
        return False
    source = split.args[0]
    return isinstance(source, fx.Node) and source.target is torch.ops.qcompile.qmm.default
