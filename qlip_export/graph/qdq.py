"""Put the input of chosen layers on a symmetric integer grid: QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from qlip_export.errors import QlipError
from qlip_export.graph.layers import find_layers
from qlip_export.quant.ranges import activation_scale


def insert_qdq(model: ir.Model, bits_of: Mapping[str, int], range_of: Mapping[str, float]) -> int:
    """Insert Q/DQ before the activation input of each layer in ``bits_of``, in place.

    The grid is symmetric, per tensor, zero point 0, with ``2^bits - 1`` levels in an INT8 container; fewer
    than 8 bits clip to the narrower grid first. Layers that read the same tensor with the same scale share
    one pair.

    Args:
        model: FP32 graph whose parameters are still inputs.
        bits_of: Activation bits (2 to 8) by layer name; other layers stay as they are.
        range_of: Clipping threshold by layer name: the largest magnitude the grid holds.

    Returns:
        The number of layers whose input is quantized.

    Raises:
        QlipError: A layer has no range, or the graph has no such layer.
    """
    graph = model.graph
    layers = {layer.name: layer for layer in find_layers(graph)}
    if unknown := set(bits_of) - set(layers):
        raise QlipError("layers to quantize are not in the graph", found=", ".join(sorted(unknown)))
    shared: dict[tuple[ir.Value, int, float], ir.Value] = {}
    grids: Counter[tuple[ir.Value, int]] = Counter()
    # In graph order: a shared pair must stand before the first layer that reads it.
    for name in [name for name in layers if name in bits_of]:
        bits = bits_of[name]
        if name not in range_of or not range_of[name] > 0:
            raise QlipError(
                f"no activation range for layer {name!r}",
                expected="a positive clipping threshold",
                found=str(range_of.get(name)),
                fix="run the calibration of this model again",
            )
        node = layers[name].node
        source = node.inputs[0]
        assert source is not None
        scale = activation_scale(range_of[name], bits)
        key = (source, bits, scale)
        if key not in shared:
            # Layers may read one tensor on several grids.
            known_as = f"{source.name}.q{bits}" + (f".{grids[source, bits]}" if grids[source, bits] else "")
            grids[source, bits] += 1
            shared[key] = _quantized(graph, node, name, source, bits, scale, known_as)
        node.replace_input_with(0, shared[key])
    return len(bits_of)


def _quantized(
    graph: ir.Graph, before: ir.Node, layer: str, source: ir.Value, bits: int, scale: float, known_as: str
) -> ir.Value:
    def constant(name: str, value: np.ndarray) -> ir.Value:
        if name in graph.initializers:
            return graph.initializers[name]
        tensor = ir.tensor(value, name=name)
        out = ir.Value(
            name=tensor.name,
            shape=ir.Shape(value.shape),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        graph.register_initializer(out)
        return out

    def insert(op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType) -> ir.Value:
        node = ir.node(op, inputs, name=f"{layer}/input.{name}")
        out = node.outputs[0]
        out.name, out.shape, out.type = f"{known_as}.{name}", source.shape, ir.TensorType(dtype)
        graph.insert_before(before, node)
        return out

    value = source
    if bits < 8:
        limit = np.float32(scale * (2 ** (bits - 1) - 1))
        value = insert(
            "Clip",
            [value, constant(f"{known_as}.min", -limit), constant(f"{known_as}.max", limit)],
            "clip",
            ir.DataType.FLOAT,
        )
    step, zero = constant(f"{known_as}.scale", np.float32(scale)), constant("zero_point", np.int8(0))
    codes = insert("QuantizeLinear", [value, step, zero], "codes", ir.DataType.INT8)
    return insert("DequantizeLinear", [codes, step, zero], "dq", ir.DataType.FLOAT)
