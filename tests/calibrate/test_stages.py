"""`qlip-export calibrate`: all stages on the tiny model, what a second run keeps, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

pytest.importorskip("sklearn")

from qlip_export.calibrate import kept, quality, stages, weights
from qlip_export.calibrate.bits import TRAINER
from qlip_export.calibrate.options import CalibrateOptions
from qlip_export.calibrate.stages import Calibration, Sizes
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.files import sha256_of
from qlip_export.policy.store import Policy, Quality
from qlip_export.progress import Silent
from qlip_export.quant.ranges import Ranges
from qlip_export.quant.rounding import LearnedRounding
from qlip_export.runtime import TextToImage
from tests import tamper
from tests.conftest import STEPS, Cli, Shared, build_tiny
from tests.test_cli import one_error, told, tree
from tests.tiny import BLOCKS, IMAGE_SIZE, WORDS
from tests.tiny_calibration import pooled_embeddings

SMALL = Sizes(
    range_prompts=2,
    weight_prompts=4,
    weight_samples=8,
    weight_iterations=1,
    weight_batch=4,
    label_prompts=24,
    epochs=2,
    bit_prompts=4,
    bit_iterations=2,
    bit_batch=2,
)
PROMPTS = [f"a {word}" for word in WORDS[5:]] + [f"the {a} {b}" for a in WORDS[5:8] for b in WORDS[8:13]]
SHORT = {"steps": 3, "groups": 2, "forced_steps": 1, "batch_size": 24}
ALL = ["ranges", "weights", "t2q", "q2b"]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SIZES", SMALL)


@pytest.fixture(scope="module")
def calibrated(shared: Shared, towers: Path) -> Path:
    """Everything, with default options but for the sizes."""

    def make(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(stages, "SIZES", SMALL)
            calibration(towers, folder).run(Silent())

    return shared("calibrated", make)


@pytest.fixture
def mine(calibrated: Path, tmp_path: Path) -> Path:
    """A copy of `calibrated`, to be changed."""
    return Path(shutil.copytree(calibrated, tmp_path / "mine"))


def calibration(model: Path, folder: Path, **options: Any) -> Calibration:
    chosen = CalibrateOptions.model_validate(SHORT | options)
    return Calibration(Checkpoint(model), PROMPTS, chosen, folder)


@pytest.fixture
def calibrate(cli: Cli, towers: Path, tmp_path: Path) -> Callable[..., Any]:
    """Run the command with the options of `calibrated` before those given."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")

    def run(folder: Path, *arguments: object, model: Path = towers) -> Any:
        settings = [text for k, v in SHORT.items() for text in ("--" + k.replace("_", "-"), v)]
        return cli(
            *("calibrate", "--model", model, "--prompts", tmp_path / "prompts.txt", *settings),
            *("-o", folder, "--json", *arguments),
        )

    return run


def report(done: Any) -> dict[str, Any]:
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def contents(folder: Path) -> dict[str, str]:
    return {name: sha256_of(folder / name) for name in tree(folder) if (folder / name).is_file()}


def never(*_: Any, **__: Any) -> None:
    raise AssertionError("this was done already")


# --- what is made


def test_random_weights_go_through_all_stages_and_are_marked(
    calibrate: Callable[..., Any], tiny_model: Path, tmp_path: Path
) -> None:
    configs = tmp_path / "configs"
    shutil.copytree(tiny_model, configs, ignore=shutil.ignore_patterns("*.safetensors"))
    out = tmp_path / "random"
    told_of = report(
        calibrate(out, "--random-weights", "--seed", 5, "--criterion", "complexity", model=configs)
    )
    assert told_of["random_weights"] == 5
    assert list(told_of["seconds"]) == list(told_of["files"]) == ALL
    assert told_of["gpu_bytes"] == {}  # no GPU was asked for
    recipes = [
        Ranges.load(out / "ranges.json").recipe,
        LearnedRounding.load(out / "weights.safetensors").recipe,
    ]
    recipes += [Quality.load(out, "complexity").recipe, Policy.load(out, "8-16-32-complexity").recipe]
    assert [recipe.random_weights for recipe in recipes] == [5] * 4
    # Only weights of that seed take it.
    options = {"bits": (8, 16, 32), "calibration": out, "random_weights": True}
    with pytest.raises(QlipError, match="on another model"):
        build_tiny(configs, tmp_path / "other", seed=6, **options)


