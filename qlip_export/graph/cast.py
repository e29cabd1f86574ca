"""Retype an FP32 graph to FP16."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_FLOAT_ONLY_INPUTS = {"Resize": (1, 2)}
"""Inputs that the ONNX standard types as float32 whatever the data type (Resize: roi, scales)."""


def cast_to_half(model: ir.Model) -> None:
    """Retype every FP32 value of ``model`` to FP16 in place, inputs, parameters and outputs included."""
    graph = model.graph
    constants: dict[ir.Value, ir.Value] = {}
    for value in graph.inputs:
        _retype(value)
    for node in graph:
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
        for out in node.outputs:
            _retype(out)
        for index, source in enumerate(node.inputs):
            if source is None or source.const_value is None or source.dtype != _FLOAT:
                continue
            if index in _FLOAT_ONLY_INPUTS.get(node.op_type, ()):
                continue
            if source not in constants:
                constants[source] = _half_constant(graph, source)
            node.replace_input_with(index, constants[source])
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        graph.initializers.pop(name)


def _retype(value: ir.Value) -> None:
    if value.dtype == _FLOAT:
        value.type = ir.TensorType(_HALF)


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
