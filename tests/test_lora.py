"""LoRAs are fused into the weights before these are quantized, in every spelling of diffusers and PEFT."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from qlip_export.checkpoint import Checkpoint
from qlip_export.errors import QlipError
from qlip_export.torch_pipeline import load_pipeline
from qlip_export.zoo import find_model
from tests.conftest import Cli

LINEAR = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
TEXT = "encoder.layers.0.self_attn.q_proj"
RANK = 2

Factors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def factors(tiny_model: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Down and up of each module, by component and path."""
    rng = np.random.default_rng(0)
    found = {}
    for part, path in (("unet", LINEAR), ("unet", CONV), ("text_encoder", TEXT)):
        weight = Checkpoint(tiny_model).component(part).get(f"{path}.weight")
        down = rng.standard_normal((RANK, *weight.shape[1:]), dtype=np.float32)
        up = rng.standard_normal((weight.shape[0], RANK, *(1,) * (weight.ndim - 2)), dtype=np.float32)
        found[f"{part}.{path}"] = (down, up)
    return found


def merged(model: Path, module: str, factors: tuple[np.ndarray, np.ndarray], scale: float) -> np.ndarray:
    """Return the weight with the LoRA added, by torch: a convolution is one by `down`, then one by `up`."""
    part, _, path = module.partition(".")
    weight = torch.from_numpy(Checkpoint(model).component(part).get(f"{path}.weight"))
    down, up = map(torch.from_numpy, factors)
    change = torch.einsum("or,r...->o...", up.flatten(1), down)
    return np.asarray(weight + scale * change)


SPELLINGS = {
    "diffusers": ("{module}.lora_A.weight", "{module}.lora_B.weight"),
    "layers": ("{module}.lora.down.weight", "{module}.lora.up.weight"),
    "text": ("{module}.lora_linear_layer.down.weight", "{module}.lora_linear_layer.up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_fused(
    tiny_model: Path, tmp_path: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]], spelling: str
) -> None:
    names = SPELLINGS[spelling]
    tensors = {n.format(module=m): f for m, both in factors.items() for n, f in zip(names, both, strict=True)}
    save_file(tensors, tmp_path / "lora.safetensors")
    _, checkpoint = find_model(str(tiny_model), lora=[f"{tmp_path / 'lora.safetensors'}:0.5"])
    for module, both in factors.items():
        part, _, path = module.partition(".")
        found = checkpoint.component(part).get(f"{path}.weight")
        np.testing.assert_allclose(found, merged(tiny_model, module, both, 0.5), rtol=1e-5, atol=1e-6)
    other = "conv_in.weight"
    same = Checkpoint(tiny_model).component("unet")
    np.testing.assert_array_equal(checkpoint.component("unet").get(other), same.get(other))
    assert checkpoint.component("unet").fingerprint != same.fingerprint


def test_attention_processors_of_older_versions_are_found(tiny_model: Path, tmp_path: Path) -> None:
    processor = LINEAR.removesuffix(".to_q") + ".processor"
    down, up = np.ones((RANK, 16), np.float32), np.ones((16, RANK), np.float32)
    tensors = {}
    for layer in ("to_q", "to_out"):
        tensors[f"unet.{processor}.{layer}_lora.down.weight"] = down
        tensors[f"unet.{processor}.{layer}_lora.up.weight"] = up
    save_file(tensors, tmp_path / "lora.safetensors")
    _, checkpoint = find_model(str(tiny_model), lora=[str(tmp_path / "lora.safetensors")])
    names = {f"{LINEAR}.weight", f"{LINEAR.removesuffix('to_q')}to_out.0.weight"}
    assert set(checkpoint.component("unet").changed) == names


