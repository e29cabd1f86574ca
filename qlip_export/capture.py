"""Capture the parts of a pipeline as ONNX graphs, once, in FP32, without moving a single weight.

Modules are built from their configs on fake tensors, exported through the dynamo exporter, and come out with
every parameter as a graph *input*: a valid ONNX file of a few hundred kilobytes. Weights are bound later, one
at a time, straight from the safetensors shards (`qlip_export.graph.weights.bind_weights`).
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.families import DenoiserInput, Dimension, Family, family_of
from qlip_export.pipelines import Decoding, Size, pipeline_of

if TYPE_CHECKING:
    import onnx_ir as ir

OPSET = 21
"""INT4 needs opset 21; TensorRT 10.3 and OpenVINO read it."""


@dataclass(frozen=True)
class Shapes:
    """Static shapes of a build: images per batch, latents (channels, height, width), text (length, width).

    `guided` batches hold an unconditional half beside the conditional one. `pooled_width` is that of the
    pooled text that the denoiser takes; 0 where it takes none.
    """

    batch_size: int
    latent_channels: int
    latent_height: int
    latent_width: int
    image_height: int
    image_width: int
    text_length: int
    text_width: int
    pooled_width: int = 0
    guided: bool = True

    @property
    def denoiser_batch(self) -> int:
        """Classifier-free guidance runs unconditional and conditional halves as one batch."""
        return 2 * self.batch_size if self.guided else self.batch_size

    @property
    def latents(self) -> tuple[int, int, int, int]:
        """Shape of the latents of one batch of images, (N, C, H, W)."""
        return (self.batch_size, self.latent_channels, self.latent_height, self.latent_width)

    @property
    def size(self) -> Size:
        """Of an image and of its latents."""
        return Size((self.image_height, self.image_width), (self.latent_height, self.latent_width))

    def of(self, value: DenoiserInput) -> tuple[int, ...]:
        """Return the shape of an input of the denoiser."""
        sizes = {**vars(self), "batch": self.denoiser_batch}
        return tuple(d if isinstance(d, int) else sizes[d] for d in value.shape)


def denoiser_family(checkpoint: Checkpoint) -> Family:
    """Return the family of the checkpoint's denoiser.

    Raises:
        QlipError: The architecture is not known.
    """
    for name in ("unet", "transformer"):
        if name in checkpoint:
            return family_of(checkpoint.class_of(name), checkpoint.component(name).config)
    raise QlipError(
        f"{checkpoint.folder} has no denoiser",
        expected="a component named 'unet' or 'transformer' in model_index.json",
        found=", ".join(checkpoint),
    )


def shapes_of(
    checkpoint: Checkpoint, *, batch_size: int, height: int | None = None, width: int | None = None
) -> Shapes:
    """Return the static shapes of the model, at its native image size unless ``height``, ``width`` are given.

    Raises:
        QlipError: A config lacks a number, the denoiser takes more channels than the VAE decodes, or the
            image is no multiple of what one latent, or one patch of latents, covers.
    """
    family = denoiser_family(checkpoint)
    sizes = {name: _dimension(checkpoint, name, value) for name, value in family.dimensions.items()}
    size = sizes.pop("latent_size")
    vae = checkpoint.component("vae").config
    if (decoded := int(vae.get("latent_channels", 4))) != sizes["latent_channels"]:
        raise QlipError(
            f"{checkpoint.folder} cannot be captured: in_channels of the denoiser",
            expected=f"{decoded}, the VAE's latent channels (no inpainting)",
            found=str(sizes["latent_channels"]),
            fix="use a plain text-to-image model",
        )
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    height, width = height or size * scale, width or size * scale
    for option, pixels in (("--height", height), ("--width", width)):
        if pixels < 1 or pixels % (scale * family.patch):
            raise QlipError(
                f"{option} does not fit the model",
                expected=f"a multiple of {scale * family.patch}",
                found=str(pixels),
                fix=f"e.g. {max(1, round(pixels / (scale * family.patch))) * scale * family.patch}",
            )
    return Shapes(
        batch_size=batch_size,
        latent_height=height // scale,
        latent_width=width // scale,
        image_height=height,
        image_width=width,
        guided=family.guided,
        **sizes,
    )


def _dimension(checkpoint: Checkpoint, name: str, wanted: Dimension) -> int:
    if isinstance(wanted, int):
        return wanted
    value = wanted.read(checkpoint.component(wanted.component).config)
    if not isinstance(value, int):
        raise QlipError(
            f"{checkpoint.folder} cannot be captured: {wanted.key} of {wanted.component} ({name})",
            expected="one number",
            found=str(value),
        )
    return value


class CallableDenoiser(torch.nn.Module):
    """The denoiser as the graph of every family is called: latents (N, C, H, W) in and out."""

    def __init__(self, module: torch.nn.Module, family: Family, shapes: Shapes) -> None:
        super().__init__()
        self.module = module
        self.family = family
        self.grid = (shapes.latent_height // family.patch, shapes.latent_width // family.patch)
        for argument, numbered in family.position_ids.items():
            # Text has no place in the image; image tokens have a row and a column.
            rows, columns = (torch.arange(float(n)) for n in self.grid)
            image = torch.cartesian_prod(torch.zeros(1), rows, columns)
            self.register_buffer(
                argument, image if numbered == "image" else torch.zeros(shapes.text_length, 3)
            )
        if family.position_embedding is not None:
            ids = torch.cat([getattr(self, argument) for argument in family.position_ids])
            embedded = getattr(module, family.position_embedding)(ids)
            setattr(module, family.position_embedding, _Constant(embedded))

    def forward(self, *inputs: Any) -> Any:
        """Return the prediction, (N, C, H, W), for the family's inputs in order."""
        arguments: dict[str, Any] = {name: getattr(self, name) for name in self.family.position_ids}
        for wanted, value in zip(self.family.inputs, inputs, strict=True):
            if wanted.name == "latents":
                value = self._packed(value)
            if wanted.divisor != 1:
                value = value / wanted.divisor
            outer, _, inner = wanted.argument.partition(".")
            if inner:
                arguments.setdefault(outer, {})[inner] = value
            else:
                arguments[outer] = value
        return self._unpacked(self.module(**arguments, return_dict=False)[0])

    def _packed(self, latents: Any) -> Any:
        """Return latents (N, C, H, W) as tokens (N, rows * columns, C * patch * patch)."""
        patch = self.family.patch
        if patch == 1:
            return latents
        n, channels = latents.shape[:2]
        rows, columns = self.grid
        patches = latents.reshape(n, channels, rows, patch, columns, patch).permute(0, 2, 4, 1, 3, 5)
        return patches.reshape(n, rows * columns, channels * patch * patch)

    def _unpacked(self, tokens: Any) -> Any:
        patch = self.family.patch
        if patch == 1:
            return tokens
        rows, columns = self.grid
        patches = tokens.reshape(len(tokens), rows, columns, -1, patch, patch).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(len(tokens), -1, rows * patch, columns * patch)


