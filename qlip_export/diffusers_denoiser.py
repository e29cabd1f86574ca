"""A bundle as the `unet` of a user's own diffusers pipeline: the only torch part of running one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

from qlip_export.errors import QlipError
from qlip_export.runtime import TextToImage
from qlip_export.runtime.chain import Pattern

CONFIG = "capture/denoiser.config.json"


class DiffusersDenoiser(torch.nn.Module):
    """Drop-in replacement of `pipeline.unet` that runs the engines of a bundle.

    Example:
        ``pipeline.unet = DiffusersDenoiser("engines/emoji", bits=8)``
    """

    def __init__(self, bundle: str | os.PathLike[str], *, bits: int | None = None) -> None:
        """Load the bundle; ``bits`` chooses the activation bits of all blocks.

        The policy is not asked: it needs the prompt, which a pipeline does not show its denoiser.
        """
        super().__init__()
        self._runtime = TextToImage.load(Path(bundle))
        takes = list(self._runtime.bundle.manifest.conditioning)
        if takes != ["text"]:
            raise QlipError(
                "this bundle's denoiser takes more than latents, timestep and text",
                expected="a bundle of Stable Diffusion 1.x",
                found=f"{self._runtime.bundle.manifest.model.family}, which takes {', '.join(takes)}",
                fix="run it with qlip_export.runtime.TextToImage",
            )
        self.bits = self._runtime.bundle.bits(bits)
        config = json.loads(self._runtime.bundle.file(CONFIG).read_text(encoding="utf-8"))
        self.config = FrozenDict(config)
        self.dtype = torch.float32
        self.device = torch.device("cpu")

    @property
    def pattern(self) -> Pattern:
        """Variant of every block."""
        return self._runtime.chain.uniform(self.bits)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
        **unused: Any,
    ) -> Any:
        """Predict the noise.

        Args:
            sample: Latents (2N, C, H, W), of the bundle's static shape.
            timestep: A number or a tensor with one value.
            encoder_hidden_states: Text states (2N, L, D).
            return_dict: As in diffusers.
            **unused: Arguments that diffusers passes as ``None``.

        Raises:
            QlipError: Another shape than the bundle was built for, or an argument that it cannot honour.
        """
        if wrong := [name for name, value in unused.items() if value is not None]:
            raise QlipError(
                "the bundle's denoiser takes latents, timestep and text only", found=", ".join(sorted(wrong))
            )
        shapes = {t.name: t.shape for t in self._runtime.bundle.manifest.inputs}
        for name, tensor in (("latents", sample), ("text", encoder_hidden_states)):
            if tuple(tensor.shape) != shapes[name]:
                raise QlipError(
                    f"{name} of another shape than the bundle's",
                    expected=str(shapes[name]),
                    found=str(tuple(tensor.shape)),
                    fix="build with the batch size you need; guidance must be above 1, it doubles the batch",
                )
        timesteps = torch.as_tensor(timestep).flatten()
        if not bool((timesteps == timesteps[0]).all()):
            raise QlipError(
                "the samples of a batch are at different timesteps", found=str(timesteps.tolist())
            )
        chain = self._runtime.chain
        chain.load([self.pattern])
        chain.hold("text", encoder_hidden_states.detach().cpu().float().numpy())
        noise = chain.step(sample.detach().cpu().float().numpy(), float(timesteps[0]), self.pattern)
        out = torch.from_numpy(np.ascontiguousarray(noise)).to(sample.dtype)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)
