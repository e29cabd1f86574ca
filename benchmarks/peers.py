"""What else could run the same denoiser here, each as its own users would: no code of ours in the way.

Every peer is a function (latents, timestep, text) -> prediction on float32 arrays, batch 2, static shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.bundles import OUT, Subject
from benchmarks.timing import THREADS

Array = NDArray[np.float32]
Denoiser = Callable[[Array, float, Array], Array]


def eager(unet: Any) -> Denoiser:
    """Return a diffusers UNet, or what torch.compile made of one, in the dtype it has."""
    import torch

    parameter = next(unet.parameters())

    def call(latents: Array, timestep: float, text: Array) -> Array:
        with torch.inference_mode():
            out = unet(
                torch.from_numpy(latents).to(parameter.dtype),
                torch.tensor(timestep),
                torch.from_numpy(text).to(parameter.dtype),
                return_dict=False,
            )[0]
        result: Array = out.float().numpy()
        return result

    return call


def openvino_whole(of: Subject, inputs: tuple[Array, float, Array], precision: str) -> Denoiser:
    """Return OpenVINO's own conversion of the unquantized UNet, run at ``precision`` ('f32' or 'bf16')."""
    import openvino as ov

    path = _folder(of) / "unet.xml"
    if not path.is_file():
        latents, timestep, text = _tensors(inputs)
        model = ov.convert_model(_positional(load_unet(of)), example_input=(latents, timestep, text))
        model.reshape({0: list(latents.shape), 1: list(timestep.shape), 2: list(text.shape)})
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(model, path, compress_to_fp16=False)
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": THREADS,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = ov.Core().compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()

    def call(latents: Array, timestep: float, text: Array) -> Array:
        request.infer([latents, np.array([timestep], np.float32), text], share_inputs=True)
        return np.array(request.get_output_tensor(0).data)

    return call


def onnxruntime_whole(of: Subject, inputs: tuple[Array, float, Array]) -> Denoiser:
    """Return ONNX Runtime on torch's own ONNX export of the unquantized UNet, FP32."""
    import onnxruntime as ort

    path = _folder(of) / "unet.onnx"
    if not path.is_file():
        import torch

        path.parent.mkdir(parents=True, exist_ok=True)
        program = torch.onnx.export(
            _positional(load_unet(of)),
            _tensors(inputs),
            dynamo=True,
            input_names=["latents", "timestep", "text"],
            verbose=False,
        )
        program.save(path, external_data=True)
    options = ort.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(latents: Array, timestep: float, text: Array) -> Array:
        feed = {"latents": latents, "timestep": np.array([timestep], np.float32), "text": text}
        result: Array = session.run(None, feed)[0]
        return result

    return call


def _folder(of: Subject) -> Path:
    """Return where conversions of these very weights are kept."""
    from qlip_export.checkpoint import Checkpoint

    fingerprint = Checkpoint(of.folder).component("unet").fingerprint
    return OUT / "peers" / f"{of.shape}-{fingerprint[:12]}"


def load_unet(of: Subject) -> Any:
    """Return the diffusers UNet in FP32, ready for inference."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(Path(of.folder) / "unet", torch_dtype=torch.float32)
    return unet.eval().requires_grad_(False)


def _positional(unet: Any) -> Any:
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, latents: Any, timestep: Any, text: Any) -> Any:
            return self.unet(latents, timestep, text, return_dict=False)[0]

    return Positional().eval()


def _tensors(inputs: tuple[Array, float, Array]) -> tuple[Any, Any, Any]:
    import torch

    latents, timestep, text = inputs
    return torch.from_numpy(latents), torch.tensor([timestep]), torch.from_numpy(text)
