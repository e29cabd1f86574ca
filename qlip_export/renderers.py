"""Who draws the images of an evaluation: a bundle's engines, or the fake-quantized model in their place."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qlip_export.bundle import Bundle
from qlip_export.capture import denoiser_family
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.pipelines import pipeline_of
from qlip_export.policy.t2q import TextToQuality
from qlip_export.quant.ranges import Ranges
from qlip_export.reference import quantized_weights
from qlip_export.runtime.pipeline import TextToImage
from qlip_export.runtime.schedule import Scheduler, layer_bits
from qlip_export.runtime.targets import choose_target
from qlip_export.simulate import Simulator

POLICY = "policy"
"""Name of the configuration in which the bundle's policy chooses the bits."""

Batch = tuple[Tensor, NDArray[np.uint8]]
"""Images (n, H, W, 3) uint8, bits of the quantized layers (n, steps, layers), in the order of the chain."""


class Renderer(ABC):
    """Draws prompts at a configuration, in batches.

    Attributes:
        target: Whose engines draw, as the manifest names them; ``None`` without engines.
    """

    target: str | None = None

    @abstractmethod
    def draw(
        self, configuration: str, prompts: Sequence[str], latents: NDArray[np.float32], guidance: float
    ) -> Iterator[Batch]:
        """Yield the images of ``prompts`` from ``latents`` (N, C, H, W), in order."""

    @abstractmethod
    def identity(self) -> object:
        """Return what the images depend on besides the bundle, JSON-serialisable."""


class EngineRenderer(Renderer):
    """The engines of the bundle, in the size of `bundle`.

    Attributes:
        batch_size: That of the engines.
    """

    def __init__(self, bundle: Bundle, backend: str = "auto") -> None:
        """Load nothing yet but the bundle's small parts.

        Raises:
            QlipError: No engines, or their library is not installed.
        """
        self._pipeline = TextToImage(bundle, choose_target(bundle, backend))
        self.target = self._pipeline.target.name
        self.batch_size = self._pipeline.bundle.manifest.shapes.batch_size

    def draw(
        self, configuration: str, prompts: Sequence[str], latents: NDArray[np.float32], guidance: float
    ) -> Iterator[Batch]:
        """See `Renderer.draw`."""
        bits = None if configuration == POLICY else int(configuration)
        size = self.batch_size
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            made = self._pipeline(list(prompts[part]), latents=latents[part], guidance=guidance, bits=bits)
            images = torch.from_numpy(np.stack([np.asarray(image) for image in made.images]))
            blocks = self._pipeline.chain.blocks
            yield images, np.stack([layer_bits(blocks, [*map(tuple, r["variants"])]) for r in made.records])

    def seconds(
        self,
        configurations: Sequence[str],
        prompts: Sequence[str],
        latents: NDArray[np.float32],
        guidance: float,
        on_image: Callable[[str], None] = lambda name: None,
    ) -> dict[str, NDArray[np.float64]]:
        """Time every configuration on every batch of ``prompts``: seconds of an image, (batches,) each.

        Configurations take turns, every other batch backwards, so that what disturbs the machine for a while
        disturbs all of them. The first batch is drawn once more and not counted: it loads engines.
        ``on_image`` is called with the name of a configuration before it draws a batch.
        """
        size = self.batch_size
        found: dict[str, list[float]] = {name: [] for name in configurations}
        starts = range(0, len(prompts), size)
        for turn, start in enumerate([0, *starts]):
            part = slice(start, start + size)
            for name in list(configurations) if turn % 2 else list(reversed(configurations)):
                on_image(name)
                bits = None if name == POLICY else int(name)
                before = time.perf_counter()
                made = self._pipeline(
                    list(prompts[part]), latents=latents[part], guidance=guidance, bits=bits
                )
                if turn:
                    found[name].append((time.perf_counter() - before) / len(made.images))
        return {name: np.array(times) for name, times in found.items()}

    def identity(self) -> object:
        """See `Renderer.identity`."""
        return ["engines", self.target]


