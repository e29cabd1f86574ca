"""The whole way on a model made in code: build, generate, validate, inspect, and agreement with diffusers."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.diffusers_denoiser import DiffusersDenoiser
from qlip_export.errors import QlipError
from qlip_export.noise import seeded_noise
from qlip_export.progress import Silent
from qlip_export.reference import psnr, reference_image, reference_pipeline
from qlip_export.runtime import TextToImage
from qlip_export.runtime.tokenizer import PromptTokenizer
from qlip_export.torch_pipeline import load_pipeline
from qlip_export.validate import validate
from tests.conftest import STEPS, Shared, build_tiny
from tests.tiny import BLOCKS, IMAGE_SIZE, TEXT_LENGTH

PROMPT = "a red apple on the boat"
LONG = "the cat of an apple tree on a green boat and the dog of a blue house"


@pytest.fixture(scope="module")
def pipeline(bundle: Path) -> TextToImage:
    return TextToImage.load(bundle)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


def same(first: Image.Image, second: Image.Image) -> bool:
    return bool((pixels(first) == pixels(second)).all())


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_prompt_becomes_an_image(pipeline: TextToImage, bits: int) -> None:
    result = pipeline(PROMPT, seed=3, bits=bits)
    (image,) = result.images
    (record,) = result.records
    assert image.size == (IMAGE_SIZE, IMAGE_SIZE)
    assert image.mode == "RGB"
    assert pixels(image).std() > 10  # a picture, not a flat colour
    assert (record["prompt"], record["seed"], record["fab"]) == (PROMPT, 3, float(bits))
    assert record["bits"] == [[bits] * len(BLOCKS)] * STEPS
    assert result.warnings == []


def test_bundle_says_what_it_is(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    layers = [layer for block in manifest.blocks for layer in block.layers]
    assert tuple(block.name for block in manifest.blocks) == BLOCKS
    assert (len(layers), sum(layer.quantized for layer in layers)) == (151, 141)
    assert manifest.bits == (8, 16, 32)
    on_disk = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert on_disk == {"manifest.json", *manifest.files}


def test_validation_passes(bundle: Path) -> None:
    report = validate(bundle, prompt=PROMPT, seed=1, model=None, progress=Silent())
    assert report.passed
    assert {(row.block, row.bits) for row in report.rows} == {(b, n) for b in BLOCKS for n in (8, 16, 32)}
    assert [image.bits for image in report.images] == [8, 16, 32]
    assert report.notes == ()
    # Fewer bits cost more: the report must show it.
    prices = [max(r.from_float32 for r in report.rows if r.bits == bits) for bits in (8, 16, 32)]
    assert prices[0] > prices[1] > prices[2]


@pytest.mark.parametrize("scheduler", ["dpmsolver++", "ddim", "euler", "pndm"])
def test_unquantized_image_is_that_of_diffusers(
    shared: Shared, plain_bundle: Path, tiny_model: Path, scheduler: str
) -> None:
    def make(out: Path) -> None:
        shutil.copytree(plain_bundle, out)
        build_tiny(tiny_model, out, bits=(32,), weight_bits=32, scheduler=scheduler)

    out = shared(f"plain-{scheduler}", make)
    run = TextToImage.load(out)
    assert run.bundle.manifest.sampler.scheduler == scheduler
    noise = seeded_noise(11, run.bundle.manifest.shapes.latents[1:])[None]
    reference = reference_pipeline(run.bundle, Checkpoint(tiny_model))
    for prompt in (PROMPT, "the blue sun"):
        expected = reference_image(reference, prompt, noise, steps=STEPS, guidance=4.0)
        assert psnr(run(prompt, latents=noise, guidance=4.0).images[0], expected) >= 45


def test_other_guidance_agrees_with_diffusers(plain_bundle: Path, tiny_model: Path) -> None:
    run = TextToImage.load(plain_bundle)
    noise = seeded_noise(5, run.bundle.manifest.shapes.latents[1:])[None]
    reference = reference_pipeline(run.bundle, Checkpoint(tiny_model))
    expected = reference_image(reference, PROMPT, noise, steps=STEPS, guidance=9.5)
    assert psnr(run(PROMPT, latents=noise, guidance=9.5).images[0], expected) >= 45
    assert psnr(run(PROMPT, latents=noise, guidance=2.0).images[0], expected) < 45


def test_same_seed_same_image(pipeline: TextToImage) -> None:
    first = pipeline(PROMPT, seed=7).images[0]
    assert same(first, pipeline(PROMPT, seed=7).images[0])
    assert not same(first, pipeline(PROMPT, seed=8).images[0])


def test_seed_is_drawn_and_reported(pipeline: TextToImage) -> None:
    result = pipeline(PROMPT)
    seed = result.records[0]["seed"]
    assert seed != pipeline(PROMPT).records[0]["seed"]
    assert same(result.images[0], pipeline(PROMPT, seed=seed).images[0])


def test_latents_instead_of_a_seed(pipeline: TextToImage) -> None:
    noise = seeded_noise(7, pipeline.bundle.manifest.shapes.latents[1:])[None]
    result = pipeline(PROMPT, latents=noise)
    assert same(result.images[0], pipeline(PROMPT, seed=7).images[0])
    assert result.records[0]["seed"] is None


@pytest.mark.parametrize("change", [{"negative_prompt": "the green dog"}, {"guidance": 1.5}, {"bits": 8}])
def test_what_changes_the_image(pipeline: TextToImage, change: dict[str, Any]) -> None:
    assert not same(pipeline(PROMPT, seed=7).images[0], pipeline(PROMPT, seed=7, **change).images[0])


def test_without_guidance_the_negative_prompt_has_no_say(pipeline: TextToImage) -> None:
    first = pipeline(PROMPT, seed=7, guidance=1.0).images[0]
    second = pipeline(PROMPT, seed=7, guidance=1.0, negative_prompt="the green dog").images[0]
    assert np.abs(pixels(first) - pixels(second)).max() <= 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"prompt": []}, "the list of prompts is empty"),
        ({"prompt": PROMPT, "seed": -1}, "the seed is negative"),
        ({"prompt": PROMPT, "bits": 6}, "no 6-bit engines(.|\n)*expected: 8 or 16 or 32"),
        ({"prompt": PROMPT, "guidance": float("nan")}, "guidance scale is not finite"),
        ({"prompt": PROMPT, "latents": np.zeros((1, 4, 9, 8))}, r"wrong shape(.|\n)*\(1, 4, 9, 8\)"),
    ],
)
def test_bad_arguments_are_refused(pipeline: TextToImage, arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(QlipError, match=complaint):
        pipeline(**arguments)


def test_prompts_in_batches_equal_prompts_one_by_one(shared: Shared, tiny_model: Path) -> None:
    """Three prompts through engines for two: the last batch is half full."""
    out = shared("batched", lambda path: build_tiny(tiny_model, path, bits=(32,), batch_size=2))
    run = TextToImage.load(out)
    prompts = [PROMPT, "the blue sun", "a dog"]
    together = run(prompts, seed=40, negative_prompt="a cat")
    assert [record["seed"] for record in together.records] == [40, 41, 42]
    for i, prompt in enumerate(prompts):
        alone = run(prompt, seed=40 + i, negative_prompt="a cat").images[0]
        assert np.abs(pixels(together.images[i]) - pixels(alone)).max() <= 1
    # Not trivially so: the three differ from each other.
    assert not same(together.images[0], together.images[1])
    assert not same(together.images[1], together.images[2])


def test_progress_counts_every_denoiser_call(pipeline: TextToImage) -> None:
    seen: list[tuple[int, int]] = []
    pipeline([PROMPT, "a dog"], seed=0, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 2 * STEPS) for i in range(1, 2 * STEPS + 1)]


@pytest.mark.parametrize("prompt", [PROMPT, LONG, "", "A  RED\tApple!", "naïve café ☕", "x" * 40])
def test_token_ids_are_those_of_transformers(bundle: Path, tiny_model: Path, prompt: str) -> None:
    import transformers

    theirs = transformers.CLIPTokenizer.from_pretrained(tiny_model / "tokenizer", local_files_only=True)
    expected = theirs(prompt, padding="max_length", max_length=TEXT_LENGTH, truncation=True).input_ids
    opened = Bundle.open(bundle)
    assert PromptTokenizer(opened, opened.manifest.text_encoders[0].tokenizer)([prompt]).ids.tolist() == [
        expected
    ]


@pytest.fixture
def diffusers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log of diffusers, which does not propagate by itself."""
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_long_prompt_is_cut_where_diffusers_cuts(
    pipeline: TextToImage, tiny_model: Path, diffusers_log: pytest.LogCaptureFixture
) -> None:
    load_pipeline(Checkpoint(tiny_model)).encode_prompt(LONG, "cpu", 1, False)
    (message,) = [m for m in diffusers_log.messages if "was truncated" in m]
    cut = message[message.index("['") + 2 : message.rindex("']")].strip()
    (warning,) = pipeline(LONG, seed=0).warnings
    assert f"cut: {cut!r}" in warning
    assert LONG.endswith(cut)
    assert f"({TEXT_LENGTH} tokens)" in warning
    # Exactly what fits brings no warning, and makes the same image.
    kept = LONG.removesuffix(cut).strip()
    short = pipeline(kept, seed=0)
    assert short.warnings == []
    assert same(short.images[0], pipeline(LONG, seed=0).images[0])


