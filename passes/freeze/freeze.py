"""Replace float weights by packed tensors from the store, and contractions by `qmm` / `qembedding`.

Packed tensors become extra graph inputs in front of the user's; a float weight that nobody reads any more
stops being an input at all. The wrapper in `runtime.frozen` keeps the calling convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile import compat
from qcompile.ir.matmul import MatmulSpec
from qcompile.ir.scheme import Scheme
from qcompile.passes.base import PackedInput, Pass, PassContext
from qcompile.passes.detect.sites import SITE
from qcompile.passes.detect.weights import Weight, before_rounding, constant_nodes, packed_rows, row_unit, weight_of
from qcompile.passes.match import argument, drop_dead, insert, op_name, pick, shape_of, value_of
from qcompile.runtime.store import Encoding, Entry, WeightExpression


@dataclass(frozen=True)
class _Packed:
    """Graph nodes of one packed tensor list, and the rows of it that are meant."""

    nodes: tuple[fx.Node, ...]
    rows: int


class Freeze(Pass):
    """Weights are encoded once, and packed tensors become inputs of the graph."""

    name: ClassVar[str] = "freeze"
    requires: ClassVar[tuple[str, ...]] = ("resolve",)

    def run(self, gm: fx.GraphModule, ctx: PassContext) -> None:
        work = _Freezer(gm.graph, ctx)
        groups: dict[int, list[fx.Node]] = {}
        for node in list(gm.graph.nodes):
            index = node.meta.get(SITE)
            if index is None or op_name(node) not in ("linear", "embedding") or not ctx.plan.decisions[index].packable:
                continue
            group = ctx.plan.decisions[index].group
            if op_name(node) == "embedding":
                work.lookup(node)
            elif group < 0:
                work.matmul([node])
            else:
                groups.setdefault(group, []).append(node)
        for members in groups.values():
            work.matmul(members)
        drop_dead(gm.graph)
        for node in list(gm.graph.nodes):
            if (
                node.op == "placeholder"
                and not node.users
                and isinstance(ctx.inputs.get(node.name), torch.nn.Parameter)
            ):
                gm.graph.erase_node(node)


class _Freezer:
    def __init__(self, graph: fx.Graph, ctx: PassContext) -> None:
        self.graph, self.ctx = graph, ctx
        self.constants = constant_nodes(graph, ctx.inputs)
        self.first = next(iter(graph.nodes))
        self.placeholders: dict[int, tuple[fx.Node, ...]] = {}  # by id of the entry
        self.counted: set[tuple[object, ...]] = set()

    def lookup(self, node: fx.Node) -> None:
        decision = self.ctx.plan.decisions[node.meta[SITE]]
        assert decision.weight is not None
        table = argument(node, 1, "weight")
        packed, site = self.pack(node, decision.weight), decision.site
        with self.graph.inserting_before(node):
            new = insert(
                self.graph,
                torch.ops.qcompile.qembedding.default,
                argument(node, 0, "input"),
                list(packed.nodes),
                str(decision.weight),
                packed.rows,
                site.k,
                value_of(table).dtype,
                like=node,
            )
        new.meta[SITE] = node.meta[SITE]
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def matmul(self, nodes: Sequence[fx.Node]) -> None:
        """One qmm for one linear or a merged group, placed where the first member stands."""
        head = nodes[0]
        decision = self.ctx.plan.decisions[head.meta[SITE]]
        assert decision.weight is not None
        packed = [self.pack(node, decision.weight) for node in nodes]
        biases = [argument(node, 2, "bias") for node in nodes]
        with self.graph.inserting_before(head):
            bias = self.bias(nodes, biases, [p.rows for p in packed])
            spec = MatmulSpec(
                decision.weight,
                tuple(p.rows for p in packed),
                decision.site.k,
                decision.act,
                "acc+e0" if bias is not None else "",
                ("row",) if bias is not None else (),
            )
            new = insert(
                self.graph,
                torch.ops.qcompile.qmm.default,
                argument(head, 0, "input"),
                [n for p in packed for n in p.nodes],
                [bias] if bias is not None else [],
                str(spec),
                like=head,
            )
            new.meta[SITE] = head.meta[SITE]
            pieces = [new]
            if len(nodes) > 1:
                split = insert(self.graph, torch.split, new, [p.rows for p in packed], -1, like=head)
                picked = [pick(self.graph, split, i, head) for i in range(len(nodes))]
                # Each member's result was a contiguous tensor of its own, and users may rely on that; see `pieces`.
                dense = {"memory_format": torch.contiguous_format}
                pieces = [insert(self.graph, torch.clone, piece, like=head, **dense) for piece in picked]
        for node, piece in zip(nodes, pieces, strict=True):
            node.replace_all_uses_with(piece)
            self.graph.erase_node(node)

    def bias(self, nodes: Sequence[fx.Node], biases: Sequence[fx.Node | None], rows: Sequence[int]) -> fx.Node | None:
        """The bias over all columns: the operand itself for one member, a frozen concatenation for a
        group."""
        if all(bias is None for bias in biases):
            return None
        if len(nodes) == 1:
            return biases[0]
        found = [None if bias is None else weight_of(bias, self.constants) for bias in biases]
        roots = [root for weight in found if weight is not None for root in weight.roots]
        text = f"bias {list(rows)} " + " | ".join(
            "none" if weight is None else weight.expression.text for weight in found
        )

        # The expression outlives the graph: it must not hold its nodes.
        takes = [None if weight is None else (len(weight.roots), weight.expression.evaluate) for weight in found]

        def evaluate(*values: torch.Tensor) -> torch.Tensor:
            rest, pieces = list(values), []
            for take, count in zip(takes, rows, strict=True):
                if take is None:
                    pieces.append(torch.zeros(count, device=values[0].device, dtype=values[0].dtype))
                else:
                    pieces.append(take[1](*rest[: take[0]]))
                    rest = rest[take[0] :]
            return torch.cat(pieces)

        where = next(weight.path for weight in found if weight is not None)
        entry = self.entry(roots, Encoding(WeightExpression(text, evaluate, where), None))
        return self.inputs(entry, roots)[0]

    def pack(self, node: fx.Node, scheme: Scheme) -> _Packed:
        """Packed operands of a site's weight, encoded by the store or already packed in the graph."""
        weight = weight_of(argument(node, 1, "weight"), self.constants)
        assert weight is not None
        if weight.packed is not None:
            packed, before, after = self.already_packed(weight)
            parts = tuple(weight.packed.args[0])  # type: ignore[arg-type]
            self.account(node, scheme, (parts, packed_rows(weight)), before, after, None)
            return packed
        decision, seed = self.ctx.plan.decisions[node.meta[SITE]], self.ctx.options.seed
        if weight.rounded is None:
            encoding = Encoding(weight.expression, scheme, decision.fit, seed, decision.min_sqnr)
        else:
            estimator = str(weight.rounded.args[4])
            encoding = Encoding(before_rounding(weight), scheme, decision.fit, seed, estimator=estimator)
        entry = self.entry(weight.roots, encoding)
        value = value_of(weight.node)
        before = value.numel() * value.element_size()
        self.account(node, scheme, (id(entry),), before, entry.nbytes, entry)
        return _Packed(self.inputs(entry, weight.roots), int(value.shape[0]))

    def account(
        self,
        node: fx.Node,
        scheme: Scheme,
        key: tuple[object, ...],
        before: int,
        after: int,
        entry: Entry | None,
    ) -> None:
        """Bytes go to the first site that reads an entry, so that sums over the ledger are what memory
        holds."""
        fresh = key not in self.counted
        self.counted.add(key)
        self.ctx.plan.update(
            node.meta[SITE],
            bytes_before=before if fresh else 0,
            bytes_after=after if fresh else 0,
            entry=entry,
            packed=True,
        )

    def already_packed(self, weight: Weight) -> tuple[_Packed, int, int]:
        assert weight.packed is not None
        parts, rows = weight.packed.args[0], packed_rows(weight)
        assert isinstance(parts, (list, tuple))
        assert rows is not None
        first, count = rows
        nodes = tuple(parts)
        total = shape_of(parts[0])
        assert total is not None
        if (first, count) != (0, int(weight.packed.args[2])):  # type: ignore[arg-type]
            unit = row_unit(Scheme.parse(str(weight.packed.args[1])))
            start, panels = first // unit, -(-count // unit)
            # In front of all calls: a merged matmul stands where its first member does, maybe before this decode.
            with self.graph.inserting_before(next(n for n in self.graph.nodes if n.op != "placeholder")):
                nodes = tuple(insert(self.graph, torch.narrow, p, 0, start, panels, like=weight.packed) for p in nodes)
        values = [value_of(p) for p in nodes]
        width = torch.empty((), dtype=weight.packed.args[4]).element_size()  # type: ignore[arg-type]
        before = count * int(weight.packed.args[3]) * width  # type: ignore[arg-type]
        return _Packed(nodes, count), before, sum(v.numel() * v.element_size() for v in values)

    def entry(self, roots: Sequence[fx.Node], encoding: Encoding) -> Entry:
        # A bad weight is an error of the call: another module with an equal graph, or a mended weight, runs this code.
        return self.ctx.store.entry([self.ctx.inputs[root.name] for root in roots], encoding, later=True)

    def inputs(self, entry: Entry, roots: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
        """Placeholders for an entry's parts, made on first use."""
        known = self.placeholders.get(id(entry))
        if known is not None:
            return known
        nodes = []
        with self.graph.inserting_before(self.first):
            for part, tensor in enumerate(entry.parts):
                name = f"packed_{len(self.ctx.packed)}"
                nodes.append(compat.add_placeholder(self.graph, name, tensor))
                self.ctx.packed.append(PackedInput(nodes[-1].name, entry, part, tuple(r.name for r in roots)))
        self.placeholders[id(entry)] = tuple(nodes)
        return tuple(nodes)
