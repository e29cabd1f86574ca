"""How engines of TensorRT are run, with a stand-in for the library on a stand-in for the GPU.

It shows that addresses, shapes, order, scratch memory and graphs are right by the documented API. That
TensorRT does what its documents say is not shown here: no engine was ever executed.
"""

from __future__ import annotations

import gc
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from qlip_export.backends import cuda
from qlip_export.backends.tensorrt_runtime import TensorRtRuntime
from qlip_export.bundle import Bundle
from qlip_export.compile import compile_bundle
from qlip_export.errors import QlipError
from qlip_export.progress import Silent
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Chain, Pattern
from qlip_export.runtime.targets import Target
from qlip_export.validate import validate
from tests.backends.stand_in_cuda import StandInRuntime
from tests.backends.stand_in_tensorrt import NUMPY, stand_in
from tests.conftest import Shared

ONNX_ENGINES = "onnxruntime-cuda"
"""Its engine files are ONNX files with their weights, which the stand-in takes for engines."""


class StandInTensorRt(TensorRtRuntime):
    """The run time itself, of a library that is none."""

    name = "tensorrt"
    title = "TensorRT"
    capabilities: Any = SimpleNamespace(half="float16")
    compile: Any = None

    def __init__(self, *, threads: int | None = None) -> None:
        pass

    @property
    def library(self) -> Any:
        return stand_in(cuda.runtime)  # type: ignore[arg-type]


StandInTensorRt.__abstractmethods__ = frozenset()


@pytest.fixture(scope="module")
def compiled(shared: Shared, bundle: Path) -> Path:
    def make(out: Path) -> None:
        shutil.copytree(bundle, out)
        compile_bundle(out, ONNX_ENGINES, Silent())

    return shared("cuda-compiled", make)


@pytest.fixture
def target(compiled: Path, gpu: StandInRuntime) -> Target:
    entry = Bundle.open(compiled).manifest.targets[ONNX_ENGINES]
    backend = StandInTensorRt()
    backend.check_target(entry, "qlip-export compile b --backend tensorrt")
    return Target("tensorrt", entry, backend)


