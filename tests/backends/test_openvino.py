"""Engines of OpenVINO compute what the graph says, at the precision they claim."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import openvino as ov
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qlip_export.backends import get_backend
from qlip_export.backends.openvino import (
    OpenVINOBackend,
    _from_bfloat16,
    _to_bfloat16,
    _without_kernel_cache,
)
from qlip_export.bundle import Bundle
from qlip_export.compiled import EngineEntry
from qlip_export.errors import QlipError
from qlip_export.families.unet import UNET
from qlip_export.graph import precisions
from qlip_export.spec import Container
from tests import tamper
from tests.conftest import Cli
from tests.graph.conftest import Arrays, relative, run
from tests.tamper import engine_entry

ROOT = Path(__file__).parents[2]
NATIVE = OpenVINOBackend(threads=1).capabilities
needs_bfloat16 = pytest.mark.skipif(
    NATIVE.half != "bfloat16", reason=f"16-bit engines use {NATIVE.half} on this CPU"
)
needs_int8 = pytest.mark.skipif(Container.INT8 not in NATIVE.containers, reason="this CPU has no fast INT8")


@pytest.fixture
def backend() -> OpenVINOBackend:
    return OpenVINOBackend(threads=1)


# --- numbers


@given(hnp.arrays(np.float32, 8, elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_bfloat16_is_rounded_as_torch_rounds(values: np.ndarray) -> None:
    expected = torch.from_numpy(values).to(torch.bfloat16)
    np.testing.assert_array_equal(_from_bfloat16(_to_bfloat16(values)), expected.float().numpy())


def test_ties_go_to_the_even_bfloat16() -> None:
    ulp = 2.0**-7
    values = np.array([1 + 0.5 * ulp, 1 + 1.5 * ulp, -1 - 0.5 * ulp, np.inf, -np.inf], dtype=np.float32)
    expected = np.array([1, 1 + 2 * ulp, -1, np.inf, -np.inf], dtype=np.float32)
    np.testing.assert_array_equal(_from_bfloat16(_to_bfloat16(values)), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_written_is_read_back(backend: OpenVINOBackend, dtype: str) -> None:
    array = np.array([[1.0, -2.5, 0.0], [0.15625, 96.0, -7.0]], dtype=np.float32)  # exact in all three
    buffer = backend.allocate((2, 3), dtype)  # type: ignore[arg-type]
    backend.write(buffer, array)
    found = backend.read(buffer)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array)
    backend.write(buffer, array + 1)
    np.testing.assert_array_equal(found, array)  # what was read is a copy


def test_cast_between_buffers_rounds(backend: OpenVINOBackend) -> None:
    array = np.random.default_rng(0).standard_normal((4, 5), dtype=np.float32)
    wide, narrow, back = (backend.allocate((4, 5), d) for d in ("float32", "bfloat16", "float32"))
    backend.write(wide, array)
    backend.cast(wide, narrow)
    backend.cast(narrow, back)
    expected = torch.from_numpy(array).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(backend.read(back), expected)
    assert not (expected == array).all()


# --- engines


def feeds_of(bundle: Path, block: str) -> Arrays:
    """Return inputs that the block sees in a run of the FP32 graphs, on noise."""
    rng = np.random.default_rng(4)
    shapes = {t.name: t.shape for t in Bundle.open(bundle).manifest.inputs}
    values: Arrays = {name: rng.standard_normal(shapes[name], dtype=np.float32) for name in UNET.input_names}
    values["timestep"] = np.array([401], dtype=np.float32)
    for entry in Bundle.open(bundle).manifest.blocks:
        if entry.name == block:
            return {name: values[name] for name in entry.inputs}
        values |= run(bundle / entry.variants["a32"].onnx, values)
    raise AssertionError(block)


def run_engine(bundle: Path, entry: EngineEntry, feeds: Arrays) -> Arrays:
    backend = OpenVINOBackend(threads=1)
    engine = backend.load(bundle / entry.path, entry)
    buffers = {p.name: backend.allocate(p.shape, p.dtype) for p in (*entry.inputs, *entry.outputs)}
    for name, buffer in buffers.items():
        engine.bind(name, buffer)
    for port in entry.inputs:
        backend.write(buffers[port.name], feeds[port.name])
    engine.run()
    return {port.name: backend.read(buffers[port.name]) for port in entry.outputs}


@pytest.mark.parametrize("block", ["time", "down_blocks.0", "up_blocks.2"])
def test_fp32_engine_is_exact(bundle: Path, block: str) -> None:
    """Its weights are integers all the same: OpenVINO must not quantize activations of Linear unasked."""
    feeds = feeds_of(bundle, block)
    wanted = run(bundle / "onnx" / f"{block}.a32.onnx", feeds)
    found = run_engine(bundle, engine_entry(bundle, block, 32), feeds)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert relative(found[name], array) < 1e-5


def test_int8_engine_is_nearer_to_the_quantized_graph_than_to_fp32(bundle: Path) -> None:
    feeds = feeds_of(bundle, "down_blocks.1")
    exact = run(bundle / "onnx/down_blocks.1.a32.onnx", feeds)
    halves = {name: array.astype(np.float16) for name, array in feeds.items()}
    quantized = run(bundle / "onnx/down_blocks.1.a8.onnx", halves)
    found = run_engine(bundle, engine_entry(bundle, "down_blocks.1", 8), feeds)
    for name in exact:
        assert relative(found[name], quantized[name]) < 0.1
        assert relative(found[name], exact[name]) > 1e-3  # something was rounded


def kernels(bundle: Path, block: str, bits: int) -> set[str]:
    """Return the precisions of the kernels that compute the block's layers: 'i8', 'bf16', 'f32'."""
    entry = engine_entry(bundle, block, bits)
    backend = OpenVINOBackend(threads=1)
    blob = io.BytesIO((bundle / entry.path).read_bytes())
    compiled = ov.Core().import_model(blob, "CPU", backend._properties(entry.container, entry.widened))
    infos = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    layers = [i for i in infos if i["layerType"].astype(str) in ("Convolution", "FullyConnected")]
    assert layers
    return {i["primitiveType"].astype(str).split("_")[-1].lower() for i in layers}


