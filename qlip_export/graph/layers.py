"""Find the layers of a graph: the Conv and Linear operations whose weight is a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_ir as ir


@dataclass(frozen=True)
class Layer:
    """One Conv2d or Linear.

    Attributes:
        name: Module path in the denoiser, e.g. ``down_blocks.0.resnets.0.conv1``.
        kind: ``conv`` or ``linear``.
        weight: Name of the weight parameter, shape (out, in, ...).
        transposed: The graph multiplies by the transposed weight through a Transpose node.
        macs: Multiply-accumulates of one call at the graph's static shapes.
        node: The operation.
    """

    name: str
    kind: str
    weight: str
    transposed: bool
    macs: int
    node: ir.Node


def find_layers(graph: ir.Graph) -> list[Layer]:
    """Return all layers in topological order."""
    return [layer for node in graph if (layer := _layer_of(node)) is not None]


def _layer_of(node: ir.Node) -> Layer | None:
    if node.op_type not in ("Conv", "MatMul", "Gemm") or len(node.inputs) < 2 or node.inputs[1] is None:
        return None
    weight, transposed = node.inputs[1], False
    producer = weight.producer()
    if producer is not None and producer.op_type == "Transpose" and producer.inputs[0] is not None:
        weight, transposed = producer.inputs[0], True
    if not weight.is_graph_input() or weight.name is None or not weight.name.endswith(".weight"):
        return None
    return Layer(
        name=weight.name.removesuffix(".weight"),
        kind="conv" if node.op_type == "Conv" else "linear",
        weight=weight.name,
        transposed=transposed,
        macs=_macs(node, static_shape(weight)),
        node=node,
    )


def _macs(node: ir.Node, weight: tuple[int, ...]) -> int:
    out = static_shape(node.outputs[0])
    if node.op_type == "Conv":
        return prod(out) * prod(weight[1:])
    return prod(out) * weight[1]


def static_shape(value: ir.Value) -> tuple[int, ...]:
    """Return a value's shape as integers.

    Raises:
        ValueError: The shape is unknown or symbolic; builds are static throughout.
    """
    if value.shape is None or not all(isinstance(d, int) for d in value.shape):
        raise ValueError(f"value {value.name!r} has no static shape: {value.shape}")
    return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]