def test_every_stage_leaves_its_result(calibrated: Path, towers: Path) -> None:
    assert [name for name in tree(calibrated) if not name.startswith(".cache")] == [
        "policies",
        "policies/8-16-32.json",
        "policies/8-16-32.safetensors",
        "ranges.json",
        "t2q.quality.json",
        "t2q.quality.safetensors",
        "weights.json",
        "weights.safetensors",
    ]
    checkpoint, quality = Checkpoint(towers), Quality.load(calibrated, "quality")
    rounding = LearnedRounding.load(calibrated / "weights.safetensors")
    rounding.check(checkpoint.component("unet").fingerprint, 4, calibrated)
    assert (rounding.recipe.samples, rounding.recipe.iterations) == (8, 1)
    assert (quality.recipe.prompts, quality.recipe.epochs, quality.recipe.mixture) == (24, 2, 16)
    recipe = Policy.load(calibrated, "8-16-32").recipe
    assert (recipe.units, recipe.parts, recipe.iterations) == (BLOCKS[1:], ("q", "m", "h"), 2)
    assert recipe.t2q_sha256 == quality.sha256
    assert recipe.weights == sha256_of(calibrated / "weights.safetensors")
    assert recipe.lambda_bit == 1e-3


def test_a_second_run_keeps_everything_and_says_so(mine: Path, calibrate: Callable[..., Any]) -> None:
    before = contents(mine)
    found = report(calibrate(mine))
    assert found["reused"] == ALL and found["measured"] == {}
    assert list(found["files"]) == ALL
    assert found["files"]["q2b"] == str(mine / "policies" / "8-16-32.safetensors")
    assert contents(mine) == before


def test_people_are_told_what_was_there_and_what_was_measured(
    cli: Cli, mine: Path, calibrate: Callable[..., Any], towers: Path, tmp_path: Path
) -> None:
    calibrate(mine)  # writes the prompts
    settings = [text for k, v in SHORT.items() for text in ("--" + k.replace("_", "-"), v)]
    done = cli(
        *("calibrate", "--model", towers, "--prompts", tmp_path / "prompts.txt", *settings, "-o", mine),
        *("--bit-options", "8,16"),
    )
    lines = done.out.splitlines()
    assert [line.endswith("(there already)") for line in lines[:4]] == [True, True, True, False]
    assert re.fullmatch(rf"q2b +{mine}/policies/8-16.safetensors  ?\([\d.]+ s\)", lines[3].strip())
    assert [line.split()[0] for line in lines[4:]] == ["fab", "error", "lambda_bit"]


@pytest.mark.parametrize(
    ("arguments", "kept", "name"),
    [
        (["--bit-options", "8,16"], ALL[:3], "8-16"),
        (["--bit-options", "6,8,16,32"], ALL[:3], "6-8-16-32"),
        (["--parts", "m,q"], ALL[:3], "8-16-32-qm"),
        (["--parts", "h,m,q"], ALL, "8-16-32"),
        (["--unit", "layer"], ALL[:3], "8-16-32-layer"),
        (["--blocks", "whole"], ALL[:3], "8-16-32"),
        (["--lambda-bit", "0.5"], ALL[:3], "8-16-32"),
        (["--lambda-bit", "0.001"], ALL, "8-16-32"),
        (["--target-fab", "12"], ALL[:3], "8-16-32"),
        (["--iterations", "3"], ["ranges", "t2q"], "8-16-32"),
        (["--limit", "23"], ["ranges", "weights"], "8-16-32"),
        pytest.param(["--guidance", "3"], [], "8-16-32", marks=pytest.mark.slow),
    ],
)
def test_what_depends_on_an_option_is_made_again(
    mine: Path, calibrate: Callable[..., Any], arguments: list[str], kept: list[str], name: str
) -> None:
    before = contents(mine)
    found = report(calibrate(mine, *arguments))
    assert found["reused"] == kept
    assert Path(found["files"]["q2b"]).stem == name
    for stage in kept:
        file = str(Path(found["files"][stage]).relative_to(mine))
        assert contents(mine)[file] == before[file]
    assert report(calibrate(mine, *arguments))["reused"] == ALL