@needs_int8
@pytest.mark.parametrize("block", ["stem", "down_blocks.1", "up_blocks.0", "out"])
def test_int8_engine_computes_in_int8(bundle: Path, block: str) -> None:
    assert "i8" in kernels(bundle, block, 8)


@needs_bfloat16
@pytest.mark.parametrize("block", ["down_blocks.1", "up_blocks.0"])
def test_16_bit_engine_computes_in_bfloat16(bundle: Path, block: str) -> None:
    assert kernels(bundle, block, 16) == {"bf16"}


@pytest.mark.parametrize("block", ["down_blocks.1", "up_blocks.0"])
def test_fp32_engine_computes_in_fp32(bundle: Path, block: str) -> None:
    assert kernels(bundle, block, 32) == {"f32"}


def test_time_block_is_fp32_at_every_option(bundle: Path) -> None:
    """Timesteps up to 1000 have no place in the 8 bits of a BF16 mantissa."""
    assert len({engine_entry(bundle, "time", bits).path for bits in (8, 16, 32)}) == 1
    assert engine_entry(bundle, "time", 8).container is Container.FLOAT


def test_ports_between_blocks_have_the_dtype_of_the_device(bundle: Path) -> None:
    for bits, dtype in ((8, NATIVE.half), (16, NATIVE.half), (32, "float32")):
        entry = engine_entry(bundle, "down_blocks.0", bits)
        assert {port.dtype for port in entry.outputs} == {dtype}


FRESH = """
import sys
from pathlib import Path
import numpy as np
from tests.backends.test_openvino import engine_entry, run_engine
bundle, block, bits, feeds, out = sys.argv[1:]
with np.load(feeds) as arrays:
    np.savez(out, **run_engine(Path(bundle), engine_entry(Path(bundle), block, int(bits)), dict(arrays)))
"""


def test_engine_file_gives_the_same_numbers_in_a_fresh_process(bundle: Path, tmp_path: Path) -> None:
    feeds = feeds_of(bundle, "up_blocks.1")
    here = run_engine(bundle, engine_entry(bundle, "up_blocks.1", 8), feeds)
    np.savez(tmp_path / "feeds.npz", **feeds)  # type: ignore[arg-type]
    arguments = [str(bundle), "up_blocks.1", "8", str(tmp_path / "feeds.npz"), str(tmp_path / "out.npz")]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], cwd=ROOT, check=True, timeout=120)
    with np.load(tmp_path / "out.npz") as there:
        assert set(there) == set(here)
        for name in here:
            np.testing.assert_array_equal(there[name], here[name])


