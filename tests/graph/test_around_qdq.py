"""What lets an engine fuse: whole attention, FP16 around Q/DQ, nothing between a pair and its layer."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from qlip_export.bundle import Bundle
from qlip_export.graph.store import load
from tests.tiny import BLOCKS

INT8_BLOCKS = [name for name in BLOCKS if name != "time"]
LAYERS = ("Conv", "MatMul", "Gemm")


def users(value: ir.Value) -> list[tuple[ir.Node, int]]:
    return [(use.node, use.idx) for use in value.uses()]


def broken_attention(model: ir.Model) -> list[str]:
    """Name every Softmax that does not stand between two products, alone and in FP16."""
    found = []
    for node in model.graph:
        if node.op_type == "Softmax":
            (x,), (y,) = node.inputs, node.outputs
            assert x is not None
            before, after = x.producer(), users(y)
            whole = before is not None and before.op_type == "MatMul" and len(users(x)) == 1
            whole = whole and [(n.op_type, i) for n, i in after] == [("MatMul", 0)]
            typed = {v.dtype for v in (x, y)} == {ir.DataType.FLOAT16}
            products = [before, *(n for n, _ in after)]
            plain = all(
                source is None or (p := source.producer()) is None or p.op_type != "DequantizeLinear"
                for product in products
                if product is not None
                for source in product.inputs
            )
            if not (whole and typed and plain):
                found.append(str(node.name))
    return found


def other_types(model: ir.Model) -> list[str]:
    """Name what is neither FP16 nor a code, an index, or what ONNX types as FP32 (Resize's scales)."""
    allowed = {ir.DataType.FLOAT16, ir.DataType.INT8, ir.DataType.INT4, ir.DataType.INT64}
    graph = model.graph
    values = [*graph.inputs, *graph.initializers.values(), *(v for node in graph for v in node.outputs)]
    found = [str(n.name) for n in graph if n.op_type == "Cast"]
    for value in values:
        scales = bool(users(value)) and all(n.op_type == "Resize" and i > 0 for n, i in users(value))
        if value.dtype not in allowed and not scales:
            found.append(str(value.name))
    return found


def loose_pairs(model: ir.Model) -> list[str]:
    """Name every Q whose DQ does not follow at once, and every DQ that something else than a layer reads."""
    found = []
    for node in model.graph:
        out = node.outputs[0]
        if node.op_type == "QuantizeLinear":
            same = all(
                n.op_type == "DequantizeLinear" and n.inputs[1:] == node.inputs[1:] for n, _ in users(out)
            )
            if not same or not users(out):
                found.append(str(node.name))
        elif node.op_type == "DequantizeLinear":
            codes = node.inputs[0]
            assert codes is not None
            index = 1 if codes.is_initializer() else 0
            if not users(out) or any(n.op_type not in LAYERS or i != index for n, i in users(out)):
                found.append(str(node.name))
    return found


@pytest.fixture
def attention(bundle: Path) -> ir.Model:
    return load(bundle / "onnx/down_blocks.1.a8.onnx")


@pytest.mark.parametrize("block", INT8_BLOCKS)
def test_attention_stays_whole(bundle: Path, block: str) -> None:
    model = load(bundle / f"onnx/{block}.a8.onnx")
    assert broken_attention(model) == []
    (entry,) = [b for b in Bundle.open(bundle).manifest.blocks if b.name == block]
    attentions = sum(layer.name.endswith(".to_q") for layer in entry.layers)
    assert sum(node.op_type == "Softmax" for node in model.graph) == attentions


@pytest.mark.parametrize("block", INT8_BLOCKS)
def test_everything_around_pairs_is_fp16(bundle: Path, block: str) -> None:
    assert other_types(load(bundle / f"onnx/{block}.a8.onnx")) == []


@pytest.mark.parametrize("block", INT8_BLOCKS)
def test_pairs_meet_their_layers(bundle: Path, block: str) -> None:
    model = load(bundle / f"onnx/{block}.a8.onnx")
    assert loose_pairs(model) == []
    (entry,) = [b for b in Bundle.open(bundle).manifest.blocks if b.name == block]
    behind_pairs = {
        node.name
        for node in model.graph
        if node.op_type in LAYERS
        and (pair := node.inputs[0].producer()) is not None  # type: ignore[union-attr]
        and pair.op_type == "DequantizeLinear"
    }
    assert len(behind_pairs) == sum(layer.quantized for layer in entry.layers)


def between(value: ir.Value, op: str, dtype: ir.DataType | None = None) -> None:
    """Put a node of ``op`` between a value and all that read it."""
    node = ir.node(op, [value], name="between")
    out = node.outputs[0]
    out.name, out.shape, out.type = "between", value.shape, ir.TensorType(dtype or value.dtype)  # type: ignore[arg-type]
    producer = value.producer()
    assert producer is not None
    readers = users(value)
    producer.graph.insert_after(producer, node)  # type: ignore[union-attr]
    for reader, index in readers:
        reader.replace_input_with(index, out)


def first(model: ir.Model, op: str) -> ir.Node:
    return next(node for node in model.graph if node.op_type == op)


def test_node_within_attention_is_noticed(attention: ir.Model) -> None:
    softmax = first(attention, "Softmax")
    between(softmax.outputs[0], "Identity")
    assert broken_attention(attention) == [softmax.name]


def test_quantized_product_of_attention_is_noticed(attention: ir.Model) -> None:
    softmax = first(attention, "Softmax")
    product = softmax.inputs[0].producer()  # type: ignore[union-attr]
    assert product is not None
    product.replace_input_with(0, first(attention, "DequantizeLinear").outputs[0])
    assert broken_attention(attention) == [softmax.name]


def test_fp32_between_fp16_is_noticed(attention: ir.Model) -> None:
    between(first(attention, "LayerNormalization").outputs[0], "Cast", ir.DataType.FLOAT)
    assert "between" in other_types(attention)


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear"])
def test_reformatting_within_a_pair_or_behind_it_is_noticed(attention: ir.Model, op: str) -> None:
    node = first(attention, op)
    between(node.outputs[0], "Transpose")
    assert node.name in loose_pairs(attention)


def test_pair_of_two_grids_is_noticed(attention: ir.Model) -> None:
    quantize = [node for node in attention.graph if node.op_type == "QuantizeLinear"]
    quantize[0].replace_input_with(1, quantize[1].inputs[1])
    assert quantize[0].name in loose_pairs(attention)
