"""Learned rounding of weights, block by block: AdaRound as Q-Diffusion applies it to denoisers.

A weight may be rounded down or up to its grid. Which of the two is learned so that the output of a block (a
ResNet, a transformer block, or a single layer outside of these) stays what it is at full precision, on
inputs sampled over prompts and timesteps. Blocks are visited in the order in which they run; the inputs of
each come through the already quantized blocks before it (Nagel et al. 2020, equations 21-24; Li et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qlip_export.calibrate.kept import KeptBlocks, LearnedBlock
from qlip_export.calibrate.reconstruct import Models, Rounding, learn_block
from qlip_export.calibrate.trajectories import Trajectories
from qlip_export.capture import denoiser_family
from qlip_export.checkpoint import Checkpoint
from qlip_export.quant.layers import layers_of
from qlip_export.quant.weights import WeightQuantizer
from qlip_export.simulate import Simulator

BLOCKS = (
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)
"""Classes reconstructed as a whole; all other layers are reconstructed one by one."""

LEARNER = 1
"""Raised when this code learns something else from the same settings: kept blocks are then learned again."""


@dataclass(frozen=True)
class Rounded:
    """Learned rounding of all layers.

    Attributes:
        up: By layer, which weights go to the code above, shape of the weight.
        scale: By layer, (C,) float32.
        error_nearest: Mean over blocks of the squared output error of rounding to nearest, relative to the
            output.
        error_learned: The same with what was learned.
        flipped: Share of weights that do not go to the nearest code.
    """

    up: dict[str, NDArray[np.bool_]]
    scale: dict[str, NDArray[np.float32]]
    error_nearest: float
    error_learned: float
    flipped: float


def learn_rounding(
    simulator: Simulator,
    trajectories: Trajectories,
    *,
    bits: int,
    samples: int,
    iterations: int,
    batch: int,
    at_once: int,
    seed: int,
    store: KeptBlocks | None = None,
    on_block: Callable[[str], None] = lambda _: None,
) -> Rounded:
    """Learn the rounding of every Conv2d and Linear of the denoiser.

    Args:
        simulator: With the full-precision weights; they stay as they are.
        trajectories: Where block inputs are sampled.
        bits: Weight bits.
        samples: Denoiser inputs to sample, half of them with the empty prompt.
        iterations: Steps of Adam for each block.
        batch: Samples of a step.
        at_once: Samples that run together, as many as the device holds; gradients of a step add up.
        seed: Of the choice of samples and batches.
        store: Where blocks that an earlier run learned are taken from, and others are kept.
        on_block: Called with the name of each block before it is learned.
    """
    import copy

    torch.manual_seed(seed)
    # Learning needs FP32; the quantized copy is the one whose weights change.
    reference = copy.deepcopy(simulator.denoiser).float()
    quantized = copy.deepcopy(reference)
    latents, timesteps, states = _sample_inputs(trajectories, samples)
    model_inputs = [latents, timesteps, *simulator.inputs(states, trajectories.guidance)]
    models = Models(simulator.callable(reference), simulator.callable(quantized), model_inputs, at_once)
    names = {id(module): name for name, module in layers_of(quantized).items()}
    component = simulator.checkpoint.component(denoiser_family(simulator.checkpoint).denoiser_folder)

    def weights(layer: str) -> Tensor:
        # Those of the checkpoint, which the build rounds; on a GPU the denoiser holds them in FP16.
        return torch.from_numpy(component.get(f"{layer}.weight").astype(np.float32))

    blocks: list[LearnedBlock] = []
    scale: dict[str, NDArray[np.float32]] = {}
    for index, name in enumerate(blocks_of(simulator)):
        on_block(name)
        block = quantized.get_submodule(name)
        inside = {f"{n}.weight" if n else "weight": m for n, m in block.named_modules() if id(m) in names}
        roundings = {
            key: Rounding(names[id(m)], weights(names[id(m)]).to(m.weight.device), bits)
            for key, m in inside.items()
        }
        learned = None if store is None else store.get(name)
        if learned is None:
            torch.manual_seed(seed + index)  # a run that goes on learns what one that nothing cut would have
            learned = learn_block(models, name, roundings, iterations, batch)
            if store is not None:
                store.put(name, learned)
        blocks.append(learned)
        for key, rounding in roundings.items():
            up = torch.from_numpy(learned.up[rounding.layer]).to(rounding.rest.device)
            inside[key].weight.data.copy_(rounding.weight(up.float()))
            scale[rounding.layer] = rounding.scale_array
    return Rounded(
        up={layer: up for block in blocks for layer, up in block.up.items()},
        scale=scale,
        error_nearest=float(np.mean([block.error_nearest for block in blocks])),
        error_learned=float(np.mean([block.error_learned for block in blocks])),
        flipped=sum(b.flipped for b in blocks) / sum(up.size for b in blocks for up in b.up.values()),
    )


def quantized_weights(
    checkpoint: Checkpoint, layers: Sequence[str], quantize: WeightQuantizer, bits: int
) -> dict[str, NDArray[np.float32]]:
    """Return the weights of ``layers`` on their grid, float32, by parameter name."""
    component = checkpoint.component(denoiser_family(checkpoint).denoiser_folder)
    return {
        f"{name}.weight": quantize(
            name, component.get(f"{name}.weight").astype(np.float32), bits, 0
        ).dequantize()
        for name in layers
    }


def blocks_of(simulator: Simulator) -> list[str]:
    """Return the names of the blocks to reconstruct, in the order in which they run."""
    denoiser = simulator.denoiser
    found: list[str] = []
    for name, module in denoiser.named_modules():
        if any(name.startswith(f"{block}.") for block in found):
            continue
        if type(module).__name__ in BLOCKS or isinstance(module, (nn.Conv2d, nn.Linear)):
            found.append(name)
    order: list[str] = []
    handles = [
        denoiser.get_submodule(name).register_forward_pre_hook(lambda _m, _a, name=name: order.append(name))
        for name in found
    ]
    latents = torch.zeros(1, *simulator.latents_shape, device=simulator.device)
    with torch.no_grad():
        simulator.predict(latents, latents.new_zeros(1), simulator.encode([""]).states)
    for handle in handles:
        handle.remove()
    return order


def _sample_inputs(trajectories: Trajectories, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return latents, timesteps and states of ``samples`` denoiser inputs spread over prompts and steps."""
    prompts, steps = trajectories.inputs.shape[:2]
    device = trajectories.inputs.device
    number = torch.arange(samples, device=device)
    # Every step equally often, with the empty prompt every other time; prompts at random.
    step, prompt = number % steps, torch.randint(prompts, (samples,), device=device)
    states = trajectories.states[prompt]
    if trajectories.empty is not None:
        empty = (step + number // steps) % 2 == 0
        states = torch.where(empty.view(-1, *[1] * (states.ndim - 1)), trajectories.empty, states)
    return trajectories.inputs[prompt, step], trajectories.timesteps[step], states
