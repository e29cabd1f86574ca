"""Graphs in files: what shape inference tells is not in them, and comes back when they are read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qlip_export.errors import QlipError
from qlip_export.graph.store import load, save
from tests.graph.conftest import graph


def test_every_value_of_a_bundle_is_typed_when_it_is_read(bundle: Path) -> None:
    paths = sorted((bundle / "onnx").glob("*.onnx"))
    assert len(paths) > 20
    for path in paths:
        for node in load(path).graph:
            for value in node.outputs:
                assert value.dtype is not None and value.shape is not None, f"{path.name}: {value.name}"
                assert all(isinstance(d, int) for d in value.shape), f"{path.name}: {value.name}"


def test_what_inference_tells_is_not_written(bundle: Path) -> None:
    """ONNX infers nothing of a GroupNormalization."""
    for path in (bundle / "onnx").glob("*.a*.onnx"):
        proto = onnx.load(path, load_external_data=False).graph
        norms = {n.output[0] for n in proto.node if n.op_type == "GroupNormalization"}
        assert {value.name for value in proto.value_info} <= norms, path.name


def test_what_inference_tells_wrongly_is_written(tmp_path: Path) -> None:
    model = graph("""
        g (float[2, 3] x, int64[2] s) => (float[3, 2] z) {
            y = Reshape (x, s)
            z = Identity (y)
        }
    """)
    made = next(iter(model.graph)).outputs[0]
    made.shape = ir.Shape([3, 2])
    save(model, tmp_path / "x.onnx")
    (value,) = onnx.load(tmp_path / "x.onnx").graph.value_info
    assert value.name == "y"
    assert list(next(iter(load(tmp_path / "x.onnx").graph)).outputs[0].shape or ()) == [3, 2]


def test_a_graph_that_is_not_well_typed_is_refused(tmp_path: Path) -> None:
    model = graph("g (float[2] x) => (float[2] y) { h = Relu (x) y = Neg (h) }")
    next(iter(model.graph)).outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    with pytest.raises(QlipError, match="not well typed"):
        save(model, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_types_that_nobody_tells_are_missed(bundle: Path, tmp_path: Path) -> None:
    proto = onnx.load(bundle / "onnx" / "down_blocks.0.a32.onnx", load_external_data=False)
    assert proto.graph.value_info
    del proto.graph.value_info[:]
    (tmp_path / "x.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(QlipError, match="does not tell the types"):
        load(tmp_path / "x.onnx")


def test_weights_stay_where_they_are(bundle: Path) -> None:
    model = load(bundle / "onnx" / "stem.a32.onnx")
    external = [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert external
    assert all(np.isfinite(v.const_value.numpy().astype(np.float32)).all() for v in external)  # type: ignore[union-attr]
