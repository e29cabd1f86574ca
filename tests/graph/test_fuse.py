"""Rewrites for ONNX Runtime's CUDA provider: the same numbers from other operations."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qlip_export.bundle import Bundle
from qlip_export.graph.fuse import fuse_attention, split_group_norm
from qlip_export.graph.store import load


def outputs(model: ir.Model) -> list[np.ndarray]:
    """Run a model on random inputs."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    session = ort.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    rng = np.random.default_rng(0)
    feed = {i.name: rng.standard_normal(i.shape, dtype=np.float32) for i in session.get_inputs()}
    return session.run(None, feed)


@pytest.fixture
def block(bundle: Path) -> ir.Model:
    """The FP32 graph of a block that holds ResNets and transformers."""
    model = load(Bundle.open(bundle).file("onnx/up_blocks.1.a32.onnx"))
    ir.external_data.load_to_model(model)
    return model


def test_group_norm_is_split_and_stays_the_same(block: ir.Model) -> None:
    expected = outputs(block)
    assert split_group_norm(block) == 6
    kinds = Counter(node.op_type for node in block.graph)
    assert (kinds["GroupNormalization"], kinds["InstanceNormalization"]) == (0, 6)
    for mine, theirs in zip(outputs(block), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_attention_is_fused_and_stays_the_same(block: ir.Model) -> None:
    before = Counter(node.op_type for node in block.graph)
    expected = outputs(block)
    assert fuse_attention(block) == before["Softmax"] == 4
    after = Counter(node.op_type for node in block.graph)
    assert after["MultiHeadAttention"] == 4
    assert after["Softmax"] == 0
    assert before["Transpose"] - after["Transpose"] == 5 * 4  # q, k twice, v, and the result
    assert before["MatMul"] - after["MatMul"] == 2 * 4
    for mine, theirs in zip(outputs(block), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())


def test_scale_of_the_fused_attention_is_that_of_the_graph(block: ir.Model) -> None:
    fuse_attention(block)
    fused = [node for node in block.graph if node.op_type == "MultiHeadAttention"]
    for node in fused:
        assert node.inputs[0] is not None and node.inputs[0].shape is not None
        width = int(node.inputs[0].shape[2]) // node.attributes["num_heads"].as_int()
        assert node.attributes["scale"].as_float() == pytest.approx(width**-0.5, rel=1e-3)


def test_softmax_that_is_no_attention_is_left_alone(block: ir.Model) -> None:
    softmax = next(node for node in block.graph if node.op_type == "Softmax")
    block.graph.outputs.append(softmax.outputs[0])  # someone else reads the weights
    expected = outputs(block)
    assert fuse_attention(block) == 3
    for mine, theirs in zip(outputs(block), expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
