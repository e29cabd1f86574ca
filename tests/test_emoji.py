"""The embedded model: its FP32 engines draw what diffusers draws, and the simulator what the engines draw."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip_export.build import BuildOptions, build
from qlip_export.bundle import Bundle
from qlip_export.noise import seeded_noise
from qlip_export.progress import Silent
from qlip_export.prompts import read_prompts
from qlip_export.reference import psnr, reference_image, reference_pipeline
from qlip_export.renderers import POLICY, EngineRenderer, SimulatorRenderer
from qlip_export.runtime import TextToImage
from qlip_export.zoo import find_model

PROMPTS = 20
STEPS = 25
LEAST_PSNR = 45.0
SIMULATED = 2
LEAST_MEDIAN = {"8": 33.0, "16": 40.0, "32": 70.0}
"""dB, of the simulator's images to the engines'; the policy's as at 8 bits."""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emoji") / "bundle"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddim", "euler", "pndm"])
def test_fp32_images_agree_with_diffusers(bundle: Path, scheduler: str) -> None:
    """Twenty prompts, 25 steps, the same latents: 45 dB or more for each of them."""
    options = BuildOptions(model="emoji", bits=(32,), weight_bits=32, scheduler=scheduler, steps=STEPS)
    build(options, bundle, Silent())
    model, checkpoint = find_model("emoji")
    assert model.calibration is not None
    prompts = read_prompts(model.calibration / "prompts.txt")[:PROMPTS]
    pipeline = TextToImage.load(bundle)
    diffusers = reference_pipeline(pipeline.bundle, checkpoint)
    found = []
    for seed, prompt in enumerate(prompts):
        noise = seeded_noise(seed, pipeline.bundle.manifest.shapes.latents[1:])[None]
        expected = reference_image(diffusers, prompt, noise, steps=STEPS, guidance=4.0)
        found.append(psnr(pipeline(prompt, latents=noise, guidance=4.0).images[0], expected))
        assert np.asarray(expected).std() > 10, "a flat image agrees with anything"
    print(f"{scheduler}: least {min(found):.1f} dB, median {sorted(found)[PROMPTS // 2]:.1f} dB")
    assert len(found) == PROMPTS
    assert min(found) >= LEAST_PSNR


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_simulator_draws_what_the_engines_draw(tmp_path: Path) -> None:
    """The same bits, and images as near as rounding lets them be, at uniform bits and by the policy."""
    build(BuildOptions(model="emoji", steps=STEPS), tmp_path / "bundle", Silent())
    opened = Bundle.open(tmp_path / "bundle")
    model, checkpoint = find_model("emoji")
    assert model.calibration is not None
    prompts = read_prompts(model.calibration / "evaluation.txt")[:SIMULATED]
    shape = opened.manifest.shapes.latents[1:]
    latents = np.stack([seeded_noise(seed, shape) for seed in range(SIMULATED)])
    engines, simulator = EngineRenderer(opened), SimulatorRenderer(opened, checkpoint, "cpu")
    policy = [POLICY] if opened.manifest.policy else []
    for configuration in [*policy, "8", "16", "32"]:
        images, bits = map(list, zip(*engines.draw(configuration, prompts, latents, 4.0), strict=True))
        drawn, chosen = map(list, zip(*simulator.draw(configuration, prompts, latents, 4.0), strict=True))
        assert np.array_equal(np.concatenate(bits), np.concatenate(chosen))
        pairs = zip(np.concatenate(images), np.concatenate(drawn), strict=True)
        found = [psnr(Image.fromarray(a), Image.fromarray(b)) for a, b in pairs]
        print(f"{configuration}: least {min(found):.1f} dB, median {np.median(found):.1f} dB")
        assert np.median(found) >= LEAST_MEDIAN.get(configuration, LEAST_MEDIAN["8"])
