"""Cut a graph into blocks by the module each node came from.

Nodes outside any block join the earliest block that consumes them, so that what they produce crosses no
boundary needlessly. Live values between blocks become each block's inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir

from qlip_export.errors import QlipError
from qlip_export.graph.ingest import module_of
from qlip_export.graph.layers import static_shape


@dataclass(frozen=True)
class Block:
    """A connected piece of the denoiser, compiled as one engine.

    Attributes:
        name: E.g. ``down_blocks.0``.
        model: Its graph; runtime inputs first, then its parameters.
        inputs: Names of the runtime inputs.
        outputs: Names of the outputs.
    """

    name: str
    model: ir.Model
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def split(
    model: ir.Model, runtime_inputs: tuple[str, ...], block_of: Callable[[str], str | None]
) -> list[Block]:
    """Return the blocks of ``model`` in the order in which they run.

    Args:
        model: Ingested graph; it is not changed.
        runtime_inputs: Names of the graph inputs that are no parameters.
        block_of: Block name of a module path, or ``None`` for modules between blocks.

    Raises:
        QlipError: The pattern cuts the graph so that a block would need the output of a later one.
    """
    nodes = list(model.graph)
    assigned, order = _assign(nodes, block_of)
    rank = {name: i for i, name in enumerate(order)}
    for node in nodes:
        for value in node.inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and rank[assigned[producer]] > rank[assigned[node]]:
                raise QlipError(
                    f"block {assigned[node]!r} would need what the later {assigned[producer]!r} computes",
                    expected="block patterns that follow the order of computation",
                    found=f"node {producer.name!r} -> {node.name!r}",
                    fix="correct the family's block patterns",
                )
    names = _boundary_names(model.graph, nodes, assigned)
    return [
        _extract(model, name, [n for n in nodes if assigned[n] == name], runtime_inputs, names)
        for name in order
    ]


def _assign(
    nodes: list[ir.Node], block_of: Callable[[str], str | None]
) -> tuple[dict[ir.Node, str], list[str]]:
    """Return the block of every node, and the blocks in the order in which they run."""
    found: dict[ir.Node, str | None] = {}
    for node in nodes:
        module = module_of(node)
        found[node] = block_of(module) if module else None
    order = _order(nodes, found)
    rank = {name: i for i, name in enumerate(order)}
    if not rank:
        raise QlipError("no node of the graph belongs to a block", fix="correct the family's block patterns")
    for node in reversed(nodes):
        if found[node] is None:
            users = {found[u.node] for o in node.outputs for u in o.uses()}
            ranks = [rank[b] for b in users if b is not None]
            found[node] = order[min(ranks, default=-1)]  # what nothing consumes is an output: the last block
    return {node: block for node, block in found.items() if block is not None}, order


def _order(nodes: list[ir.Node], found: dict[ir.Node, str | None]) -> list[str]:
    """Return the blocks so that each comes after those it reads from, else as they appear.

    Blocks that read from each other have no such order; they come last, as they appear.
    """
    needs: dict[str, set[str]] = {}
    sources: dict[ir.Node, set[str]] = {}  # blocks that a node reads from, through nodes that belong to none
    for node in nodes:
        producers = [p for v in node.inputs if v is not None and (p := v.producer()) is not None]
        reads: set[str] = set()
        for producer in producers:
            block = found[producer]
            reads |= sources[producer] if block is None else {block}
        sources[node] = reads
        own = found[node]
        if own is not None:
            needs.setdefault(own, set()).update(reads - {own})
    order: list[str] = []
    while ready := next((b for b, needed in needs.items() if needed <= set(order)), None):
        order.append(ready)
        del needs[ready]
    return order + list(needs)


def _boundary_names(
    graph: ir.Graph, nodes: list[ir.Node], assigned: dict[ir.Node, str]
) -> dict[ir.Value, str]:
    """Name every value that leaves its block after the block, keeping the names of graph outputs."""
    names: dict[ir.Value, str] = {}
    counts: dict[str, int] = {}
    graph_outputs = set(graph.outputs)
    for node in nodes:
        for value in node.outputs:
            if value in graph_outputs and value.name is not None:
                names[value] = value.name
            elif any(assigned[user.node] != assigned[node] for user in value.uses()):
                index = counts.get(assigned[node], 0)
                counts[assigned[node]] = index + 1
                names[value] = f"{assigned[node]}_out{index}"
    return names


def _extract(
    model: ir.Model,
    name: str,
    nodes: list[ir.Node],
    runtime_inputs: tuple[str, ...],
    names: dict[ir.Value, str],
) -> Block:
    mapping: dict[ir.Value, ir.Value] = {}
    inputs: list[ir.Value] = []
    parameters: list[ir.Value] = []
    initializers: list[ir.Value] = []
    inside = set(nodes)

    def outer(value: ir.Value) -> ir.Value:
        """Return this block's copy of a value that it does not produce."""
        if value not in mapping:
            copy = ir.Value(name=names.get(value, value.name), shape=value.shape, type=value.type)
            if value.is_initializer():
                copy.const_value = value.const_value
                initializers.append(copy)
            elif value.is_graph_input() and value.name not in runtime_inputs:
                parameters.append(copy)
            else:
                inputs.append(copy)
            mapping[value] = copy
        return mapping[value]

    copies = []
    for node in nodes:
        sources = [
            None if v is None else (mapping[v] if v.producer() in inside else outer(v)) for v in node.inputs
        ]
        copy = ir.Node(
            node.domain,
            node.op_type,
            sources,
            list(node.attributes.values()),
            num_outputs=len(node.outputs),
            name=node.name,
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = names.get(old, old.name), old.shape, old.type
            mapping[old] = new
        copies.append(copy)
    graph_outputs = set(model.graph.outputs)
    outputs = [
        mapping[value]
        for node in nodes
        for value in node.outputs
        if value in graph_outputs or any(user.node not in inside for user in value.uses())
    ]
    for value in (*inputs, *outputs):
        static_shape(value)
    graph = ir.Graph(
        inputs + parameters,
        outputs,
        nodes=copies,
        initializers=initializers,
        opset_imports=dict(model.graph.opset_imports),
        name=name,
    )
    block = ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
    return Block(name, block, tuple(str(v.name) for v in inputs), tuple(str(v.name) for v in outputs))
