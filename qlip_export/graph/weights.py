"""The one weight file of a bundle: each weight once, packed, and an index that says where.

Layout: raw little-endian tensors, each aligned to 64 bytes, addressed by ONNX external data (offset, length).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qlip_export.errors import QlipError
from qlip_export.graph.layers import Layer, static_shape
from qlip_export.quant.weights import QuantizedWeight, WeightQuantizer, pack_int4
from qlip_export.spec import Frozen, WeightBits

ALIGNMENT = 64
HALF_MAX = 65504.0


class StoredTensor(Frozen):
    """Where a tensor lies in the weight file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    def external(self, name: str, location: str, folder: Path) -> ir.ExternalTensor:
        """Return the tensor as ONNX external data of a model in ``folder``."""
        return ir.ExternalTensor(
            location,
            self.offset,
            self.length,
            ir.DataType[self.dtype],
            shape=ir.Shape(self.shape),
            name=name,
            base_dir=folder,
        )


class WeightIndex(Frozen):
    """Everything in the weight file, by name."""

    tensors: dict[str, StoredTensor]
    layer_axis: dict[str, int]
    """Quantized parameters and the axis of their scales, as stored."""


class WeightWriter:
    """Appends tensors to an open weight file."""

    def __init__(self, file: IO[bytes], *, halves: bool = True) -> None:
        """Write to ``file`` from its current position on; ``halves`` adds FP16 copies of FP32 parameters."""
        self._file = file
        self._halves = halves
        self.tensors: dict[str, StoredTensor] = {}
        self.layer_axis: dict[str, int] = {}

    @property
    def index(self) -> WeightIndex:
        """The index of what has been written."""
        return WeightIndex(tensors=self.tensors, layer_axis=self.layer_axis)

    def add_layer(
        self, layer: Layer, array: NDArray[Any], bits: WeightBits, quantize: WeightQuantizer
    ) -> None:
        """Store a layer's weight (out, in, ...) at ``bits``, transposed where the graph wants it so."""
        if bits == 32:
            self.add_parameter(layer.weight, array.T if layer.transposed else array)
            return
        quantized: QuantizedWeight = quantize(layer.name, array.astype(np.float32), bits, 0)
        codes = quantized.codes.T if layer.transposed else quantized.codes
        if bits == 4:
            self._append(f"{layer.weight}.codes", "INT4", codes.shape, pack_int4(codes))
        else:
            self._append(f"{layer.weight}.codes", "INT8", codes.shape, codes)
        self._append(f"{layer.weight}.scale", "FLOAT", quantized.scale.shape, quantized.scale)
        self._append(
            f"{layer.weight}.scale.half", "FLOAT16", quantized.scale.shape, quantized.scale.astype("<f2")
        )
        self.layer_axis[layer.weight] = 1 if layer.transposed else 0

    def add_parameter(self, name: str, array: NDArray[Any]) -> None:
        """Store a parameter as it is: nothing is gained by widening an FP16 or BF16 checkpoint."""
        if array.dtype == np.float16:
            self._append(f"{name}.half", "FLOAT16", array.shape, array)
            return
        if array.dtype.name == "bfloat16":
            self._append(f"{name}.bfloat", "BFLOAT16", array.shape, array)
            return
        self._append(name, "FLOAT", array.shape, array.astype("<f4"))
        if self._halves:
            if array.size and float(np.abs(array).max()) > HALF_MAX:
                raise QlipError(
                    f"parameter {name!r} does not fit into FP16",
                    expected=f"magnitudes up to {HALF_MAX:.0f}",
                    found=f"{float(np.abs(array).max()):.6g}",
                    fix="this model cannot run at 16 bits or less",
                )
            self._append(f"{name}.half", "FLOAT16", array.shape, array.astype("<f2"))

    def _append(self, name: str, dtype: str, shape: tuple[int, ...], data: NDArray[Any]) -> None:
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        self._file.write(np.ascontiguousarray(data).tobytes())
        self.tensors[name] = StoredTensor(
            dtype=dtype, shape=shape, offset=offset, length=self._file.tell() - offset
        )


