"""One weight file: each weight once, packed, and read back through ONNX as what was put in."""

from __future__ import annotations

import io
import weakref
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
import pytest

from qlip_export.bundle import Bundle
from qlip_export.compiled import EngineEntry
from qlip_export.errors import QlipError
from qlip_export.families.unet import UNET
from qlip_export.graph.layers import find_layers
from qlip_export.graph.weights import ALIGNMENT, WeightIndex, WeightWriter, bind_weights, write_weights
from qlip_export.quant.weights import round_to_nearest
from qlip_export.reference import DENOISER_WEIGHTS, quantized_weights
from qlip_export.spec import Container, WeightBits
from tests.graph.conftest import Arrays, graph, relative, run

X = np.random.default_rng(1).standard_normal((2, 7, 5), dtype=np.float32)
WEIGHTS = {
    "lin.weight": np.random.default_rng(2).standard_normal((9, 5), dtype=np.float32),
    "lin.bias": np.random.default_rng(3).standard_normal(9, dtype=np.float32),
}


def linear() -> ir.Model:
    return graph("""
        g (float[2, 7, 5] x, float[9, 5] lin__weight, float[9] lin__bias) => (float[2, 7, 9] y) {
            turned = Transpose <perm: ints = [1, 0]> (lin__weight)
            product = MatMul (x, turned)
            y = Add (product, lin__bias)
        }
    """)


def store(folder: Path, model: ir.Model, weights: Arrays, bits: WeightBits) -> WeightIndex:
    file = io.BytesIO()
    layers, names = find_layers(model.graph), list(weights)
    index = write_weights(file, layers, names, weights.__getitem__, bits, round_to_nearest, lambda _: None)
    (folder / "w.bin").write_bytes(file.getvalue())
    return WeightIndex.model_validate_json(index.model_dump_json())


def bound(folder: Path, model: ir.Model, index: WeightIndex) -> Path:
    bind_weights(model, ("x",), index, "w.bin", folder)
    path = folder / "model.onnx"
    path.write_bytes(ir.to_proto(model).SerializeToString())
    onnx.checker.check_model(path, full_check=True)
    return path


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_graph_multiplies_by_the_stored_weight(tmp_path: Path, bits: WeightBits) -> None:
    path = bound(tmp_path, linear(), store(tmp_path, linear(), WEIGHTS, bits))
    weight = WEIGHTS["lin.weight"]
    if bits != 32:
        weight = round_to_nearest("lin", weight, bits, 0).dequantize()
    expected = X @ weight.T + WEIGHTS["lin.bias"]
    assert relative(run(path, {"x": X})["y"], expected) < 1e-6
    assert "Transpose" not in {node.op_type for node in onnx.load(path).graph.node}


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_bfloat16_stays_in_the_file_and_is_exact(tmp_path: Path, backend: str) -> None:
    """As a text encoder is stored: no FP16 copies, and wide again in the graph."""
    narrow = {name: array.astype(ir.DataType.BFLOAT16.numpy()) for name, array in WEIGHTS.items()}
    model, file = linear(), io.BytesIO()
    layers = find_layers(model.graph)
    args = (layers, list(narrow), narrow.__getitem__, 32, round_to_nearest, lambda _: None)
    index = write_weights(file, *args, halves=False)  # type: ignore[arg-type]
    (tmp_path / "w.bin").write_bytes(file.getvalue())
    assert sum(tensor.length for tensor in index.tensors.values()) == 2 * (9 * 5 + 9)
    path = bound(tmp_path, model, index)
    wide = {name: array.astype(np.float32) for name, array in narrow.items()}
    expected = X @ wide["lin.weight"].T + wide["lin.bias"]
    found = compiled(path, backend, {"x": X})["y"]
    assert relative(found, expected) < 1e-6


def compiled(onnx_file: Path, backend: str, inputs: Arrays) -> Arrays:
    """Run a graph as an engine in FP32."""
    from qlip_export.backends import get_backend

    made = get_backend(backend)
    engine = onnx_file.with_suffix(made.capabilities.suffix)
    ports = made.compile(onnx_file, engine, Container.FLOAT)
    entry = EngineEntry(
        path=engine.name, container=Container.FLOAT, inputs=ports.inputs, outputs=ports.outputs, widened=False
    )
    loaded = made.load(engine, entry)
    buffers = {port.name: made.allocate(port.shape, port.dtype) for port in (*ports.inputs, *ports.outputs)}
    for name, buffer in buffers.items():
        loaded.bind(name, buffer)
    for name, array in inputs.items():
        made.write(buffers[name], array)
    loaded.run()
    return {port.name: made.read(buffers[port.name]) for port in ports.outputs}


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_half_graph_reads_the_same_file(tmp_path: Path, bits: WeightBits) -> None:
    from qlip_export.graph.cast import cast_to_half

    index = store(tmp_path, linear(), WEIGHTS, bits)
    exact = run(bound(tmp_path, linear(), index), {"x": X})["y"]
    model = linear()
    cast_to_half(model)
    found = run(bound(tmp_path, model, index), {"x": X.astype(np.float16)})["y"]
    assert found.dtype == np.float16
    assert relative(found, exact) < 2e-3


