"""AdaRound on the tiny model: what is learned is better than the nearest, storable, and all there is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qlip_export.calibrate import weights
from qlip_export.calibrate.trajectories import Trajectories
from qlip_export.calibrate.weights import Rounded, blocks_of, learn_rounding, quantized_weights
from qlip_export.quant.rounding import LearnedRounding, floor_codes
from qlip_export.quant.weights import round_to_nearest
from qlip_export.simulate import Simulator
from tests.quant.test_rounding import RECIPE

SETTINGS: dict[str, Any] = {"bits": 4, "samples": 12, "batch": 8, "at_once": 8, "seed": 0}


class Spied(weights.Rounding):
    """Remembers the weights that were learned, by layer."""

    learned: ClassVar[dict[str, Tensor]] = {}

    def __init__(self, name: str, *rest: Any) -> None:
        super().__init__(name, *rest)
        self.name = name

    def hard(self) -> Tensor:
        self.learned[self.name] = super().hard()
        return self.learned[self.name]


@pytest.fixture(scope="module")
def rounded(simulator: Simulator, trajectories: Trajectories) -> tuple[Rounded, dict[str, Tensor]]:
    """What was learned, and the weights that the blocks had in the end."""
    before = {n: p.clone() for n, p in simulator.denoiser.named_parameters()}
    Spied.learned = {}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(weights, "Rounding", Spied)
        found = learn_rounding(simulator, trajectories, iterations=12, **SETTINGS)
    assert all(torch.equal(p, before[n]) for n, p in simulator.denoiser.named_parameters())
    return found, dict(Spied.learned)


@pytest.fixture(scope="module")
def stored(rounded: tuple[Rounded, Any], tmp_path_factory: pytest.TempPathFactory) -> LearnedRounding:
    path = tmp_path_factory.mktemp("rounding") / "weights.safetensors"
    LearnedRounding.of(RECIPE, rounded[0].up, rounded[0].scale).save(path)
    return LearnedRounding.load(path)


def test_every_layer_lies_in_one_block_in_the_order_of_the_run(simulator: Simulator) -> None:
    blocks = blocks_of(simulator)
    assert blocks[0] == "time_embedding.linear_1" and blocks[-1] == "conv_out"
    assert blocks.index("conv_in") < blocks.index("down_blocks.0.resnets.0")
    assert blocks.index("down_blocks.2.resnets.0") < blocks.index("up_blocks.0.resnets.0")
    inside = [[n for n in simulator.all_layers if f"{n}.".startswith(f"{block}.")] for block in blocks]
    assert sorted(itertools.chain(*inside)) == sorted(simulator.all_layers)
    assert len(simulator.all_layers) == 151


def test_learning_lowers_the_error(rounded: tuple[Rounded, Any]) -> None:
    found, _ = rounded
    assert found.error_learned < 0.97 * found.error_nearest
    assert 0 < found.flipped < 0.5
    assert set(found.up) == set(found.scale) and len(found.up) == 151


def test_what_runs_at_once_changes_no_result(simulator: Simulator, trajectories: Trajectories) -> None:
    """The last part of a batch is smaller than the others, and counts less."""
    together, apart = (
        learn_rounding(simulator, trajectories, iterations=4, **SETTINGS | {"at_once": n}) for n in (8, 3)
    )
    assert apart.error_learned == pytest.approx(together.error_learned, rel=1e-3)
    same = [np.count_nonzero(apart.up[layer] == up) for layer, up in together.up.items()]
    assert sum(same) > 0.9995 * sum(up.size for up in together.up.values())


def test_the_first_block_errs_less(
    simulator: Simulator, trajectories: Trajectories, stored: LearnedRounding
) -> None:
    """Computed here from the weights alone: the block's outputs over all recorded inputs."""
    name, layer = "conv_in", simulator.denoiser.conv_in
    assert isinstance(layer, nn.Conv2d)
    weight = layer.weight.detach()
    inputs = trajectories.inputs.flatten(0, 1).float()

    def error(quantize: Any) -> float:
        off = torch.from_numpy(quantize(name, weight.numpy(), 4, 0).dequantize()) - weight
        return float(nn.functional.conv2d(inputs, off, padding=1).square().mean())

    assert error(stored) < error(round_to_nearest)


def test_every_code_is_the_one_below_or_above(simulator: Simulator, stored: LearnedRounding) -> None:
    up = 0
    for name in simulator.all_layers:
        weight = simulator.denoiser.get_submodule(name).weight.detach().numpy()
        found = stored(name, weight, 4, 0)
        floor = floor_codes(weight, found.scale)
        below, above = found.codes == np.clip(floor, -8, 7), found.codes == np.clip(floor + 1, -8, 7)
        assert (below | above).all(), name
        up += int((above & ~below).sum())
    assert up > 0


def test_what_comes_back_from_disk_is_what_was_learned(
    simulator: Simulator, rounded: tuple[Rounded, dict[str, Tensor]], stored: LearnedRounding
) -> None:
    found = quantized_weights(simulator.checkpoint, simulator.all_layers, stored, 4)
    assert len(found) == len(rounded[1]) == 151
    for name, weight in rounded[1].items():
        assert np.array_equal(found[f"{name}.weight"], weight.numpy()), name


def test_a_denoiser_in_half_precision_learns_for_the_weights_of_the_checkpoint(
    towers: Path, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: rounding FP16's idea of a weight is not rounding the weight."""
    from qlip_export.checkpoint import Checkpoint

    simulator = Simulator(Checkpoint(towers), steps=4)
    simulator.denoiser.half()
    monkeypatch.setattr(weights, "Rounding", Spied)
    monkeypatch.setattr(Spied, "learned", {})
    found = learn_rounding(simulator, trajectories, iterations=1, **SETTINGS)
    again = quantized_weights(
        simulator.checkpoint, simulator.all_layers, LearnedRounding.of(RECIPE, found.up, found.scale), 4
    )
    for name, weight in Spied.learned.items():
        assert np.array_equal(again[f"{name}.weight"], weight.numpy()), name


@pytest.mark.parametrize("steps", [3, 4])
def test_every_step_is_learned_with_and_without_a_prompt(steps: int) -> None:
    inputs = torch.arange(steps, dtype=torch.float32).view(1, steps, 1, 1, 1)
    runs = Trajectories(
        inputs, inputs, torch.arange(float(steps)), torch.ones(1, 1, 1), torch.zeros(1, 1, 1), 4.0
    )
    latents, timesteps, states = weights._sample_inputs(runs, 4 * steps)
    assert torch.equal(latents.flatten(), timesteps)
    seen = [(int(t), int(s)) for t, s in zip(timesteps, states.flatten(), strict=True)]
    assert sorted(seen) == sorted([(t, s) for t in range(steps) for s in (0, 1)] * 2)
