"""Several sizes of images and batches in one bundle: one weight file, engines for each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.noise import seeded_noise
from qlip_export.plan import plan, plan_sizes
from qlip_export.progress import Silent
from qlip_export.reference import psnr, reference_image, reference_pipeline
from qlip_export.runtime import TextToImage
from qlip_export.spec import image_sizes
from qlip_export.validate import validate
from qlip_export.zoo import find_configs
from tests.conftest import STEPS, Cli, Shared, build_tiny
from tests.test_cli import one_error, tree

PROMPT = "a red apple"
SIZES = ("32x32", "48x32", "32x32:2")


@pytest.fixture(scope="session")
def sized(shared: Shared, tiny_model: Path, trained: Path, adaptive_bundle: Path) -> Path:
    """The tiny model with a policy, in two sizes, and in batches of two in the first."""

    def make(out: Path) -> None:
        shutil.copytree(adaptive_bundle, out)
        build_tiny(tiny_model, out, bits=(8, 16, 32), sizes=SIZES, calibration=trained)

    return shared("sized", make)


def test_weights_stand_in_the_bundle_once(sized: Path) -> None:
    first, *others = Bundle.open(sized).manifest.sizes
    files = first.files
    assert sorted(p for p in files if p.endswith(".bin")) == [
        "onnx/denoiser.weights.bin",
        "onnx/text_encoder.weights.bin",
        "onnx/vae_decoder.weights.bin",
    ]
    wide, batch = others
    assert (wide.shapes.label, batch.shapes.label) == ("48x32", "32x32:2")
    # A further size costs its graphs, which hold no weight. Text encoder and policy see no images.
    graphs, own = (
        {v.onnx for block in size.blocks for v in block.variants.values()} for size in (first, wide)
    )
    assert not own & graphs
    sizes = [sum(files[path].size for path in paths) for paths in (graphs, own)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    assert wide.text_encoders == first.text_encoders and wide.policy == first.policy
    assert batch.text_encoders != first.text_encoders
    assert batch.policy is not None and first.policy is not None
    assert batch.policy.table == first.policy.table and batch.policy.onnx != first.policy.onnx
    assert sum(b.macs for block in wide.blocks for b in block.layers) > sum(
        b.macs for block in first.blocks for b in block.layers
    )


@pytest.mark.parametrize("size", [{"width": 32}, {"width": 48}, {"batch_size": 2}])
def test_every_size_draws_what_diffusers_draws(sized: Path, tiny_model: Path, size: dict[str, int]) -> None:
    run = TextToImage.load(sized, **size)  # type: ignore[arg-type]
    prompts = [PROMPT, "a green boat"]
    noise = np.stack([seeded_noise(i, run.bundle.manifest.shapes.latents[1:]) for i in range(2)])
    images = run(prompts, latents=noise, bits=32).images
    pipeline = reference_pipeline(run.bundle, Checkpoint(tiny_model))
    for i, prompt in enumerate(prompts):
        assert images[i].size == (size.get("width", 32), 32)
        expected = reference_image(
            pipeline, prompt, noise[i : i + 1], steps=STEPS, guidance=run.bundle.guidance()
        )
        assert psnr(images[i], expected) >= 45


def test_policy_is_one(sized: Path) -> None:
    """The same prompt gets the same bits in every size."""
    found = [
        TextToImage.load(sized, **size)(PROMPT, seed=0).records[0]  # type: ignore[arg-type]
        for size in ({"width": 32, "batch_size": 1}, {"width": 48}, {"batch_size": 2})
    ]
    assert found[0]["bits"] == found[1]["bits"] == found[2]["bits"]
    assert found[0]["q"] == pytest.approx(found[1]["q"]) == pytest.approx(found[2]["q"], abs=1e-5)


def test_validate_looks_at_every_size(sized: Path) -> None:
    report = validate(sized, prompt=PROMPT, seed=0, model=None, progress=Silent())
    assert report.passed
    assert [report.size, *(other.size for other in report.other_sizes)] == list(SIZES)
    for one in (report, *report.other_sizes):
        assert one.policy is not None and one.policy.passed
        assert next(image.psnr or 0 for image in one.images if image.bits == 32) >= 45


def test_generate_picks_the_size_or_names_those_there(cli: Cli, sized: Path, tmp_path: Path) -> None:
    done = cli("generate", sized, PROMPT, "--width", 48, "--seed", 0, "-o", tmp_path / "wide.png", "--json")
    assert done.code == 0, done.err
    with Image.open(tmp_path / "wide.png") as image:
        assert image.size == (48, 32)
    error = one_error(cli("generate", sized, PROMPT, "--width", 64, "-o", tmp_path / "no.png", "--json"))
    assert error["expected"].startswith("32x32, 48x32, 32x32:2")
    assert error["found"] == "--width 64"
    assert not (tmp_path / "no.png").exists()


@pytest.mark.parametrize(("images", "label"), [(None, "32x32"), (1, "32x32"), (2, "32x32:2"), (3, "32x32")])
def test_batch_size_is_the_one_that_wastes_least(sized: Path, images: int | None, label: str) -> None:
    assert Bundle.open(sized).at(images=images).manifest.shapes.label == label


def test_inspect_and_build_tell_of_all_sizes(cli: Cli, sized: Path) -> None:
    assert "further sizes: 48x32, 32x32:2" in cli("inspect", sized).out


def test_timing_is_kept_by_size(cli: Cli, sized: Path, tmp_path: Path, shared: Shared) -> None:
    mine = Path(shutil.copytree(sized, tmp_path / "mine"))
    done = cli("compile", mine, "--backend", "openvino", "--json")
    assert json.loads(done.out)["built"] == 0
    timing = Bundle.open(mine).manifest.targets["openvino"].timing
    assert timing is not None
    assert set(timing.other_sizes) == {"48x32", "32x32:2"}
    wide = Bundle.open(mine).manifest.sizes[1]
    assert {v.onnx for b in wide.blocks for v in b.variants.values()} <= set(timing.milliseconds)
    moved = wide.targets["openvino"].timing
    assert moved is not None and moved.instead == timing.other_sizes["48x32"]


def test_another_size_later_makes_no_weights_again(
    cli: Cli, sized: Path, tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(sized, tmp_path / "mine"))
    options = {"bits": (8, 16, 32), "calibration": trained}
    report = build_tiny(tiny_model, mine, sizes=SIZES[:2], **options)
    assert report.built == 0  # one size less
    assert report.sizes == SIZES[:2]
    assert not [path for path in tree(mine) if "batch2" in path]


def test_plan_counts_the_engines_of_all_sizes(tiny_model: Path, sized: Path) -> None:
    model, checkpoint = find_configs(str(tiny_model))
    found = plan_sizes(model, checkpoint, image_sizes(SIZES, None, None, 1))
    made = Bundle.open(sized).manifest.targets["openvino"].engines
    assert found.engines == len([path for path in made if "policy" not in path])
    assert [(o.width, o.batch_size) for o in found.other_sizes] == [(48, 1), (32, 2)]
    assert found.other_sizes[0].macs_per_step > found.macs_per_step
    assert found.weight_file_bytes == plan(model, checkpoint).weight_file_bytes


REFUSED: list[tuple[list[object], str]] = [
    (["--size", "32"], "--size is not known"),
    (["--size", "32x32:0"], "--size is not known"),
    (["--size", "32x32", "--height", 32], "said twice"),
    (["--size", "32x32", "--size", "32x32:1"], "given twice"),
    (["--size", "32x32", "--size", "33x32"], "--width does not fit the model"),
]


@pytest.mark.parametrize(("options", "problem"), REFUSED)
@pytest.mark.parametrize("command", ["build", "plan"])
def test_sizes_that_are_refused(
    cli: Cli, tiny_model: Path, tmp_path: Path, command: str, options: list[object], problem: str
) -> None:
    out = ["-o", tmp_path / "bundle"] if command == "build" else []
    assert problem in one_error(cli(command, "--model", tiny_model, *options, *out, "--json"))["problem"]
    assert not list(tmp_path.iterdir())


def test_limit_of_one_size_is_refused_for_several(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    done = cli(
        *("build", "--model", tiny_model, "--granularity", "layer", "--max-engine-bytes", "1MB"),
        *("--size", "32x32", "--size", "48x32", "-o", tmp_path / "bundle", "--json"),
    )
    assert "about one size" in one_error(done)["problem"]
