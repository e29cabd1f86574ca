"""A memory budget changes when engines are loaded, and nothing else."""

from __future__ import annotations

import gc
import re
import shutil
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qlip_export.backends.memory import tells_memory
from qlip_export.compiled import EngineEntry
from qlip_export.errors import QlipError
from qlip_export.runtime import TextToImage
from qlip_export.runtime.budget import parse_budget
from tests import long_use, tamper
from tests.conftest import STEPS, Cli, Shared, build_tiny
from tests.long_use import AMPLE, PROMPTS

needs_linux = pytest.mark.skipif(not tells_memory(), reason="resident memory is read from /proc")


@pytest.fixture
def pipeline(adaptive_bundle: Path) -> TextToImage:
    return TextToImage.load(adaptive_bundle)


def same(first: Image.Image, second: Image.Image) -> bool:
    return bool((np.asarray(first) == np.asarray(second)).all())


def least(pipeline: TextToImage, prompt: str, **options: Any) -> int:
    found: int = pipeline(prompt, seed=0, memory_budget=AMPLE, **options).records[0]["memory"]["smallest"]
    return found


@pytest.mark.parametrize("backend", ["adaptive_bundle", "ort_bundle"])
def test_images_are_the_same_at_any_budget(request: pytest.FixtureRequest, backend: str) -> None:
    bundle = request.getfixturevalue(backend)
    expected = TextToImage.load(bundle)(PROMPTS, seed=0)
    pipeline = TextToImage.load(bundle)
    smallest = least(pipeline, PROMPTS[0])
    for budget in (AMPLE, smallest + 2_000_000, max(least(pipeline, p) for p in PROMPTS), None):
        found = pipeline(PROMPTS, seed=0, memory_budget=budget)
        for mine, theirs in zip(found.images, expected.images, strict=True):
            assert same(mine, theirs)
        for mine, theirs in zip(found.records, expected.records, strict=True):
            assert mine["bits"] == theirs["bits"]
            assert ("memory" in mine) == (budget is not None)
            if budget is not None:
                assert mine["memory"]["peak"] <= mine["memory"]["budget"] == budget


def test_the_smallest_budget_works_and_less_is_refused_before_the_first_step(pipeline: TextToImage) -> None:
    smallest = least(pipeline, PROMPTS[0])
    used = pipeline(PROMPTS[0], seed=0, memory_budget=smallest).records[0]["memory"]
    assert used["peak"] <= used["budget"] == used["smallest"] == smallest
    assert used["loaded"] > used["smallest"] - pipeline.backend.reserve  # more than fits at once
    steps: list[int] = []
    with pytest.raises(QlipError, match="memory budget is too small") as caught:
        pipeline(PROMPTS[0], memory_budget=smallest - 1, on_step=lambda done, total: steps.append(done))
    assert steps == []
    named = option_of(caught.value)
    assert smallest <= parse_budget(named) < smallest + 100_000
    assert f"{for_every_prompt(pipeline)} for every prompt" in str(caught.value.expected)
    again = pipeline(PROMPTS[0], seed=0, memory_budget=named).records[0]["memory"]
    assert again["peak"] <= parse_budget(named)


def option_of(error: QlipError) -> str:
    """Return the budget that an error tells to try."""
    found = re.match(r"--memory-budget ([0-9.]+MB)", str(error.fix))
    assert found is not None, error
    return found[1]


def for_every_prompt(pipeline: TextToImage) -> str:
    with pytest.raises(QlipError, match="too small for this run") as caught:
        pipeline(PROMPTS[0], memory_budget=1)
    return option_of(caught.value).replace("MB", " MB")


def test_no_room_for_the_text_encoder_names_what_the_least_and_every_prompt_need(
    pipeline: TextToImage,
) -> None:
    with pytest.raises(QlipError, match="too small for this run") as caught:
        pipeline(PROMPTS[0], memory_budget=1)
    expected = re.fullmatch(
        r"at least (.*), by the bits of the prompt; (.*) for every prompt", str(caught.value.expected)
    )
    assert expected is not None
    lowest, every = map(parse_budget, expected.groups())
    assert every == parse_budget(option_of(caught.value))
    for prompt in PROMPTS:
        assert lowest - 100_000 < least(pipeline, prompt) <= every  # told in steps of 0.1 MB, rounded up
        pipeline(prompt, seed=0, memory_budget=every)


def test_a_budget_that_holds_the_text_encoder_is_told_what_its_prompt_needs(pipeline: TextToImage) -> None:
    with pytest.raises(QlipError) as caught:
        pipeline(PROMPTS[0], memory_budget=1)
    found = re.search(r"from ([0-9.]+MB) on this error tells what the prompt needs", str(caught.value.fix))
    assert found is not None
    encoder = parse_budget(found[1])
    for prompt in PROMPTS:
        needed = least(pipeline, prompt)
        assert encoder < needed
        with pytest.raises(QlipError) as caught:
            pipeline(prompt, seed=0, memory_budget=encoder)
        assert needed <= parse_budget(option_of(caught.value)) < needed + 100_000


