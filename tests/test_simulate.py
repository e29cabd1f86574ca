"""The simulator at full precision and at uniform bits: what it encodes, counts and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.noise import seeded_noise
from qlip_export.quant.ranges import Ranges
from qlip_export.simulate import Simulator
from qlip_export.zoo import find_model
from tests.tiny import TEXT_LENGTH, TEXT_WIDTH
from tests.tiny_calibration import pooled_embeddings

EMOJI_CALIBRATION = Path(__file__).parents[1] / "calibration" / "emoji"
PROMPTS = ["a red apple", "the blue boat", ""]
LONG = "the cat of an apple tree on a green boat and the dog of a blue house"


@pytest.fixture(scope="module")
def simulator(towers: Path, calibration: Path) -> Simulator:
    return Simulator(Checkpoint(towers), ranges=Ranges.load(calibration / "ranges.json"), steps=3)


def noise(simulator: Simulator, count: int = len(PROMPTS)) -> np.ndarray:
    return np.stack([seeded_noise(seed, simulator.latents_shape) for seed in range(count)])


def images(simulator: Simulator, bits: torch.Tensor | None) -> torch.Tensor:
    return torch.cat(list(simulator.generate(PROMPTS, noise(simulator), guidance=4.0, bits=bits)))


def uniform(simulator: Simulator, bits: int) -> torch.Tensor:
    return torch.full((len(PROMPTS), 3, len(simulator.layers)), bits)


def test_text_is_pooled_at_the_first_end_of_text(simulator: Simulator) -> None:
    """The tokens that pad a prompt are end-of-text tokens too. A long prompt ends where it is cut."""
    found = simulator.encode([*PROMPTS, LONG])
    assert found.states.shape == (4, TEXT_LENGTH, TEXT_WIDTH)
    for row, position in zip(range(4), (4, 4, 1, TEXT_LENGTH - 1), strict=True):
        assert torch.equal(found.pooled[row], found.states[row, position])
    expected = pooled_embeddings(simulator.checkpoint.folder, PROMPTS)
    torch.testing.assert_close(found.pooled[:3], expected, rtol=0, atol=1e-5)
    assert torch.equal(simulator.pooled(PROMPTS), simulator.encode(PROMPTS).pooled)


def test_batches_of_text_change_nothing(simulator: Simulator) -> None:
    whole, parts = simulator.encode(PROMPTS), simulator.encode(PROMPTS, batch_size=2)
    torch.testing.assert_close(whole.states, parts.states, rtol=0, atol=1e-6)


def test_work_is_what_the_manifest_says(simulator: Simulator, bundle: Path) -> None:
    """The manifest counts one call: both halves of the guidance, for every image of the batch."""
    manifest = Bundle.open(bundle).manifest
    layers = {layer.name: layer.macs for block in manifest.blocks for layer in block.layers}
    rows = 2 * manifest.shapes.batch_size
    assert {name: rows * macs for name, macs in simulator.layer_macs.items()} == layers


def test_drawing_is_reproducible(simulator: Simulator) -> None:
    first = images(simulator, None)
    assert first.dtype == torch.uint8
    assert torch.equal(first, images(simulator, None))
    assert not torch.equal(first[0], first[1])


def test_32_bits_are_full_precision_on_a_cpu_and_8_are_not(simulator: Simulator) -> None:
    full = images(simulator, None)
    assert torch.equal(images(simulator, uniform(simulator, 32)), full)
    assert not torch.equal(images(simulator, uniform(simulator, 8)), full)
    assert torch.equal(images(simulator, None), full), "rounding was left behind"


def test_bits_of_prompt_step_and_layer_are_independent(simulator: Simulator) -> None:
    """A mixed batch draws each prompt as its own bits alone would."""
    low, full = images(simulator, uniform(simulator, 8)), images(simulator, None)
    bits = uniform(simulator, 32)
    bits[1] = 8
    mixed = images(simulator, bits)
    assert torch.equal(mixed[0], full[0]) and torch.equal(mixed[1], low[1])
    last = uniform(simulator, 32)
    last[:, -1] = 8
    assert not torch.equal(images(simulator, last), full)
    assert not torch.equal(images(simulator, last), low)


def test_weights_can_be_replaced(simulator: Simulator) -> None:
    name = "conv_in.weight"
    before = simulator.denoiser.get_parameter(name).detach().numpy().copy()
    full = images(simulator, None)
    simulator.set_weights({name: np.zeros_like(before)})
    assert not torch.equal(images(simulator, None), full)
    simulator.set_weights({name: before})
    assert torch.equal(images(simulator, None), full)


def test_what_is_missing_is_refused(towers: Path, tiny_model: Path, calibration: Path) -> None:
    without = Simulator(Checkpoint(tiny_model), steps=3)
    with pytest.raises(QlipError, match="no 8-bit range for layer 'conv_in'"):
        images(without, uniform(without, 8))
    with pytest.raises(QlipError, match="has no projection to learn quality from"):
        _ = without.projection
    ranges = Ranges.load(calibration / "ranges.json")
    with pytest.raises(QlipError, match="was measured on another model"):
        Simulator(Checkpoint(towers), ranges=ranges.model_copy(update={"fingerprint": "0" * 64}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_no_cuda(towers: Path) -> None:
    with pytest.raises(QlipError, match="there is no CUDA device here"):
        Simulator(Checkpoint(towers), device="cuda")


def test_projection_is_that_of_the_checkpoint(simulator: Simulator) -> None:
    assert simulator.projection.shape == (TEXT_WIDTH, TEXT_WIDTH)


@pytest.fixture(scope="module")
def emoji_on_gpu() -> Simulator:
    _, checkpoint = find_model("emoji")
    ranges = Ranges.load(EMOJI_CALIBRATION / "ranges.json")
    return Simulator(checkpoint, device="cuda", ranges=ranges, steps=5)


def drawn(simulator: Simulator) -> list[torch.Tensor]:
    low = uniform(simulator, 8)[:1, :1].expand(1, 5, -1)
    return [
        next(simulator.generate([prompt], noise(simulator, 1), guidance=4.0, bits=bits)).float()
        for prompt, bits in (("red apple", None), ("blue boat", None), ("red apple", low))
    ]


@pytest.mark.gpu
def test_recorded_steps_draw_the_same(emoji_on_gpu: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is recorded once and replayed for other prompts and other bits."""
    found = drawn(emoji_on_gpu)
    monkeypatch.setattr("qlip_export.simulate.recorded", lambda work, _: work)
    monkeypatch.setattr(emoji_on_gpu, "_step", None)
    for mine, theirs in zip(found, drawn(emoji_on_gpu), strict=True):
        assert (mine - theirs).square().mean() < 4
    monkeypatch.setattr(emoji_on_gpu, "_step", None)
    assert (found[0] - found[1]).square().mean() > 100


@pytest.mark.gpu
def test_a_gpu_predicts_what_a_cpu_predicts(emoji_on_gpu: Simulator) -> None:
    """In FP16 instead of FP32."""
    on_cpu = Simulator(emoji_on_gpu.checkpoint, steps=5)
    latents = torch.from_numpy(noise(on_cpu, 2))
    found = [
        s.predict(
            latents.to(s.device),
            torch.tensor([500.0], device=s.device),
            s.encode(["red apple", "blue boat"]).states,
        ).cpu()
        for s in (emoji_on_gpu, on_cpu)
    ]
    torch.testing.assert_close(*found, rtol=0, atol=0.02)
