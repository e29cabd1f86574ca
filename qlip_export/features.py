"""Image and text features of a model's own CLIP towers, and their statistics over reference images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError
from torch import Tensor, nn

from qlip_export.checkpoint import Component
from qlip_export.errors import QlipError
from qlip_export.files import sha256_of, written_aside
from qlip_export.spec import Frozen
from qlip_export.torch_pipeline import quiet_loading, token_ids

SPATIAL_CHANNELS = 7
"""Channels of the spatial map that sFID uses."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

OnBatch = Callable[[int, int], None]
"""Called before each batch with the number of batches before it and of all."""

Features = dict[str, NDArray[np.float32]]
"""Feature sets of N images, (N, width) float32 each: ``embedding``, ``spatial`` and perhaps ``inception``."""


class FeatureExtractor:
    """The vision tower of a model, and Inception-v3 where its weights are given.

    ``embedding`` is the projected CLIP embedding: FID and CLIP score use it. ``spatial`` is for sFID: the
    first 7 channels of every patch token of the last hidden layer, flattened. The paper that defined sFID
    (arXiv 2103.03841) takes the first 7 channels of an intermediate map of Inception; ours is the same on
    another network. Distances in these two compare configurations of one model, not models with each other.
    ``inception`` is the 2048-wide pooled layer of the usual FID.

    Attributes:
        fingerprints: SHA-256 of the network behind each feature set.
    """

    def __init__(self, model: Path, *, device: str = "cpu", inception: Path | None = None) -> None:
        """Load the networks.

        Args:
            model: Folder in the diffusers layout; the vision tower lies in its ``image_encoder``.
            device: ``cpu`` or ``cuda``.
            inception: Weights of Inception-v3 as torch-fidelity publishes them.

        Raises:
            QlipError: The model has no vision tower, or Inception cannot be loaded.
        """
        tower = Component(model / "image_encoder")
        if not has_vision_tower(model):
            raise QlipError(
                f"{model} has no vision tower to take image features from",
                expected="a CLIPVisionModelWithProjection in its folder image_encoder",
                found=f"no {tower.folder / 'config.json'}",
                fix="--metrics fab,bitops,latency needs none",
            )
        from transformers import CLIPVisionModelWithProjection

        tower.get("visual_projection.weight")  # transformers would make up a missing one at random
        self._device = torch.device(device)
        with quiet_loading():
            self._tower: Any = CLIPVisionModelWithProjection.from_pretrained(
                tower.folder, local_files_only=True
            )
        self._tower.float().eval().to(self._device)
        self._side = int(self._tower.config.image_size)
        self._inception: Any = None
        self.fingerprints = {"embedding": tower.fingerprint, "spatial": tower.fingerprint}
        if inception is not None:
            self._inception = _load_inception(inception).to(self._device)
            self.fingerprints["inception"] = sha256_of(inception)

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Features:
        """Return the features of (N, H, W, 3) uint8 images.

        Raises:
            QlipError: The images are not of the size that the tower takes.
        """
        if images.shape[1:] != (self._side, self._side, 3):
            raise QlipError(
                "images of the wrong size for the vision tower",
                expected=f"{self._side}x{self._side}, RGB",
                found="x".join(map(str, images.shape[1:])),
            )
        pixels = images.to(self._device).permute(0, 3, 1, 2)
        found = self._tower(pixel_values=pixels.float() / 127.5 - 1)
        features = {
            "embedding": found.image_embeds,
            "spatial": found.last_hidden_state[:, 1:, :SPATIAL_CHANNELS].flatten(1),
        }
        if self._inception is not None:
            features["inception"] = self._inception(pixels.contiguous())
        return {name: tensor.float().cpu().numpy() for name, tensor in features.items()}


def has_vision_tower(model: Path) -> bool:
    """Say whether a model folder has a vision tower."""
    return (model / "image_encoder" / "config.json").is_file()


