"""Engines of TensorRT-RTX are really compiled. None is executed: that takes a GPU that nobody had here."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qlip_export.backends import cuda
from qlip_export.backends.options import CompileOptions
from qlip_export.bundle import Bundle
from qlip_export.compile import compile_bundle, preflight
from qlip_export.compiled import EngineEntry, TargetEntry
from qlip_export.errors import QlipError
from qlip_export.graph.cast import cast_to_half
from qlip_export.graph.qdq import insert_qdq
from qlip_export.manifest import Manifest
from qlip_export.progress import Silent
from qlip_export.runtime.targets import choose_target
from qlip_export.spec import Container, WeightBits
from tests import tamper
from tests.backends.stand_in_cuda import StandInRuntime
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


@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("block", [name for name in BLOCKS if name != "time"])
def test_engine_of_every_block_of_the_emoji_model(emoji_rtx: Path, block: str, bits: int) -> None:
    opened = Bundle.open(emoji_rtx)
    (entry,) = [b for b in opened.manifest.blocks if b.name == block]
    engine = opened.engine(opened.manifest.targets["tensorrt-rtx"], f"onnx/{block}.a{bits}.onnx")
    assert [port.name for port in engine.inputs] == list(entry.inputs)
    assert [port.name for port in engine.outputs] == list(entry.outputs)
    assert {port.dtype for port in engine.outputs} == ({"float16"} if bits < 32 else {"float32"})
    facts = engine.facts
    assert facts is not None and facts.source == "parsed network"
    assert facts.wrong == {}
    assert ("int8" in facts.precisions) == (bits == 8)
    assert facts.precisions["float16" if bits < 32 else "float32"] > len(entry.layers)
    assert (facts.int4_weights_widened == len(entry.layers)) == (bits == 8)
    recognised(opened, engine)


@pytest.mark.parametrize("name", ["text_encoder", "vae_decoder", "policy", "time.a32"])
def test_engine_of_what_has_no_bit_options(emoji_rtx: Path, name: str) -> None:
    opened = Bundle.open(emoji_rtx)
    engine = opened.engine(opened.manifest.targets["tensorrt-rtx"], f"onnx/{name}.onnx")
    assert {port.dtype for port in engine.outputs} <= {"float32", "int64"}
    assert all(port.shape for port in (*engine.inputs, *engine.outputs))
    assert engine.facts is not None and engine.facts.wrong == {}
    recognised(opened, engine)


def recognised(bundle: Bundle, engine: EngineEntry) -> None:
    """As far as a machine without a GPU can tell: the library recognises the file, and no other."""
    from qlip_export.backends.tensorrt_rtx import diagnose

    plan = bundle.file(engine.path).read_bytes()
    assert "MALFORMED_ENGINE" not in diagnose(plan)[0]
    assert "MALFORMED_ENGINE" in diagnose(b"no " + plan)[0]


def sizes(manifest: Manifest) -> dict[int, int]:
    """Return the bytes of all engines of blocks by bits."""
    engines = manifest.targets["tensorrt-rtx"].engines
    found = dict.fromkeys((8, 16, 32), 0)
    for bits in found:
        paths = [engine.path for onnx, engine in engines.items() if onnx.endswith(f".a{bits}.onnx")]
        found[bits] = sum(manifest.files[path].size for path in paths)
        print(f"{bits} bits: {found[bits] / 1e6:.1f} MB")
    return found


def test_sizes_of_the_emoji_model(emoji_rtx: Path, rtx: Any) -> None:
    """In small blocks kernels count more than weights, and INT8 has more of them: not half a size."""
    bundle = Bundle.open(emoji_rtx)
    manifest = bundle.manifest
    engines = manifest.targets["tensorrt-rtx"].engines
    assert set(engines) == set(manifest.containers) and len(engines) == 28
    size = sizes(manifest)
    assert size[16] < size[8] < 1.4 * size[16]
    assert size[32] < 1.2 * size[16]
    estimate = preflight(manifest, rtx, tuple(manifest.containers), emoji_rtx, bundle.file)
    total = sum(manifest.files[e.path].size for e in engines.values())
    assert total < estimate.need < 2 * total


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


def test_engine_holds_weights_at_the_width_it_was_given(tmp_path: Path, rtx: Any) -> None:
    """4 bits in an FP16 engine, 8 in an INT8 one, which is half of an FP16 engine with weights as they are.

    So it is where weights dominate. In small blocks the kernels for all GPUs are most of an engine.
    """
    megabytes = []
    for container, weight_bits in ((Container.HALF, 4), (Container.INT8, 4), (Container.HALF, 32)):
        onnx, plan = heavy_block(tmp_path, container, weight_bits), tmp_path / "x.plan"  # type: ignore[arg-type]
        rtx.compile(onnx, plan, container)
        megabytes.append(plan.stat().st_size / 1e6)
        print(f"{weight_bits}-bit weights, {container.value} engine: {megabytes[-1]:.1f} MB")
    packed, int8, half = megabytes
    assert packed <= 0.6 * int8
    assert int8 <= 0.6 * half
    assert half >= 2 * 640 * 1024 * 9 / 1e6


def test_packed_int4_weights_of_int8_convolutions_are_refused(
    bundle: Path, tmp_path: Path, rtx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is why they are widened; should this fail one day, they need not be."""
    monkeypatch.setattr("qlip_export.graph.expand.expand_int4", lambda model: 0)
    with pytest.raises(QlipError, match=r"cannot compile stem\.a8\.onnx(.|\n)*found: .*Error") as caught:
        rtx.compile(bundle / "onnx/stem.a8.onnx", tmp_path / "x.plan", Container.INT8)
    assert "W.type()" in str(caught.value.found)
    assert not (tmp_path / "x.plan").exists()


