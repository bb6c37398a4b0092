"""Weights as expressions of parameters.

A linear's weight operand is rarely the bare parameter: it may be a chunk of a fused qkv matrix, a transpose
(HF `Conv1D`), a cast, or the decode of packed buffers. Instead of listing such cases, this module finds
every node that is a pure function of parameters, and turns the ones that end as an operand into a
`WeightExpression` that can be evaluated on the real parameters now and again whenever they change.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile import compat
from qcompile.ir.packing import PANEL
from qcompile.ir.scheme import Scheme
from qcompile.passes.match import PURE, memory_of, op_name, shape_of, value_of, writes
from qcompile.runtime.store import WeightExpression


@dataclass(frozen=True)
class Weight:
    """A node that is a function of parameters only.

    Attributes:
        node: the operand.
        roots: parameter placeholders, in order of first use.
        expression: the function.
        path: module path of the first root.
        packed: the `qcompile.decode` node underneath when the weight is already packed, else `None`.
        rounded: the `qcompile.fake_quant` node underneath when the model rounds the weight itself, with learned scales.
        chain: nodes from roots to operand, in graph order.
    """

    node: fx.Node
    roots: tuple[fx.Node, ...]
    expression: WeightExpression
    path: str
    packed: fx.Node | None
    chain: tuple[fx.Node, ...]
    rounded: fx.Node | None = None

    @property
    def scheme(self) -> str:
        """The scheme that was fixed before this graph, "" when none was."""
        if self.packed is not None:
            return str(self.packed.args[1])
        return "" if self.rounded is None else str(self.rounded.args[3])


def is_rounded(node: fx.Node) -> bool:
    """Whether a node rounds a weight with learned scales."""
    return op_name(node) == "fake_quant" and bool(node.args[2])


def is_decode(node: fx.Node) -> bool:
    """Whether a node decodes packed buffers into a float weight."""
    return node.op == "call_function" and node.target in (
        torch.ops.qcompile.decode.default,
        torch.ops.qcompile.decode,
    )


def _keeps_weights(node: fx.Node) -> bool:
    return op_name(node) in PURE or is_rounded(node)


# A step of a source such as L['self']._modules['a.b'].weight or L['layers'][0]: a key in quotes, an index, a name.
_KEY = re.compile(r"""\[('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")\]|(?:\[|\.)(\w+)\]?""")
_REGISTRIES = ("_modules", "_parameters", "_buffers")
_ORIGINAL = re.compile(r"original\d*")  # what torch calls the tensors behind a parametrized one


def parameter_path(node: fx.Node) -> str:
    """Module path of a parameter placeholder: "model.layers.0.mlp.up_proj.weight"."""
    found = _KEY.findall(compat.placeholder_source(node))
    keys = [ast.literal_eval(quoted) if quoted else bare for quoted, bare in found if bare not in _REGISTRIES]
    # The first key names the module inside the compiled frame ("self", "model"), not a part of its path.
    keys = keys[1:] if len(keys) > 1 else keys
    # What stands behind a parametrized weight is that weight to whoever writes a rule.
    if keys[-3:-2] == ["parametrizations"] and _ORIGINAL.fullmatch(keys[-1]):
        keys = [*keys[:-3], keys[-2]]
    return ".".join(keys)


def constant_nodes(graph: fx.Graph, inputs: Mapping[str, Any]) -> set[fx.Node]:
    """Nodes that are pure functions of parameters (or decode packed buffers)."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if isinstance(inputs.get(node.name), torch.nn.Parameter):
                found.add(node)
        elif is_decode(node):
            if all(n.op == "placeholder" for n in node.all_input_nodes):
                found.add(node)
        elif _keeps_weights(node) and node.all_input_nodes and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found - _written(graph, found)


def _written(graph: fx.Graph, constants: set[fx.Node]) -> set[fx.Node]:
    """Nodes that share storage with a parameter the graph itself writes to: those are not constant within a
    call."""
    operands = {operand for node in graph.nodes for operand in writes(node)}
    memory = {memory_of(operand) for operand in operands} - {None}  # also through views that are not in PURE
    stack = [node for node in constants if node in operands or memory_of(node) in memory]
    written: set[fx.Node] = set()
    while stack:
        current = stack.pop()
        if current in constants and current not in written:
            written.add(current)
            stack += [*current.all_input_nodes, *current.users]
    return written


def is_frozen_parameter(node: fx.Node) -> bool:
    """Whether a node is a parameter that Dynamo made a constant of the graph (`torch._inductor.config.freezing`)."""
    owner = node.graph.owning_module
    return node.op == "get_attr" and isinstance(getattr(owner, str(node.target), None), torch.nn.Parameter)


def parameter_roots(graph: fx.Graph, inputs: Mapping[str, Any]) -> dict[fx.Node, fx.Node]:
    """Every node that is a function of parameters only, whatever it computes, and one of these parameters."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if is_decode(node) or is_frozen_parameter(node) or isinstance(inputs.get(node.name), torch.nn.Parameter):
            found[node] = node
            continue
        operands = [n for n in node.all_input_nodes if not isinstance(value_of(n), _NUMBERS)]
        if node.op != "output" and operands and all(n in found for n in operands):
            found[node] = found[operands[0]]
    return found


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def root_path(root: fx.Node) -> str:
    """Module path of a parameter, or of the packed tensors that stand for one."""
    if root.op == "get_attr":
        return str(root.target)
    return parameter_path(root.all_input_nodes[0] if is_decode(root) else root)


def ancestors(node: fx.Node) -> list[fx.Node]:
    """A node and everything that it is computed from, packed weights being the start of it."""
    behind: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current not in behind:
            behind[current] = None
            stack += [] if is_decode(current) else current.all_input_nodes
    return list(behind)


def why_not_constant(node: Any, roots: Mapping[fx.Node, fx.Node]) -> str:
    """Why an operand is no weight (one of `constant_nodes`), in words.

    Args:
        roots: `parameter_roots` of its graph.
    """
    if not isinstance(node, fx.Node):
        return "the weight operand is no tensor of the graph"
    behind = ancestors(node)
    if any(is_frozen_parameter(n) for n in behind):
        return "the parameters are constants of the graph: torch._inductor.config.freezing is on; turn it off"
    if node in roots:
        work = [
            op_name(n) for n in reversed(behind) if not (n.op == "placeholder" or is_decode(n) or _keeps_weights(n))
        ]
        if work:
            return f"the weight operand is arithmetic on parameters ({', '.join(dict.fromkeys(work))})"
        return "the weight operand is not constant: the graph writes to it in place"
    return (
        f"the weight operand is not a parameter: it depends on {'buffers' if buffers_behind(node, roots) else 'inputs'}"
    )


def buffers_behind(node: fx.Node, roots: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
    """The buffers that a node is a function of; none when it depends on inputs too.

    Args:
        roots: `parameter_roots` of its graph.
    """
    inputs = [n for n in ancestors(node) if n.op == "placeholder" and n not in roots]
    return inputs if all("_buffers[" in compat.placeholder_source(n) for n in inputs) else []


def buffer_nodes(graph: fx.Graph, roots: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Nodes that are functions of buffers, and maybe of parameters, but of nothing else. A buffer that the graph writes to
    is no part of it: it holds activations.

    Args:
        roots: `parameter_roots` of the graph.
    """
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            if node not in roots and "_buffers[" in compat.placeholder_source(node):
                found.add(node)
            continue
        operands = [n for n in node.all_input_nodes if not isinstance(value_of(n), _NUMBERS)]
        fixed = all(n in found or n in roots for n in operands)
        if node.op != "output" and fixed and any(n in found for n in operands):
            found.add(node)
    return found - _written(graph, found)


def weight_of(node: Any, constants: set[fx.Node]) -> Weight | None:
    """The weight that a node is, or `None` when it depends on anything but parameters."""
    if not isinstance(node, fx.Node) or node not in constants:
        return None
    chain: list[fx.Node] = []
    roots: list[fx.Node] = []
    seen: set[fx.Node] = set()

    def visit(current: fx.Node) -> None:
        if current in seen:
            return
        seen.add(current)
        if current.op == "placeholder" or is_decode(current):
            roots.append(current)
            return
        for operand in current.all_input_nodes:
            visit(operand)
        chain.append(current)

    visit(node)
    packed = roots[0] if len(roots) == 1 and is_decode(roots[0]) else None
    if packed is None and any(is_decode(root) for root in roots):
        return None  # a mixture of packed and float pieces has no single scheme
    path = parameter_path(roots[0]) if packed is None else parameter_path(packed.all_input_nodes[0])
    expression = expression_of(node, roots, chain, path)
    rounded = [item for item in chain if is_rounded(item)]
    if len(rounded) > 1:
        return None  # pieces with scales of their own
    return Weight(node, tuple(roots), expression, path, packed, tuple(chain), rounded[0] if rounded else None)


def before_rounding(weight: Weight) -> WeightExpression:
    """What a weight that the model rounds is made of: the float weight, then its learned tensors."""
    assert weight.rounded is not None
    results = [weight.rounded.args[0], *weight.rounded.args[2]]  # type: ignore[misc]
    return expression_of(tuple(results), weight.roots, weight.chain, weight.path)


def expression_of(
    result: fx.Node | tuple[fx.Node, ...], roots: Sequence[fx.Node], chain: Sequence[fx.Node], path: str
) -> WeightExpression:
    """Copy the chain into a graph of its own, so that it outlives the graph it was found in."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for index, root in enumerate(roots):
        mapping[root] = graph.placeholder(f"p{index}")
    for item in chain:
        # Names are canonical, so that the same function found in two graphs has the same text.
        mapping[item] = graph.create_node(
            item.op,
            item.target,
            fx.map_arg(item.args, lambda n: mapping[n]),
            fx.map_arg(item.kwargs, lambda n: mapping[n]),
            name=f"v{len(mapping)}",
        )
    graph.output(fx.map_arg(result, lambda n: mapping[n]))
    graph.eliminate_dead_code()
    module = fx.GraphModule(torch.nn.Module(), graph)
    return WeightExpression(module.code.strip(), module.forward, path)


def packed_rows(weight: Weight) -> tuple[int, int] | None:
    """Which rows of its packed table a weight expression reads, `(first row, rows)`; `None` when it is no row
    range, or one that begins inside a panel.

    Packed parts can only be used through views that keep whole rows. Strides and offset of the view decide
    that, on a tensor without storage, so any chain of transposes that cancels out is seen through.
    """
    if weight.rounded is not None:
        n, k = shape_of(weight.rounded)  # type: ignore[misc]
        after = weight.chain[weight.chain.index(weight.rounded) + 1 :]
        views = expression_of(weight.node, [weight.rounded], after, weight.path)
    else:
        assert weight.packed is not None
        n, k = int(weight.packed.args[2]), int(weight.packed.args[3])  # type: ignore[arg-type]
        views = weight.expression
    if not weight.chain:
        return 0, n
    # `meta` keeps sizes, strides and offset, and runs no arithmetic.
    probe = torch.empty(n, k, device="meta")
    view = views.evaluate(probe)
    first, rest = divmod(int(view.storage_offset()), k)
    same_storage = view.untyped_storage()._cdata == probe.untyped_storage()._cdata
    if not same_storage or rest or view.dim() != 2 or view.shape[1] != k or view.stride() != (k, 1):
        return None
    if first % row_unit(Scheme.parse(weight.scheme)):
        return None
    return first, int(view.shape[0])


def row_unit(scheme: Scheme) -> int:
    """How many rows lie together in one piece of packed tensors, which cannot be cut."""
    return 1 if scheme.packing == "rows" else PANEL
