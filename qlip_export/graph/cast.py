"""Retype an FP32 graph to FP16, all of it or around layers that stay in FP32."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_ir as ir

from qlip_export.graph.layers import find_layers

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_FLOAT_ONLY_INPUTS = {"Resize": (1, 2)}
"""Inputs that the ONNX standard types as float32 whatever the data type (Resize: roi, scales)."""


def cast_to_half(model: ir.Model, float_layers: Collection[str] = ()) -> None:
    """Retype every FP32 value of ``model`` to FP16 in place, inputs, parameters and outputs included.

    Layers in ``float_layers`` and their biases stay in FP32, and so does what computes their input from the
    outputs of other layers: an activation of 32 bits that comes through FP16 has 16. Where types meet, a
    value is cast once. An input of the graph stays FP32 where something in FP32 reads it; its outputs are
    FP16.
    """
    graph = model.graph
    wide = _wide_nodes(graph, float_layers)
    for value in graph.inputs:
        if not any(use.node in wide for use in value.uses()):
            _retype(value)
    for node in graph:
        if node in wide:
            continue
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
        for out in node.outputs:
            _retype(out)
    made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        wanted = _FLOAT if node in wide else _HALF
        for index, source in enumerate(node.inputs):
            if source is None or source.dtype not in (_FLOAT, _HALF) or source.dtype == wanted:
                continue
            if node.op_type == "Cast" or index in _FLOAT_ONLY_INPUTS.get(node.op_type, ()):
                continue
            if (source, wanted) not in made:
                made[source, wanted] = (
                    _half_constant(graph, source) if source.const_value is not None else _cast(graph, source)
                )
            node.replace_input_with(index, made[source, wanted])
    for index, value in enumerate(graph.outputs):
        if value.dtype == _FLOAT:
            name, value.name = value.name, f"{value.name}.inner"
            graph.outputs[index] = made.get((value, _HALF)) or _cast(graph, value)
            graph.outputs[index].name = name
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        graph.initializers.pop(name)


def _wide_nodes(graph: ir.Graph, float_layers: Collection[str]) -> set[ir.Node]:
    """Return the nodes that compute in FP32."""
    of_layer: dict[ir.Node, bool] = {}
    for layer in find_layers(graph):
        is_float = layer.name in float_layers
        of_layer[layer.node] = is_float
        for use in layer.node.outputs[0].uses():
            if use.node.op_type == "Add" and any(v is not None and _is_bias(v) for v in use.node.inputs):
                of_layer[use.node] = is_float
    wide: set[ir.Node] = set()
    for node in reversed(list(graph)):
        read_by_wide = any(use.node in wide for out in node.outputs for use in out.uses())
        if of_layer.get(node, read_by_wide):
            wide.add(node)
    return wide


def _is_bias(value: ir.Value) -> bool:
    return value.is_graph_input() and value.name is not None and value.name.endswith(".bias")


def _retype(value: ir.Value) -> None:
    if value.dtype == _FLOAT:
        value.type = ir.TensorType(_HALF)


def _cast(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return ``value`` in the other of the two types."""
    target = _HALF if value.dtype == _FLOAT else _FLOAT
    node = ir.node("Cast", [value], {"to": int(target)}, name=f"{value.name}.as_{target.name.lower()}")
    out = node.outputs[0]
    out.name, out.shape, out.type = str(node.name), value.shape, ir.TensorType(target)
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return out


def _half_constant(graph: ir.Graph, value: ir.Value) -> ir.Value:
    assert value.const_value is not None
    array = value.const_value.numpy().astype(np.float16)
    name = f"{value.name}.half"
    constant = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(_HALF),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(constant)
    return constant
