"""The policy drives the engines: q from the prompt, the schedule from q, before the first step."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

from qlip_export.backends import get_backend
from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.manifest import PolicyEntry
from qlip_export.policy.store import Quality
from qlip_export.progress import Plain
from qlip_export.runtime import Previews, TextToImage
from qlip_export.runtime.schedule import Scheduler, block_bits, engine_switches, feature_average_bits
from tests import tamper
from tests.conftest import STEPS, Cli, Shared, build_tiny
from tests.tiny import BLOCKS
from tests.tiny_calibration import pooled_embeddings, write_policy

PROMPTS = ["a red apple", "the blue boat", "a dog"]
LONG = "the cat of an apple tree on a green boat and the dog of a blue house"


@pytest.fixture(scope="module")
def pipeline(adaptive_bundle: Path) -> TextToImage:
    return TextToImage.load(adaptive_bundle)


@pytest.fixture(scope="module")
def ort_adaptive(shared: Shared, tiny_model: Path, adaptive_bundle: Path, trained: Path) -> Path:
    def make(out: Path) -> None:
        shutil.copytree(adaptive_bundle, out)
        build_tiny(tiny_model, out, backend="onnxruntime", calibration=trained)

    return shared("ort-adaptive", make)


@pytest.fixture(scope="module")
def batched(shared: Shared, tiny_model: Path, trained: Path) -> TextToImage:
    make = lambda out: build_tiny(tiny_model, out, calibration=trained, batch_size=2)  # noqa: E731
    return TextToImage.load(shared("batched-adaptive", make))


def policy_of(pipeline: TextToImage) -> PolicyEntry:
    policy = pipeline.bundle.manifest.policy
    assert policy is not None
    return policy


def same(first: Image.Image, second: Image.Image) -> bool:
    return bool((np.asarray(first) == np.asarray(second)).all())


@pytest.mark.parametrize("backend", ["adaptive_bundle", "ort_adaptive"])
def test_q_is_that_of_torch(
    request: pytest.FixtureRequest, tiny_model: Path, trained: Path, backend: str
) -> None:
    records = TextToImage.load(request.getfixturevalue(backend))(PROMPTS, seed=0).records
    with torch.no_grad():
        expected = Quality.load(trained, "quality").network(pooled_embeddings(tiny_model, PROMPTS))
    np.testing.assert_allclose([r["q"] for r in records], expected.numpy(), atol=1e-4)
    assert expected.std() > 0.1, "prompts of one quality test nothing"


def test_record_tells_the_schedule_of_q(pipeline: TextToImage) -> None:
    records = pipeline(PROMPTS, seed=0).records
    blocks = pipeline.bundle.manifest.blocks
    for record in records:
        patterns = Scheduler(policy_of(pipeline).table, blocks)([record["q"]])
        assert record["variants"] == [list(pattern) for pattern in patterns]
        assert record["bits"] == [list(map(block_bits, blocks, pattern)) for pattern in patterns]
        assert record["blocks"] == list(BLOCKS)
        assert record["fab"] == round(feature_average_bits(blocks, patterns), 4)
        assert record["engine_switches"] == engine_switches(patterns) > 0
        assert len(record["seconds"]["steps"]) == STEPS
        assert 0 < record["seconds"]["policy"] < record["seconds"]["prompt_and_load"]
    assert records[0]["bits"] != records[1]["bits"]


def test_forced_bits_are_uniform(pipeline: TextToImage) -> None:
    (record,) = pipeline(PROMPTS[0], seed=0, bits=8).records
    assert (record["q"], record["fab"], record["engine_switches"]) == (None, 8.0, 0)
    assert record["bits"] == [[8] * len(BLOCKS)] * STEPS


def test_bundle_without_policy_is_uniform(bundle: Path) -> None:
    (record,) = TextToImage.load(bundle)(PROMPTS[0], seed=0).records
    assert (record["q"], record["fab"], record["engine_switches"]) == (None, 16.0, 0)


def test_the_engines_of_the_schedule_run_and_no_others(
    pipeline: TextToImage, adaptive_bundle: Path, tmp_path: Path
) -> None:
    """A block that changes its bits draws with both engines; the third may compute what it likes."""
    (expected,), (record,) = (lambda result: (result.images, result.records))(pipeline(PROMPTS[0], seed=4))
    used = {name: {row[i] for row in record["bits"]} for i, name in enumerate(BLOCKS)}
    switching = next(name for name in BLOCKS if len(used[name]) == 2)
    for bits in (8, 16, 32):
        other = tamper.copy_of(adaptive_bundle, tmp_path / str(bits))
        tamper.alter_engine(other, switching, bits, lambda bias: bias + 1)
        image = TextToImage.load(other)(PROMPTS[0], seed=4).images[0]
        assert same(image, expected) == (bits not in used[switching])


def test_previews_come_evenly_and_change_nothing(pipeline: TextToImage) -> None:
    events: list[Any] = []
    made = pipeline(
        PROMPTS[0],
        seed=0,
        on_step=lambda done, total: events.append(done),
        previews=Previews(2, lambda images: events.append(images)),
    )
    kinds = [event if isinstance(event, int) else "preview" for event in events]
    expected: list[Any] = []
    for done in range(1, STEPS + 1):
        expected += [done, "preview"] if done in {round(STEPS / 3), round(2 * STEPS / 3)} else [done]
    assert kinds == expected
    assert same(made.images[0], pipeline(PROMPTS[0], seed=0).images[0])
    assert 0 < made.records[0]["seconds"]["previews"] < made.records[0]["seconds"]["total"]
    assert Previews(9, lambda images: None).after(4) == {1, 2, 3}
    assert Previews(0, lambda images: None).after(4) == set()
    with pytest.raises(QlipError, match="drop the memory budget"):
        pipeline(PROMPTS[0], memory_budget="4GB", previews=Previews(2, lambda images: None))


def test_every_engine_is_loaded_before_the_first_step(adaptive_bundle: Path) -> None:
    pipeline = TextToImage.load(adaptive_bundle)
    load, events = pipeline.backend.load, []
    pipeline.backend.load = lambda path, entry: (events.append(path.name), load(path, entry))[1]  # type: ignore[method-assign]
    pipeline(PROMPTS[0], seed=0, on_step=lambda done, total: events.append("step"))
    first = events.index("step")
    assert len(events[:first]) > len(BLOCKS)
    assert set(events[first:]) == {"step", "vae_decoder.blob"}


def test_a_policy_that_always_says_8_draws_what_forced_8_draws(
    adaptive_bundle: Path, tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(trained, tmp_path / "calibration"))
    recipe = json.loads((folder / "policies" / "8-16-32.json").read_text())
    write_policy(
        folder,
        Checkpoint(tiny_model),
        (8, 16, 32),
        t2q_sha256=recipe["t2q_sha256"],
        name="low",
        always=8,
        forced_steps=0,
    )
    out = tamper.copy_of(adaptive_bundle, tmp_path)
    build_tiny(tiny_model, out, calibration=folder, policy="low")
    pipeline = TextToImage.load(out)
    adaptive, forced = pipeline(PROMPTS, seed=0), pipeline(PROMPTS, seed=0, bits=8)
    assert [record["fab"] for record in adaptive.records] == [8.0] * 3
    for mine, theirs in zip(adaptive.images, forced.images, strict=True):
        assert same(mine, theirs)
    assert not same(adaptive.images[0], pipeline(PROMPTS[0], seed=0, bits=16).images[0])


def test_layers_decide_for_their_blocks(
    adaptive_bundle: Path, tiny_model: Path, trained: Path, tmp_path: Path
) -> None:
    out = tamper.copy_of(adaptive_bundle, tmp_path)
    build_tiny(tiny_model, out, calibration=trained, policy="8-16-32-layer")
    pipeline = TextToImage.load(out)
    assert len(policy_of(pipeline).table.units) == 141
    (record,) = pipeline(PROMPTS[0], seed=0).records
    patterns = Scheduler(policy_of(pipeline).table, pipeline.bundle.manifest.blocks)([record["q"]])
    assert record["variants"] == [list(pattern) for pattern in patterns]


# --- batches


def test_a_batch_shares_the_highest_bits_and_padding_has_no_say(batched: TextToImage) -> None:
    records = batched(PROMPTS, seed=0).records
    table, blocks = policy_of(batched).table, batched.bundle.manifest.blocks
    schedule = Scheduler(table, blocks)
    alone = [
        np.array([list(map(block_bits, blocks, pattern)) for pattern in schedule([record["q"]])])
        for record in records
    ]
    assert (alone[0] != alone[1]).any(), "prompts of one mind test nothing"
    together = np.maximum(alone[0], alone[1]).tolist()
    assert records[0]["bits"] == records[1]["bits"] == together
    # The third runs beside a copy of itself.
    assert records[2]["bits"] == alone[2].tolist()
    # Each keeps its own q, the same as alone.
    for prompt, record in zip(PROMPTS, records, strict=True):
        assert abs(batched(prompt, seed=0).records[0]["q"] - record["q"]) < 1e-5


def test_images_are_handed_over_as_they_are_made(batched: TextToImage) -> None:
    events: list[Any] = []
    result = batched(
        PROMPTS,
        seed=0,
        on_step=lambda done, total: events.append((done, total)),
        on_image=lambda image, record: events.append(record["prompt"]),
    )
    steps = [(i + 1, 2 * STEPS) for i in range(2 * STEPS)]
    assert events == [*steps[:STEPS], *PROMPTS[:2], *steps[STEPS:], PROMPTS[2]]
    assert len(result.images) == 3


def test_progress_knows_how_many_batches_there_are(
    cli: Cli, batched: TextToImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages: list[tuple[str, int]] = []
    monkeypatch.setattr(Plain, "stage", lambda self, name, total: stages.append((name, total)))
    assert cli("generate", batched.bundle.root, *PROMPTS, "-o", tmp_path / "x").code == 0
    assert stages == [("sample", 2 * STEPS)]


def test_warnings_tell_the_prompt_from_the_negative_one(batched: TextToImage) -> None:
    both = batched([LONG, LONG], seed=0, negative_prompt=LONG).warnings
    assert [warning.split(" is longer")[0] for warning in both] == ["the negative prompt", "the prompt"]
    assert batched(PROMPTS[:1], seed=0, negative_prompt=LONG).warnings == both[:1]


# --- the command line


def test_json_of_an_adaptive_run(cli: Cli, adaptive_bundle: Path, tmp_path: Path) -> None:
    done = cli("generate", adaptive_bundle, *PROMPTS, "--seed", 1, "-o", tmp_path / "x", "--json")
    assert done.code == 0, done.err
    for record in json.loads(done.out)["images"]:
        assert 0 < record["q"] < 1
        assert 8 <= record["fab"] <= 32
        assert [len(row) for row in record["bits"]] == [len(record["blocks"])] * STEPS
        assert record["engine_switches"] > 0
        assert set(record["seconds"]) == {"total", "policy", "prompt_and_load", "steps", "decode"}
        assert Path(record["file"]).is_file()


def drawn(text: str, record: dict[str, Any]) -> list[list[int]]:
    """Read the map of `--explain` back: bits by step and block; blocks without a choice are left out."""
    rows = [line.split() for line in text.splitlines() if line.split(" ")[0] in record["blocks"]]
    numbers = [[int(n) for n in row[1:-1]] for row in rows if row[1] != "·"]
    return [list(column) for column in zip(*numbers, strict=True)]


def test_explain_draws_what_the_record_tells(
    cli: Cli, adaptive_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    command = ("generate", adaptive_bundle, PROMPTS[0], "--seed", 1, "-o", tmp_path / "x.png", "--explain")
    (record,) = json.loads(cli(*command, "--json").out)["images"]
    done = cli(*command)
    assert drawn(done.out, record) == [row[1:] for row in record["bits"]]  # the time block has no choice
    assert f"q {record['q']:.4f}" in done.out
    assert f"FAB {record['fab']:.2f}" in done.out
    assert f"{record['engine_switches']} engine switches" in done.out
    assert max(map(len, done.out.splitlines()[:-1])) <= 100  # the last line names a file
    # With --json the map goes to the other stream.
    assert f"FAB {record['fab']:.2f}" in cli(*command, "--json").err


def test_explain_of_a_narrow_terminal_and_forced_bits(
    cli: Cli, adaptive_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "28")
    done = cli("generate", adaptive_bundle, "a dog", "--bits", 16, "-o", tmp_path / "x.png", "--explain")
    assert "uniform bits" in done.out
    assert done.out.count("down_blocks.1") == 2  # two steps fit, so two maps below each other
    assert done.out.count("16 ") >= STEPS * (len(BLOCKS) - 1)


def test_images_before_a_failure_are_saved(
    cli: Cli, adaptive_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = TextToImage._batch

    def fail(self: TextToImage, prompts: list[str], *more: Any) -> None:
        if prompts == [PROMPTS[2]]:
            raise QlipError("the third one fails")
        decode(self, prompts, *more)

    monkeypatch.setattr(TextToImage, "_batch", fail)
    done = cli("generate", adaptive_bundle, *PROMPTS, "-o", tmp_path / "x", "--bits", 8, "--json")
    assert done.code == 2
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["0000.png", "0001.png"]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["generate"], "Missing argument 'bundle'."),
        (["generate", "x", "a dog", "--seed", "many"], "Invalid value for '--seed'"),
        (["bogus"], "No such command 'bogus'."),
        (["inspect", "x", "--all"], "No such option: --all"),
    ],
)
def test_wrong_arguments_are_an_error_in_json_too(cli: Cli, arguments: list[str], problem: str) -> None:
    done = cli(*arguments, "--json")
    assert done.code == 2
    assert problem in json.loads(done.out)["error"]["problem"]
    assert problem in done.err
    assert cli(*arguments).out == ""


def test_inspect_shows_the_policy(cli: Cli, adaptive_bundle: Path, bundle: Path) -> None:
    text = cli("inspect", adaptive_bundle).out
    assert "policy 8-16-32: quality chooses 8/16/32 bits for each of 8 blocks" in text
    assert "SROCC 0.250, PLCC 0.500" in text
    assert "weights 4 bits (learned rounding)" in text
    assert json.loads(cli("inspect", adaptive_bundle, "--json").out)["policy"]["table"]["units"]
    assert "no policy: every run is at uniform bits" in cli("inspect", bundle).out


# --- validate


def test_validate_judges_the_policy(cli: Cli, adaptive_bundle: Path, tmp_path: Path) -> None:
    lost = tamper.copy_of(adaptive_bundle, tmp_path)
    tamper.edit_manifest(lost, lambda m: m["model"].update(source=str(tmp_path / "gone")))  # no images
    report = json.loads(cli("validate", lost, "--json").out)
    assert (report["passed"], report["policy"]["follows_table"]) == (True, True)
    assert report["policy"]["error"] < 1e-4
    assert f"policy: q {report['policy']['q']:.4f}" in cli("validate", lost).out
    _retrain(lost)
    done = cli("validate", lost)
    assert done.code == 1
    assert "off: the policy; images were not compared" in done.out


def _retrain(bundle: Path) -> None:
    """Compile a T2Q that sees less quality, and vouch for the engine: whole, but wrong."""
    opened = Bundle.open(bundle)
    assert opened.manifest.policy is not None
    model = onnx.load(bundle / opened.manifest.policy.onnx)
    (bias,) = [tensor for tensor in model.graph.initializer if tensor.name == "output.bias"]
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) - 1, bias.name))
    onnx.save(model, bundle / "altered.onnx")
    engine = opened.engine(opened.manifest.targets["openvino"], opened.manifest.policy.onnx)
    get_backend("openvino").compile(bundle / "altered.onnx", bundle / engine.path, engine.container)
    (bundle / "altered.onnx").unlink()
    tamper.accept(bundle, engine.path)


# --- damage


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda m: m["policy"]["table"]["group_of_step"].pop(), "the policy is for 3 steps, not 4"),
        (lambda m: m.update(bits=[8, 16]), "the policy chooses among (8, 16, 32), not (8, 16)"),
    ],
)
def test_policy_that_does_not_fit_its_bundle(
    adaptive_bundle: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], Any], complaint: str
) -> None:
    damaged = tamper.copy_of(adaptive_bundle, tmp_path)
    tamper.edit_manifest(damaged, edit)
    with pytest.raises(QlipError) as caught:
        Bundle.open(damaged)
    assert caught.value.found is not None and complaint in caught.value.found


def test_damaged_policy_engine_is_found(adaptive_bundle: Path, tmp_path: Path) -> None:
    damaged = tamper.copy_of(adaptive_bundle, tmp_path)
    tamper.flip_byte(damaged / "engines" / "openvino" / "policy.blob")
    with pytest.raises(QlipError, match=r"policy\.blob was altered after the build"):
        TextToImage.load(damaged)(PROMPTS[0], seed=0)
    assert len(TextToImage.load(damaged)(PROMPTS[0], seed=0, bits=8).images) == 1