def test_a_policy_is_trained_again_for_other_weights(mine: Path, calibrate: Callable[..., Any]) -> None:
    for suffix in ("safetensors", "json"):
        (mine / f"weights.{suffix}").unlink()
    assert report(calibrate(mine, "--stages", "q2b"))["reused"] == []
    assert Policy.load(mine, "8-16-32").recipe.weights == "nearest"


def test_what_an_older_trainer_made_is_made_again(mine: Path, calibrate: Callable[..., Any]) -> None:
    path = mine / "policies" / "8-16-32.json"
    recipe = json.loads(path.read_text())
    del recipe["trainer"]
    path.write_text(json.dumps(recipe))
    assert Policy.load(mine, "8-16-32").recipe.trainer == 1
    assert report(calibrate(mine))["reused"] == ["ranges", "weights", "t2q"]
    assert Policy.load(mine, "8-16-32").recipe.trainer == TRAINER


def test_quality_recipes_of_before_a_field_was_added_are_good(
    mine: Path, calibrate: Callable[..., Any]
) -> None:
    path = mine / "t2q.quality.json"
    recipe = json.loads(path.read_text())
    del recipe["reference_sha256"]
    path.write_text(json.dumps(recipe))
    assert report(calibrate(mine))["reused"] == ALL


def test_another_criterion_uses_the_same_images(
    mine: Path, calibrate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "draw", never)
    found = report(calibrate(mine, "--criterion", "complexity"))
    assert found["reused"] == ["ranges", "weights"]
    assert Path(found["files"]["t2q"]).name == "t2q.complexity.safetensors"
    assert Policy.load(mine, "8-16-32-complexity").recipe.criterion == "complexity"
    recipe = Quality.load(mine, "complexity").recipe
    assert recipe.mixture is None and 0 < recipe.low < recipe.high < 1


def test_prompt_length_needs_no_images(towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "draw", never)
    calibration(towers, tmp_path, stages=("t2q",), criterion="length").run(Silent())
    recipe = Quality.load(tmp_path, "length").recipe
    tokenizer = CLIPTokenizer.from_pretrained(towers / "tokenizer", local_files_only=True)
    lengths = [len(tokenizer(prompt).input_ids) - 2 for prompt in PROMPTS]
    assert (recipe.low, recipe.high) == pytest.approx(np.percentile(lengths[:24], [1, 99]))


