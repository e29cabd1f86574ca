"""Evaluation: the simulator stands for the engines, and the command says what it measured on what."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torchmetrics")

from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.noise import seeded_noise
from qlip_export.progress import Silent
from qlip_export.reference import psnr
from qlip_export.renderers import POLICY, EngineRenderer, SimulatorRenderer
from tests.conftest import STEPS, Cli
from tests.test_cli import one_error, told
from tests.tiny import IMAGE_SIZE, LATENT_SIZE, WORDS

PROMPTS = [f"a {word}" for word in WORDS[5:11]]
LATENTS = np.stack([seeded_noise(seed, (4, LATENT_SIZE, LATENT_SIZE)) for seed in range(len(PROMPTS))])
LEAST_PSNR = {"8": 33.0, "16": 45.0, "32": 70.0, POLICY: 48.0}
"""dB. What is not on an INT8 grid is BF16 in the engines and FP32 in the simulator. That moves values across
edges of the grid, and random weights carry on what was moved: at 8 bits, a step tells more than an image."""


def drawn(renderer: Any, configuration: str) -> tuple[list[Image.Image], np.ndarray]:
    parts = list(renderer.draw(configuration, PROMPTS, LATENTS, 4.0))
    images = [Image.fromarray(pixels) for images, _ in parts for pixels in images.numpy()]
    return images, np.concatenate([bits for _, bits in parts])


# --- the simulator and the engines


@pytest.fixture(scope="module")
def renderers(adaptive_bundle: Path, tiny_model: Path) -> tuple[EngineRenderer, SimulatorRenderer]:
    opened = Bundle.open(adaptive_bundle)
    return EngineRenderer(opened), SimulatorRenderer(opened, Checkpoint(tiny_model), "cpu")


@pytest.mark.parametrize("configuration", [POLICY, "8", "16", "32"])
def test_the_simulator_draws_what_the_engines_draw(renderers: Any, configuration: str) -> None:
    expected, bits = drawn(renderers[0], configuration)
    found, simulated_bits = drawn(renderers[1], configuration)
    assert np.array_equal(bits, simulated_bits)
    assert bits.shape[:2] == (len(PROMPTS), STEPS)
    if configuration == POLICY:
        assert len({prompt.tobytes() for prompt in bits}) > 1, "prompts of one schedule would prove little"
    worst = min(psnr(a, b) for a, b in zip(found, expected, strict=True))
    print(f"{configuration}: {worst:.1f} dB")
    assert worst >= LEAST_PSNR[configuration]


def test_at_8_bits_the_simulator_errs_as_the_engines_do(
    adaptive_bundle: Path, renderers: tuple[EngineRenderer, SimulatorRenderer]
) -> None:
    """One step: the errors that quantization makes in both are nearly the same vector, not just as large."""
    import torch

    from qlip_export.runtime import TextToImage

    pipeline, simulator = TextToImage.load(adaptive_bundle), renderers[1].simulator
    states = simulator.encode(["", PROMPTS[0]]).states
    both = np.concatenate([LATENTS[:1], LATENTS[:1]])
    pipeline.chain.hold("text", states.numpy())
    errors = []
    for bits in (8, 32):
        pattern = pipeline.chain.uniform(bits)
        pipeline.chain.load([pattern])
        simulator.quantizer.set_bits(dict.fromkeys(simulator.layers, bits))
        with torch.inference_mode():
            simulated = simulator.predict(torch.from_numpy(both), torch.tensor([500.0]), states)
        errors.append([pipeline.chain.step(both, 500.0, pattern), simulated.numpy()])
    simulator.quantizer.set_functions({})
    (engine8, simulated8), (engine32, simulated32) = errors
    assert simulated32 == pytest.approx(engine32, abs=1e-4)
    found = np.corrcoef((engine8 - engine32).ravel(), (simulated8 - simulated32).ravel())[0, 1]
    print(f"correlation of errors: {found:.3f}")
    assert found > 0.8


def test_prompts_of_a_batch_share_their_schedule(renderers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    simulated = renderers[1]
    alone = simulated.schedules(POLICY, PROMPTS)
    monkeypatch.setattr(simulated, "batch_size", 4)
    together = simulated.schedules(POLICY, PROMPTS)
    for start in (0, 4):
        part = slice(start, start + 4)
        assert np.array_equal(together[part], np.broadcast_to(alone[part].max(0), together[part].shape))


# --- the command


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def rows(report: dict[str, Any]) -> dict[str, Any]:
    return {row["configuration"]: row["metrics"] for row in report["rows"]}


@pytest.mark.parametrize("device", ["engines", "cpu"])
def test_evaluate_compares_the_policy_with_uniform_bits(
    cli: Cli, adaptive_bundle: Path, towers: Path, prompts: Path, tmp_path: Path, device: str
) -> None:
    out = tmp_path / "kept"
    done = cli(
        *("evaluate", adaptive_bundle, "--model", towers, "--prompts", prompts, "--samples", 4),
        *("--device", device, "--json", "-o", out),
    )
    assert done.code == 0, done.err
    report = json.loads(done.out)
    found = rows(report)
    assert list(found) == ["policy", "8", "16", "32"]
    assert report["reference"] == "the 32-bit images of the same prompts and noise"
    assert report["target"] == ("openvino" if device == "engines" else None)
    assert (report["samples"], report["steps"], report["baseline"]) == (4, STEPS, "16")
    names = {"fid", "sfid", "clip", "fab", "bitops"} | ({"latency"} if device == "engines" else set())
    assert all(set(metrics) == names for metrics in found.values())
    for name, metrics in found.items():
        assert all(m["low"] <= m["value"] <= m["high"] for m in metrics.values())
        assert (metrics["fab"]["ratio"] is None) == (name == "16")
    assert [found[bits]["fab"]["value"] for bits in ("8", "16", "32")] == [8, 16, 32]
    assert found["32"]["fid"]["value"] == pytest.approx(0, abs=1e-9) != found["16"]["fid"]["value"]
    assert found["8"]["fid"]["value"] > 3 * found["16"]["fid"]["value"]
    assert 8 < found["policy"]["fab"]["value"] < 32
    assert found["8"]["bitops"]["ratio"] == pytest.approx(0.5, abs=0.05)
    assert found["32"]["bitops"]["ratio"] == 2
    assert sorted(path.name for path in (out / "policy").iterdir()) == [f"{i:05d}.png" for i in range(4)]
    with Image.open(out / "policy" / "00000.png") as image:
        assert image.size == (IMAGE_SIZE, IMAGE_SIZE)


def test_configurations_take_turns_on_the_clock(
    renderers: tuple[EngineRenderer, SimulatorRenderer], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, _ = renderers
    called = []
    run = engines._pipeline

    def recording(prompts: list[str], *, bits: int | None, **rest: Any) -> Any:
        called.append((prompts[0], bits))
        return run(prompts, bits=bits, **rest)

    monkeypatch.setattr(engines, "_pipeline", Recording(run, recording))
    seconds = engines.seconds(["policy", "8"], PROMPTS[:2], LATENTS[:2], 4.0)
    first, second = PROMPTS[:2]
    assert called == [(first, 8), (first, None), (first, None), (first, 8), (second, 8), (second, None)]
    assert {name: len(times) for name, times in seconds.items()} == {"policy": 2, "8": 2}
    assert all((times > 0).all() for times in seconds.values())


class Recording:
    """A pipeline whose calls go through a function."""

    def __init__(self, pipeline: Any, call: Any) -> None:
        self.bundle, self._call = pipeline.bundle, call

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._call(*arguments, **named)


def test_the_table_fits_a_terminal(
    cli: Cli, adaptive_bundle: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    done = cli("evaluate", adaptive_bundle, "--prompts", prompts, "--samples", 1, "--metrics", "fab,bitops")
    assert done.code == 0, done.err
    table = [line for line in done.out.splitlines() if line and line[0] in "┏┃┡│└"]
    assert max(map(len, table)) <= 80
    assert [line.split("│")[1].strip() for line in table if "│ " in line and "x" not in line] == [
        "policy",
        "8",
        "16",
        "32",
    ]


def test_an_interrupted_evaluation_goes_on(
    adaptive_bundle: Path, towers: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlip_export.evaluate import EvaluateOptions, evaluate

    options = EvaluateOptions(
        prompts=prompts, samples=2, metrics=("clip", "fab"), compare=(8, 16), model=str(towers), out=tmp_path
    )
    drawn: list[str] = []
    draw = EngineRenderer.draw

    def counting(self: EngineRenderer, configuration: str, *rest: Any) -> Iterator[Any]:
        drawn.append(configuration)
        if configuration == "16" and len(drawn) < 4:
            raise KeyboardInterrupt
        return draw(self, configuration, *rest)

    monkeypatch.setattr(EngineRenderer, "draw", counting)
    with pytest.raises(KeyboardInterrupt):
        evaluate(adaptive_bundle, options, Silent())
    assert drawn == ["policy", "8", "16"]
    first = evaluate(adaptive_bundle, options, Silent())
    assert drawn[3:] == ["16"]
    assert evaluate(adaptive_bundle, options, Silent()) == first
    assert drawn[4:] == []
    (tmp_path / "8.safetensors").write_bytes((tmp_path / "8.safetensors").read_bytes()[:-8])
    assert evaluate(adaptive_bundle, options, Silent()) == first
    assert drawn[4:] == ["8"]
    evaluate(adaptive_bundle, options.model_copy(update={"seed": 1}), Silent())
    assert drawn[5:] == ["policy", "8", "16"]


def test_a_folder_of_images_is_a_reference(
    cli: Cli, adaptive_bundle: Path, towers: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", adaptive_bundle, "--model", towers, "--prompts", prompts, "--samples", 3)
    options = ("--metrics", "fid", "--compare", "16", "--json")
    done = cli(*arguments, *options, "-o", tmp_path)
    assert done.code == 0, done.err
    again = cli(*arguments, *options, "--reference", tmp_path / "16")
    assert again.code == 0, again.err
    report = json.loads(again.out)
    assert report["reference"] == f"the images of {tmp_path / '16'}"
    assert rows(report)["16"]["fid"]["value"] == pytest.approx(0, abs=1e-9)
    assert rows(report)["policy"]["fid"]["value"] > 1e-6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--metrics", "fid,ssim"], ["unknown metric 'ssim'", "fid, sfid, clip, fab, bitops, latency"]),
        (["--device", "tpu"], ["unknown device 'tpu'", "engines, cpu, cuda"]),
        (["--device", "cpu", "--metrics", "fab,latency"], ["latency", "cpu"]),
        (["--samples", 7], ["more samples than prompts", "at most 6", "--samples 7"]),
        (["--samples", 0], ["samples", "0"]),
        (["--samples", 1, "--metrics", "fid"], ["the metric fid", "2 samples or more"]),
        (["--compare", "8,12"], ["12-bit", "8 or 16 or 32"]),
        (["--compare", "eight"], ["--compare is no list of numbers", "eight"]),
        (["--baseline", "6"], ["unknown baseline '6'", "policy, 8, 16, 32"]),
        (["--guidance", "nan"], ["--guidance", "finite"]),
        (["--seed", -1], ["--seed", "-1"]),
        (["--model", "emoji"], ["is not the model that", "fingerprint"]),
        (["--metrics", "clip"], ["no vision tower", "image_encoder"]),
        (
            ["--metrics", "fab", "--backend", "onnxruntime"],
            ["holds no engines of onnxruntime", "qlip-export compile", "--backend onnxruntime"],
        ),
    ],
)
def test_bad_input_is_one_clear_error(
    cli: Cli, adaptive_bundle: Path, prompts: Path, options: list[Any], words: list[str]
) -> None:
    error = one_error(cli("evaluate", adaptive_bundle, "--json", "--prompts", prompts, *options))
    assert all(word in told(error) for word in words), told(error)


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "holds no prompt"), (b"a \xff cat\n", "cannot read prompts")]
)
def test_a_prompt_file_that_cannot_be_read(
    cli: Cli, adaptive_bundle: Path, prompts: Path, content: bytes, word: str
) -> None:
    prompts.write_bytes(content)
    error = one_error(cli("evaluate", adaptive_bundle, "--json", "--prompts", prompts))
    assert word in error["problem"] and str(prompts) in error["problem"]


def test_cuda_without_a_gpu(cli: Cli, adaptive_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    error = one_error(cli("evaluate", adaptive_bundle, "--json", "--device", "cuda"))
    assert "no CUDA device" in error["problem"]


def test_other_reference_statistics_are_refused(
    cli: Cli, adaptive_bundle: Path, towers: Path, prompts: Path, tmp_path: Path
) -> None:
    arguments = ("evaluate", adaptive_bundle, "--json", "--model", towers, "--prompts", prompts)
    emoji = Path(__file__).parents[1] / "calibration/emoji/reference.safetensors"
    error = one_error(cli(*arguments, "--reference", emoji))
    assert "features of this network" in error["problem"]
    error = one_error(cli(*arguments, "--reference", tmp_path / "nothing.safetensors"))
    assert "cannot read reference statistics" in error["problem"]


def test_missing_library_is_told_before_anything_is_drawn(
    cli: Cli, adaptive_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip_export.evaluate.find_spec", lambda name: None)
    done = cli("evaluate", adaptive_bundle)
    assert done.code == 2
    assert 'pip install "qlip-export[evaluate]"' in done.err
    assert "evaluate (" not in done.err


def test_inception_needs_its_library(
    cli: Cli, adaptive_bundle: Path, towers: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlip_export.features.find_spec", lambda name: None)
    error = one_error(
        cli(
            "evaluate",
            adaptive_bundle,
            "--json",
            "--model",
            towers,
            "--inception",
            prompts,
            "--prompts",
            prompts,
        )
    )
    assert "torch-fidelity" in error["problem"] and "qlip-export[inception]" in error["fix"]