@pytest.mark.parametrize("bits", [32, 8])
def test_denoiser_in_a_pipeline_of_diffusers(bundle: Path, tiny_model: Path, bits: int) -> None:
    """Text encoder, scheduler and VAE are diffusers' own, so the image agrees and is not the same."""
    run = TextToImage.load(bundle)
    noise = seeded_noise(2, run.bundle.manifest.shapes.latents[1:])[None]
    theirs = reference_pipeline(run.bundle, Checkpoint(tiny_model))
    theirs.unet = DiffusersDenoiser(bundle, bits=bits)
    found = reference_image(theirs, PROMPT, noise, steps=STEPS, guidance=4.0)
    assert psnr(found, run(PROMPT, latents=noise, bits=bits).images[0]) >= (45 if bits == 32 else 30)


def test_denoiser_refuses_what_it_cannot_honour(bundle: Path) -> None:
    denoiser = DiffusersDenoiser(bundle, bits=32)
    latents, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, TEXT_LENGTH, 32)
    assert denoiser(latents, 500, text).sample.shape == latents.shape
    with pytest.raises(QlipError, match=r"another shape(.|\n)*found: \(4, 4, 8, 8\)"):
        denoiser(torch.zeros(4, 4, 8, 8), 500, text)
    with pytest.raises(QlipError, match="found: class_labels"):
        denoiser(latents, 500, text, class_labels=torch.zeros(2))