def test_an_interrupted_run_goes_on(
    towers: Path, tmp_path: Path, calibrate: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the images were drawn, which takes longest: neither they nor earlier stages are lost."""

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "new"
    with monkeypatch.context() as patched:
        patched.setattr(stages, "train_t2q", killed)
        with pytest.raises(KeyboardInterrupt):
            calibration(towers, folder).run(Silent())
    assert not Quality.path(folder, "quality").exists()
    assert not list(folder.rglob("*.part"))
    monkeypatch.setattr(stages, "draw", never)
    found = report(calibrate(folder))
    assert found["reused"] == ["ranges", "weights"]
    assert Path(found["files"]["q2b"]).is_file()
    assert set(found["measured"]) == {"srocc", "plcc", "fab", "error", "lambda_bit"}


def test_images_drawn_before_a_run_was_cut_are_kept(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the images are those of a run that nothing cut."""
    monkeypatch.setattr(kept, "PART", 8)
    sizes: list[int] = []

    def cut_in_the_second_part(simulator: Any, prompts: list[str], *rest: Any, **named: Any) -> Any:
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise torch.OutOfMemoryError
        return quality.draw(simulator, prompts, *rest, **named)

    monkeypatch.setattr(stages, "draw", cut_in_the_second_part)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 24 * 10**9))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    only = {"stages": ("t2q",), "criterion": "complexity"}
    with pytest.raises(QlipError, match="too little memory for t2q with --batch-size 24") as caught:
        calibration(towers, resumed, **only).run(Silent())
    assert "--batch-size 12" in caught.value.fix
    assert [f.name.split(".")[1] for f in (resumed / ".cache").iterdir()] == ["0-8"]
    calibration(towers, resumed, **only | {"batch_size": 12}).run(Silent())
    monkeypatch.setattr(kept, "PART", 512)
    calibration(towers, whole, **only).run(Silent())
    assert sizes == [8, 8, 8, 8, 24]
    (mine,), (theirs,) = (list((f / ".cache").iterdir()) for f in (resumed, whole))
    assert mine.name == theirs.name
    found, expected = kept.read_drawn(mine), kept.read_drawn(theirs)
    assert found is not None and expected is not None
    np.testing.assert_allclose(found.complexity, expected.complexity, atol=1e-3)