def test_bits_that_are_known_are_refused_before_anything_is_loaded(
    pipeline: TextToImage, adaptive_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = TextToImage.load(adaptive_bundle)
    loaded: list[Path] = []
    monkeypatch.setattr(fresh.backend, "load", lambda path, entry: loaded.append(path))
    for bits in (8, 32):
        needed = least(pipeline, PROMPTS[0], bits=bits)
        with pytest.raises(QlipError, match="too small for this run") as caught:
            fresh(PROMPTS[0], bits=bits, memory_budget=needed - 1)
        assert needed <= parse_budget(option_of(caught.value)) < needed + 100_000
        assert "every prompt" not in str(caught.value.expected)
    assert loaded == []


def test_engines_are_dropped_and_loaded_again(adaptive_bundle: Path) -> None:
    pipeline = TextToImage.load(adaptive_bundle)
    smallest = least(pipeline, PROMPTS[0])
    load, loaded = pipeline.backend.load, []

    def counting(path: Path, entry: EngineEntry) -> Any:
        loaded.append(path.name)
        return load(path, entry)

    pipeline.backend.load = counting  # type: ignore[method-assign]
    pipeline(PROMPTS[0], seed=0, memory_budget=smallest)
    assert max(loaded.count(name) for name in loaded) == STEPS
    loaded.clear()
    pipeline(PROMPTS[0], seed=0, memory_budget=AMPLE)
    assert max(loaded.count(name) for name in loaded) == 1
    loaded.clear()
    pipeline(PROMPTS[0], seed=0, memory_budget=AMPLE)
    assert loaded == []


def test_a_damaged_engine_is_found_by_the_background_thread(adaptive_bundle: Path, tmp_path: Path) -> None:
    damaged = tamper.copy_of(adaptive_bundle, tmp_path)
    tamper.flip_byte(damaged / "engines" / "openvino" / "up_blocks.1.a8.blob")
    pipeline = TextToImage.load(damaged)
    with pytest.raises(QlipError, match=r"up_blocks\.1\.a8\.blob was altered after the build"):
        pipeline(PROMPTS[0], seed=0, bits=8, memory_budget=AMPLE)
    assert background_threads() == []
    assert len(pipeline(PROMPTS[0], seed=0, bits=16, memory_budget=AMPLE).images) == 1


def test_an_engine_that_changes_between_two_loads_is_found(adaptive_bundle: Path, tmp_path: Path) -> None:
    bundle = tamper.copy_of(adaptive_bundle, tmp_path)
    pipeline = TextToImage.load(bundle)
    smallest = least(pipeline, PROMPTS[0], bits=8)
    engine = bundle / "engines" / "openvino" / "up_blocks.1.a8.blob"
    replaced = engine.with_suffix(".new")
    replaced.write_bytes(bytes(engine.stat().st_size))
    replaced.replace(engine)
    with pytest.raises(QlipError, match="was altered after the build"):
        pipeline(PROMPTS[0], seed=0, bits=8, memory_budget=smallest)


def test_a_run_that_is_broken_off_leaves_no_thread_and_works_again(pipeline: TextToImage) -> None:
    class EnoughError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise EnoughError

    smallest = least(pipeline, PROMPTS[0])
    expected = pipeline(PROMPTS[0], seed=0).images[0]
    with pytest.raises(EnoughError):
        pipeline(PROMPTS[0], seed=0, memory_budget=smallest, on_step=stop)
    assert background_threads() == []
    assert same(pipeline(PROMPTS[0], seed=0, memory_budget=smallest).images[0], expected)


def background_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("qlip-")]


# --- amounts


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("600MB", 600_000_000),
        ("1.5 GiB", 3 * 2**29),
        ("1kb", 1000),
        ("7B", 7),
        (12, 12),
        (" 2TB ", 2e12),
    ],
)
def test_amounts(text: str | int, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["-5MB", "0MB", "much", "", "12", "12XB", "1e3MB", "MB", "600 M", "nanMB"])
def test_bad_amounts_are_one_error(cli: Cli, adaptive_bundle: Path, tmp_path: Path, text: str) -> None:
    done = cli("generate", adaptive_bundle, "a dog", "-o", tmp_path / "x.png", "--memory-budget", text)
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith("error: the memory budget is no")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("size", [0, -1])
def test_numbers_below_one_byte(size: int) -> None:
    with pytest.raises(QlipError, match="not above zero"):
        parse_budget(size)


