"""The pipeline in torch with a fake-quantized denoiser: what the engines compute, for many prompts at once.

On a GPU the denoiser runs in FP16, so there 16 and 32 bits are the same; coarser grids are exact. On a CPU
all is FP32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlip_export.capture import CallableDenoiser, denoiser_family, shapes_of, unscaled
from qlip_export.checkpoint import Checkpoint
from qlip_export.conditioning import Constant, GuidanceScale
from qlip_export.conditioning import Encoded as EncodedInput
from qlip_export.cuda_graph import recorded
from qlip_export.errors import QlipError
from qlip_export.pipelines import TextEncoder, pipeline_of
from qlip_export.quant.fake import FakeQuantizer, round_rows
from qlip_export.quant.layers import layers_of
from qlip_export.quant.ranges import RANGE_BITS, Ranges
from qlip_export.text_encoders import encode, text_length
from qlip_export.torch_pipeline import (
    load_pipeline,
    replace_weights,
    require_device,
    token_ids,
    use_scheduler,
)

TEXT_BATCH = 512
"""Prompts that go through a text encoder at a time, where they have as many tokens as CLIP takes."""
CLIP_LENGTH = 77


@dataclass(frozen=True)
class Encoded:
    """Prompts after the text encoder.

    Attributes:
        states: What the denoiser is given of each prompt, float32: text states (N, length, width), or a row
            of all inputs (N, size) where there are several.
        pooled: (N, C_clip) float32, the CLIP state at the first end-of-text token, before projection.
    """

    states: Tensor
    pooled: Tensor


def paired(empty: Tensor | None, states: Tensor) -> Tensor:
    """Return states for a guided prediction: the empty prompt's half first, where there is one."""
    return states if empty is None else torch.cat([empty.expand_as(states), states])


def text_projection(checkpoint: Checkpoint) -> NDArray[np.float32]:
    """Return the projection of a model's text encoder, (C, C_clip): T2Q begins with it.

    Raises:
        QlipError: The checkpoint has none.
    """
    name = pipeline_of(denoiser_family(checkpoint).name).quality_encoder
    encoder = checkpoint.component(name)
    try:
        return encoder.get("text_projection.weight").astype(np.float32)
    except QlipError as error:
        raise QlipError(
            f"the text encoder of {checkpoint.folder} has no projection to learn quality from",
            expected="text_projection.weight, as CLIPTextModelWithProjection saves it",
            found=error.problem,
            fix="save that of the CLIP model it comes from beside its weights, "
            "or --stages ranges,weights for uniform bits",
        ) from error