class SimulatorRenderer(Renderer):
    """The fake-quantized model with the bundle's weights, ranges and policy; says nothing about speed.

    Attributes:
        simulator: The model in torch.
        batch_size: That of the engines: prompts that would share a batch share its schedule.
    """

    def __init__(self, bundle: Bundle, checkpoint: Checkpoint, device: str) -> None:
        """Load the model.

        Raises:
            QlipError: No such device here.
        """
        manifest = bundle.manifest
        ranges = manifest.quantization.ranges
        self._blocks = manifest.blocks
        self._layers = [layer.name for block in manifest.blocks for layer in block.quantized]
        self._steps = len(manifest.sampler.steps)
        self.batch_size = manifest.shapes.batch_size
        self._device = device
        self.simulator = Simulator(
            checkpoint,
            device=device,
            weights=quantized_weights(bundle),
            ranges=Ranges.load(bundle.file(ranges)) if ranges else None,
            scheduler=manifest.sampler.scheduler,
            steps=manifest.sampler.requested_steps,
            height=manifest.shapes.image[0],
            width=manifest.shapes.image[1],
        )
        self._schedule = Scheduler(manifest.policy.table, manifest.blocks) if manifest.policy else None
        self._network = quality_network(bundle).to(device) if manifest.policy else None

    def schedules(self, configuration: str, prompts: Sequence[str]) -> NDArray[np.uint8]:
        """Return the bits of every quantized layer, (N, steps, layers) uint8, as the engines would run."""
        if self._schedule is None or self._network is None or configuration != POLICY:
            shape = (len(prompts), self._steps, len(self._layers))
            return np.full(shape, int(configuration), dtype=np.uint8)
        with torch.inference_mode():
            qualities = self._network(self.simulator.pooled(prompts)).tolist()
        found: list[NDArray[np.uint8]] = []
        for start in range(0, len(prompts), self.batch_size):
            batch = qualities[start : start + self.batch_size]
            found += [layer_bits(self._blocks, self._schedule(batch))] * len(batch)
        return np.stack(found)

    def draw(
        self, configuration: str, prompts: Sequence[str], latents: NDArray[np.float32], guidance: float
    ) -> Iterator[Batch]:
        """See `Renderer.draw`."""
        bits = self.schedules(configuration, prompts)
        columns = [self._layers.index(name) for name in self.simulator.layers]
        done = 0
        for images in self.simulator.generate(
            prompts,
            latents,
            guidance=guidance,
            bits=torch.from_numpy(bits[:, :, columns].astype(np.int64)),
            batch_size=128 if self._device == "cuda" else 8,
        ):
            yield images, bits[done : done + len(images)]
            done += len(images)

    def identity(self) -> object:
        """See `Renderer.identity`."""
        checkpoint = self.simulator.checkpoint
        encoders = pipeline_of(denoiser_family(checkpoint).name).text_encoders
        parts = (*(encoder.name for encoder in encoders), "vae")
        return [self._device, *(checkpoint.component(name).fingerprint for name in parts)]


def quality_network(bundle: Bundle) -> TextToQuality:
    """Return the T2Q network of a bundle's policy, with the very weights that its engine has.

    Raises:
        QlipError: The bundle has no policy.
    """
    import onnx_ir as ir

    if bundle.manifest.policy is None:
        raise QlipError(f"{bundle.root} has no policy", fix="build it with a calibrated one")
    graph = ir.load(bundle.file(bundle.manifest.policy.onnx)).graph
    arrays = {
        name: torch.from_numpy(value.const_value.numpy().copy())
        for name, value in graph.initializers.items()
        if value.const_value is not None
    }
    network = TextToQuality(arrays["projection"].T)
    weights = {name: arrays[name] for name in network.state_dict() if name != "projection"}
    network.load_state_dict(weights, strict=False)
    network.eval()
    return network
