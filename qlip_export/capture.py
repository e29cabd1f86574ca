"""Capture the parts of a pipeline as ONNX graphs, once, in FP32, without moving a single weight.

Modules are built from their configs on fake tensors, exported through the dynamo exporter, and come out with
every parameter as a graph *input*: a valid ONNX file of a few hundred kilobytes. Weights are bound later, one
at a time, straight from the safetensors shards (`qlip_export.graph.weights.bind_weights`).
"""

from __future__ import annotations

import importlib
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.families import Family, family_of

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21
"""INT4 needs opset 21; TensorRT 10.3 and OpenVINO read it."""


@dataclass(frozen=True)
class Shapes:
    """Static shapes of a build: images per batch, and latents (channels, height, width)."""

    batch_size: int
    latent_channels: int
    latent_height: int
    latent_width: int
    image_height: int
    image_width: int
    text_length: int
    text_width: int

    @property
    def denoiser_batch(self) -> int:
        """Classifier-free guidance runs unconditional and conditional halves as one batch."""
        return 2 * self.batch_size

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Shape of the latents of one batch of images, (N, C, H, W)."""
        return (self.batch_size, self.latent_channels, self.latent_height, self.latent_width)


def denoiser_family(checkpoint: Checkpoint) -> Family:
    """Return the family of the checkpoint's denoiser.

    Raises:
        QlipError: The architecture is not known.
    """
    for name in ("unet", "transformer"):
        if name in checkpoint:
            return family_of(checkpoint.class_of(name))
    raise QlipError(
        f"{checkpoint.folder} has no denoiser",
        expected="a component named 'unet' or 'transformer' in model_index.json",
        found=", ".join(checkpoint),
    )


def shapes_of(checkpoint: Checkpoint, *, batch_size: int) -> Shapes:
    """Return the static shapes of the model at its native image size."""
    denoiser = checkpoint.component("unet").config
    vae = checkpoint.component("vae").config
    text = checkpoint.component("text_encoder").config
    _require_plain(checkpoint, denoiser, int(vae.get("latent_channels", 4)))
    size = int(denoiser["sample_size"])
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    return Shapes(
        batch_size=batch_size,
        latent_channels=int(denoiser["in_channels"]),
        latent_height=size,
        latent_width=size,
        image_height=size * scale,
        image_width=size * scale,
        text_length=int(text["max_position_embeddings"]),
        text_width=int(denoiser["cross_attention_dim"]),
    )


def _require_plain(checkpoint: Checkpoint, denoiser: dict[str, Any], latent_channels: int) -> None:
    """Refuse UNets that take more than latents, timestep and text states.

    Raises:
        QlipError: Naming the setting.
    """
    wanted: dict[str, tuple[Any, str]] = {
        "in_channels": (latent_channels, f"{latent_channels}, the VAE's latent channels (no inpainting)"),
        "addition_embed_type": (None, "none (SDXL's size and pooled-text conditioning is not supported yet)"),
        "class_embed_type": (None, "none"),
        "encoder_hid_dim_type": (None, "none"),
    }
    for key, (value, expected) in wanted.items():
        if denoiser.get(key) != value:
            raise QlipError(
                f"{checkpoint.folder} cannot be captured: {key} of the denoiser",
                expected=expected,
                found=str(denoiser.get(key)),
                fix="use a plain text-to-image model of the Stable Diffusion 1.x family",
            )
    for key in ("sample_size", "cross_attention_dim"):
        if not isinstance(denoiser.get(key), int):
            raise QlipError(
                f"{checkpoint.folder} cannot be captured: {key} of the denoiser",
                expected="one number",
                found=str(denoiser.get(key)),
            )


class _Denoiser(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, latents: Any, timestep: Any, text: Any) -> Any:
        return self.module(latents, timestep, text, return_dict=False)[0]


class _TextEncoder(torch.nn.Module):
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, input_ids: Any) -> Any:
        out = self.module(input_ids=input_ids)
        # Pooled *before* the projection: T2Q's first linear is the projection itself (QLIP, table S5).
        return out.last_hidden_state, out.pooler_output


class _VaeDecoder(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, scaling_factor: float) -> None:
        super().__init__()
        self.module = module
        self.scaling_factor = scaling_factor

    def forward(self, latents: Any) -> Any:
        # StableDiffusionPipeline ignores shift_factor; what it ignores, parity must ignore as well.
        return self.module.decode(latents / self.scaling_factor, return_dict=False)[0]


def capture_denoiser(checkpoint: Checkpoint, shapes: Shapes) -> ir.Model:
    """Return the denoiser's graph.

    Inputs: latents (2N, C, H, W), timestep (1,), text (2N, L, D), float32, then the parameters.
    Output: noise (2N, C, H, W), or whatever the model predicts.
    """
    import diffusers

    family = denoiser_family(checkpoint)
    config = checkpoint.component(family.denoiser_folder).config
    n = shapes.denoiser_batch

    def make() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
        module = getattr(diffusers, family.denoiser_class).from_config(config)
        latents = torch.zeros(n, *shapes.latents[1:])
        return _Denoiser(module), (
            latents,
            torch.zeros(1),
            torch.zeros(n, shapes.text_length, shapes.text_width),
        )

    return _export(make, ("latents", "timestep", "text"), ("noise",))


def capture_text_encoder(checkpoint: Checkpoint, shapes: Shapes) -> ir.Model:
    """Return the text encoder's graph.

    Input: input_ids (2N, L) int64. Outputs: text (2N, L, D) and pooled (2N, D) before projection, float32.
    """
    component = checkpoint.component("text_encoder")
    class_name = checkpoint.class_of("text_encoder")

    def make() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
        transformers = importlib.import_module("transformers")
        if class_name not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            raise QlipError("the text encoder cannot be captured", expected="CLIPTextModel", found=class_name)
        config = transformers.CLIPTextConfig.from_dict(component.config)
        config._attn_implementation = "sdpa"
        module = transformers.CLIPTextModel(config)
        return _TextEncoder(module), (
            torch.zeros(shapes.denoiser_batch, shapes.text_length, dtype=torch.int64),
        )

    return _export(make, ("input_ids",), ("text", "pooled"))


def capture_vae_decoder(checkpoint: Checkpoint, shapes: Shapes) -> ir.Model:
    """Return the VAE decoder's graph, scaling included.

    Input: latents (N, C, H, W). Output: image (N, 3, H, W), nominally in [-1, 1]. Both float32.
    """
    import diffusers

    config = checkpoint.component("vae").config

    def make() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
        vae = diffusers.AutoencoderKL.from_config(config)
        # Not from the file: older configs leave it to the class's default.
        return _VaeDecoder(vae, float(vae.config.scaling_factor)), (torch.zeros(shapes.latents),)

    return _export(make, ("latents",), ("image",))


@dataclass(frozen=True)
class CapturedTokenizer:
    """A tokenizer as the `tokenizers` library reads it, and how prompts are padded."""

    json: str
    max_length: int
    pad_id: int


def capture_tokenizer(checkpoint: Checkpoint) -> CapturedTokenizer:
    """Return the model's tokenizer; one that has only vocabulary and merges is converted."""
    import transformers

    folder = checkpoint.folder / "tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    longest = int(checkpoint.component("text_encoder").config["max_position_embeddings"])
    return CapturedTokenizer(
        json=tokenizer.backend_tokenizer.to_str(),
        max_length=min(int(tokenizer.model_max_length), longest),
        pad_id=int(tokenizer.pad_token_id),
    )


def _without_weights(make: Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]) -> Any:
    """Build a module with its parameters on the meta device but its buffers real: they hold constants."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        module, args = make()
    return module.eval().requires_grad_(False), args


def _materialise_fake(module: torch.nn.Module) -> None:
    """Replace meta parameters by fake CPU tensors, so that they trace beside real buffers and inputs."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            fake = torch.empty(parameter.shape, dtype=torch.float32)
            part.register_parameter(name, torch.nn.Parameter(fake, requires_grad=False))


def _export(make: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> ir.Model:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from qlip_export.graph.ingest import ingest

    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # The exporter's own deprecation warnings are no news for our users.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", UserWarning)
        module, args = _without_weights(make)
        with FakeTensorMode(allow_non_fake_inputs=True):
            _materialise_fake(module)
            program = torch.onnx.export(
                module,
                args,
                dynamo=True,
                optimize=False,
                input_names=list(inputs),
                output_names=list(outputs),
                opset_version=OPSET,
                verbose=False,
            )
    if program is None:
        raise QlipError("torch.onnx.export returned no program")
    names = {name for name, _ in module.named_parameters()}
    return ingest(program.model, parameters=names, prefix="module.")