class Simulator:
    """A text-to-image model whose denoiser runs at any activation bits for any prompt, step and layer.

    Attributes:
        layers: Names of the layers that follow the bit options, in module order.
        all_layers: Names of all layers, those of fixed precision included.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        device: str = "cpu",
        weights: Mapping[str, NDArray[np.float32]] | None = None,
        ranges: Ranges | None = None,
        scheduler: str | None = None,
        steps: int = 25,
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        """Load the model.

        Args:
            checkpoint: The full-precision model.
            device: ``cpu`` or ``cuda``.
            weights: Replacements of the denoiser's parameters by name, e.g. after quantization.
            ranges: Activation ranges; without them only full precision runs.
            scheduler: Name of the scheduler; the family's own if absent.
            steps: Sampling steps of a run.
            height: Of the images, pixels; the model's own if absent.
            width: The same.

        Raises:
            QlipError: No such device here, a size that does not fit, or ranges of another model.
        """
        require_device(device)
        self.device = torch.device(device)
        family = denoiser_family(checkpoint)
        self._kind = pipeline_of(family.name)
        self.checkpoint, self.scheduler, self.steps = checkpoint, scheduler or self._kind.scheduler, steps
        self.guidance = self._kind.guidance(checkpoint.index)
        self._shapes = shapes_of(checkpoint, batch_size=1, height=height, width=width)
        self._recipes = self._kind.inputs(self._shapes.size)
        # On the device from the start: nothing may be copied there while a CUDA graph is recorded.
        self._constants = {
            name: torch.tensor(recipe.at(self._shapes.size.image), device=self.device)
            for name, recipe in self._recipes.items()
            if isinstance(recipe, Constant)
        }
        if ranges is not None:
            ranges.check(checkpoint.component(family.denoiser_folder).fingerprint, set(), checkpoint.folder)
        self.pipeline = load_pipeline(checkpoint)
        use_scheduler(self.pipeline, self.scheduler)
        self.denoiser: nn.Module = getattr(self.pipeline, family.denoiser_folder)
        self.set_weights(weights or {})
        encoders = [getattr(self.pipeline, encoder.name) for encoder in self._kind.text_encoders]
        for part in (self.denoiser, self.pipeline.vae, *encoders):
            part.requires_grad_(False).eval().to(self.device)
        if self.device.type == "cuda":
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
            self.denoiser.to(dtype=torch.float16, memory_format=torch.channels_last)
        self.all_layers = tuple(layers_of(self.denoiser))
        self.layers = tuple(name for name in self.all_layers if family.quantizes(name))
        thresholds = {b: ranges.thresholds(b) for b in RANGE_BITS} if ranges is not None else {}
        self.quantizer = FakeQuantizer(self.denoiser, thresholds)
        self._called = self.callable(self.denoiser)
        self._step: tuple[object, _GuidedStep] | None = None

    def set_weights(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        """Replace parameters of the denoiser, by name."""
        replace_weights(self.denoiser, weights)

    @property
    def latents_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents."""
        return self._shapes.latents[1:]

    @property
    def dtype(self) -> torch.dtype:
        """In which the denoiser computes."""
        return next(self.denoiser.parameters()).dtype

    @property
    def rows(self) -> int:
        """Rows of the denoiser's batch for each image: 2 where guidance is classifier-free."""
        return self.guidance.rows

    def callable(self, denoiser: nn.Module) -> CallableDenoiser:
        """Return a denoiser of this model as it is captured: with latents (N, C, H, W) in and out."""
        called = CallableDenoiser(denoiser, denoiser_family(self.checkpoint), self._shapes)
        called.to(self.device)
        return called

    @cached_property
    def layer_macs(self) -> dict[str, int]:
        """Multiply-accumulates of every Conv2d and Linear of the denoiser for one sample."""
        macs: dict[str, int] = {}

        def count(name: str, module: nn.Module, _: Any, output: Tensor) -> None:
            assert isinstance(module, (nn.Conv2d, nn.Linear))
            macs[name] = output.numel() * module.weight[0].numel()

        handles = [
            module.register_forward_hook(partial(count, name))
            for name, module in layers_of(self.denoiser).items()
        ]
        latents = torch.zeros(1, *self.latents_shape, device=self.device)
        self.predict(latents, torch.zeros(1, device=self.device), self.encode([""]).states)
        for handle in handles:
            handle.remove()
        return macs

    @torch.inference_mode()
    def encode(self, prompts: Sequence[str], batch_size: int = TEXT_BATCH) -> Encoded:
        """Return what the denoiser and T2Q are given of ``prompts``."""
        encoded = {e.name: self._encode(e, prompts, batch_size) for e in self._kind.text_encoders}
        inputs = [
            torch.cat([encoded[name][recipe.output] for name in recipe.encoders], -1)
            for recipe in self._recipes.values()
            if isinstance(recipe, EncodedInput)
        ]
        states = inputs[0] if len(inputs) == 1 else torch.cat([x.flatten(1) for x in inputs], 1)
        return Encoded(states, encoded[self._kind.quality_encoder]["pooled"])

    def _encode(self, encoder: TextEncoder, prompts: Sequence[str], batch_size: int) -> dict[str, Tensor]:
        """Return the outputs of a text encoder, float32, by name; ``batch_size`` is in prompts of CLIP."""
        tokenizer = getattr(self.pipeline, encoder.tokenizer)
        module = getattr(self.pipeline, encoder.name)
        length = text_length(self.checkpoint, self._shapes, encoder)
        batches = [
            encode(module, ids.to(self.device), encoder)
            for ids in token_ids(
                tokenizer, prompts, batch_size * CLIP_LENGTH // max(CLIP_LENGTH, length), length
            )
        ]
        return {name: torch.cat([batch[name].float() for batch in batches]) for name in encoder.outputs}

    @cached_property
    def empty(self) -> Tensor | None:
        """States of no prompt, (1, ...) float32; ``None`` where guidance is not classifier-free."""
        if self.rows == 1:
            return None
        states = self.encode([""]).states
        return torch.zeros_like(states) if self.guidance.zeros else states

    @property
    def quality_tokenizer(self) -> Any:
        """The tokenizer of the text encoder whose pooled embedding T2Q reads."""
        return getattr(self.pipeline, self._kind.quality.tokenizer)

    @torch.inference_mode()
    def pooled(self, prompts: Sequence[str]) -> Tensor:
        """Return the pooled embeddings before projection, (N, C_clip) float32: what T2Q reads."""
        only = replace(self._kind.quality, outputs=("pooled",))
        return self._encode(only, prompts, TEXT_BATCH)["pooled"]

    @cached_property
    def projection(self) -> Tensor:
        """The text encoder's projection, (C, C_clip) float32: the first layer of T2Q.

        Raises:
            QlipError: The checkpoint has none.
        """
        return torch.from_numpy(text_projection(self.checkpoint)).to(self.device)

    def inputs(self, states: Tensor, guidance: float) -> list[Tensor]:
        """Return all inputs of the denoiser but latents and timesteps, for states of N prompts, in order."""
        family = denoiser_family(self.checkpoint)
        shapes = {i.name: self._shapes.of(i)[1:] for i in family.inputs}
        made, start = {}, 0
        for name, recipe in self._recipes.items():
            match recipe:
                case EncodedInput():
                    size = math.prod(shapes[name])
                    flat = states.flatten(1)[:, start : start + size]
                    made[name], start = flat.unflatten(1, shapes[name]), start + size
                case Constant():
                    made[name] = self._constants[name].expand(len(states), -1)
                case GuidanceScale():
                    made[name] = states.new_full((len(states),), guidance)
        return [made[i.name] for i in family.inputs if i.name in made]

    def predict(
        self, latents: Tensor, timesteps: Tensor, states: Tensor, guidance: float | None = None
    ) -> Tensor:
        """Run the denoiser once.

        Args:
            latents: (N, C, H, W) any float dtype.
            timesteps: (N,) or (1,).
            states: As `encode` returns them, N rows.
            guidance: Scale for denoisers that are told it; the model's own if absent.

        Returns:
            The prediction, (N, C, H, W) float32.
        """
        inputs = self.inputs(states, self.guidance.scale if guidance is None else guidance)
        prediction: Tensor = self._called(
            latents.to(self.dtype, memory_format=torch.channels_last),
            timesteps,
            *(x.to(self.dtype) for x in inputs),
        )
        return prediction.float()

    def guided(self, latents: Tensor, timesteps: Tensor, states: Tensor, guidance: float) -> Tensor:
        """Return the guided prediction for ``states`` as `paired` returns them."""
        if self.rows == 1:
            return self.predict(latents, timesteps, states, guidance)
        both = self.predict(
            torch.cat([latents, latents]), timesteps.repeat(2) if len(timesteps) > 1 else timesteps, states
        )
        free, conditional = both.chunk(2)
        return free + guidance * (conditional - free)

    @torch.inference_mode()
    def sample(
        self,
        states: Tensor,
        latents: Tensor,
        guidance: float,
        bits: Tensor | None = None,
        on_step: Callable[[Tensor, Tensor, Tensor], None] = lambda *_: None,
    ) -> Tensor:
        """Return denoised latents, (N, C, H, W) float32.

        Args:
            states: As `paired` returns them for N prompts.
            latents: (N, C, H, W) float32 noise of unit variance.
            guidance: Guidance scale.
            bits: (N, steps, layers) int64; full precision if absent.
            on_step: Gets denoiser input, timestep and guided prediction of each step.
        """
        scheduler = self.pipeline.scheduler
        arguments = self._kind.timesteps(scheduler.config, self.steps, self._shapes.size)
        scheduler.set_timesteps(**arguments, device=self.device)
        chosen = None if bits is None else self._chosen_grids(bits)
        # Flow-matching schedulers start from the noise as it is, and give the sample to the model as it is.
        x = latents.to(self.device) * getattr(scheduler, "init_noise_sigma", 1.0)
        scale = getattr(scheduler, "scale_model_input", lambda sample, _: sample)
        step = self._guided_step(
            states, guidance, scheduler.timesteps[0], None if chosen is None else chosen[0]
        )
        for index, timestep in enumerate(scheduler.timesteps):
            model_input = scale(x, timestep)
            grids = None if chosen is None else chosen[min(index, len(chosen) - 1)]
            prediction = step(model_input, timestep, grids)
            on_step(model_input, timestep, prediction)
            x = scheduler.step(prediction, timestep, x, return_dict=False)[0]
        self.quantizer.set_functions({})
        return x

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Return the images of latents, (N, H, W, 3) uint8 on the CPU."""
        vae = self.pipeline.vae
        pixels = vae.decode(unscaled(latents, self._kind.decoding(vae.config)), return_dict=False)[0]
        levels = ((pixels / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
        images: Tensor = levels.permute(0, 2, 3, 1).cpu()
        return images

    def generate(
        self,
        prompts: Sequence[str],
        latents: NDArray[np.float32],
        *,
        guidance: float,
        bits: Tensor | None = None,
        batch_size: int = 64,
    ) -> Iterator[Tensor]:
        """Yield the images of ``prompts`` in order, (n, H, W, 3) uint8.

        Args:
            prompts: N prompts.
            latents: (N, C, H, W) float32 noise of unit variance.
            guidance: Guidance scale.
            bits: (N, steps, layers) int64, the activation bits of `layers`; full precision if absent.
            batch_size: Images at a time. Float sums differ in their last digits with it, and rounding to a
                coarse grid makes more of that: another batch size is another draw of quantization noise.

        Raises:
            QlipError: No range for one of the bits.
        """
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            both = paired(self.empty, self.encode(prompts[part]).states)
            noise = torch.from_numpy(latents[part])
            yield self.decode(self.sample(both, noise, guidance, None if bits is None else bits[part]))

    def _chosen_grids(self, bits: Tensor) -> Tensor:
        """Return the grid of each layer and row, both halves of a pair, (steps, layers, rows, 3)."""
        options = sorted(int(b) for b in bits.unique())
        grids = self.quantizer.grids(self.layers, options).to(self.device)
        index = torch.searchsorted(torch.tensor(options), bits.cpu().contiguous()).to(self.device)
        chosen = grids[torch.arange(len(self.layers), device=self.device), index]
        return torch.cat([chosen] * self.rows).permute(1, 2, 0, 3).contiguous()

    def _guided_step(
        self, states: Tensor, guidance: float, timestep: Tensor, grids: Tensor | None
    ) -> _GuidedStep:
        """Return the step for batches like this one: the last one's, if that was alike."""
        key = (states.shape, guidance, None if grids is None else grids.shape)
        if self._step is None or self._step[0] != key or self.device.type != "cuda":
            self._step = None
            self._step = (key, _GuidedStep(self, states, guidance, timestep, grids))
        self._step[1].states.copy_(states)
        return self._step[1]


