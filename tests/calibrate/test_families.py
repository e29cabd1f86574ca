"""Calibration of SDXL and FLUX in small: every stage on tiny pipelines, then a bundle with the policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip_export.bundle import Bundle
from qlip_export.calibrate.options import CalibrateOptions
from qlip_export.calibrate.stages import Calibration
from qlip_export.checkpoint import Checkpoint
from qlip_export.evaluate import EvaluateOptions, evaluate
from qlip_export.noise import seeded_noise
from qlip_export.policy.store import Quality
from qlip_export.progress import Silent
from qlip_export.reference import psnr, reference_image, reference_pipeline
from qlip_export.renderers import SimulatorRenderer
from qlip_export.runtime import TextToImage
from qlip_export.validate import validate
from tests.conftest import STEPS, Shared, build_tiny
from tests.tiny import WORDS
from tests.tiny_pipelines import SIZE, write_flux, write_sdxl

PROMPTS = [f"a {colour} {thing}" for colour in WORDS[5:8] for thing in WORDS[8:]]
POLICY = "8-16-32-complexity"
MODELS: dict[str, Any] = {"sdxl": write_sdxl, "flux": write_flux}


@dataclass(frozen=True)
class Calibrated:
    """A tiny model, what calibration made of it, and a bundle with its policy."""

    model: Path
    folder: Path
    bundle: Path


@pytest.fixture(scope="session", params=MODELS)
def calibrated(request: pytest.FixtureRequest, shared: Shared) -> Calibrated:
    family = request.param
    model = shared(f"model-{family}", MODELS[family])

    def calibrate(folder: Path) -> None:
        # Complexity stands in for quality: that needs a vision tower and differs in the label alone.
        options = CalibrateOptions(
            steps=STEPS,
            groups=2,
            forced_steps=1,
            iterations=1,
            criterion="complexity",
            batch_size=8,
            height=SIZE,
            width=SIZE,
        )
        report = Calibration(Checkpoint(model), PROMPTS, options, folder).run(Silent())
        assert set(report.files) == {"ranges", "weights", "t2q", "q2b"}

    folder = shared(f"calibrated-{family}", calibrate)

    def build(out: Path) -> None:
        build_tiny(model, out, calibration=folder, policy=POLICY, height=SIZE, width=SIZE)

    return Calibrated(model, folder, shared(f"adaptive-{family}", build))


@pytest.mark.slow
def test_policy_reads_the_pooled_embedding_of_the_clip_encoder(calibrated: Calibrated) -> None:
    run = TextToImage.load(calibrated.bundle)
    manifest = run.bundle.manifest
    assert manifest.policy is not None and manifest.policy.name == POLICY
    pipeline = reference_pipeline(run.bundle, Checkpoint(calibrated.model))
    encoder = getattr(pipeline, manifest.quality_encoder)
    tokenizer = getattr(pipeline, manifest.quality_encoder.replace("text_encoder", "tokenizer"))
    ids = tokenizer(PROMPTS, padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = getattr(encoder, "text_model", encoder)(ids).pooler_output
        expected = Quality.load(calibrated.folder, "complexity").network(pooled)
    np.testing.assert_allclose(run.qualities(PROMPTS), expected.numpy(), atol=1e-5)
    assert np.ptp(expected.numpy()) > 1e-4


@pytest.mark.slow
def test_bundle_with_a_policy_validates_and_is_evaluated(calibrated: Calibrated, tmp_path: Path) -> None:
    report = validate(calibrated.bundle, prompt=PROMPTS[0], seed=1, model=None, progress=Silent())
    assert report.passed and report.policy is not None
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]), encoding="utf-8")
    rows = {}
    for device in ("engines", "cpu"):
        options = EvaluateOptions(
            prompts=tmp_path / "prompts.txt", samples=3, metrics=("fab", "bitops"), device=device
        )
        rows[device] = evaluate(calibrated.bundle, options, Silent()).rows
    assert rows["engines"] == rows["cpu"]
    assert [row.configuration for row in rows["cpu"]] == ["policy", "8", "16", "32"]


@pytest.mark.slow
def test_simulator_draws_what_diffusers_draws(calibrated: Calibrated) -> None:
    """At 32 bits with the bundle's weights: conditioning, guidance, schedule and decoding are the same."""
    opened = Bundle.open(calibrated.bundle)
    checkpoint = Checkpoint(calibrated.model)
    renderer = SimulatorRenderer(opened, checkpoint, "cpu")
    latents = np.stack([seeded_noise(i, opened.manifest.shapes.latents[1:]) for i in range(2)])
    guidance = opened.guidance()
    ((images, _),) = renderer.draw("32", PROMPTS[:2], latents, guidance)
    pipeline = reference_pipeline(opened, checkpoint)
    for i, prompt in enumerate(PROMPTS[:2]):
        expected = reference_image(pipeline, prompt, latents[i : i + 1], steps=STEPS, guidance=guidance)
        assert psnr(Image.fromarray(images[i].numpy()), expected) >= 45
