"""SDXL and FLUX end to end, on tiny random pipelines: bundles against diffusers, without a hub."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qlip_export.backends.openvino import OpenVINOBackend
from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.compile import MEMORY_BASE, MEMORY_WEIGHT, preflight
from qlip_export.diffusers_denoiser import DiffusersDenoiser
from qlip_export.errors import QlipError
from qlip_export.graph.weights import WeightIndex
from qlip_export.noise import seeded_noise
from qlip_export.progress import Silent
from qlip_export.reference import psnr, reference_image, reference_pipeline
from qlip_export.runtime import TextToImage
from qlip_export.runtime.tokenizer import PromptTokenizer
from qlip_export.text_encoders import part_of, parts_of
from qlip_export.validate import validate
from tests.conftest import STEPS, Cli, Shared, build_tiny
from tests.tiny_pipelines import FLOW_MATCH, SIZE, write_flux, write_sdxl

PROMPT = "a red apple on the boat"
LONG = "the cat of an apple tree on a green boat and the dog of a blue house"
LEAST_INT8 = {"sdxl": 30.0, "flux": 40.0}
"""dB against diffusers with fake-quantized layers; INT8 engines round as they do, in another order."""


@dataclass(frozen=True)
class Built:
    """A tiny model and its bundle at 8, 16 and 32 bits with 4-bit weights."""

    family: str
    model: Path
    bundle: Path

    @property
    def runtime(self) -> TextToImage:
        return TextToImage.load(self.bundle)

    def difference(self, first: dict[str, Any], second: dict[str, Any]) -> float:
        """Return the PSNR of two runs from the same noise at 32 bits."""
        run = self.runtime
        one, two = (run(PROMPT, seed=1, bits=32, **options).images[0] for options in (first, second))
        return psnr(one, two)


def write(family: str, folder: Path) -> Path:
    return write_sdxl(folder) if family == "sdxl" else write_flux(folder, family)


@pytest.fixture(scope="session")
def model_of(shared: Shared) -> Any:
    return lambda family: shared(f"model-{family}", lambda folder: write(family, folder))


@pytest.fixture(scope="session", params=["sdxl", "flux"])
def built(request: pytest.FixtureRequest, shared: Shared, model_of: Any) -> Built:
    family = request.param
    model = model_of(family)

    def make(out: Path) -> None:
        calibration = shared(f"ranges-{family}", lambda folder: measure(model, folder))
        build_tiny(model, out, calibration=calibration, height=SIZE, width=SIZE)

    return Built(family, model, shared(f"bundle-{family}", make))


def measure(model: Path, folder: Path) -> None:
    from qlip_export.calibrate import measure_ranges

    ranges = measure_ranges(Checkpoint(model), [PROMPT, "a dog"], steps=2, height=SIZE, width=SIZE)
    folder.mkdir()
    (folder / "ranges.json").write_text(ranges.model_dump_json(), encoding="utf-8")


def test_bundle_agrees_with_diffusers_at_every_option(built: Built) -> None:
    """Blocks with the captured graph; images with diffusers, fake-quantized where engines are INT8."""
    report = validate(built.bundle, prompt=PROMPT, seed=1, model=None, progress=Silent())
    assert report.passed
    assert report.notes == ()
    decibel = {image.bits: image.psnr or 0.0 for image in report.images}
    assert decibel[32] >= 45
    assert decibel[16] >= 40
    assert decibel[8] >= LEAST_INT8[built.family]
    prices = [max(r.from_float32 for r in report.rows if r.bits == bits) for bits in (8, 16, 32)]
    assert prices[0] > prices[1] > prices[2]


def reference(built: Built, noise: np.ndarray, prompt: str = PROMPT, **options: Any) -> Image.Image:
    opened = Bundle.open(built.bundle)
    pipeline = reference_pipeline(opened, Checkpoint(built.model))
    options = {"guidance": opened.guidance()} | options
    return reference_image(pipeline, prompt, noise, steps=STEPS, **options)


def agrees(built: Built, **options: Any) -> bool:
    """Say whether options mean to a bundle what they mean to diffusers."""
    noise = seeded_noise(5, built.runtime.bundle.manifest.shapes.latents[1:])[None]
    found = built.runtime(PROMPT, latents=noise, bits=32, **options).images[0]
    return psnr(found, reference(built, noise, **options)) >= 45


def test_guidance_means_what_it_means_to_diffusers(built: Built) -> None:
    assert agrees(built, guidance=9.0)
    assert built.difference({"guidance": 9.0}, {}) < 70  # the scale has a say at all


@pytest.mark.parametrize("built", ["sdxl"], indirect=True)
def test_no_negative_prompt_is_not_an_empty_one(built: Built) -> None:
    """Where nothing is given, zeros stand for it, as Stable Diffusion XL was trained."""
    assert agrees(built, negative_prompt="a dog")
    assert agrees(built, negative_prompt="")
    assert built.difference({"negative_prompt": ""}, {}) < 45
    assert built.difference({"negative_prompt": "a dog"}, {"negative_prompt": ""}) < 45


@pytest.mark.parametrize("built", ["flux"], indirect=True)
def test_distilled_model_takes_no_negative_prompt(built: Built, cli: Cli) -> None:
    done = cli("generate", built.bundle, PROMPT, "--negative-prompt", "a dog")
    assert done.code == 2
    assert "flux takes no negative prompt" in done.err
    assert built.runtime(PROMPT, seed=1, negative_prompt="").images  # an empty one asks for nothing


@pytest.mark.parametrize("built", ["flux"], indirect=True)
def test_text_encoder_is_stored_as_the_checkpoint_has_it(built: Built) -> None:
    files = Bundle.open(built.bundle).manifest.files
    facts = files["onnx/text_encoder_2.weights.bin"].facts
    index = WeightIndex.model_validate(facts)
    assert {tensor.dtype for tensor in index.tensors.values()} == {"BFLOAT16"}


def test_bundle_is_no_unet_of_stable_diffusion(built: Built) -> None:
    with pytest.raises(QlipError, match="takes more than latents, timestep and text"):
        DiffusersDenoiser(built.bundle)


def test_every_tokenizer_gives_the_ids_of_transformers(built: Built) -> None:
    opened = Bundle.open(built.bundle)
    reference = reference_pipeline(opened, Checkpoint(built.model))
    for entry in opened.manifest.text_encoders:
        theirs = getattr(reference, entry.name.replace("text_encoder", "tokenizer"))
        ours = PromptTokenizer(opened, entry.tokenizer)
        for prompt in (PROMPT, LONG, "", "naïve  café"):
            length = entry.tokenizer.max_length
            expected = theirs(prompt, padding="max_length", max_length=length, truncation=True).input_ids
            assert ours([prompt]).ids.tolist() == [expected]


def test_what_does_not_fit_is_told_by_encoder(built: Built) -> None:
    warnings = built.runtime(LONG, seed=0).warnings
    short = {"sdxl": ["text_encoder", "text_encoder_2"], "flux": ["text_encoder"]}[built.family]
    assert [w.split(" is longer than ")[1].split()[0] for w in warnings] == short


@pytest.mark.slow
def test_prompts_in_a_half_full_batch_and_another_image_size(built: Built, shared: Shared) -> None:
    def make(out: Path) -> None:
        shutil.copytree(built.bundle, out)
        build_tiny(built.model, out, bits=(32,), batch_size=2, height=32, width=48)

    run = TextToImage.load(shared(f"wide-{built.family}", make))
    prompts = [PROMPT, "the blue sun", "a dog"]
    noise = np.stack([seeded_noise(i, run.bundle.manifest.shapes.latents[1:]) for i in range(3)])
    images = run(prompts, latents=noise).images
    pipeline = reference_pipeline(run.bundle, Checkpoint(built.model))
    for i, prompt in enumerate(prompts):
        assert images[i].size == (48, 32)
        guidance = run.bundle.guidance()
        expected = reference_image(pipeline, prompt, noise[i : i + 1], steps=STEPS, guidance=guidance)
        assert psnr(images[i], expected) >= 45
    assert psnr(images[0], images[1]) < 45


@pytest.mark.parametrize("built", ["flux"], indirect=True)
def test_large_text_encoders_become_several_engines(
    built: Built, shared: Shared, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut between their layers they give the image that one engine each gives, in any memory budget."""
    monkeypatch.setattr("qlip_export.text_encoders.PART_WEIGHTS", 16_000)

    def make(out: Path) -> None:
        shutil.copytree(built.bundle, out)
        folder = shared(f"ranges-{built.family}", lambda folder: measure(built.model, folder))
        build_tiny(built.model, out, calibration=folder, height=SIZE, width=SIZE)

    opened = Bundle.open(shared("flux-in-parts", make))
    assert [len(encoder.graphs) for encoder in opened.manifest.text_encoders] == [2, 2]
    backend = OpenVINOBackend(threads=1)
    for encoder in opened.manifest.text_encoders:  # the second's weights are stored in BF16
        stored = opened.manifest.files[f"onnx/{encoder.name}.weights.bin"]
        tensors = WeightIndex.model_validate(stored.facts).tensors.values()
        each = [
            preflight(opened.manifest, backend, (onnx,), opened.root, opened.file) for onnx in encoder.graphs
        ]
        counts = [(found.memory - MEMORY_BASE) // MEMORY_WEIGHT for found in each]
        assert min(counts) > 0 and sum(counts) == sum(prod(tensor.shape) for tensor in tensors)
        assert all(found.need > 2 * 4 * count for found, count in zip(each, counts, strict=True))
    weights = [path for path in opened.manifest.files if path.endswith(".bin")]
    assert weights == [path for path in Bundle.open(built.bundle).manifest.files if path.endswith(".bin")]
    whole = built.runtime(PROMPT, seed=1, bits=32).images[0]
    run = TextToImage.load(opened.root)
    assert psnr(run(PROMPT, seed=1, bits=32).images[0], whole) >= 60
    again = run(PROMPT, seed=1, bits=32, memory_budget="2GB")
    assert psnr(again.images[0], whole) >= 60
    # Each engine of an encoder comes by itself: not even all of them have to be loaded at once.
    assert again.records[0]["memory"]["smallest"] < again.records[0]["memory"]["all_resident"]


def test_text_encoders_are_cut_between_layers() -> None:
    layers = {f"encoder.block.{i}.layer.0.q.weight": 200_000_000 for i in range(7)}
    sizes = {"shared.weight": 130_000_000, **layers, "encoder.final_layer_norm.weight": 4096}
    parts = parts_of(sizes)
    assert parts == [range(2), range(2, 5), range(5, 7)]
    assert [part_of(f"encoder.block.{i}.layer.1", parts) for i in (0, 2, 6)] == ["part0", "part1", "part2"]
    assert part_of("encoder.final_layer_norm", parts) is None
    assert parts_of({"text_model.encoder.layers.0.fc1.weight": 600_000_000}) == []


@pytest.mark.parametrize("scheduler", ["ddim", "dpmsolver++", "pndm"])
@pytest.mark.parametrize("built", ["sdxl"], indirect=True)
@pytest.mark.slow
def test_other_schedulers_agree(built: Built, shared: Shared, scheduler: str) -> None:
    def make(out: Path) -> None:
        shutil.copytree(built.bundle, out)
        build_tiny(built.model, out, bits=(32,), scheduler=scheduler)

    run = TextToImage.load(shared(f"sdxl-{scheduler}", make))
    noise = seeded_noise(5, run.bundle.manifest.shapes.latents[1:])[None]
    pipeline = reference_pipeline(run.bundle, Checkpoint(built.model))
    expected = reference_image(pipeline, PROMPT, noise, steps=STEPS, guidance=5.0)
    assert psnr(run(PROMPT, latents=noise).images[0], expected) >= 45


@pytest.mark.slow
def test_flux_schnell_takes_no_guidance(shared: Shared, model_of: Any) -> None:
    model = model_of("flux-schnell")
    out = shared(
        "bundle-schnell",
        lambda path: build_tiny(model, path, bits=(32,), weight_bits=32, height=SIZE, width=SIZE),
    )
    run = TextToImage.load(out)
    noise = seeded_noise(5, run.bundle.manifest.shapes.latents[1:])[None]
    result = run(PROMPT, latents=noise)
    pipeline = reference_pipeline(run.bundle, Checkpoint(model))
    expected = reference_image(pipeline, PROMPT, noise, steps=STEPS, guidance=0.0)
    assert psnr(result.images[0], expected) >= 45
    assert result.records[0]["guidance"] == 0.0
    with pytest.raises(QlipError, match="takes no guidance scale"):
        run(PROMPT, seed=1, guidance=3.5)


def test_shift_grows_with_the_image() -> None:
    """The table of a large image has the sigmas that diffusers computes for it."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    from qlip_export.pipelines import Size, pipeline_of
    from qlip_export.sampler_probe import probe_scheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLOW_MATCH)
    for side in (64, 128):
        given = pipeline_of("flux").timesteps(scheduler.config, 8, Size((8 * side, 8 * side), (side, side)))
        assert given["mu"] == pytest.approx(calculate_shift((side // 2) ** 2))
        table = probe_scheduler(scheduler, 8, name="flow-match-euler", timesteps=given)
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 8, 8), mu=given["mu"])
        assert [s.timestep for s in table.steps] == pytest.approx(scheduler.timesteps.tolist())
        deltas = scheduler.sigmas.diff().tolist()
        assert [s.output[0] for s in table.steps] == pytest.approx(deltas)