class _GuidedStep:
    """Guided predictions for batches of one shape, recorded on a GPU.

    Attributes:
        states: Of all rows, what the next call reads.
    """

    def __init__(
        self, simulator: Simulator, states: Tensor, guidance: float, timestep: Tensor, grids: Tensor | None
    ) -> None:
        """Let the quantizer of ``simulator`` read the grids of each call from now on."""
        self.states = states.clone()
        self._latents = states.new_zeros(len(states) // simulator.rows, *simulator.latents_shape)
        self._timestep = timestep[None].clone()
        self._grids = None if grids is None else grids.clone()
        layers = [] if self._grids is None else list(zip(simulator.layers, self._grids, strict=True))
        simulator.quantizer.set_functions({name: partial(round_rows, grids=grid) for name, grid in layers})
        self._run = recorded(
            lambda: simulator.guided(self._latents, self._timestep, self.states, guidance), simulator.device
        )

    def __call__(self, latents: Tensor, timestep: Tensor, grids: Tensor | None) -> Tensor:
        """Return the prediction for ``latents`` (N, C, H, W), rounding to ``grids`` (layers, rows, 3)."""
        self._latents.copy_(latents)
        self._timestep.copy_(timestep)
        if self._grids is not None:
            assert grids is not None
            self._grids.copy_(grids)
        return self._run().clone()
