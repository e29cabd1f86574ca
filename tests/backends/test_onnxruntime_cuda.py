"""What ONNX Runtime's CUDA backend does without a GPU: compile, refuse to run, tell why."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime as ort
import pytest

from qlip_export.backends import get_backend
from qlip_export.backends.onnxruntime_cuda import PROVIDER, nodes_elsewhere
from qlip_export.bundle import Bundle
from qlip_export.compile import compile_bundle
from qlip_export.errors import QlipError
from qlip_export.progress import Silent
from qlip_export.runtime.targets import choose_target
from tests.conftest import Shared

NAME = "onnxruntime-cuda"
WITHOUT_GPU = pytest.mark.skipif(
    PROVIDER in ort.get_available_providers(), reason="this ONNX Runtime has the CUDA provider"
)


@pytest.fixture(scope="module")
def compiled(shared: Shared, bundle: Path) -> Path:
    """The tiny bundle with engines for GPUs, compiled where there is none."""

    def make(out: Path) -> None:
        shutil.copytree(bundle, out)
        compile_bundle(out, NAME, Silent())

    return shared("cuda-compiled", make)


def operations(bundle: Path, name: str) -> Counter[str]:
    model = onnx.load(bundle / "engines" / NAME / f"{name}.onnx")
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    return Counter(node.op_type for node in model.graph.node)


def test_engines_hold_what_the_provider_has_kernels_for(compiled: Path) -> None:
    for bits in (8, 16):
        found = operations(compiled, f"up_blocks.1.a{bits}")
        assert (found["MultiHeadAttention"], found["Softmax"], found["GroupNormalization"]) == (4, 0, 0)
        assert (found["QuantizeLinear"] > 0) == (bits == 8)
    # A fused kernel multiplies FP32 in TF32.
    assert operations(compiled, "up_blocks.1.a32")["Softmax"] == 4


def test_target_says_what_is_known(compiled: Path) -> None:
    target = Bundle.open(compiled).manifest.targets[NAME]
    assert (target.backend, target.device, target.half) == (NAME, "NVIDIA GPUs", "float16")
    assert len(target.engines) == 27
    facts = target.engines["onnx/up_blocks.1.a16.onnx"].facts
    assert facts is not None
    assert facts.elsewhere is None  # nobody has asked a GPU
    assert facts.precisions["float16"] > 100


@WITHOUT_GPU
def test_running_without_the_provider_names_the_package(compiled: Path) -> None:
    with pytest.raises(QlipError, match=r"no CUDA provider(.|\n)*onnxruntime-gpu"):
        choose_target(Bundle.open(compiled), NAME)


@WITHOUT_GPU
def test_auto_passes_it_over(compiled: Path) -> None:
    assert choose_target(Bundle.open(compiled)).name == "openvino"
    assert get_backend("auto").name == "openvino"


def test_nodes_on_another_provider_are_named(compiled: Path) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = compiled / "engines" / NAME / "time.a32.onnx"
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    assert nodes_elsewhere(session, "CPUExecutionProvider") == ()
    elsewhere = nodes_elsewhere(session)
    assert elsewhere and all(node.endswith("(CPUExecutionProvider)") for node in elsewhere)
    assert any(node.startswith("Gemm ") for node in elsewhere)