def by_onnx_runtime(bundle: Bundle, pattern: Pattern, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Run the same ONNX files one after the other, without any of our run time."""
    engines = bundle.manifest.targets[ONNX_ENGINES].engines
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    values = dict(inputs)
    for block, variant in zip(bundle.manifest.blocks, pattern, strict=True):
        session = ort.InferenceSession(bundle.root / engines[block.variants[variant].onnx].path, options)
        feeds = {p.name: values[p.name].astype(NUMPY[p.type]) for p in session.get_inputs()}
        names = [p.name for p in session.get_outputs()]
        values |= dict(zip(names, session.run(names, feeds), strict=True))
    return np.asarray(values[names[0]], dtype=np.float32)


def patterns(chain: Chain) -> dict[str, Pattern]:
    uniform = {bits: chain.uniform(bits) for bits in (32, 16, 8)}
    order = (32, 16, 8, 32, 8)
    mixed = tuple(uniform[order[i % 5]][i] for i in range(len(chain.blocks)))
    return {"16": uniform[16], "32": uniform[32], "mixed": mixed}


def random_inputs(bundle: Bundle) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {p.name: rng.standard_normal(p.shape, dtype=np.float32) for p in bundle.manifest.inputs}


@pytest.mark.parametrize("which", ["16", "32", "mixed"])
def test_every_step_is_that_of_the_engines_one_by_one(
    compiled: Path, target: Target, gpu: StandInRuntime, which: str
) -> None:
    bundle = Bundle.open(compiled)
    chain = Chain(bundle, target)
    pattern = patterns(chain)[which]
    chain.load([pattern])
    inputs = random_inputs(bundle)
    chain.hold("text", inputs["text"])
    for i in range(5):  # the third is recorded
        latents = inputs["latents"] * (1 + i / 4)
        found = chain.step(latents, 900.0 - 100 * i, pattern)
        timestep = np.array([900.0 - 100 * i], dtype=np.float32)
        expected = by_onnx_runtime(bundle, pattern, {**inputs, "latents": latents, "timestep": timestep})
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3 * np.abs(expected).max())
    assert target.backend.notes == []
    assert gpu.launches == 4  # one to compare, three steps


def test_engines_share_one_scratch_memory_of_the_largest(
    compiled: Path, target: Target, gpu: StandInRuntime
) -> None:
    bundle = Bundle.open(compiled)
    chain = Chain(bundle, target)
    small, large = chain.uniform(16), chain.uniform(32)
    sizes = {
        bits: max(len((bundle.root / target.entry.engines[key].path).read_bytes()) for key in keys)
        for bits, keys in ((16, chain.engines_of([small])), (32, chain.engines_of([large])))
    }
    inputs = random_inputs(bundle)
    chain.load([small])
    scratch = target.backend._scratch  # type: ignore[attr-defined]
    assert scratch.buffer.size == sizes[16] < sizes[32]
    chain.hold("text", inputs["text"])
    before = [chain.step(inputs["latents"], 500.0, small) for _ in range(4)]
    (recording,) = target.backend._recordings  # type: ignore[attr-defined]
    assert recording._graph is not None
    chain.load([large])
    gc.collect()
    assert scratch.buffer.size == sizes[32]
    assert recording._graph is None  # it held the old address, which the stand-in would notice
    for _ in range(4):
        np.testing.assert_array_equal(chain.step(inputs["latents"], 500.0, small), before[0])


def test_prompt_becomes_an_image(compiled: Path, target: Target) -> None:
    made = TextToImage(Bundle.open(compiled), target)("a dog", seed=1, bits=32)
    expected = TextToImage.load(compiled, backend="openvino")("a dog", seed=1, bits=32)
    difference = np.asarray(made.images[0], dtype=float) - np.asarray(expected.images[0], dtype=float)
    assert made.warnings == []
    assert 10 * np.log10(255**2 / max((difference**2).mean(), 1e-10)) > 40


def test_memory_budgets_are_refused_because_they_bound_the_process(compiled: Path, target: Target) -> None:
    pipeline = TextToImage(Bundle.open(compiled), target)
    with pytest.raises(QlipError, match="a memory budget is for memory of the process") as caught:
        pipeline("a dog", seed=1, bits=32, memory_budget="4GB")
    assert caught.value.found == f"engines of {target.backend.name}, which take the GPU's"
    assert list(pipeline.chain._engines) == []


def test_validation_passes_and_prints_commands_for_the_engines(
    compiled: Path, target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = TextToImage(Bundle.open(compiled), target)
    monkeypatch.setattr(TextToImage, "load", lambda path, backend: pipeline)
    monkeypatch.setattr("qlip_export.validate.choose_target", lambda bundle, backend: target)
    monkeypatch.setattr("qlip_export.validate._compare_images", lambda *arguments: ([], []))
    report = validate(
        compiled,
        prompt="a dog",
        seed=1,
        model=None,
        progress=Silent(),
        save=tmp_path / "cases",
        backend="tensorrt",
    )
    assert [(row.block, row.variant) for row in report.rows if not row.passed] == []
    commands = [command for command in report.commands if "--trt" in command]
    assert len(commands) == len(report.rows)
    # polygraphy reads the line and writes what it would run; running it takes the library.
    program = Path(sys.executable).with_name("polygraphy")
    line = [*shlex.split(commands[-1])[1:], "--gen-script", "-"]
    done = subprocess.run([program, *line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TrtRunner" in done.stdout and "EngineFromBytes" in done.stdout


def test_without_graphs_every_engine_is_started(compiled: Path, target: Target, gpu: StandInRuntime) -> None:
    target.backend.graphs = False  # type: ignore[attr-defined]
    bundle = Bundle.open(compiled)
    chain = Chain(bundle, target)
    pattern = chain.uniform(16)
    chain.load([pattern])
    for _ in range(4):
        chain.step(random_inputs(bundle)["latents"], 1.0, pattern)
    assert gpu.launches == 0


def test_engine_that_is_refused_names_both_sides(target: Target, tmp_path: Path) -> None:
    plan = tmp_path / "x.plan"
    plan.write_bytes(b"no engine")
    entry = next(iter(target.entry.engines.values()))
    with pytest.raises(QlipError, match=r"x\.plan: the engine cannot be loaded") as caught:
        target.backend.load(plan, entry)
    assert "NVIDIA GPUs" in str(caught.value.expected)
    assert str(caught.value.found) == "TensorRT on stand-in: Error Code 1: Serialization (no engine)"
    assert caught.value.fix == "qlip-export compile b --backend tensorrt"


def test_buffer_of_another_shape_is_refused(compiled: Path, target: Target) -> None:
    bundle = Bundle.open(compiled)
    onnx = bundle.manifest.blocks[1].variants["a16"].onnx
    entry = target.entry.engines[onnx]
    engine = target.backend.load(bundle.root / entry.path, entry)
    with pytest.raises(QlipError, match=r"refuses latents: \(1, 2\)"):
        engine.bind("latents", target.backend.allocate((1, 2), "float16"))
    with pytest.raises(QlipError, match="the engine does not start"):
        engine.run()


def test_machine_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "runtime", StandInRuntime(gpus=0))
    with pytest.raises(QlipError, match=r"run on NVIDIA GPUs; none is at hand(.|\n)*another --backend"):
        StandInTensorRt().require_device()
