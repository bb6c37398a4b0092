"""What a graph says about its nodes once: which can be weights, which parameters they are made of, which run recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakIdKeyDictionary

from qcompile.passes.base import PassContext
from qcompile.passes.detect.weights import Weight, constant_nodes, is_decode, parameter_roots
from qcompile.passes.match import transformed

STAND_IN = torch.nn.Parameter(torch.empty(0), requires_grad=False)  # for packed weights, which are no parameters


@dataclass(frozen=True)
class Scope:
    """A graph, and what describing its nodes needs to know about it.

    Attributes:
        constants: nodes that can be weights.
        roots: functions of parameters, each with one of these.
        recorded: nodes that run while autograd records.
        transformed: nodes inside a transform of `torch.func`.
        inputs: real parameters by the names of their placeholders.
        tables: tensors that embeddings read, see `Store.tables`.
        refused: why nothing in this graph can be quantized, "" when something can.
        origin: of the call that holds this graph, "" for Dynamo's own (see `PassContext.origins`).
    """

    graph: fx.Graph
    constants: set[fx.Node]
    roots: dict[fx.Node, fx.Node]
    recorded: set[fx.Node]
    transformed: set[fx.Node]
    inputs: Mapping[str, Any]
    ctx: PassContext
    tables: WeakIdKeyDictionary
    refused: str = ""
    origin: str = ""

    @classmethod
    def of(
        cls,
        graph: fx.Graph,
        inputs: Mapping[str, Any],
        recorded: set[fx.Node],
        ctx: PassContext,
        tables: WeakIdKeyDictionary,
        refused: str = "",
        origin: str = "",
    ) -> Scope:
        constants = constant_nodes(graph, inputs)
        roots = parameter_roots(graph, inputs)
        return cls(graph, constants, roots, recorded, transformed(graph), inputs, ctx, tables, refused, origin)

    def tensors(self, weight: Weight) -> list[torch.Tensor]:
        """What a weight is made of: its parameters, or the packed tensors that stand for them."""
        nodes = [n for root in weight.roots for n in (root.all_input_nodes if is_decode(root) else [root])]
        return [
            tensor for node in nodes if (tensor := self.inputs.get(node.name)) is not STAND_IN and tensor is not None
        ]

    def looked_up(self, weight: Weight) -> bool:
        """Whether an embedding reads the same tensors: here, or in a graph that was compiled before."""
        tensors = self.tensors(weight)
        return bool(tensors) and all(tensor in self.tables for tensor in tensors)
