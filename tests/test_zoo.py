"""Models by name, from the Hub and of random weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import errors
from transformers import CLIPTokenizer, T5TokenizerFast

from qlip_export.bundle import Bundle
from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.random_weights import RandomCheckpoint, random_pipeline
from qlip_export.runtime import TextToImage
from qlip_export.zoo import EMBEDDED, HUB, find_configs, find_model
from tests.conftest import Cli, build_tiny
from tests.tiny_pipelines import write_flux

Download = Callable[..., str]


class Response:
    """As much of an answer of the Hub as its errors look at."""

    headers: dict[str, str] = {}  # noqa: RUF012
    request = None
    status_code = 403


def hub_says(monkeypatch: pytest.MonkeyPatch, answer: Download) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)


def test_name_of_the_zoo_is_downloaded_from_its_repository(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = tmp_path / ("0123456789abcdef" * 2 + "01234567")
    shutil.copytree(tiny_model, commit)
    asked: list[tuple[Any, ...]] = []

    def download(repository: str, *, revision: str | None, **patterns: list[str]) -> str:
        asked.append((repository, revision, patterns["allow_patterns"]))
        return str(commit)

    hub_says(monkeypatch, download)
    model, checkpoint = find_model("bk-sdm-tiny", revision="v1")
    assert (model.name, model.source, model.revision) == ("bk-sdm-tiny", "bk-sdm-tiny", commit.name)
    assert checkpoint.folder == commit
    model, _ = find_model("someone/their-model")
    assert (model.name, model.source) == ("their-model", "someone/their-model")
    find_configs("someone/their-model")
    assert [a[:2] for a in asked] == [
        ("nota-ai/bk-sdm-tiny-2m", "v1"),
        ("someone/their-model", None),
        ("someone/their-model", None),
    ]
    assert [any("safetensors" in p for p in a[2]) for a in asked] == [True, True, False]
    # diffusers loads it beside the parts that we read.
    assert all("feature_extractor/*" in a[2] for a in asked)
    assert not any(".bin" in p or ".ckpt" in p for a in asked for p in a[2])


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (lambda: errors.GatedRepoError("403 gated", response=Response()), "accept the licence at https://"),
        (lambda: errors.RepositoryNotFoundError("404", response=Response()), "HF_TOKEN"),
        (lambda: errors.RevisionNotFoundError("404", response=Response()), "a branch, tag or commit"),
        (lambda: errors.LocalEntryNotFoundError("not in the cache"), "HF_HUB_OFFLINE"),
        (lambda: errors.OfflineModeIsEnabled("offline"), "--random-weights"),
        (lambda: ConnectionError("no route"), "check the network"),
    ],
)
def test_what_the_hub_refuses_is_told_with_what_to_do(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Callable[[], Exception], told: str
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error()

    hub_says(monkeypatch, refuse)
    done = cli("build", "--model", "flux-dev", "-o", tmp_path / "bundle")
    assert done.code == 2
    assert told in done.err
    assert "black-forest-labs/FLUX.1-dev" in done.err
    assert not list(tmp_path.iterdir())


def test_configs_of_the_zoo_need_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise AssertionError("asked the Hub")

    hub_says(monkeypatch, refuse)
    for name in HUB:
        _, checkpoint = find_configs(name)
        for part in checkpoint:
            if part not in ("scheduler", "tokenizer", "tokenizer_2"):
                assert checkpoint.component(part).config
        _, random = find_model(name, random_weights=1)
        assert random.random_seed == 1


def test_revision_of_a_folder_is_refused(tiny_model: Path) -> None:
    with pytest.raises(QlipError, match="has no revisions"):
        find_model(str(tiny_model), revision="main")


def test_unknown_name_lists_the_zoo() -> None:
    with pytest.raises(QlipError, match=r"emoji, bk-sdm-tiny, .*flux-dev"):
        find_model("dall-e")


@pytest.fixture
def configs(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model without its weights."""
    folder = tmp_path / "configs"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_random_parameters_depend_on_name_and_seed_alone(configs: Path, tiny_model: Path) -> None:
    part = RandomCheckpoint(configs, 3, tokenizer=configs).component("unet")
    again = RandomCheckpoint(configs, 3, tokenizer=configs).component("unet")
    other = RandomCheckpoint(configs, 4, tokenizer=configs).component("unet")
    name = "down_blocks.0.resnets.0.conv1.weight"
    weight = part.get(name)
    assert weight.dtype == np.float16
    assert weight.shape == Checkpoint(tiny_model).component("unet").get(name).shape
    assert 0.9 < float(weight.astype(np.float32).std()) * np.sqrt(weight[0].size) < 1.1
    np.testing.assert_array_equal(again.get(name), weight)
    assert not np.array_equal(other.get(name), weight)
    assert part.fingerprint == again.fingerprint != other.fingerprint
    assert set(part.get("conv_norm_out.weight")) == {1}
    assert set(part.get("conv_norm_out.bias")) == {0}


def test_tokenizers_of_a_model_of_random_weights_are_its_own_or_clips(tmp_path: Path) -> None:
    flux = write_flux(tmp_path / "flux")
    own = random_pipeline(RandomCheckpoint(flux, 0, EMBEDDED["emoji"] / "tokenizer")).tokenizer_2
    assert (
        own("a boat").input_ids == T5TokenizerFast.from_pretrained(flux / "tokenizer_2")("a boat").input_ids
    )
    shutil.rmtree(flux / "tokenizer_2")
    stands_in = random_pipeline(RandomCheckpoint(flux, 0, EMBEDDED["emoji"] / "tokenizer")).tokenizer_2
    assert isinstance(stands_in, CLIPTokenizer)


def test_bundle_of_random_weights_says_so_runs_and_validates(
    cli: Cli, configs: Path, bundle: Path, tmp_path: Path
) -> None:
    out = tmp_path / "bundle"
    shutil.copytree(bundle, out)  # captures know no weights: they are good for these as well
    report = build_tiny(configs, out, bits=(8, 32), weight_bits=32, random_weights=True, seed=3)
    assert report.random_weights == 3
    manifest = Bundle.open(out).manifest
    assert manifest.model.random_weights == 3
    assert "assumed" in (out / "calibration" / "ranges.json").read_text()
    assert "random weights of seed 3" in cli("inspect", out).out
    images = [TextToImage.load(out)("a red apple", seed=0, bits=bits).images[0] for bits in (8, 32)]
    assert all(image.size == (32, 32) for image in images)
    done = cli("validate", out, "--json")
    rows = json.loads(done.out)["images"]
    assert next(row["psnr"] for row in rows if row["bits"] == 32) >= 45
