"""Ranges measured on the tiny model are what a plain hook sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qlip_export.calibrate import measure_ranges
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.families.unet import UNET
from qlip_export.prompts import read_prompts
from qlip_export.quant.ranges import RANGE_BITS, Ranges
from qlip_export.sampler_probe import scheduler_from_config
from qlip_export.torch_pipeline import load_pipeline

PROMPTS = ["a red apple", "the blue boat"]


@pytest.fixture(scope="module")
def pipeline(tiny_model: Path) -> Any:
    return load_pipeline(Checkpoint(tiny_model))


def test_ranges_cover_the_quantized_layers(calibration: Path, pipeline: Any, tiny_model: Path) -> None:
    ranges = Ranges.load(calibration / "ranges.json")
    layers = {
        name
        for name, module in pipeline.unet.named_modules()
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and UNET.quantizes(name)
    }
    assert len(layers) == 141
    assert set(ranges.layers) == layers
    assert ranges.fingerprint == Checkpoint(tiny_model).component("unet").fingerprint
    assert (ranges.recipe.prompts, ranges.recipe.steps) == (2, 3)
    for measured in ranges.layers.values():
        assert set(measured.thresholds) == set(RANGE_BITS)
        assert all(0 < t <= measured.maximum * (1 + 1e-5) for t in measured.thresholds.values())


def test_maxima_are_those_that_a_plain_hook_sees(calibration: Path, pipeline: Any) -> None:
    """Over both prompts, both halves of the guidance and all timesteps."""
    seen: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
            seen[name] = max(seen.get(name, 0.0), float(args[0].abs().max()))

        return hook

    ranges = Ranges.load(calibration / "ranges.json")
    handles = [
        module.register_forward_pre_hook(watch(name))
        for name, module in pipeline.unet.named_modules()
        if name in ranges.layers
    ]
    pipeline.scheduler = scheduler_from_config("dpmsolver++", dict(pipeline.scheduler.config))
    for seed, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(seed)
        pipeline(prompt, num_inference_steps=3, guidance_scale=4.0, generator=generator, output_type="latent")
    for handle in handles:
        handle.remove()
    assert {name: r.maximum for name, r in ranges.layers.items()} == pytest.approx(seen, rel=1e-5)


def test_measuring_reports_every_step(tiny_model: Path) -> None:
    steps: list[None] = []
    measure_ranges(Checkpoint(tiny_model), PROMPTS, steps=2, on_step=lambda: steps.append(None))
    assert len(steps) == 2 * len(PROMPTS)


def test_model_that_overflows_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(checkpoint: Checkpoint) -> Any:
        pipeline = load_pipeline(checkpoint)
        pipeline.unet.conv_in.weight.data.fill_(torch.inf)
        return pipeline

    monkeypatch.setattr("qlip_export.calibrate.ranges.load_pipeline", broken)
    with pytest.raises(QlipError, match="an activation is not finite"):
        measure_ranges(Checkpoint(tiny_model), PROMPTS[:1], steps=1)


def test_prompts_are_lines(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("  a café \n\n\tb\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a café", "b"]