@pytest.mark.parametrize(("settings", "factor"), [({}, 4.0), ({"use_rslora": True}, 4.0 * 2**0.5)])
def test_folder_of_peft_brings_its_alpha(
    tiny_model: Path, tmp_path: Path, factors: dict[str, tuple[np.ndarray, np.ndarray]],
    settings: dict[str, bool], factor: float,
) -> None:  # fmt: skip
    down, up = factors[f"unet.{LINEAR}"]
    tensors = {f"base_model.model.{LINEAR}.lora_{n}.weight": f for n, f in (("A", down), ("B", up))}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"lora_alpha": 4 * RANK, "r": RANK, **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    _, checkpoint = find_model(str(tiny_model), lora=[str(tmp_path)])
    wanted = merged(tiny_model, f"unet.{LINEAR}", (down, up), factor)
    found = checkpoint.component("unet").get(f"{LINEAR}.weight")
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_export_is_that_of_the_merged_model(
    cli: Cli, tiny_model: Path, bundle: Path, tmp_path: Path,
    factors: dict[str, tuple[np.ndarray, np.ndarray]],
) -> None:  # fmt: skip
    names = SPELLINGS["diffusers"]
    tensors = {n.format(module=m): f for m, both in factors.items() for n, f in zip(names, both, strict=True)}
    save_file(tensors, tmp_path / "lora.safetensors")
    model = tmp_path / "merged"
    shutil.copytree(tiny_model, model)
    for part in ("unet", "text_encoder"):
        (file,) = (model / part).glob("*.safetensors")
        weights = load_file(file)
        for module, both in factors.items():
            stored = [n for n in weights if n.endswith(f"{module.partition('.')[2]}.weight")]
            if module.startswith(f"{part}.") and stored:
                weights[stored[0]] = merged(tiny_model, module, both, 1)
        save_file(weights, file)
    for name, arguments in (
        ("a", ["--model", tiny_model, "--lora", tmp_path / "lora.safetensors"]),
        ("b", ["--model", model]),
    ):
        shutil.copytree(bundle, tmp_path / name)
        done = cli(
            "export", *arguments, "--bits", "32", "--weight-bits", "32", "-o", tmp_path / name, "--json"
        )
        assert done.code == 0, done.err
    for part in ("denoiser", "text_encoder"):
        found, wanted = (
            np.frombuffer((tmp_path / n / "onnx" / f"{part}.weights.bin").read_bytes(), np.uint8)
            for n in "ab"
        )
        assert found.shape == wanted.shape
        assert (found != wanted).mean() < 1e-3  # the last bit of a sum may differ
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["model"]["lora"] == [f"{tmp_path / 'lora.safetensors'}:1"]
    _, checkpoint = find_model(str(tiny_model), lora=manifest["model"]["lora"])
    reference = load_pipeline(checkpoint)
    weight = reference.unet.get_submodule(LINEAR).weight
    wanted = merged(tiny_model, f"unet.{LINEAR}", factors[f"unet.{LINEAR}"], 1)
    np.testing.assert_allclose(weight.detach().numpy(), wanted, rtol=1e-5, atol=1e-6)


def bad(folder: Path, tensors: Factors) -> str:
    save_file(tensors, folder / "bad.safetensors")
    return str(folder / "bad.safetensors")


def pair(module: str, outputs: int, inputs: int) -> Factors:
    down, up = np.ones((RANK, inputs), np.float32), np.ones((outputs, RANK), np.float32)
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


@pytest.mark.parametrize(
    ("tensors", "complaint"),
    [
        (pair(f"unet.{LINEAR}", 16, 24), "for another model"),
        (pair("unet.down_blocks.9.attn1.to_q", 16, 16), "for another model"),
        (pair("lora_unet_down_blocks_0", 16, 16), "for another model"),
        ({"conv_in.weight": np.ones((2, 2), np.float32)}, "no LoRA in the format"),
        ({f"unet.{LINEAR}.lora_A.weight": np.ones((2, 16), np.float32)}, "no LoRA in the format"),
        (pair(f"unet.{LINEAR}", 16, 16) | {"unet.x.dora_scale": np.ones(1, np.float32)}, "no LoRA in"),
    ],
)
def test_what_does_not_fit_is_one_error_and_leaves_nothing(
    cli: Cli, tiny_model: Path, tmp_path: Path, tensors: Factors, complaint: str
) -> None:
    file = bad(tmp_path, tensors)
    done = cli("export", "--model", tiny_model, "--lora", file, "-o", tmp_path / "out" / "bundle")
    assert done.code == 2
    assert complaint in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("lora.bin", "can run code"), ("none.safetensors", "no such"), ("x:y", "no number")],
)
def test_files_that_are_not_read_are_refused(
    tiny_model: Path, tmp_path: Path, name: str, complaint: str
) -> None:
    (tmp_path / "lora.bin").touch()
    with pytest.raises(QlipError, match=complaint):
        find_model(str(tiny_model), lora=[str(tmp_path / name)])