class _Constant(torch.nn.Module):
    """Returns the tensors it was made with, whatever it is called with."""

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        super().__init__()
        for i, value in enumerate(values):
            self.register_buffer(f"value{i}", value)

    def forward(self, *_: Any) -> Any:
        return tuple(self.buffers())


class _VaeDecoder(torch.nn.Module):
    def __init__(self, module: torch.nn.Module, decoding: Decoding) -> None:
        super().__init__()
        self.module, self.decoding = module, decoding

    def forward(self, latents: Any) -> Any:
        return self.module.decode(unscaled(latents, self.decoding), return_dict=False)[0]


def make_denoiser(checkpoint: Checkpoint, shapes: Shapes) -> torch.nn.Module:
    """Return the denoiser as its graph is called; its attribute ``module`` is the diffusers class."""
    import diffusers

    family = denoiser_family(checkpoint)
    config = checkpoint.component(family.denoiser_folder).config
    return CallableDenoiser(getattr(diffusers, family.denoiser_class).from_config(config), family, shapes)


def capture_denoiser(checkpoint: Checkpoint, shapes: Shapes) -> ir.Model:
    """Return the denoiser's graph.

    Inputs: those of the family, float32, then the parameters. For ``unet``: latents (2N, C, H, W),
    timestep (1,), text (2N, L, D). Output: noise, or whatever the model predicts, shaped as the latents.
    """
    family = denoiser_family(checkpoint)

    def make() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
        denoiser = make_denoiser(checkpoint, shapes)
        return denoiser, tuple(torch.zeros(shapes.of(i)) for i in family.inputs)

    return export_graph(make, family.input_names, ("noise",))


def unscaled(latents: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """Return latents (N, C, H, W) as the VAE wants them."""

    def by_channel(numbers: tuple[float, ...]) -> torch.Tensor | float:
        if len(numbers) == 1:
            return numbers[0]
        return torch.tensor(numbers, device=latents.device).view(1, -1, 1, 1)

    wide: torch.Tensor = latents / by_channel(decoding.divisor)
    return wide + by_channel(decoding.shift) if any(decoding.shift) else wide


def capture_vae_decoder(checkpoint: Checkpoint, shapes: Shapes) -> ir.Model:
    """Return the VAE decoder's graph, scaling included.

    Input: latents (N, C, H, W). Output: image (N, 3, H, W), nominally in [-1, 1]. Both float32.
    """
    import diffusers

    config = checkpoint.component("vae").config
    decoding_of = pipeline_of(denoiser_family(checkpoint).name).decoding

    def make() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
        vae = diffusers.AutoencoderKL.from_config(config)
        # Not from the file: older configs leave it to the class's default.
        return _VaeDecoder(vae, decoding_of(vae.config)), (torch.zeros(shapes.latents),)

    return export_graph(make, ("latents",), ("image",))


def _without_weights(make: Callable[[], tuple[torch.nn.Module, tuple[torch.Tensor, ...]]]) -> Any:
    """Build a module with its parameters on the meta device but its buffers real: they hold constants."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False), _uninitialised():
        module, args = make()
    return module.eval().requires_grad_(False), args


@contextlib.contextmanager
def _uninitialised() -> Iterator[None]:
    """Keep layers from filling weights that are thrown away: twelve billion numbers take minutes."""
    kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Embedding)
    before = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = lambda _: None
    try:
        yield
    finally:
        for kind, reset in zip(kinds, before, strict=True):
            kind.reset_parameters = reset


def _materialise_fake(module: torch.nn.Module) -> None:
    """Replace meta parameters by fake CPU tensors, so that they trace beside real buffers and inputs.

    Parameters that are shared stay shared.
    """
    fakes: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter not in fakes:
                fake = torch.empty(parameter.shape, dtype=torch.float32)
                fakes[parameter] = torch.nn.Parameter(fake, requires_grad=False)
            part.register_parameter(name, fakes[parameter])


def export_graph(make: Any, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> ir.Model:
    """Return the graph of the module that ``make`` builds from a config, with the arguments it gives.

    The parameters of the module's child ``module`` become graph inputs under their own names.
    """
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
