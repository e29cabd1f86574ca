"""The model that the repository ships: it loads, has the promised size, draws, and names its sources."""

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import torch
from safetensors import safe_open

from tools.emoji import checkpoint
from tools.emoji import tokenizer as bpe
from tools.emoji.architecture import MAX_PARAMETERS, SHIPPED, count_layers, scheduler_config
from tools.emoji.captions import STYLES
from tools.emoji.export import export, exported_networks, random_networks, trained_networks
from tools.emoji.restore import restore

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "qlip_export/zoo/emoji"


@pytest.fixture(scope="module")
def pipeline():
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def networks():
    return exported_networks(MODEL)


def test_the_pipeline_loads_and_draws_on_white(pipeline):
    with torch.no_grad():
        drawn = pipeline(
            "volcano, noto style",
            guidance_scale=4.0,
            num_inference_steps=8,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]
    assert drawn.shape == (128, 128, 3)
    corners = drawn[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.min() > 0.9
    assert drawn[40:90, 40:90].mean() < 0.8


def test_the_denoiser_has_the_topology_of_bk_sdm_tiny(networks):
    config = networks.unet.config
    assert count_layers(networks.unet) == 151
    assert config["down_block_types"] == ["CrossAttnDownBlock2D"] * 3
    assert config["up_block_types"] == ["CrossAttnUpBlock2D"] * 3
    assert (config["mid_block_type"], config["layers_per_block"], config["attention_head_dim"]) == (
        None,
        1,
        8,
    )
    assert config["cross_attention_dim"] == networks.text.config.hidden_size
    assert networks.vae.config["scaling_factor"] == 1.0


def test_the_weights_fit_their_budget(networks):
    files = list(MODEL.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 36_000_000
    assert max(path.stat().st_size for path in files) <= 10_000_000
    assert sum(networks.parameters().values()) <= MAX_PARAMETERS
    for path in files:
        with safe_open(path, "pt") as opened:
            assert {opened.get_slice(name).get_dtype() for name in opened.keys()} == {"F16"}  # noqa: SIM118


def test_both_text_classes_read_the_same_states(pipeline, networks):
    ids = pipeline.tokenizer(
        ["a noto style emoji of octopus"], padding="max_length", return_tensors="pt"
    ).input_ids
    assert ids.shape == (1, 77)
    with torch.no_grad():
        states = pipeline.text_encoder(ids)[0]
        output = networks.text(ids)
    assert torch.equal(states, output.last_hidden_state)
    assert output.text_embeds.shape == (1, SHIPPED.projection)


def test_the_text_tower_tells_styles_and_emoji_apart(pipeline, networks):
    prompts = [
        "an emoji of volcano in noto style",
        "an emoji of volcano in twemoji style",
        "an emoji of cat in noto style",
    ]
    ids = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        embeds = torch.nn.functional.normalize(networks.text(ids).text_embeds, dim=-1)
    likeness = embeds @ embeds.T
    assert likeness[0, 1] < 0.99
    assert likeness[0, 2] < likeness[0, 1]


def test_transformers_and_the_project_tokenize_alike(pipeline):
    tokenizer = bpe.Tokenizer.from_file(str(MODEL / "tokenizer/tokenizer.json"))
    prompts = (ROOT / "calibration/emoji/prompts.txt").read_text(encoding="utf-8").splitlines()[:96]
    theirs = pipeline.tokenizer(prompts, padding="max_length", truncation=True, max_length=77).input_ids
    assert theirs == list(bpe.encode(tokenizer, prompts))
    assert pipeline.tokenizer.pad_token == pipeline.tokenizer.eos_token == bpe.END


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler"])
def test_other_samplers_read_the_schedule(pipeline, name):
    scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(10)
    assert int(scheduler.timesteps[0]) == 999
    assert not scheduler.config.get("clip_sample", False)
    stored = json.loads((MODEL / "scheduler/scheduler_config.json").read_text())
    assert scheduler_config().items() <= stored.items()


def test_the_evaluation_tower_is_apart_from_the_pipeline():
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["safety_checker"] == index["feature_extractor"] == index["image_encoder"] == [None, None]
    assert (MODEL / "image_encoder/config.json").is_file()


def test_every_source_is_attributed():
    licences = MODEL / "LICENSES"
    attribution = (licences / "ATTRIBUTION.md").read_text(encoding="utf-8")
    for style in STYLES:
        row = next(line for line in attribution.splitlines() if f"`{style.package}` {style.version}" in line)
        assert style.licence in row and style.phrase in row
    for name, phrase in {
        "Apache-2.0.txt": "Apache License",
        "CC-BY-4.0.txt": "Section 3 -- License Conditions.",
        "MIT-fluent-emoji.txt": "Microsoft Corporation",
        "MIT-emojibase.txt": "Miles Johnson",
        "Unicode-3.0.txt": "UNICODE LICENSE V3",
    }.items():
        assert phrase in (licences / name).read_text(encoding="utf-8"), name
        assert f"]({name})" in attribution


def test_the_card_reports_the_numbers_of_the_metrics_file():
    metrics = json.loads((MODEL / "metrics.json").read_text())
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert f"{metrics['vae_psnr_held_out_db']:.1f} dB" in card
    for found in metrics["generated"]:
        for key, digits in (("clip_score", 3), ("clip_score_ratio", 3), ("fid", 2), ("retrieval_at_1", 3)):
            assert f"{found[key]:.{digits}f}" in card, (found["guidance"], key)


def test_restored_weights_export_to_the_same_model(networks, tmp_path):
    restore(MODEL, tmp_path / "weights")
    again = trained_networks(tmp_path / "weights", "shipped")
    for name in ("text", "vision", "vae", "unet"):
        for one, two in zip(
            getattr(again, name).parameters(), getattr(networks, name).parameters(), strict=True
        ):
            assert torch.equal(one, two)
    assert checkpoint.read(tmp_path / "weights/unet")[1]["step"] == 0


def test_an_export_reads_back_as_it_was(tmp_path):
    made = random_networks("rehearsal", 560, seed=1)
    written = export(made, MODEL / "tokenizer", tmp_path)
    assert written >= 2 * sum(made.parameters().values())
    found = exported_networks(tmp_path)
    for name in ("text", "vision", "vae", "unet"):
        for one, two in zip(getattr(made, name).parameters(), getattr(found, name).parameters(), strict=True):
            assert two.dtype == torch.float32
            assert torch.equal(one.half().float(), two)
