"""What precision a typed graph asks of each layer, and where in it a library's complaint points."""

from __future__ import annotations

import re
from pathlib import Path

import onnx_ir as ir

from qlip_export.graph.ingest import module_of
from qlip_export.spec import Asked

_NAMES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}


def asked_precisions(model: ir.Model) -> dict[str, Asked]:
    """Return the layers of a bound graph by the name of their node."""
    return {
        str(node.name): Asked(_layer_name(node), _precision(node))
        for node in model.graph
        if node.op_type in ("Conv", "MatMul", "Gemm") and _is_constant(node.inputs[1])
    }


def locate(onnx: Path, message: str) -> str:
    """Return the file's name, and the node that a library's ``message`` names with its operator and layer."""
    words = set(re.findall(r"[\w.:/-]+", message))
    nodes = list(ir.load(onnx).graph)
    named = [n for n in nodes if n.name in words or any(out.name in words for out in n.outputs)]
    if not named and _UNSUPPORTED.search(message):
        operators = set(re.findall(r"\w+", message))  # some libraries name the operator alone
        named = [node for node in nodes if node.op_type in operators]
    if not named:
        return onnx.name
    layer = module_of(named[0])
    where = f"{onnx.name}: node {named[0].name!r} ({named[0].op_type})"
    return where + (f" of layer {layer!r}" if layer else "")


_UNSUPPORTED = re.compile(
    "not support|unsupported|not a registered|not implemented|no conversion rule", re.IGNORECASE
)


def _layer_name(node: ir.Node) -> str:
    # The checkpoint's name of the weight is what stays of a layer when exporters move its node.
    value, name = node.inputs[1], ""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type != "Transpose":
            name = module_of(producer)
        value = producer.inputs[0]
    return name or str(value.name if value is not None else "").split(".weight")[0]


def _precision(node: ir.Node) -> str:
    source, weight = node.inputs[:2]
    assert source is not None and weight is not None
    pair = source.producer()
    if pair is not None and pair.op_type == "DequantizeLinear":
        codes = pair.inputs[0]
        if codes is not None and codes.dtype == ir.DataType.INT8 and not codes.is_initializer():
            return "int8"
    dtype = source.dtype or weight.dtype  # not every value is typed; a layer's operands are of one type
    return _NAMES[dtype] if dtype in _NAMES else str(dtype).lower()


def _is_constant(value: ir.Value | None) -> bool:
    while value is not None and not value.is_initializer():
        producer = value.producer()
        if producer is None or producer.op_type not in ("DequantizeLinear", "Cast", "Transpose"):
            return False
        value = producer.inputs[0]
    return value is not None
