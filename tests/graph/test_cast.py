"""An FP32 graph becomes an FP16 graph that is well typed."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qlip_export.families.unet import UNET
from qlip_export.graph.cast import cast_to_half
from qlip_export.graph.split import split
from tests.graph.conftest import Arrays, graph, relative, run

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


def check(model: ir.Model) -> None:
    onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)


def resize() -> ir.Model:
    return graph("""
        g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y)
        <float[4] scales = {1, 1, 2, 2}, float[1] bias = {0.5}> {
            shifted = Add (x, bias)
            y = Resize <mode: string = "nearest"> (shifted, , scales)
        }
    """)


def test_scales_of_resize_stay_float32() -> None:
    model = resize()
    cast_to_half(model)
    check(model)
    add, node = model.graph
    assert (node.inputs[2].dtype, add.inputs[1].dtype) == (FLOAT, HALF)
    assert {v.dtype for v in (*model.graph.inputs, *model.graph.outputs)} == {HALF}
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 4), dtype=np.float32)
    found = run(model, {"x": x.astype(np.float16)})["y"]
    assert found.dtype == np.float16
    assert relative(found, run(resize(), {"x": x})["y"]) < 1e-3


def test_constant_that_both_want_is_kept_in_both_types() -> None:
    model = graph("""
        g (float[1, 2, 4, 4] x) => (float[1, 2, 8, 8] y) <float[4] s = {1, 1, 2, 2}> {
            shifted = Add (x, s)
            y = Resize <mode: string = "nearest"> (shifted, , s)
        }
    """)
    cast_to_half(model)
    check(model)
    assert {name: v.dtype for name, v in model.graph.initializers.items()} == {"s": FLOAT, "s.half": HALF}


def test_casts_to_float_become_casts_to_half_and_others_stay() -> None:
    model = graph("""
        g (int64[4] i, float[4] x) => (float[4] y, int64[4] z) {
            f = Cast <to: int = 1> (i)
            y = Add (f, x)
            z = Cast <to: int = 7> (x)
        }
    """)
    cast_to_half(model)
    check(model)
    targets = [node.attributes["to"].as_int() for node in model.graph if node.op_type == "Cast"]
    assert targets == [int(HALF), int(ir.DataType.INT64)]
    assert [v.dtype for v in model.graph.inputs] == [ir.DataType.INT64, HALF]


@pytest.mark.parametrize("name", ["down_blocks.1", "up_blocks.0", "out"])
def test_blocks_of_the_denoiser(captured: ir.Model, parameters: Arrays, inputs: Arrays, name: str) -> None:
    values = inputs | parameters
    for block in split(captured, UNET.input_names, lambda scope: UNET.block_of(scope, "coarse")):
        exact = run(block.model, values)
        if block.name == name:
            break
        values |= exact
    cast_to_half(block.model)
    check(block.model)
    found = run(block.model, {n: v.astype(np.float16) for n, v in values.items()})
    for output, array in exact.items():
        assert found[output].dtype == np.float16
        assert relative(found[output], array) < 1e-2
