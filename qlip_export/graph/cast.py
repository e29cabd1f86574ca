"""Retype an FP32 graph to FP16, except where a module must stay in FP32."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from qlip_export.graph.ingest import SCOPE

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_FLOAT_ONLY_INPUTS = {"Resize": (1, 2)}
"""Inputs that the ONNX standard types as float32 whatever the data type (Resize: roi, scales)."""


def cast_to_half(model: ir.Model, keeps_float32: Callable[[str], bool]) -> None:
    """Retype all floating-point values of ``model`` to FP16 in place.

    Nodes whose module ``keeps_float32`` stay in FP32, with Casts on the way in and out, and so do graph
    inputs that feed only such nodes.
    """
    graph = model.graph
    kept = {n for n in graph if keeps_float32(n.metadata_props.get(SCOPE, ""))}
    for value in graph.inputs:
        if value.dtype == _FLOAT and not (value.uses() and all(u.node in kept for u in value.uses())):
            value.type = ir.TensorType(_HALF)
    for node in graph:
        if node in kept:
            continue
        if node.op_type == "Cast" and node.attributes["to"].as_int() == _FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(_HALF))
        for out in node.outputs:
            if out.dtype == _FLOAT:
                out.type = ir.TensorType(_HALF)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
    for node in list(graph):
        for index, source in enumerate(node.inputs):
            if source is None or source.dtype not in (_FLOAT, _HALF):
                continue
            float_only = node in kept or index in _FLOAT_ONLY_INPUTS.get(node.op_type, ())
            wanted = _FLOAT if float_only else _HALF
            if source.dtype != wanted and not (node.op_type == "Cast" and node not in kept):
                if (source, wanted) not in casts:
                    casts[source, wanted] = _converted(graph, node, source, wanted)
                node.replace_input_with(index, casts[source, wanted])
    for name in [n for n, v in graph.initializers.items() if not v.uses()]:
        graph.initializers.pop(name)


def _converted(graph: ir.Graph, before: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return ``value`` in ``dtype``: constants are converted now, anything else through a Cast node."""
    name = f"{value.name}.{dtype.name.lower()}"
    if value.const_value is not None:
        array = value.const_value.numpy().astype(np.float16 if dtype == _HALF else np.float32)
        tensor = ir.tensor(array, name=name)
        constant = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(dtype), const_value=tensor
        )
        graph.register_initializer(constant)
        return constant
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)}, name=name)
    cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].type = (
        name,
        value.shape,
        ir.TensorType(dtype),
    )
    graph.insert_before(before, cast)
    return cast.outputs[0]
