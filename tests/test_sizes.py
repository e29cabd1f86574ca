"""Several sizes of images and batches in one bundle: one weight file, engines for each."""

from __future__ import annotations

import json
import shutil
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qlip_export.build import _check_engine_bytes
from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.demo.studio import Limits, Studio, View
from qlip_export.errors import QlipError
from qlip_export.noise import seeded_noise
from qlip_export.plan import plan, plan_sizes
from qlip_export.progress import Silent
from qlip_export.reference import psnr, reference_image, reference_pipeline
from qlip_export.report.collect import ReportOptions, collect
from qlip_export.report.page import render
from qlip_export.runtime import TextToImage
from qlip_export.sizes import choose_size
from qlip_export.spec import image_sizes
from qlip_export.validate import validate
from qlip_export.zoo import find_configs
from tests.conftest import SIZES, STEPS, Cli, Shared, build_tiny
from tests.test_cli import one_error, tree

PROMPT = "a red apple"


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
    assert choose_size(Bundle.open(sized), images=images).manifest.shapes.label == label


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


def test_seconds_of_one_size_are_refused_for_several(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    done = cli(
        *("build", "--model", tiny_model, "--granularity", "layer", "--target-latency", "1"),
        *("--size", "32x32", "--size", "48x32", "-o", tmp_path / "bundle", "--json"),
    )
    error = one_error(done)
    assert "each takes its own time" in error["problem"]
    assert "--max-variants" in error["fix"]


def test_engine_bytes_are_those_of_all_sizes(sized: Path) -> None:
    manifest = Bundle.open(sized).manifest
    target = manifest.targets["openvino"]
    onnx = {v.onnx for size in manifest.sizes for block in size.blocks for v in block.variants.values()}
    total = sum(manifest.files[target.engines[path].path].size for path in onnx)
    _check_engine_bytes(manifest, target, total)
    with pytest.raises(QlipError, match="larger than --max-engine-bytes") as raised:
        _check_engine_bytes(manifest, target, total - 1)
    assert raised.value.found is not None and f"{total:,} bytes of {len(onnx)}" in raised.value.found


def test_pipeline_changes_size_on_the_same_backend(sized: Path) -> None:
    first = TextToImage.load(sized, threads=1)
    wide = first.at(width=48)
    assert wide.backend is first.backend
    assert wide.at(width=48, batch_size=1) is wide
    assert wide(PROMPT, seed=0).images[0].size == (48, 32)
    assert wide.at(width=32).bundle.manifest.shapes == first.bundle.manifest.shapes


def test_manifest_is_read_once_for_all_sizes(sized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = TextToImage.load(sized, threads=1)

    def again(root: Path) -> Bundle:
        raise AssertionError(f"{root} was opened again")

    monkeypatch.setattr(Bundle, "open", again)
    wide = first.at(width=48)
    assert [size.shapes.label for size in wide.sizes()] == ["48x32", "32x32", "32x32:2"]
    assert wide.at(batch_size=2).bundle.manifest.shapes.label == "32x32:2"


def test_evaluate_draws_the_size_that_is_asked_for(cli: Cli, sized: Path, tmp_path: Path) -> None:
    def run(*size: object) -> dict[str, Any]:
        done = cli(
            *("evaluate", sized, "--metrics", "fab,bitops", "--compare", 16, "--samples", 2, *size),
            *("-o", tmp_path / "kept", "--json"),
        )
        assert done.code == 0, done.err
        found: dict[str, Any] = json.loads(done.out)
        return found

    wide, first = run("--width", 48), run()
    assert (wide["size"], first["size"]) == ("48x32", "32x32")
    work = [report["rows"][0]["metrics"]["bitops"]["value"] for report in (wide, first)]
    assert work[0] > 1.4 * work[1]
    with Image.open(tmp_path / "kept" / "16" / "00001.png") as image:
        assert image.size == (32, 32)  # what another size kept was drawn again
    error = one_error(cli("evaluate", sized, "--batch-size", 3, "--json"))
    assert error["found"] == "--batch-size 3"


def test_report_draws_one_size_and_tells_of_all(sized: Path) -> None:
    data = collect(sized, ReportOptions(images=1, width=48), Silent())
    assert {drawing.image.size for row in data.rows for drawing in row.drawings} == {(48, 32)}
    assert {drawing.label for drawing in data.rows[0].drawings} >= {"FP32, diffusers", "QLIP"}
    assert [row.size for row in data.sizes] == ["48x32", "32x32", "32x32:2"]
    wide = data.sizes[0]
    assert wide.engines == len(data.engines) and wide.bytes == sum(e.bytes for e in data.engines)
    assert [*wide.milliseconds] == [8, 16, 32]
    eights = [e.milliseconds for e in data.engines if e.variant == "8"]
    assert wide.milliseconds[8] == pytest.approx(sum(eights))
    page = render(data)
    assert "All engines agree with their graphs." in page
    for size in SIZES:
        assert f'<th scope="row">{size}</th>' in page
    # The column of sizes counts engines, images and the policy's decision.
    parity = data.parity
    assert parity is not None and parity.policy is not None and parity.images
    bad = {"passed": False}
    failed = parity.model_copy(
        update={
            **bad,
            "images": tuple(image.model_copy(update=bad) for image in parity.images),
            "policy": parity.policy.model_copy(update=bad),
        }
    )
    assert f"{len(parity.images) + 1} off" in render(replace(data, parity=failed))


def test_visitors_of_the_demo_choose_the_size(sized: Path) -> None:
    studio = Studio(TextToImage.load(sized), Limits(images=2), previews=0)
    assert [*studio.sizes] == ["32 x 32", "48 x 32"]

    def draw(count: int, size: str) -> View:
        return [*studio.draw(PROMPT, "16 bits", 0, count, size)][-1]

    assert draw(1, "48 x 32").images[0].size == (48, 32)
    before = weakref.ref(studio.pipeline)
    assert [image.size for image in draw(2, "32 x 32").images] == [(32, 32)] * 2
    assert studio.pipeline.bundle.manifest.shapes.label == "32x32:2"
    assert before() is None  # engines of two sizes never add up
    assert "no such size: 64 x 64" in draw(1, "64 x 64").status


def test_engines_of_a_visitor_who_left_go_before_those_of_another_size(
    sized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    studio = Studio(TextToImage.load(sized), Limits(images=2), previews=0)
    work, released = studio._work, threading.Event()

    def slow(*arguments: Any) -> None:
        work(*arguments)
        released.wait(30)

    monkeypatch.setattr(studio, "_work", slow)
    request = studio.draw(PROMPT, "16 bits", 0, 1, "48 x 32")
    next(request), next(request)
    before = weakref.ref(studio.pipeline)
    request.close()  # type: ignore[attr-defined]
    threading.Timer(0.3, released.set).start()
    following = studio.draw(PROMPT, "16 bits", 0, 1, "32 x 32")
    next(following)  # nothing of this size is loaded yet
    assert released.is_set() and before() is None
    *_, last = following
    assert last.images[0].size == (32, 32)
