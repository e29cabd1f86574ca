"""Engines of TensorRT-RTX are really compiled. None is executed: that takes a GPU that nobody had here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qlip_export.backends import get_backend
from qlip_export.bundle import Bundle
from qlip_export.compile import compile_bundle, preflight
from qlip_export.errors import QlipError
from qlip_export.graph.cast import cast_to_half
from qlip_export.graph.qdq import insert_qdq
from qlip_export.progress import Silent
from qlip_export.runtime.targets import choose_target
from qlip_export.spec import Container, WeightBits, container_of
from tests import tamper
from tests.conftest import Cli
from tests.graph.conftest import graph
from tests.graph.test_weights import bound, store
from tests.tiny import BLOCKS


def test_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, cli: Cli, bundle: Path) -> None:
    monkeypatch.delitem(sys.modules, "qlip_export.backends.tensorrt_rtx", raising=False)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    done = cli("compile", bundle, "--backend", "tensorrt-rtx", "--json")
    error = json.loads(done.out)["error"]
    assert error["problem"] == "the library of backend 'tensorrt-rtx' is not installed"
    assert error["fix"] == 'pip install "qlip-export[tensorrt-rtx]"'


@pytest.fixture
def backend() -> Any:
    pytest.importorskip("tensorrt_rtx", reason='needs pip install "qlip-export[tensorrt-rtx]"')
    return get_backend("tensorrt-rtx")


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "time"])
def test_block_compiles(bundle: Path, tmp_path: Path, backend: Any, block: str, bits: int) -> None:
    (entry,) = [b for b in Bundle.open(bundle).manifest.blocks if b.name == block]
    container = container_of(bits)
    made = backend.compile(bundle / f"onnx/{block}.a{bits}.onnx", tmp_path / "x.plan", container)
    assert [port.name for port in made.inputs] == list(entry.inputs)
    assert [port.name for port in made.outputs] == list(entry.outputs)
    half = {"float16"} if bits < 32 else {"float32"}
    assert {port.dtype for port in made.outputs} == half
    types = made.facts["parsed_layers"]
    assert ("int8" in types) == (bits == 8)
    assert ("half" in types) == (bits < 32)
    assert (made.facts["int4_weights_widened"] > 0) == (bits == 8)
    assert (tmp_path / "x.plan").stat().st_size > 100_000


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder", "policy", "time.a32"])
def test_what_has_no_bit_options_compiles(
    adaptive_bundle: Path, tmp_path: Path, backend: Any, name: str
) -> None:
    made = backend.compile(adaptive_bundle / f"onnx/{name}.onnx", tmp_path / "x.plan", Container.FLOAT)
    assert "half" not in made.facts["parsed_layers"]
    assert all(port.shape for port in (*made.inputs, *made.outputs))


def heavy_block(folder: Path, container: Container, weight_bits: WeightBits) -> Path:
    """Write a convolution of 5.9 million weights by the passes of an export."""
    text = """
        heavy (float[1, 1024, 8, 8] x, float[640, 1024, 3, 3] heavy__weight) => (float[1, 640, 8, 8] out) {
            out = Conv <pads: ints = [1, 1, 1, 1]> (x, heavy__weight)
        }
    """
    weights = {"heavy.weight": np.random.default_rng(0).standard_normal((640, 1024, 3, 3), dtype=np.float32)}
    index = store(folder, graph(text), weights, weight_bits)
    model = graph(text)
    if container is Container.INT8:
        insert_qdq(model, {"heavy": 8}, {"heavy": 4.0})
    cast_to_half(model)
    return bound(folder, model, index)


def test_engine_holds_weights_at_the_width_it_was_given(tmp_path: Path, backend: Any) -> None:
    """4 bits in an FP16 engine, 8 in an INT8 one, which is half of an FP16 engine with weights as they are.

    So it is where weights dominate. In small blocks the kernels for all GPUs are most of an engine.
    """
    megabytes = []
    for container, weight_bits in ((Container.HALF, 4), (Container.INT8, 4), (Container.HALF, 32)):
        onnx, plan = heavy_block(tmp_path, container, weight_bits), tmp_path / "x.plan"  # type: ignore[arg-type]
        backend.compile(onnx, plan, container)
        megabytes.append(plan.stat().st_size / 1e6)
        print(f"{weight_bits}-bit weights, {container.value} engine: {megabytes[-1]:.1f} MB")
    packed, int8, half = megabytes
    assert packed <= 0.6 * int8
    assert int8 <= 0.6 * half
    assert half >= 2 * 640 * 1024 * 9 / 1e6


def test_packed_int4_weights_of_int8_convolutions_are_refused(
    bundle: Path, tmp_path: Path, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is why they are widened; should this fail one day, they need not be."""
    monkeypatch.setattr("qlip_export.graph.expand.expand_int4", lambda model: 0)
    with pytest.raises(QlipError, match=r"cannot compile stem\.a8\.onnx(.|\n)*found: .*Error") as caught:
        backend.compile(bundle / "onnx/stem.a8.onnx", tmp_path / "x.plan", Container.INT8)
    assert "W.type()" in str(caught.value.found)
    assert not (tmp_path / "x.plan").exists()


