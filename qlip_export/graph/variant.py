"""A block whose layers have bits of their own: INT8, 16 bits and FP32 in one typed graph."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qlip_export.graph.cast import cast_to_half
from qlip_export.graph.qdq import insert_qdq
from qlip_export.spec import Container, container_of


def type_variant(model: ir.Model, bits_of: Mapping[str, int], range_of: Mapping[str, float]) -> None:
    """Give every layer of an FP32 graph the container of its activation bits, in place.

    Layers that ``bits_of`` does not name compute in FP16, as does all between layers that no FP32 layer
    reads. Where every named layer is at 32 bits, the graph stays in FP32.

    Args:
        model: FP32 graph whose parameters are still inputs.
        bits_of: Activation bits by layer name.
        range_of: Clipping threshold of each layer that is carried by INT8.

    Raises:
        QlipError: A layer has no range, or the graph has no such layer.
    """
    containers = {name: container_of(bits) for name, bits in bits_of.items()}
    if set(containers.values()) == {Container.FLOAT}:
        return
    insert_qdq(model, {n: b for n, b in bits_of.items() if containers[n] is Container.INT8}, range_of)
    cast_to_half(model, {name for name, container in containers.items() if container is Container.FLOAT})
