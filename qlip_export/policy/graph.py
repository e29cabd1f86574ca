"""The policy as one ONNX graph: pooled text embedding in, quality and the bits of every unit out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qlip_export.policy.table import DecisionTable

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21


def policy_graph(
    projection: NDArray[np.float32],
    hidden: tuple[NDArray[np.float32], NDArray[np.float32]],
    output: tuple[NDArray[np.float32], NDArray[np.float32]],
    table: DecisionTable,
    batch: int | str = "N",
) -> ir.Model:
    """Return the graph of T2Q followed by the decision table.

    Q2B enters as its table, not as sigmoids: comparing q with thresholds is exact in every engine, while an
    argmax over rounded probabilities could fall either way at a threshold.

    Inputs: ``pooled`` (N, C_clip) float32.
    Outputs: ``quality`` (N,) float32; ``bits`` (N, G, K) int64, the choice for each group; ``forced``
    (G, K) int64, the choice where p_q is set to 1, as in the first sampling steps.

    Args:
        projection: (C, C_clip), the text encoder's projection.
        hidden: Weight (512, C) and bias (512,).
        output: Weight (1, 512) and bias (1,).
        table: Decision table of Q2B.
        batch: N; a name leaves it open, which engines of static shapes do not take.
    """
    import onnx_ir as ir

    initializers: list[ir.Value] = []
    nodes: list[ir.Node] = []

    def constant(name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(np.ascontiguousarray(array), name=name)
        value = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        initializers.append(value)
        return value

    def apply(op: str, inputs: list[ir.Value], name: str, **attributes: Any) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=name)
        nodes.append(node)
        node.outputs[0].name = name
        return node.outputs[0]

    pooled = ir.Value(
        name="pooled", shape=ir.Shape([batch, projection.shape[1]]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    value = apply(
        "Relu", [apply("MatMul", [pooled, constant("projection", projection.T)], "projected")], "relu0"
    )
    value = apply(
        "Gemm",
        [value, constant("hidden.weight", hidden[0]), constant("hidden.bias", hidden[1])],
        "hidden",
        transB=1,
    )
    value = apply("Relu", [value], "relu1")
    value = apply(
        "Gemm",
        [value, constant("output.weight", output[0]), constant("output.bias", output[1])],
        "output",
        transB=1,
    )
    column = apply("Sigmoid", [value], "sigmoid")
    quality = apply("Squeeze", [column, constant("last", np.array([1]))], "quality")
    thresholds, steps, first = _arrays(table)
    q = apply("Reshape", [column, constant("broadcast", np.array([-1, 1, 1, 1]))], "q")
    passed = apply(
        "Cast",
        [apply("GreaterOrEqual", [q, constant("thresholds", thresholds)], "reached")],
        "passed",
        to=int(ir.DataType.INT64),
    )
    change = apply(
        "ReduceSum",
        [apply("Mul", [passed, constant("steps", steps)], "change"), constant("axis", np.array([3]))],
        "sum",
        keepdims=0,
    )
    bits = apply("Add", [constant("first", first), change], "bits")
    forced = apply(
        "Identity",
        [constant("forced.bits", np.array([[c.forced for c in row] for row in table.choices]))],
        "forced",
    )
    groups, units = first.shape[1:]
    for out, shape, dtype in (
        (quality, [batch], ir.DataType.FLOAT),
        (bits, [batch, groups, units], ir.DataType.INT64),
        (forced, [groups, units], ir.DataType.INT64),
    ):
        out.shape, out.type = ir.Shape(shape), ir.TensorType(dtype)
    graph = ir.Graph(
        [pooled],
        [quality, bits, forced],
        nodes=nodes,
        initializers=initializers,
        opset_imports={"": OPSET},
        name="policy",
    )
    return ir.Model(graph, ir_version=10, producer_name="qlip-export")


def _arrays(table: DecisionTable) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """Return thresholds and what each adds to the bits, (1, G, K, T), and the bits at q = 0, (1, G, K)."""
    groups, units, most = len(table.choices), len(table.units), len(table.options) - 1
    thresholds = np.full((1, groups, units, most), np.inf, dtype=np.float32)
    steps = np.zeros((1, groups, units, most), dtype=np.int64)
    first = np.zeros((1, groups, units), dtype=np.int64)
    for g, row in enumerate(table.choices):
        for k, choice in enumerate(row):
            count = len(choice.thresholds)
            thresholds[0, g, k, :count] = choice.thresholds
            steps[0, g, k, :count] = np.diff(choice.bits)
            first[0, g, k] = choice.bits[0]
    return thresholds, steps, first