def test_unsupported_operator_names_node_and_block(tmp_path: Path, backend: Any) -> None:
    x = ir.Value(name="x", shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("NoSuchOperator", [x], domain="nowhere", name="mid.odd")
    node.outputs[0].name = "y"
    odd = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 21, "nowhere": 1})
    ir.save(ir.Model(odd, ir_version=10), tmp_path / "odd.a16.onnx")
    with pytest.raises(QlipError, match=r"cannot read odd\.a16\.onnx") as caught:
        backend.compile(tmp_path / "odd.a16.onnx", tmp_path / "odd.plan", Container.HALF)
    assert "node 'mid.odd' (NoSuchOperator)" in str(caught.value.found)


@pytest.fixture
def small(bundle: Path, tmp_path: Path, backend: Any) -> Path:
    """A bundle with engines of OpenVINO, whose blocks `stem` and `out` are all that is left to compile."""
    out = tamper.copy_of(bundle, tmp_path)

    def shrink(manifest: dict[str, Any]) -> None:
        manifest["bits"] = [8]
        manifest["blocks"] = [b for b in manifest["blocks"] if b["name"] in ("stem", "out")]

    tamper.edit_manifest(out, shrink)
    compile_bundle(out, "tensorrt-rtx", Silent())
    return out


def test_target_stands_beside_others_and_is_passed_over(small: Path) -> None:
    manifest = Bundle.open(small).manifest
    target = manifest.targets["tensorrt-rtx"]
    assert {engine.path for engine in target.engines.values()} == {
        f"engines/tensorrt-rtx/{name}.plan" for name in ("stem.a8", "out.a8", "text_encoder", "vae_decoder")
    }
    assert target.options == {"strongly_typed": True, "tf32": False}
    assert choose_target(Bundle.open(small)).name == "openvino"
    assert compile_bundle(small, "tensorrt-rtx", Silent()).built == 0


@pytest.mark.parametrize("command", [("generate", "a dog"), ("validate",)])
def test_running_is_one_clear_error(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(command[0], small, *command[1:], "--backend", "tensorrt-rtx", "--json")
    assert (done.code, done.err.count("error: ")) == (2, 1)
    error = json.loads(done.out)["error"]
    assert error["problem"] == "qlip-export compiles engines of tensorrt-rtx, but cannot run them yet"
    assert "compute capability 8.0, 8.6, 8.9 and 12.x" in error["expected"]


@pytest.mark.slow
def test_every_engine_of_the_emoji_model_compiles(cli: Cli, tmp_path: Path, backend: Any) -> None:
    assert cli("export", "--model", "emoji", "-o", tmp_path / "emoji").code == 0
    done = cli("compile", tmp_path / "emoji", "--backend", "tensorrt-rtx", "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    manifest = Bundle.open(tmp_path / "emoji").manifest
    assert report["built"] == len(manifest.containers) == len(manifest.targets["tensorrt-rtx"].engines)
    assert report["bytes"] < preflight(manifest, backend, tuple(manifest.containers), tmp_path).need