@pytest.fixture
def small(bundle: Path, tmp_path: Path, rtx: Any) -> Path:
    """A bundle with engines of OpenVINO, whose blocks `stem` and `out` are all that is left to compile."""
    out = shrunk(tamper.copy_of(bundle, tmp_path))
    compile_bundle(out, "tensorrt-rtx", Silent())
    return out


def shrunk(out: Path) -> Path:
    def shrink(manifest: dict[str, Any]) -> None:
        manifest["bits"] = [8]
        manifest["blocks"] = [b for b in manifest["blocks"] if b["name"] in ("stem", "out")]
        for block in manifest["blocks"]:
            block["variants"] = {"a8": block["variants"]["a8"]}

    tamper.edit_manifest(out, shrink)
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


def test_options_are_part_of_the_target(small: Path) -> None:
    options = CompileOptions(tf32=True, optimization_level=1, target=("sm89", "sm86"))
    report = compile_bundle(small, "tensorrt-rtx", Silent(), options)
    assert (report.built, report.device) == (
        4,
        "NVIDIA GPUs of compute capability 8.6 (RTX 30) and 8.9 (RTX 40)",
    )
    target = Bundle.open(small).manifest.targets["tensorrt-rtx"]
    wanted = {"strongly_typed": True, "tf32": True, "optimization_level": 1, "target": ["sm86", "sm89"]}
    assert target.options == wanted
    assert compile_bundle(small, "tensorrt-rtx", Silent(), options).built == 0
    assert compile_bundle(small, "tensorrt-rtx", Silent()).built == 4


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (("--target", "sm90"), "TensorRT-RTX builds for no GPU called sm90"),
        (("--hardware-compat", "ampere-plus"), "tensorrt-rtx takes no --hardware-compat"),
        (("--timing-cache", "cache"), "tensorrt-rtx takes no --timing-cache"),
        (("--version-compat",), "tensorrt-rtx takes no --version-compat"),
        (("--optimization-level", "6"), "--optimization-level: Input should be less than or equal to 5"),
    ],
)
def test_options_that_are_refused(
    cli: Cli, bundle: Path, rtx: Any, option: tuple[str, ...], problem: str
) -> None:
    done = cli("compile", bundle, "--backend", "tensorrt-rtx", *option, "--json")
    assert done.code == 2
    assert json.loads(done.out)["error"]["problem"] == problem
    assert list(Bundle.open(bundle).manifest.targets) == ["openvino"]


def test_workspace_that_is_too_small_says_so(cli: Cli, bundle: Path, tmp_path: Path, rtx: Any) -> None:
    out = tamper.copy_of(bundle, tmp_path)
    done = cli("compile", out, "--backend", "tensorrt-rtx", "--workspace", "1", "--json")
    assert json.loads(done.out)["error"]["fix"] == "allow more than --workspace 1"