def test_engine_that_is_none_is_refused(bundle: Path, tmp_path: Path, backend: OpenVINOBackend) -> None:
    (tmp_path / "x.blob").write_bytes(b"no engine")
    with pytest.raises(QlipError, match=r"does not load .*x\.blob(.|\n)*build the bundle again"):
        backend.load(tmp_path / "x.blob", engine_entry(bundle, "stem", 32))


def test_graph_that_cannot_be_compiled_is_named(tmp_path: Path, backend: OpenVINOBackend) -> None:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("NoSuchOperator", [x], domain="nowhere")
    node.outputs[0].name, node.outputs[0].type = "y", x.type
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21, "nowhere": 1})
    ir.save(ir.Model(graph, ir_version=10), tmp_path / "odd.onnx")
    with pytest.raises(QlipError, match=r"OpenVINO cannot compile odd\.onnx"):
        backend.compile(tmp_path / "odd.onnx", tmp_path / "odd.blob", Container.FLOAT)


def test_threads_limit_the_engines() -> None:
    assert (
        get_backend("openvino", threads=1)._properties(Container.FLOAT, widened=False)[
            "INFERENCE_NUM_THREADS"
        ]
        == 1
    )


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_layers_compute_in_the_precision_of_the_graph(bundle: Path, bits: int) -> None:
    """As the plugin tells it, after fusion, on a CPU that has kernels for the container."""
    backend = OpenVINOBackend(threads=1)
    can = backend.capabilities
    precision = {8: "int8", 16: can.half, 32: "float32"}[bits]
    opened = Bundle.open(bundle)
    for block in opened.manifest.blocks:
        variant = block.variants[f"a{bits}"]
        facts = opened.manifest.targets["openvino"].engines[variant.onnx].facts
        assert facts is not None and (facts.source, facts.wrong) == ("engine", {})
        assert facts.layers == sum(facts.precisions.values())
        if variant.container in can.containers and block.name != "time":
            assert facts.precisions[precision] > 0


def test_layer_that_lost_its_precision_is_named(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An FP16 graph that is said to ask for INT8."""
    read = precisions.asked_precisions
    everything = {"precision": "int8"}
    monkeypatch.setattr(
        precisions,
        "asked_precisions",
        lambda model: {node: asked._replace(**everything) for node, asked in read(model).items()},
    )
    backend = OpenVINOBackend(threads=1)
    found = backend._facts  # the container counts only where the CPU has kernels for it
    monkeypatch.setattr(
        backend,
        "_facts",
        lambda compiled, asked, _, widened: found(compiled, asked, Container.FLOAT, widened),
    )
    facts = backend.compile(bundle / "onnx/stem.a16.onnx", tmp_path / "x.blob", Container.HALF).facts
    assert facts is not None
    assert facts.wrong == {"conv_in": backend.capabilities.half}


def test_variant_of_another_precision_is_reported_and_fails(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    out = tamper.copy_of(bundle, tmp_path)

    def edit(manifest: dict[str, Any]) -> None:
        manifest["model"]["source"] = str(tmp_path / "gone")  # no images
        engine = manifest["targets"]["openvino"]["engines"]["onnx/stem.a8.onnx"]
        engine["facts"]["wrong"] = {"conv_in": "float32"}

    tamper.edit_manifest(out, edit)
    assert "stem a8: NOT in the precision of the graph: conv_in (float32)" in cli("inspect", out).out
    done = cli("validate", out)
    assert done.code == 1
    assert "stem at 8 bits: conv_in computes in float32" in done.out
    assert "off: stem at 8 bits" in done.out


def test_environment_changes_only_while_no_engine_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time do, and C code that reads it meanwhile may crash."""
    variable = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.delenv(variable, raising=False)
    with _without_kernel_cache:
        with _without_kernel_cache:
            assert os.environ[variable] == "0"
        assert os.environ[variable] == "0"
    assert variable not in os.environ
    monkeypatch.setenv(variable, "7")  # the user's own stays
    with _without_kernel_cache:
        assert os.environ[variable] == "7"
    assert os.environ[variable] == "7"
