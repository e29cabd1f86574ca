"""The tiny denoiser as a captured graph, its parameters, and what torch makes of the same inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

Arrays = dict[str, np.ndarray]


@pytest.fixture
def captured(bundle: Path) -> ir.Model:
    """The denoiser as captured; tests may change it."""
    return ir.load(bundle / "capture" / "denoiser.onnx")


@pytest.fixture(scope="session")
def denoiser(tiny_model: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_pretrained(tiny_model / "unet").eval().requires_grad_(False)


@pytest.fixture(scope="session")
def parameters(denoiser: Any) -> Arrays:
    return {name: value.numpy() for name, value in denoiser.state_dict().items()}


@pytest.fixture(scope="session")
def inputs() -> Arrays:
    rng = np.random.default_rng(0)
    return {
        "latents": rng.standard_normal((2, 4, 8, 8), dtype=np.float32),
        "timestep": np.array([601], dtype=np.float32),
        "text": rng.standard_normal((2, 16, 32), dtype=np.float32),
    }


@pytest.fixture(scope="session")
def expected(denoiser: Any, inputs: Arrays) -> np.ndarray:
    """The noise that torch predicts."""
    tensors = [torch.from_numpy(inputs[name]) for name in ("latents", "timestep", "text")]
    return np.asarray(denoiser(*tensors, return_dict=False)[0])


def run(model: ir.Model | bytes | str | Path, feeds: Arrays) -> Arrays:
    """Run a graph as it is written, without any optimization."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    source = ir.to_proto(model).SerializeToString() if isinstance(model, ir.Model) else model
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    feeds = {port.name: feeds[port.name] for port in session.get_inputs()}
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    wanted = wanted.astype(np.float64)
    return float(np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted))


def graph(text: str) -> ir.Model:
    """Return a model from ONNX's own text form of a graph; `__` in a name stands for a dot."""
    import onnx.parser

    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True))
    values = [*model.graph.inputs, *(out for node in model.graph for out in node.outputs)]
    for value in values:
        value.name = str(value.name).replace("__", ".")
    return model
