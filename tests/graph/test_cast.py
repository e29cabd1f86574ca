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


# --- layers that stay in FP32


def chain_of_layers() -> ir.Model:
    return graph("""
        g (float[2, 4] x, float[4, 4] a__weight, float[4] a__bias, float[4, 4] b__weight,
        float[4, 4] c__weight) => (float[2, 4] y, float[2, 4] kept) {
            product = MatMul (x, a__weight)
            biased = Add (product, a__bias)
            kept = Relu (biased)
            second = MatMul (kept, b__weight)
            sum = Add (second, kept)
            y = MatMul (sum, c__weight)
        }
    """)


def types(model: ir.Model) -> dict[str, ir.DataType | None]:
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    return {str(value.name): value.dtype for value in values}


@pytest.mark.parametrize(
    ("float_layers", "wide", "casts"),
    [
        ((), (), ()),
        # Its input is an input of the graph; what it computes is only read in FP16.
        (("a",), ("x", "a.weight", "a.bias", "product", "biased"), ("biased.as_float16",)),
        # Relu computes in FP32 for b, from the bias of a that is cast up; its value leaves in FP16.
        (
            ("b",),
            ("b.weight", "kept.inner", "second"),
            ("biased.as_float", "second.as_float16", "kept"),
        ),
        (("c",), ("c.weight", "kept.inner", "sum", "y.inner"), ("biased.as_float", "second.as_float", "y")),
    ],
)
def test_what_feeds_a_float_layer_is_float_and_the_rest_half(
    float_layers: tuple[str, ...], wide: tuple[str, ...], casts: tuple[str, ...]
) -> None:
    model = chain_of_layers()
    cast_to_half(model, float_layers)
    check(model)
    found = types(model)
    up = {name for name in casts if name.endswith(".as_float")}
    assert {name for name, dtype in found.items() if dtype == FLOAT} == {*wide, *up}
    assert {o.name: o.dtype for o in model.graph.outputs} == {"y": HALF, "kept": HALF}
    written = {str(node.outputs[0].name) for node in model.graph if node.op_type == "Cast"}
    assert set(casts) - {"kept"} <= written
    rng = np.random.default_rng(0)
    exact = {
        v.name: rng.standard_normal(list(v.shape), dtype=np.float32) for v in chain_of_layers().graph.inputs
    }
    feeds = {
        v.name: exact[v.name].astype(np.float32 if v.dtype == FLOAT else np.float16)
        for v in model.graph.inputs
    }
    for name, array in run(chain_of_layers(), exact).items():
        assert relative(run(model, feeds)[name], array) < 5e-3


def test_all_layers_in_float_leave_only_the_ports_in_half() -> None:
    model = chain_of_layers()
    cast_to_half(model, ("a", "b", "c"))
    check(model)
    half = {name for name, dtype in types(model).items() if dtype == HALF}
    assert half == {"y", "kept"}
