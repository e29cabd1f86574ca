"""How much finer grids could be for some layers: centred ones, and one for each half of a concatenation.

Numbers are mean squared errors of a layer's input, relative to its energy, each at the best step found.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.rows import GUIDANCE, Subject
from qlip_export.files import write_json
from qlip_export.prompts import read_prompts
from qlip_export.quant.weights import round_to_nearest
from qlip_export.zoo import find_model

BITS = (6, 8)
CALLS = (2, 8, 14, 20, 24)
"""Sampling steps whose inputs are looked at."""
VALUES = 400_000


def measure_grids(calibration: Path, out: Path) -> None:
    """Write ``grids.json``."""
    _, checkpoint = find_model("emoji")
    subject = Subject(checkpoint, calibration, "cpu")
    simulator = subject.simulator("fp32")
    runs = subject.trajectories(read_prompts(calibration / "prompts.txt")[:2])
    seen: dict[str, list[Tensor]] = {name: [] for name in simulator.layers}
    layers: dict[str, Any] = {n: m for n, m in simulator.denoiser.named_modules() if n in seen}

    def keep(name: str) -> Any:
        return lambda _module, args: seen[name].append(args[0].detach().float())

    handles = [module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]
    states = runs.both_states(torch.arange(2)).float()
    with torch.no_grad():
        for step in CALLS:
            simulator.guided(runs.inputs[:, step].float(), runs.timesteps[step][None], states, GUIDANCE)
    for handle in handles:
        handle.remove()
    found: dict[str, Any] = {"centred": {}, "split": {}, "split_weights": {}}
    for name, module in layers.items():
        values = torch.cat(seen[name])
        if isinstance(module, nn.Linear) or module.kernel_size == (1, 1):
            found["centred"][name] = {
                str(bits): [_error(values, bits, centred=False), _error(values, bits, centred=True)]
                for bits in BITS
            }
    for name in simulator.all_layers:
        parts = _concatenated(simulator.denoiser, name)
        if parts is None:
            continue
        weight = simulator.denoiser.get_submodule(name).weight.detach().numpy()
        halves = [weight[:, : parts[0]], weight[:, parts[0] :]]
        found["split_weights"][name] = [_weight_error(weight), sum(map(_weight_error, halves))]
        if name in seen:
            values = torch.cat(seen[name])
            first, second = values.split(list(parts), 1)
            energy = [float(v.square().sum()) for v in (first, second)]
            found["split"][name] = {
                str(bits): [
                    _error(values, bits, centred=False),
                    (
                        _error(first, bits, centred=False) * energy[0]
                        + _error(second, bits, centred=False) * energy[1]
                    )
                    / sum(energy),
                ]
                for bits in BITS
            }
    write_json(out / "grids.json", found)


def _concatenated(denoiser: nn.Module, name: str) -> tuple[int, int] | None:
    """Return the channels of hidden state and skip connection where a layer reads both."""
    place = name.split(".")
    if place[0] != "up_blocks" or place[-1] not in ("conv1", "conv_shortcut"):
        return None
    block, number = denoiser.get_submodule(".".join(place[:2])), int(place[3])
    before = block.resnets[number - 1].out_channels if number else None
    total = int(block.resnets[number].in_channels)
    if before is None:
        index = int(place[1])
        before = (
            int(denoiser.get_submodule(f"up_blocks.{index - 1}").resnets[-1].out_channels)
            if index
            else (int(denoiser.get_submodule("down_blocks")[-1].resnets[-1].out_channels))
        )
    return before, total - before


def _error(values: Tensor, bits: int, *, centred: bool) -> float:
    """Return the least relative squared error of a grid with ``bits`` over steps and, if asked, centres."""
    x = values.flatten()
    if len(x) > VALUES:
        x = x[torch.randint(len(x), (VALUES,), generator=torch.Generator().manual_seed(0))]
    limit = 2 ** (bits - 1) - 1
    low, high = float(x.min()), float(x.max())
    centres = [0.0]
    if centred:
        centres += [(high * a + low * b) / 2 for a in (1, 0.8, 0.6, 0.4, 0.25) for b in (1, 0.8, 0.6, 0.4)]
    least = np.inf
    for centre in centres:
        moved = x - centre
        reach = float(moved.abs().max())
        for share in np.geomspace(0.1, 1, 14):
            step = max(reach * share / limit, 1e-12)
            rounded = torch.clamp(torch.round(moved / step), -limit, limit) * step
            least = min(least, float((rounded - moved).square().mean()))
    return least / max(float(x.square().mean()), 1e-30)


def _weight_error(weight: np.ndarray[Any, Any]) -> float:
    part = np.ascontiguousarray(weight)
    return float(((round_to_nearest("weight", part, 4, 0).dequantize() - part) ** 2).sum())
