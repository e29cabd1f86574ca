"""ONNX Runtime as a backend: the reference for numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from qlip_export.backends.onnxruntime import OnnxRuntimeBackend
from qlip_export.bundle import Bundle
from qlip_export.compiled import EngineEntry
from qlip_export.errors import QlipError
from qlip_export.progress import Silent
from qlip_export.reference import psnr
from qlip_export.runtime import TextToImage
from qlip_export.spec import Container
from qlip_export.validate import validate


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_image_is_nearly_that_of_openvino(bundle: Path, ort_bundle: Path, bits: int) -> None:
    mine, theirs = (
        TextToImage.load(b)("a red apple", seed=1, bits=bits).images[0] for b in (ort_bundle, bundle)
    )
    assert psnr(mine, theirs) > (60 if bits == 32 else 30)


def test_bundle_passes_validation(ort_bundle: Path) -> None:
    report = validate(ort_bundle, prompt="a red apple", seed=0, model=None, progress=Silent())
    assert report.passed
    assert len(report.rows) == 27


def test_engines_stand_alone(ort_bundle: Path) -> None:
    """None may point at a weight file: it would not be covered by the engine's hash, nor lie beside it."""
    engines = sorted((ort_bundle / "engines" / "onnxruntime").iterdir())
    assert len(engines) == 27
    for path in engines:
        model = onnx.load(path, load_external_data=False)
        assert not any(t.external_data for t in model.graph.initializer), path.name


def test_manifest_says_what_kernels_compute_in(bundle: Path, tmp_path: Path) -> None:
    """A CPU without FP16 kernels multiplies in FP32: the layers of an FP16 graph are widened."""
    facts = {}
    for bits, container in ((32, Container.FLOAT), (16, Container.HALF)):
        onnx_file = bundle / f"onnx/down_blocks.0.a{bits}.onnx"
        made = OnnxRuntimeBackend(threads=1).compile(onnx_file, tmp_path / f"{bits}.ort.onnx", container)
        assert made.facts is not None
        facts[bits] = made.facts
        assert facts[bits].source == "engine"
        assert sum(facts[bits].precisions.values()) == facts[bits].layers > 20
    assert "float16" not in facts[32].precisions
    assert facts[16].precisions["float16"] > 0 and facts[16].precisions["float32"] > 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["16.ort.onnx", "32.ort.onnx"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
def test_what_is_written_is_read_back(dtype: str) -> None:
    backend = OnnxRuntimeBackend(threads=1)
    array = np.array([[1, -2, 0], [5, 96, -7]])
    buffer = backend.allocate((2, 3), dtype)  # type: ignore[arg-type]
    backend.write(buffer, array)
    np.testing.assert_array_equal(backend.read(buffer), array)


def test_cast_between_buffers_rounds() -> None:
    backend = OnnxRuntimeBackend(threads=1)
    array = np.random.default_rng(0).standard_normal((4, 5), dtype=np.float32)
    wide, narrow = backend.allocate((4, 5), "float32"), backend.allocate((4, 5), "float16")
    backend.write(wide, array)
    backend.cast(wide, narrow)
    np.testing.assert_array_equal(backend.read(narrow), array.astype(np.float16).astype(np.float32))


def test_engine_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.ort.onnx").write_bytes(b"no engine")
    entry = EngineEntry(path="x.ort.onnx", container=Container.FLOAT, inputs=(), outputs=())
    with pytest.raises(QlipError, match=r"does not load .*x\.ort\.onnx(.|\n)*build the bundle again"):
        OnnxRuntimeBackend(threads=1).load(tmp_path / "x.ort.onnx", entry)


def test_manifest_names_the_backend(ort_bundle: Path) -> None:
    (target,) = Bundle.open(ort_bundle).manifest.targets.values()
    assert (target.backend, target.device, target.half) == ("onnxruntime", "CPU", "float16")