def bind_weights(
    model: ir.Model, runtime_inputs: tuple[str, ...], index: WeightIndex, location: str, folder: Path
) -> None:
    """Replace every parameter input of ``model`` by a reference into the weight file, in place.

    Quantized weights become a DequantizeLinear over their codes, in the type the graph wants (FP32 or FP16).
    Parameters that are stored only in FP16 or BF16 are widened by a Cast where the graph wants FP32. That
    node bears the parameter's name; what it reads and what comes out have short ones, because names are a
    good part of a graph, and a policy by layer takes a hundred graphs.
    """
    graph = model.graph

    def stored(name: str, known_as: str) -> ir.Value:
        tensor = index.tensors[name].external(known_as, location, folder)
        value = ir.Value(
            name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        graph.register_initializer(value)
        return value

    for number, parameter in enumerate([v for v in graph.inputs if v.name not in runtime_inputs]):
        graph.inputs.remove(parameter)
        name, half = str(parameter.name), parameter.dtype == ir.DataType.FLOAT16
        target = _weight_operand(parameter)
        if name in index.layer_axis:
            codes = stored(f"{name}.codes", f"weight.{number}.codes")
            scale = stored(f"{name}.scale.half" if half else f"{name}.scale", f"weight.{number}.scale")
            node = ir.node(
                "DequantizeLinear",
                [codes, scale],
                {"axis": index.layer_axis[name]},
                name=f"{_as_node(name)}.dq",
            )
            _insert(graph, node, target, f"weight.{number}")
        elif half or name in index.tensors:
            own = f"{name}.half" if half else name
            value = stored(own, own)
            if static_shape(value) != static_shape(target):
                raise ValueError(f"{name}: stored as {value.shape}, used as {target.shape}")
            target.replace_all_uses_with(value)
        else:
            narrow = f"{name}.half" if f"{name}.half" in index.tensors else f"{name}.bfloat"
            node = ir.node(
                "Cast",
                [stored(narrow, f"weight.{number}.narrow")],
                {"to": int(ir.DataType.FLOAT)},
                name=f"{_as_node(name)}.float",
            )
            _insert(graph, node, target, f"weight.{number}")
        transpose = target.producer()
        if transpose is not None:
            graph.remove(transpose, safe=True)


def _as_node(parameter: str) -> str:
    """Return a parameter's name as that of a node: its module, and what it is there."""
    module, _, own = parameter.rpartition(".")
    return f"{module}/{own}"


def _weight_operand(parameter: ir.Value) -> ir.Value:
    """Return the value a layer multiplies by: the parameter, or its transpose (stored transposed)."""
    users = {u.node for u in parameter.uses()}
    if len(users) == 1:
        (user,) = users
        if user.op_type == "Transpose" and all(u.node.op_type == "MatMul" for u in user.outputs[0].uses()):
            return user.outputs[0]
    return parameter


def _insert(graph: ir.Graph, node: ir.Node, target: ir.Value, name: str) -> None:
    out = node.outputs[0]
    out.name, out.shape, out.type = name, target.shape, target.type
    graph.insert_before(graph[0], node)  # it reads initializers only
    target.replace_all_uses_with(out)


def write_weights(
    file: IO[bytes],
    layers: list[Layer],
    parameters: list[str],
    read: Callable[[str], NDArray[Any]],
    bits: WeightBits,
    quantize: WeightQuantizer,
    on_layer: Callable[[str], None],
    halves: bool = True,
) -> WeightIndex:
    """Write all weights of a graph, one at a time, and return the index.

    Args:
        file: Open for binary writing.
        layers: Layers whose weights are quantized.
        parameters: Names of all parameters, those of the layers included.
        read: Returns a parameter by name.
        bits: Weight bits; 32 stores the weights as they are.
        quantize: The method for 4 and 8 bits.
        on_layer: Called with the name of each parameter before it is processed.
        halves: Also store FP16 copies of FP32 parameters, for FP16 graphs.
    """
    writer = WeightWriter(file, halves=halves)
    layer_of = {layer.weight: layer for layer in layers}
    for name in parameters:
        on_layer(name)
        if name in layer_of:
            writer.add_layer(layer_of[name], read(name), bits, quantize)
        else:
            writer.add_parameter(name, read(name))
    return writer.index
