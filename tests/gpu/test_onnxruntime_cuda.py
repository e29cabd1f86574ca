"""ONNX Runtime's CUDA provider on a real GPU: the numbers of the CPU, on the device, as CUDA graphs."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from qlip_export.bundle import Bundle
from qlip_export.compile import compile_bundle
from qlip_export.errors import QlipError
from qlip_export.progress import Silent
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Chain, Pattern
from qlip_export.runtime.targets import Target, choose_target
from qlip_export.validate import validate
from tests.conftest import Shared

if TYPE_CHECKING:
    from qlip_export.backends.onnxruntime_cuda import Graphs


def obstacle() -> str | None:
    """Say why the CUDA provider cannot run here."""
    try:
        from qlip_export.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

        OnnxRuntimeCudaBackend(threads=None).require_device()
    except ImportError as error:
        return str(error)
    except QlipError as error:
        return error.problem
    return None


OBSTACLE = obstacle()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(OBSTACLE is not None, reason=str(OBSTACLE))]

PROMPT = "a red apple"
CUDA = "onnxruntime-cuda"


def psnr(mine: Image.Image, theirs: Image.Image) -> float:
    """In dB; the one of `qlip_export.reference` would load torch and diffusers."""
    first, second = (np.asarray(image, dtype=np.float64) for image in (mine, theirs))
    return float(10 * np.log10(255**2 / max(((first - second) ** 2).mean(), 1e-10)))


@pytest.fixture(scope="module")
def both(shared: Shared, adaptive_bundle: Path) -> Path:
    """The adaptive bundle with engines for the GPU and for the CPU, by the same ONNX Runtime."""

    def make(out: Path) -> None:
        shutil.copytree(adaptive_bundle, out)
        for backend in (CUDA, "onnxruntime"):
            compile_bundle(out, backend, Silent())

    return shared("cuda", make)


@pytest.fixture(scope="module")
def on_gpu(both: Path) -> TextToImage:
    return TextToImage.load(both, backend=CUDA)


@pytest.fixture(scope="module")
def on_cpu(both: Path) -> TextToImage:
    return TextToImage.load(both, backend="onnxruntime")


@pytest.fixture
def chain(both: Path) -> Chain:
    return open_chain(both, "none")


@pytest.fixture
def recorded(both: Path) -> Chain:
    """A chain that records its patterns as CUDA graphs."""
    return open_chain(both, "pattern")


def open_chain(bundle: Path, graphs: Graphs) -> Chain:
    from qlip_export.backends.onnxruntime_cuda import OnnxRuntimeCudaBackend

    opened = Bundle.open(bundle)
    backend = OnnxRuntimeCudaBackend(threads=None, graphs=graphs)
    return Chain(opened, Target(CUDA, opened.manifest.targets[CUDA], backend))


def feed(of: Chain) -> dict[str, Any]:
    """Hold random text states; return random latents and a timestep."""
    rng = np.random.default_rng(0)
    shapes = {port.name: port.shape for port in of._bundle.manifest.inputs}
    of.hold("text", rng.standard_normal(shapes["text"], dtype=np.float32))
    return {"latents": rng.standard_normal(shapes["latents"], dtype=np.float32), "timestep": 500.0}


def test_every_node_is_on_the_gpu(both: Path) -> None:
    engines = Bundle.open(both).manifest.targets[CUDA].engines
    elsewhere = {onnx: engine.facts.elsewhere for onnx, engine in engines.items() if engine.facts}
    assert len(elsewhere) == len(engines)
    assert {onnx: nodes for onnx, nodes in elsewhere.items() if nodes != ()} == {}


def test_is_chosen_where_there_is_a_gpu(both: Path) -> None:
    assert choose_target(Bundle.open(both)).name == CUDA


@pytest.mark.parametrize(("bits", "least"), [(32, 60), (16, 45), (8, 30)])
def test_image_is_nearly_that_of_the_cpu(
    on_gpu: TextToImage, on_cpu: TextToImage, bits: int, least: float
) -> None:
    mine, theirs = (run(PROMPT, seed=1, bits=bits) for run in (on_gpu, on_cpu))
    assert mine.warnings == []
    assert psnr(mine.images[0], theirs.images[0]) > least


def test_adaptive_run_decides_as_on_the_cpu(on_gpu: TextToImage, on_cpu: TextToImage) -> None:
    for prompt in (PROMPT, "the blue boat on a tree"):
        mine, theirs = (run(prompt, seed=2) for run in (on_gpu, on_cpu))
        assert mine.records[0]["bits"] == theirs.records[0]["bits"]
        assert mine.records[0]["q"] == pytest.approx(theirs.records[0]["q"], abs=1e-5)
        assert psnr(mine.images[0], theirs.images[0]) > 30


def test_validation_passes(both: Path) -> None:
    report = validate(both, prompt=PROMPT, seed=1, model=None, progress=Silent(), backend=CUDA)
    assert [(row.block, row.bits) for row in report.rows if not row.passed] == []


def close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-3) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def steps(of: Chain, pattern: Pattern) -> list[np.ndarray]:
    """Run six steps, each on other latents and another timestep; on a GPU the third is recorded."""
    of.load([pattern])
    inputs = feed(of)
    return [of.step(inputs["latents"] * (1 + i / 4), 900.0 - 100 * i, pattern) for i in range(6)]


TOLERANCE = {32: 1e-3, 16: 2e-2, 8: 5e-2}


@pytest.mark.parametrize("graphs", ["none", "engine", "pattern"])
@pytest.mark.parametrize("bits", [8, 16, 32])
def test_every_step_is_that_of_the_cpu(both: Path, bits: int, graphs: Graphs) -> None:
    gpu = open_chain(both, graphs)
    cpu = Chain(Bundle.open(both), choose_target(Bundle.open(both), "onnxruntime"))
    found, expected = (steps(of, of.uniform(bits)) for of in (gpu, cpu))
    for mine, theirs in zip(found, expected, strict=True):
        close(mine, theirs, TOLERANCE[bits])
    for earlier, later in pairwise(found):
        assert np.abs(earlier - later).max() > 1e-2 * np.abs(later).max()
    assert gpu._backend.notes == []


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_graph_gives_what_the_engines_give_one_by_one(chain: Chain, recorded: Chain, bits: int) -> None:
    pattern = chain.uniform(bits)
    for mine, theirs in zip(steps(recorded, pattern), steps(chain, pattern), strict=True):
        close(mine, theirs)
    (recording,) = recorded._backend._recordings  # type: ignore[attr-defined]
    assert recording.nodes["kernel"] > 50


@pytest.mark.parametrize("graphs", ["none", "engine", "pattern"])
def test_patterns_that_mix_dtypes_are_cast_on_the_gpu(both: Path, graphs: Graphs) -> None:
    gpu = open_chain(both, graphs)
    cpu = Chain(Bundle.open(both), choose_target(Bundle.open(both), "onnxruntime"))
    options = (32, 16, 8, 32, 8)
    uniform = [gpu.uniform(bits) for bits in options]
    pattern = tuple(uniform[i % len(options)][i] for i in range(len(gpu.blocks)))
    for mine, theirs in zip(steps(gpu, pattern), steps(cpu, pattern), strict=True):
        close(mine, theirs, 0.05)
    assert gpu._backend.notes == []


def test_values_between_blocks_stay_on_the_gpu(recorded: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = recorded.uniform(16)
    steps(recorded, pattern)
    inputs = feed(recorded)
    gpu = recorded._backend.gpu  # type: ignore[attr-defined]
    copies: list[str] = []
    read, write = gpu.read, gpu.write
    monkeypatch.setattr(gpu, "read", lambda b: copies.append("read") or read(b))
    monkeypatch.setattr(gpu, "write", lambda b, a: copies.append("write") or write(b, a))
    recorded.step(**inputs, pattern=pattern)
    assert copies.count("read") == 1
    assert copies.count("write") == sum(name in ("latents", "timestep") for name, _ in recorded._buffers)
    # What ONNX Runtime copies by itself must not come back to the host.
    (recording,) = recorded._backend._recordings  # type: ignore[attr-defined]
    assert "DeviceToHost" not in recording.nodes


def test_what_is_written_is_read_back(on_gpu: TextToImage) -> None:
    gpu = on_gpu.backend
    array = np.array([[1, -2, 0], [5, 96, -7]])
    for dtype in ("float32", "float16", "int64", "int32"):
        buffer = gpu.allocate((2, 3), dtype)  # type: ignore[arg-type]
        gpu.write(buffer, array)
        np.testing.assert_array_equal(gpu.read(buffer), array)


def test_casts_round_to_nearest_even(on_gpu: TextToImage) -> None:
    gpu = on_gpu.backend
    array = np.random.default_rng(0).standard_normal((70, 500), dtype=np.float32)
    wide, narrow = gpu.allocate(array.shape, "float32"), gpu.allocate(array.shape, "float16")
    gpu.write(wide, array)
    gpu.cast(wide, narrow)
    np.testing.assert_array_equal(gpu.read(narrow), array.astype(np.float16).astype(np.float32))
    gpu.cast(narrow, wide)
    np.testing.assert_array_equal(gpu.read(wide), array.astype(np.float16).astype(np.float32))


def test_recording_that_fails_is_told_and_runs_all_the_same(on_gpu: TextToImage) -> None:
    """Waiting for the stream is forbidden while it is recorded."""
    from qlip_export.backends.cuda import Recording

    gpu = on_gpu.backend.gpu  # type: ignore[attr-defined]
    buffer = gpu.allocate((4,), "float32")
    runs: list[int] = []

    def call() -> None:
        runs.append(1)
        gpu.synchronize()
        gpu.write(buffer, np.full(4, len(runs), dtype=np.float32))

    recording = Recording(gpu, [call], [], [buffer], eager_runs=1)
    recording()
    recording()
    assert recording.note is not None and "not recorded" in recording.note
    assert gpu.read(buffer).tolist() == [len(runs)] * 4
    recording()
    assert gpu.read(buffer).tolist() == [len(runs)] * 4