def _load_inception(weights: Path) -> nn.Module:
    if find_spec("torch_fidelity") is None:
        raise QlipError("Inception features need torch-fidelity", fix='pip install "qlip-export[inception]"')
    from torchmetrics.image.fid import FrechetInceptionDistance

    if not weights.is_file():
        raise QlipError(
            f"there is no file {weights}",
            expected="the weights of Inception-v3 (pt_inception-2015-12-05-6726825d.pth of torch-fidelity)",
        )
    # torch-fidelity leaves torch.load at its default, which reads tensors only and runs no code.
    inception: nn.Module = FrechetInceptionDistance(
        feature=2048, feature_extractor_weights_path=str(weights)
    ).inception
    return inception.eval()


@torch.inference_mode()
def text_embeddings(
    model: Path,
    prompts: Sequence[str],
    *,
    encoder: str = "text_encoder",
    tokenizer: str = "tokenizer",
    device: str = "cpu",
    batch_size: int = 256,
    on_batch: OnBatch = lambda before, total: None,
) -> NDArray[np.float32]:
    """Return the projected text embeddings of ``prompts``, (N, C) float32, in the vision tower's space.

    Raises:
        QlipError: The text encoder of the model folder has no projection.
    """
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    part = Component(model / encoder)
    part.get("text_projection.weight")  # transformers would make up a missing one at random
    tokenizing: Any = CLIPTokenizer.from_pretrained(model / tokenizer, local_files_only=True)
    with quiet_loading():
        tower: Any = CLIPTextModelWithProjection.from_pretrained(part.folder, local_files_only=True)
    tower.float().eval().to(device)
    found = []
    for before, ids in enumerate(token_ids(tokenizing, prompts, batch_size)):
        on_batch(before, -(-len(prompts) // batch_size))
        found.append(tower(input_ids=ids.to(device)).text_embeds.float().cpu().numpy())
    embeddings: NDArray[np.float32] = np.concatenate(found)
    return embeddings


@dataclass(frozen=True)
class Moments:
    """Mean (width,) and covariance (width, width) of a feature set, float64, of ``count`` images."""

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    count: int

    @classmethod
    def of(cls, features: NDArray[np.float32]) -> Moments:
        """Return the moments of (N, width) features.

        Raises:
            QlipError: Fewer than two images: no covariance.
        """
        if len(features) < 2:
            raise QlipError(
                "a Fréchet distance needs the covariance of images",
                expected="2 images or more",
                found=str(len(features)),
            )
        wide = features.astype(np.float64)
        return cls(wide.mean(0), np.cov(wide, rowvar=False), len(wide))


class ReferenceRecipe(Frozen):
    """What reference statistics are of."""

    images: int = Field(ge=2)
    source: str = Field(description="which images")
    fingerprints: dict[str, str] = Field(description="SHA-256 of the network behind each feature set")


class ReferenceStatistics:
    """Moments of the images that Fréchet distances are measured to.

    On disk: safetensors with the mean and the upper triangle of the covariance of each feature set, float32,
    and the recipe as JSON beside it. In float16 the covariance would lose its small eigenvalues.
    """

    def __init__(self, moments: Mapping[str, Moments], recipe: ReferenceRecipe) -> None:
        """Wrap moments by feature set."""
        self.moments, self.recipe = dict(moments), recipe

    @classmethod
    def of_features(
        cls, features: Features, fingerprints: Mapping[str, str], source: str
    ) -> ReferenceStatistics:
        """Return the statistics of feature sets."""
        moments = {name: Moments.of(values) for name, values in features.items()}
        count = next(iter(moments.values())).count
        recipe = ReferenceRecipe(images=count, source=source, fingerprints=dict(fingerprints))
        return cls(moments, recipe)

    @classmethod
    def of_images(
        cls, images: Iterable[Tensor], extractor: FeatureExtractor, source: str
    ) -> ReferenceStatistics:
        """Return the statistics of batches of (n, H, W, 3) uint8 images."""
        return cls.of_features(joined(map(extractor, images)), extractor.fingerprints, source)

    @classmethod
    def load(cls, path: Path) -> ReferenceStatistics:
        """Read statistics.

        Raises:
            QlipError: Missing, truncated, or not such a file.
        """
        import safetensors
        from safetensors.numpy import load_file

        try:
            recipe = ReferenceRecipe.model_validate_json(
                path.with_suffix(".json").read_text(encoding="utf-8")
            )
            tensors = load_file(path)
            moments = {
                name: Moments(
                    tensors[f"{name}.mean"].astype(np.float64),
                    _unpacked(tensors[f"{name}.covariance"].astype(np.float64), len(tensors[f"{name}.mean"])),
                    recipe.images,
                )
                for name in recipe.fingerprints
            }
        except (
            OSError,
            UnicodeDecodeError,
            ValidationError,
            ValueError,
            KeyError,
            safetensors.SafetensorError,
        ) as error:
            raise QlipError(
                f"cannot read reference statistics from {path}",
                expected="a safetensors file of image statistics, with its .json beside it",
                found=str(error).splitlines()[0],
                fix="name a folder of images, or --reference fp32",
            ) from error
        return cls(moments, recipe)

    def save(self, path: Path) -> None:
        """Write the statistics to ``path`` and the recipe beside it."""
        from safetensors.numpy import save_file

        tensors = {}
        for name, moments in self.moments.items():
            upper = np.triu_indices(len(moments.mean))
            tensors[f"{name}.mean"] = moments.mean.astype(np.float32)
            tensors[f"{name}.covariance"] = moments.covariance[upper].astype(np.float32)
        with written_aside(path) as aside:
            save_file(tensors, aside)
        with written_aside(path.with_suffix(".json")) as aside:
            aside.write_text(self.recipe.model_dump_json(indent=1) + "\n", encoding="utf-8")

    def check(self, fingerprints: Mapping[str, str], path: Path) -> None:
        """Refuse statistics that lack one of the feature sets, or were made with another network.

        Raises:
            QlipError: Naming the difference.
        """
        for name, fingerprint in fingerprints.items():
            found = self.recipe.fingerprints.get(name)
            if found != fingerprint:
                raise QlipError(
                    f"{path} holds no {name} features of this network",
                    expected=f"fingerprint {fingerprint[:16]}…",
                    found=f"{found[:16]}…" if found else f"only {', '.join(self.recipe.fingerprints)}",
                    fix="name a folder of images, or --reference fp32",
                )


def joined(parts: Iterable[Features]) -> Features:
    """Return batches of features as one."""
    every = list(parts)
    return {name: np.concatenate([part[name] for part in every]) for name in (every[0] if every else ())}


def images_of(
    folder: Path, batch_size: int = 64, on_batch: OnBatch = lambda before, total: None
) -> Iterator[Tensor]:
    """Yield the images of a folder by name, (n, H, W, 3) uint8; what is transparent becomes white.

    Raises:
        QlipError: No images, one that cannot be read, or images of several sizes.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise QlipError(f"{folder} holds no images", expected=" or ".join(IMAGE_SUFFIXES))
    for start in range(0, len(files), batch_size):
        on_batch(start // batch_size, -(-len(files) // batch_size))
        try:
            batch = [_opaque(path) for path in files[start : start + batch_size]]
            yield torch.from_numpy(np.stack(batch))
        except (OSError, ValueError) as error:
            raise QlipError(
                f"cannot read the images of {folder}", expected="images of one size", found=str(error)
            ) from error


def _opaque(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, rgba).convert("RGB"))


def _unpacked(upper: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Return the symmetric (width, width) matrix with this upper triangle."""
    matrix = np.zeros((width, width))
    matrix[np.triu_indices(width)] = upper
    matrix.T[np.triu_indices(width)] = upper
    return matrix