def test_generate_tells_what_it_took(cli: Cli, adaptive_bundle: Path, tmp_path: Path) -> None:
    arguments = ("generate", adaptive_bundle, "a dog", "--seed", 0, "-o", tmp_path / "x.png")
    done = cli(*arguments, "--memory-budget", "1GB")
    assert done.code == 0
    assert "memory of engines: at most" in done.out and "of 1000" in done.out
    refused = cli(*arguments, "--memory-budget", "1kB")
    assert refused.code == 2
    assert "memory budget is too small" in refused.err and "--memory-budget" in refused.err


@needs_linux
def test_predicted_and_measured_peaks_agree(adaptive_bundle: Path, tmp_path: Path) -> None:
    """Of engines compiled in a process of their own: in this one, torch leaves holes that they fill."""
    from benchmarks.residency import peaks_apart

    bundle = tmp_path / "bundle"
    shutil.copytree(adaptive_bundle, bundle, ignore=shutil.ignore_patterns("engines"))
    command = [sys.executable, "-m", "qlip_export", "compile", bundle, "--backend", "openvino", "--no-timing"]
    subprocess.run(command, check=True, capture_output=True)
    rows = peaks_apart(bundle, bundle, None)
    told = [
        f"{row['peak'] / 1e6:.1f} MB predicted, {row['measured_peak'] / 1e6:.1f} measured" for row in rows
    ]
    assert all(row["measured"] for row in rows)
    assert rows[0]["peak"] > 1.5 * rows[-1]["peak"], told
    for row in rows:
        assert abs(row["peak"] - row["measured_peak"]) <= 0.15 * row["measured_peak"], told


# --- long-lived use


def test_a_pipeline_goes_with_its_last_reference(adaptive_bundle: Path) -> None:
    pipeline = TextToImage.load(adaptive_bundle)
    pipeline(PROMPTS[0], seed=0, memory_budget=least(pipeline, PROMPTS[0]))
    pipeline(PROMPTS[0], seed=0)
    parts = [weakref.ref(part) for part in (pipeline, pipeline.chain, pipeline._engines)]
    gc.disable()
    try:
        del pipeline
        assert [part() for part in parts] == [None] * len(parts)
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def small_bundle(shared: Shared) -> Path:
    """A model of one down and one up block, of two steps, with a policy: it is loaded often here."""

    def make(folder: Path) -> None:
        from qlip_export.calibrate import measure_ranges
        from qlip_export.checkpoint import Checkpoint
        from tests.tiny import write_model
        from tests.tiny_calibration import write_policy, write_quality

        model, calibration = folder / "model", folder / "calibration"
        calibration.mkdir(parents=True)
        checkpoint = Checkpoint(write_model(model, channels=(16,)))
        ranges = measure_ranges(checkpoint, PROMPTS, steps=2)
        (calibration / "ranges.json").write_text(ranges.model_dump_json(), encoding="utf-8")
        sha256 = write_quality(calibration, checkpoint)
        units = ("stem", "down_blocks.0", "up_blocks.0", "out")
        write_policy(calibration, checkpoint, (8, 16, 32), t2q_sha256=sha256, units=units)
        build_tiny(model, folder / "bundle", calibration=calibration, steps=2)

    return shared("small", make) / "bundle"


SPLIT = 1000
"""Mappings that come and go with the drops of a pipeline. Left alone, a generation of it adds 160."""


@needs_linux
@pytest.mark.parametrize("users", [1, 2])
def test_nothing_leaks_in_a_while(small_bundle: Path, users: int) -> None:
    before, *_, after = long_use.apart(small_bundle, 48, 16, users)
    assert after.resident <= 1.03 * before.resident, f"{before}, then {after}"
    assert after.mappings <= before.mappings + SPLIT * users, f"{before}, then {after}"


@needs_linux
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("users", [1, 2])
def test_nothing_leaks_in_500_generations(small_bundle: Path, users: int) -> None:
    found = long_use.apart(small_bundle, 500, 50, users)
    for number, footprint in enumerate(found, start=1):
        print(f"{users} threads: {footprint} after {50 * number} generations")
    before, *_, after = found
    assert abs(after.resident - before.resident) <= 0.03 * before.resident
    assert after.mappings <= before.mappings + SPLIT * users


def test_two_threads_share_one_pipeline(pipeline: TextToImage) -> None:
    expected = {prompt: pipeline(prompt, seed=0).images[0] for prompt in PROMPTS}
    smallest = max(least(pipeline, prompt) for prompt in PROMPTS)
    wrong: list[str] = []

    def work(order: list[str]) -> None:
        for i, prompt in enumerate(order * 3):
            image = pipeline(prompt, seed=0, memory_budget=(smallest, AMPLE, None)[i % 3]).images[0]
            if not same(image, expected[prompt]):
                wrong.append(prompt)

    workers = [threading.Thread(target=work, args=(order,)) for order in (PROMPTS, PROMPTS[::-1])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