@pytest.mark.parametrize("command", [("generate", "a dog"), ("validate",)])
def test_running_is_one_clear_error(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli(command[0], small, *command[1:], "--backend", "tensorrt-rtx", "--json")
    assert (done.code, done.err.count("error: ")) == (2, 1)
    error = json.loads(done.out)["error"]
    assert error["problem"] == "engines of TensorRT-RTX run on NVIDIA GPUs; none is at hand"
    assert error["fix"] == "choose another --backend"


def test_file_that_is_no_engine_is_refused_with_both_sides(tmp_path: Path, rtx: Any) -> None:
    rtx._made, rtx._rebuild = "TensorRT-RTX 1.6", "qlip-export compile b"
    with pytest.raises(QlipError, match=r"does not run x\.plan here: it is no engine") as caught:
        rtx.check_plan(tmp_path / "x.plan", bytes(1000))
    assert caught.value.expected == "TensorRT-RTX 1.6"
    assert str(caught.value.found).startswith(f"TensorRT-RTX {rtx.capabilities.version}")
    assert caught.value.fix == "qlip-export compile b"


def test_real_engine_is_loaded_as_far_as_a_machine_without_a_gpu_goes(
    small: Path, rtx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library takes its own engine for one, and then finds no driver."""
    if cuda.gpu_count() > 0:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(cuda, "runtime", StandInRuntime())
    bundle = Bundle.open(small)
    target = bundle.manifest.targets["tensorrt-rtx"]
    rtx.check_target(target.model_copy(update={"options": {"target": ["sm90"]}}), "qlip-export compile b")
    entry = target.engines["onnx/stem.a8.onnx"]
    with pytest.raises(QlipError, match=r"stem\.a8\.plan: the engine cannot be loaded") as caught:
        rtx.load(bundle.root / entry.path, entry)
    assert "CUDA driver version is insufficient" in str(caught.value.found)
    assert caught.value.expected == f"TensorRT-RTX {target.version} for {target.device}"
    assert caught.value.fix == "qlip-export compile b"


@pytest.mark.parametrize(
    ("capability", "options", "fix"),
    [
        ((8, 9), {}, None),
        ((12, 0), {}, None),
        ((8, 9), {"target": ["sm86"]}, "rebuild"),
        ((8, 6), {"target": ["sm86"]}, None),
        ((9, 0), {}, "compile here with --backend tensorrt"),
        ((8, 7), {}, "compile here with --backend tensorrt"),
    ],
)
def test_gpu_that_engines_were_not_compiled_for_is_named(
    rtx: Any,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    options: dict[str, Any],
    fix: str | None,
) -> None:
    monkeypatch.setattr(cuda, "runtime", StandInRuntime())
    rtx.gpu.capability = capability
    target = TargetEntry(
        backend="tensorrt-rtx",
        version="1.7",
        device="these GPUs",
        half="float16",
        options=options,
        engines={},
    )
    if fix is None:
        rtx.check_target(target, "rebuild")
        return
    with pytest.raises(QlipError, match="not compiled for this GPU") as caught:
        rtx.check_target(target, "rebuild")
    assert caught.value.expected == target.device
    assert caught.value.found == f"stand-in, compute capability {capability[0]}.{capability[1]}"
    assert caught.value.fix == fix


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_engine_of_the_shape_of_bk_sdm_tiny(cli: Cli, tmp_path: Path, rtx: Any) -> None:
    """Random weights; at 4 bits an INT8 engine is about twice an FP16 one, which keeps them packed."""
    from benchmarks.shapes import write_bk_sdm_tiny

    write_bk_sdm_tiny(tmp_path / "model")
    out = tmp_path / "bundle"
    assert cli("export", "--model", tmp_path / "model", "-o", out).code == 0
    started = time.monotonic()
    done = cli("compile", out, "--backend", "tensorrt-rtx", "--json")
    assert done.code == 0, done.err
    print(f"{json.loads(done.out)['built']} engines in {time.monotonic() - started:.0f} s")
    opened = Bundle.open(out)
    manifest = opened.manifest
    engines = manifest.targets["tensorrt-rtx"].engines
    assert len(engines) == len(manifest.containers) == 27
    size = sizes(manifest)
    assert 1.5 * size[16] < size[8] < 2.2 * size[16]
    assert size[32] < 1.1 * size[16]
    for engine in engines.values():
        assert engine.facts is not None and engine.facts.wrong == {}
        recognised(opened, engine)
