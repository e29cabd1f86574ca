"""Graphs as files: checked when they are written, and without what shape inference tells their readers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir

from qlip_export.errors import QlipError


def save(model: ir.Model, path: Path) -> None:
    """Check types and shapes, then write the graph; weights stay where they are.

    Raises:
        QlipError: The graph is not well typed, or no valid ONNX.
    """
    proto = ir.to_proto(model)
    try:
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    except onnx.shape_inference.InferenceError as error:
        raise QlipError(f"the graph {model.graph.name} is not well typed", found=str(error)) from error
    _drop_inferable(proto)
    path.write_bytes(proto.SerializeToString())
    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise QlipError(f"the graph {model.graph.name} is not valid ONNX", found=str(error)) from error


def load(path: Path) -> ir.Model:
    """Return a graph with the types and shapes of all its values; weights stay where they are.

    Raises:
        QlipError: The ONNX library here infers less than the one that left them out.
    """
    proto = onnx.load(path, load_external_data=False)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    outputs = [value for node in model.graph for value in node.outputs if value.name]
    if untyped := [value.name for value in outputs if value.dtype is None]:
        raise QlipError(
            f"onnx {onnx.__version__} does not tell the types of all values in {path}",
            found=f"none for {untyped[0]!r}",
            fix="pip install --upgrade onnx",
        )
    ir.external_data.set_base_dir(model.graph, path.parent)
    return model


def _drop_inferable(proto: onnx.ModelProto) -> None:
    """Describe only those values between nodes that shape inference says nothing of, or something else."""
    opsets = {opset.domain: opset.version for opset in proto.opset_import}
    described = {value.name: value for value in proto.graph.value_info}
    for tensor in proto.graph.initializer:
        described.pop(tensor.name, None)  # these tell their types themselves
    unknown = {name for node in proto.graph.node if not _is_inferable(node, opsets) for name in node.output}
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(value for name, value in described.items() if name in unknown)
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    proto.graph.value_info.extend(value for name, value in described.items() if inferred.get(name) != value)


def _is_inferable(node: onnx.NodeProto, opsets: Mapping[str, int]) -> bool:
    try:
        schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
    except onnx.defs.SchemaError:
        return False
    return schema.has_type_and_shape_inference_function