def test_onnx_reads_int4_as_it_was_packed(bundle: Path, parameters: Arrays) -> None:
    """Through the files of a real bundle and ONNX's own reader."""
    model = onnx.load(bundle / "onnx" / "up_blocks.1.a8.onnx")
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    kinds = {t.name: t.data_type for t in model.graph.initializer}
    index = WeightIndex.model_validate(Bundle.open(bundle).manifest.files[DENOISER_WEIGHTS].facts)
    widened = {
        n.name.removesuffix(".dq").replace("/", "."): n.input
        for n in model.graph.node
        if n.name.endswith("/weight.dq")
    }
    assert len(widened) > 20
    for weight, (name, scale, *_) in widened.items():
        assert kinds[name] == onnx.TensorProto.INT4
        expected = round_to_nearest(weight, parameters[weight], 4, 0)
        found = arrays[name].astype(np.int8)
        # Most linear layers are stored as the graph multiplies by them: transposed.
        np.testing.assert_array_equal(found.T if index.layer_axis[weight] == 1 else found, expected.codes)
        np.testing.assert_array_equal(arrays[scale].astype(np.float32), expected.scale)


def test_stored_weights_are_those_the_reference_uses(bundle: Path, parameters: Arrays) -> None:
    weights = quantized_weights(Bundle.open(bundle))
    assert len(weights) == 151
    for name, weight in weights.items():
        expected = round_to_nearest(name, parameters[name], 4, 0).dequantize()
        np.testing.assert_array_equal(weight, expected)
        assert 0 < relative(weight, parameters[name]) < 0.2


def test_every_weight_is_stored_once(bundle: Path, parameters: Arrays) -> None:
    entry = Bundle.open(bundle).manifest.files[DENOISER_WEIGHTS]
    index = WeightIndex.model_validate(entry.facts)
    spans = sorted((t.offset, t.offset + t.length) for t in index.tensors.values())
    assert all(start % ALIGNMENT == 0 for start, _ in spans)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    # What a packed weight costs: half a byte a code, and its scales in FP32 and FP16; the rest in both.
    expected, padding = 0, 0
    for name, array in parameters.items():
        if name in index.layer_axis:
            parts = [(array.size + 1) // 2, 4 * len(array), 2 * len(array)]
        else:
            parts = [4 * array.size, 2 * array.size]
        expected += sum(parts)
        padding += ALIGNMENT * len(parts)
    assert sum(t.length for t in index.tensors.values()) == expected
    assert expected <= entry.size < expected + padding
    assert spans[-1][1] == entry.size


def test_all_graphs_of_a_bundle_share_the_weight_file(bundle: Path) -> None:
    for path in (bundle / "onnx").glob("*.a*.onnx"):
        model = onnx.load(path, load_external_data=False)
        places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert places <= {"denoiser.weights.bin"}
        # What is left inside are shapes and scales.
        inside = sum(len(t.raw_data) for t in model.graph.initializer)
        assert inside < 20_000, path.name


@pytest.mark.parametrize("bits", [4, 32])
def test_fp16_checkpoint_stays_fp16(tmp_path: Path, bits: WeightBits) -> None:
    """Widening it would double the file and add nothing; where FP32 is wanted the graph casts."""
    halves = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    index = store(tmp_path, linear(), halves, bits)
    wide = [name for name, t in index.tensors.items() if t.dtype == "FLOAT"]
    assert wide == (["lin.weight.scale"] if bits == 4 else [])
    path = bound(tmp_path, linear(), index)
    weight = halves["lin.weight"].astype(np.float32)
    if bits == 4:
        weight = round_to_nearest("lin", weight, 4, 0).dequantize()
    expected = X @ weight.T + halves["lin.bias"].astype(np.float32)
    assert relative(run(path, {"x": X})["y"], expected) < 1e-6


def test_every_parameter_of_every_block_is_bound(bundle: Path) -> None:
    for path in (bundle / "onnx").glob("*.onnx"):
        names = {value.name for value in onnx.load(path, load_external_data=False).graph.input}
        assert all(n in (*UNET.input_names, "input_ids") or "_out" in n for n in names), path.name


def test_parameter_beyond_fp16_is_refused_by_name() -> None:
    with pytest.raises(QlipError, match=r"'norm\.weight' does not fit into FP16"):
        WeightWriter(io.BytesIO()).add_parameter("norm.weight", np.array([1.0, 7e4], dtype=np.float32))
    WeightWriter(io.BytesIO(), halves=False).add_parameter("norm.weight", np.array([7e4], dtype=np.float32))


@pytest.mark.parametrize("bits", [4, 8, 32])
def test_one_weight_is_held_at_a_time(bits: WeightBits) -> None:
    """So the memory of an export is that of its largest weight, however many there are."""
    held: list[weakref.ref[np.ndarray]] = []

    def read(name: str) -> np.ndarray:
        assert [ref for ref in held if ref() is not None] == []
        array = WEIGHTS[name].copy()
        held.append(weakref.ref(array))
        return array

    names = list(WEIGHTS) * 3
    write_weights(io.BytesIO(), find_layers(linear().graph), names, read, bits, round_to_nearest, len)
    assert len(held) == len(names)
