"""Write the trained networks in diffusers layout, as FP16 safetensors shards of at most 9 MB.

`StableDiffusionPipeline.from_pretrained(folder)` loads the result without the network. The text tower is
saved once, with its projection: the pipeline reads it as `CLIPTextModel`, whose first output is the text
states that the denoiser attends to, and evaluation reads the same file as `CLIPTextModelWithProjection`.
"""

import argparse
import copy
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from tools.emoji import checkpoint
from tools.emoji.architecture import (
    MAX_PARAMETERS,
    SIZES,
    build_text,
    build_unet,
    build_vae,
    build_vision,
    count_parameters,
    scheduler_config,
)
from tools.emoji.tokenizer import write_json

SHARD_SIZE = "9MB"
SCHEDULER = "DPMSolverMultistepScheduler"
MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", SCHEDULER],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


@dataclass(frozen=True)
class Networks:
    """The four trained networks, in FP32."""

    text: CLIPTextModelWithProjection
    vision: CLIPVisionModelWithProjection
    vae: AutoencoderKL
    unet: UNet2DConditionModel

    def parameters(self) -> dict[str, int]:
        """Count the parameters of each network."""
        return {name: count_parameters(getattr(self, name)) for name in ("text", "vision", "vae", "unet")}


def export(networks: Networks, tokenizer: Path, folder: Path) -> int:
    """Write `networks` and the `tokenizer` folder to `folder` and return the bytes of all weight files.

    Raises:
        ValueError: the networks have more parameters together than the model may ship.
    """
    total = sum(networks.parameters().values())
    if total > MAX_PARAMETERS:
        raise ValueError(
            f"expected at most {MAX_PARAMETERS} parameters, found {total}: {networks.parameters()}"
        )
    parts = {
        "text_encoder": networks.text,
        "image_encoder": networks.vision,
        "vae": networks.vae,
        "unet": networks.unet,
    }
    for name, model in parts.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        # Half of a copy: the caller's weights stay in FP32.
        copy.deepcopy(model).half().save_pretrained(folder / name, max_shard_size=SHARD_SIZE)
        load_in_full_precision(folder / name / "config.json")
    shutil.copytree(tokenizer, folder / "tokenizer", dirs_exist_ok=True)
    # Written by hand: diffusers would add -Infinity, which strict JSON readers refuse.
    scheduler = {
        "_class_name": SCHEDULER,
        "_diffusers_version": "0.30.0",
        **scheduler_config(),
    }
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", MODEL_INDEX)
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def load_in_full_precision(config: Path) -> None:
    """Make a transformers `config` ask for FP32, the precision of the rest of a pipeline on a CPU.

    transformers would otherwise build the towers in the FP16 of the stored weights, next to an FP32 denoiser.
    """
    content = json.loads(config.read_text(encoding="utf-8"))
    for key in ("dtype", "torch_dtype"):
        if key in content:
            content[key] = "float32"
            write_json(config, content)


def random_networks(size: str, vocabulary: int, seed: int) -> Networks:
    """Build the four networks with random weights drawn from `seed`."""
    sizes = SIZES[size]
    torch.manual_seed(seed)
    return Networks(build_text(sizes, vocabulary), build_vision(sizes), build_vae(sizes), build_unet(sizes))


def trained_networks(weights: Path, size: str) -> Networks:
    """Read the four networks from the folders that the training stages handed on, on the CPU."""
    sizes = SIZES[size]
    tensors = {name: checkpoint.read_weights(weights / name) for name in ("text", "vision", "vae", "unet")}
    vocabulary = tensors["text"]["text_model.embeddings.token_embedding.weight"].shape[0]
    networks = Networks(
        build_text(sizes, vocabulary), build_vision(sizes), build_vae(sizes), build_unet(sizes)
    )
    for name, state in tensors.items():
        load_weights(getattr(networks, name), state)
    return networks


def load_weights(model: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Load every parameter of `model` from `state`; buffers, which are all constants, stay as built.

    Raises:
        ValueError: a parameter is missing or left over.
    """
    parameters = dict(model.named_parameters())
    if parameters.keys() != state.keys():
        raise ValueError(
            f"expected the parameters of {type(model).__name__}, found {parameters.keys() ^ state.keys()}"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state[name])


def exported_networks(folder: Path) -> Networks:
    """Read the four networks from a folder in diffusers layout, on the CPU, without the network."""
    return Networks(
        CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder", local_files_only=True),
        CLIPVisionModelWithProjection.from_pretrained(folder / "image_encoder", local_files_only=True),
        AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True),
        UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True),
    )


def main() -> None:
    """Read the command line and export the trained weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, default=Path("build/emoji-train/weights"))
    parser.add_argument("--data", type=Path, default=Path("build/emoji-data"))
    parser.add_argument("--out", type=Path, default=Path("qlip_export/zoo/emoji"))
    parser.add_argument("--size", choices=SIZES, default="shipped")
    arguments = parser.parse_args()
    networks = trained_networks(arguments.weights, arguments.size)
    written = export(networks, arguments.data / "tokenizer", arguments.out)
    total = sum(networks.parameters().values())
    print(f"{networks.parameters()}: {total} parameters, {written} bytes of weights")


if __name__ == "__main__":
    main()