def test_blocks_learned_before_a_run_was_cut_are_kept(
    towers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is learned after them is what a run learns that nothing cut."""
    learned: list[str] = []
    learn = weights.learn_block

    def cut_at_the_sixth(models: Any, name: str, *rest: Any) -> Any:
        learned.append(name)
        if len(learned) == 6:
            raise KeyboardInterrupt
        return learn(models, name, *rest)

    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    only = {"stages": ("weights",), "iterations": 3}
    calibration(towers, whole, **only).run(Silent())
    monkeypatch.setattr(weights, "learn_block", cut_at_the_sixth)
    with pytest.raises(KeyboardInterrupt):
        calibration(towers, resumed, **only).run(Silent())
    (damaged,) = (resumed / ".cache").rglob(f"{learned[2]}.safetensors")
    tamper.truncate(damaged)
    calibration(towers, resumed, **only).run(Silent())
    assert {block for block in learned if learned.count(block) > 1} == {learned[2], learned[5]}
    assert len(set(learned)) == 44
    assert sha256_of(resumed / "weights.safetensors") == sha256_of(whole / "weights.safetensors")
    assert (resumed / "weights.json").read_text() == (whole / "weights.json").read_text()
    assert not list((resumed / ".cache").iterdir())


def test_images_of_another_size_are_drawn_anew(towers: Path, tmp_path: Path) -> None:
    only = {"stages": ("t2q",), "criterion": "complexity"}
    for size in ({}, {"height": 48, "width": 32}):
        calibration(towers, tmp_path, **only | size).run(Silent())
    assert len(list((tmp_path / ".cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("file", "again"),
    [
        pytest.param("ranges.json", "ranges", marks=pytest.mark.slow),
        ("weights.safetensors", "weights"),
        ("t2q.quality.safetensors", "t2q"),
        ("policies/8-16-32.safetensors", "q2b"),
    ],
)
def test_a_damaged_result_is_made_again(
    mine: Path, calibrate: Callable[..., Any], file: str, again: str
) -> None:
    """The same is made again, so what depends on it is kept."""
    before = contents(mine)
    tamper.truncate_text(mine / file)
    done = calibrate(mine)
    assert f"{mine / file} is damaged or not of this version: it is made again" in done.err
    assert report(done)["reused"] == [stage for stage in ALL if stage != again]
    assert contents(mine) == before


def test_reference_images_change_the_quality(
    mine: Path, calibrate: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()

    def write(name: int, seed: int) -> None:
        pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")

    for i in range(20):
        write(i, i)
    command = ("--stages", "t2q", "--reference", folder)
    assert report(calibrate(mine, *command))["reused"] == []
    assert Quality.load(mine, "quality").recipe.reference == 20
    assert report(calibrate(mine, *command))["reused"] == ["t2q"]
    write(0, 99)
    assert report(calibrate(mine, *command))["reused"] == []


def test_latency_as_the_cost(mine: Path, calibrate: Callable[..., Any], bundle: Path, tmp_path: Path) -> None:
    command = ("--cost", "latency", "--lambda-bit", "1")
    error = one_error(calibrate(mine, *command))
    assert "the latency cost needs measured times" in error["problem"]
    error = one_error(calibrate(mine, *command, "--bundle", tmp_path / "none"))
    assert "none is no bundle" in error["problem"]
    found = report(calibrate(mine, *command, "--bundle", bundle))
    assert found["reused"] == ALL[:3]
    assert Path(found["files"]["q2b"]).stem == "8-16-32-latency"
    times = (mine / "latency.json").read_text()
    # The times are kept, so the bundle may go.
    assert report(calibrate(mine, *command))["reused"] == ALL
    assert report(calibrate(mine, *command, "--unit", "layer"))["reused"] == ALL[:3]
    assert (mine / "latency.json").read_text() == times
    error = one_error(calibrate(mine, "--cost", "latency", "--bit-options", "6,8"))
    assert error["problem"] == "no time of block stem at 6 bits"


# --- what is refused, and when


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--bit-options", "16,8"], ["two to four increasing bit options", "e.g. 8,16,32", "found: 16,8"]),
        (["--bit-options", "8,8"], ["two to four increasing bit options"]),
        (["--bit-options", "8"], ["two to four increasing bit options", "found: 8"]),
        (["--bit-options", "4,6,8,16,32"], ["two to four increasing bit options"]),
        (["--bit-options", "3,8"], ["no activation ranges are measured for 3 bits", "4, 5, 6, 7, 8"]),
        (["--bit-options", "8,17"], ["no hardware format holds 17-bit activations"]),
        (["--bit-options", "8,x"], ["--bit-options is no list of numbers", "found: 8,x"]),
        (["--parts", "q"], ["these parts do not give 3 options", "q,m,h or q,m or q,h", "found: q"]),
        (["--parts", "m,h"], ["these parts do not give 3 options", "found: m,h"]),
        (["--parts", "q,m", "--bit-options", "8,16"], ["these parts do not give 2 options", "expected: q\n"]),
        (["--parts", "q,z"], ["--parts: Input should be 'q', 'm' or 'h'", "found: z"]),
        (["--lambda-bit", "1", "--target-fab", "10"], ["exclude each other", "--lambda-bit, --target-fab"]),
        (["--lambda-bit", "0"], ["--lambda-bit: Input should be greater than 0", "found: 0.0"]),
        (["--target-fab", "7"], ["no choice of bits has the target FAB", "8 to 32", "found: 7"]),
        (["--groups", "4"], ["more timestep groups than sampling steps", "at most 3", "found: 4"]),
        (["--stages", "weighs"], ["--stages: Input should be 'ranges', 'weights', 't2q' or 'q2b'", "weighs"]),
        (["--stages", ""], ["--stages: Input should be"]),
        (["--unit", "head"], ["--unit: Input should be 'block' or 'layer'", "found: head"]),
        (["--criterion", "beauty"], ["--criterion: Input should be 'quality', 'complexity' or 'length'"]),
        (["--cost", "money"], ["--cost: Input should be 'bits' or 'latency'", "found: money"]),
        (["--device", "tpu"], ["--device: Input should be 'cpu' or 'cuda'", "found: tpu"]),
        (["--steps", "0"], ["--steps: Input should be greater than or equal to 1"]),
        (["--limit", "0"], ["--limit: Input should be greater than or equal to 1"]),
        (["--guidance", "nan"], ["--guidance: Input should be a finite number"]),
        (["--scheduler", "heun"], ["unknown scheduler", "dpmsolver++, ddim, euler, pndm", "found: heun"]),
        (["--reference", "nowhere"], ["cannot read reference features from nowhere", "a folder of images"]),
        (["--limit", "19"], ["too few prompts to learn a policy from", "--stages ranges,weights"]),
        (["--stages", "q2b"], ["cannot read", "t2q.quality.safetensors", "run 'qlip-export calibrate'"]),
    ],
)
def test_options_that_do_not_fit(
    calibrate: Callable[..., Any], tmp_path: Path, arguments: list[str], complaint: list[str]
) -> None:
    error = one_error(calibrate(tmp_path / "new", *arguments))
    for text in complaint:
        assert text in told(error)
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_no_cuda(calibrate: Callable[..., Any], tmp_path: Path) -> None:
    error = one_error(calibrate(tmp_path / "new", "--device", "cuda"))
    assert (error["problem"], error["fix"]) == ("there is no CUDA device here", "--device cpu")


def test_stage_that_lacks_the_one_before(mine: Path, calibrate: Callable[..., Any]) -> None:
    (mine / "ranges.json").unlink()
    error = one_error(calibrate(mine, "--stages", "q2b"))
    assert error["problem"] == f"cannot read activation ranges from {mine / 'ranges.json'}"
    tamper.truncate(mine / "t2q.quality.safetensors")
    error = one_error(calibrate(mine, "--stages", "q2b"))
    assert error["problem"] == f"cannot read {mine / 't2q.quality.safetensors'}"
    assert "calibrate" in error["fix"]


def test_results_of_another_model_are_refused(mine: Path, calibrate: Callable[..., Any]) -> None:
    ranges = json.loads((mine / "ranges.json").read_text())
    (mine / "ranges.json").write_text(json.dumps(ranges | {"fingerprint": "0" * 64}))
    error = one_error(calibrate(mine, "--stages", "q2b"))
    assert error["problem"] == f"{mine / 'ranges.json'} was measured on another model"


def test_model_without_towers_is_told_what_it_can_do(
    calibrate: Callable[..., Any], towers: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Before hours of work: no projection, no T2Q; no vision tower, no quality but complexity."""
    error = one_error(calibrate(tmp_path / "new", model=tiny_model))
    assert error["problem"] == f"the text encoder of {tiny_model} has no projection to learn quality from"
    assert "--stages ranges,weights" in error["fix"]
    blind = Path(shutil.copytree(towers, tmp_path / "blind"))
    shutil.rmtree(blind / "image_encoder")
    error = one_error(calibrate(tmp_path / "new", model=blind))
    assert error["problem"] == f"{blind} has no vision tower to judge images by"
    assert "--criterion complexity" in error["fix"] and "--stages ranges,weights" in error["fix"]
    assert not (tmp_path / "new").exists()
    found = report(calibrate(tmp_path / "new", "--criterion", "complexity", "--stages", "t2q", model=blind))
    assert Path(found["files"]["t2q"]).name == "t2q.complexity.safetensors"


def test_own_model_without_prompts_is_told_what_it_can_do(cli: Cli, towers: Path, tmp_path: Path) -> None:
    error = one_error(cli("calibrate", "--model", towers, "-o", tmp_path / "new", "--json"))
    assert error["problem"] == "too few prompts to learn a policy from"
    assert "--prompts" in error["fix"] and "--stages ranges,weights" in error["fix"]


# --- and what becomes of it


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"unit": "layer"}, {"bit_options": (8, 16)}])
def test_build_and_draw_with_the_result(
    towers: Path, mine: Path, bundle: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    done = calibration(towers, mine, **options).run(Silent())
    out = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    name = Path(done.files["q2b"]).stem
    build_tiny(towers, out, calibration=mine, policy=name)
    pipeline = TextToImage.load(out)
    result = pipeline(PROMPTS[:2], seed=0)
    with torch.no_grad():
        expected = Quality.load(mine, "quality").network(pooled_embeddings(towers, PROMPTS[:2]))
    assert [record["q"] for record in result.records] == pytest.approx(expected.tolist(), abs=1e-4)
    table = Policy.load(mine, name).table(STEPS)
    for record in result.records:
        units = [table.bits(record["q"], step) for step in range(STEPS)]
        assert [max(row[1:]) for row in record["bits"]] == [max(row) for row in units]
