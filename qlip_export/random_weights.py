"""A model of which only the configs are known: random weights of the right shapes, made one at a time.

They stand in for real ones where speed, memory or sizes are wanted, before anything is downloaded. Each
depends on seed and name alone, so a build that goes on makes the same ones.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qlip_export.checkpoint import Checkpoint, Component
from qlip_export.errors import QlipError
from qlip_export.files import content_key
from qlip_export.quant.layers import layers_of
from qlip_export.quant.ranges import RANGE_BITS, LayerRange, Ranges, Recipe

ASSUMED_RANGE = 4.0
"""End of the grid of every layer: activations of random weights are of order one."""

RESIDUAL_ENDS = ("conv2.weight", "proj_out.weight", "to_out.0.weight", "to_add_out.weight", "net.2.weight")
"""What closes a residual branch. It is small in trained networks too; so activations stay of order one."""


@dataclass(frozen=True)
class RandomComponent(Component):
    """A part of a model whose parameters are drawn when they are asked for, in FP16."""

    library: str
    class_name: str
    seed: int

    @cached_property
    def names(self) -> dict[str, tuple[int, ...]]:
        """The shape of each parameter, by name; a CLIP text encoder's projection too: T2Q begins with it."""
        module = module_of(self.library, self.class_name, self.config)
        shapes = {name: tuple(parameter.shape) for name, parameter in module.state_dict().items()}
        if self.class_name.startswith("CLIPTextModel"):
            width = self.config["hidden_size"]
            shapes.setdefault("text_projection.weight", (self.config.get("projection_dim", width), width))
        return shapes

    def require_weights(self) -> None:
        """There is nothing to open."""

    def shape_of(self, stored: str) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self.names[stored]

    def _read(self, stored: str) -> NDArray[Any]:
        return draw(stored, self.names[stored], self.seed)

    @cached_property
    def fingerprint(self) -> str:
        """Changes with config and seed."""
        key = content_key("random weights", self.seed, self.config)
        return hashlib.sha256(key.encode()).hexdigest()


class RandomCheckpoint(Checkpoint):
    """A model whose folder need not hold weights or tokenizers."""

    def __init__(self, folder: Path, seed: int, tokenizer: Path) -> None:
        """Read `model_index.json` of ``folder``; ``tokenizer`` stands in for those that the folder lacks.

        Raises:
            QlipError: The folder is absent or is no diffusers model.
        """
        super().__init__(folder)
        self.seed = seed
        self._tokenizer = tokenizer

    @property
    def random_seed(self) -> int | None:
        """Seed of the weights."""
        return self.seed

    def folder_of(self, name: str) -> Path:
        """Return where a component's files lie."""
        return self._tokenizer if self._lacks(name) else super().folder_of(name)

    def class_of(self, name: str) -> str:
        """Return the class of a component, or of the tokenizer that stands in for it."""
        listed = super().class_of(name)
        return "CLIPTokenizer" if self._lacks(name) else listed

    def _lacks(self, name: str) -> bool:
        return name.startswith("tokenizer") and not super().folder_of(name).is_dir()

    def component(self, name: str) -> Component:
        """Return a component by its folder name."""
        made = RandomComponent(self.folder_of(name), self.library_of(name), self.class_of(name), self.seed)
        return self._components.setdefault(name, made)


def assumed_ranges(checkpoint: Checkpoint, denoiser: str) -> Ranges:
    """Return ranges for all layers of a denoiser of random weights: the same grid for each.

    Measured ones would say nothing more: engines are as fast whatever their scales are.
    """
    part = checkpoint.component(denoiser)
    module = module_of(checkpoint.library_of(denoiser), checkpoint.class_of(denoiser), part.config)
    same = LayerRange(maximum=ASSUMED_RANGE, thresholds=dict.fromkeys(RANGE_BITS, ASSUMED_RANGE))
    recipe = Recipe(
        prompts_sha256="",
        prompts=0,
        steps=0,
        scheduler="",
        guidance=0,
        seed=0,
        method="assumed, not measured",
        random_weights=checkpoint.random_seed,
    )
    return Ranges(fingerprint=part.fingerprint, recipe=recipe, layers=dict.fromkeys(layers_of(module), same))


def random_pipeline(checkpoint: Checkpoint) -> Any:
    """Return the diffusers pipeline of a model with its random weights, in FP32 on the CPU."""
    import diffusers
    import transformers

    parts: dict[str, Any] = {n: None for n, v in checkpoint.index.items() if v == [None, None]}
    for name in checkpoint:
        class_name = checkpoint.class_of(name)
        if name == "scheduler":
            parts[name] = getattr(diffusers, class_name).from_pretrained(checkpoint.folder, subfolder=name)
        elif name.startswith("tokenizer"):
            parts[name] = getattr(transformers, class_name).from_pretrained(checkpoint.folder_of(name))
        else:
            component = checkpoint.component(name)
            module = module_of(checkpoint.library_of(name), class_name, component.config)
            for path, parameter in list(module.named_parameters()):
                owner, _, attribute = path.rpartition(".")
                values = torch.from_numpy(component.get(path)).float()
                setattr(
                    module.get_submodule(owner),
                    attribute,
                    torch.nn.Parameter(values, parameter.requires_grad),
                )
            parts[name] = module.eval()
    settings = {n: v for n, v in checkpoint.index.items() if isinstance(v, bool)}
    return getattr(diffusers, checkpoint.index["_class_name"])(**parts, **settings)


def module_of(
    library: str, class_name: str, config: dict[str, Any], *, meta: bool = False
) -> torch.nn.Module:
    """Return a module of diffusers or transformers with its parameters, or all of it, on the meta device.

    Raises:
        QlipError: The library has no such class.
    """
    kind = getattr(importlib.import_module(library), class_name, None)
    if kind is None:
        raise QlipError(f"{library} has no class {class_name!r}", fix="update it, or use another model")
    from accelerate import init_empty_weights

    with torch.device("meta") if meta else init_empty_weights(include_buffers=False):
        if library == "diffusers":
            return kind.from_config(config)
        return kind(kind.config_class.from_dict(config))


def draw(name: str, shape: tuple[int, ...], seed: int) -> NDArray[np.float16]:
    """Return the parameter of this name and seed: normal with variance 1 / inputs, norms 1, biases 0."""
    if len(shape) < 2:
        return np.full(shape, 1 if name.endswith("weight") else 0, np.float16)
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    rng = np.random.Generator(np.random.SFC64(int.from_bytes(digest[:16], "little")))
    values = rng.standard_normal(shape, dtype=np.float32)
    values *= (0.3 if name.endswith(RESIDUAL_ENDS) else 1.0) / np.sqrt(prod(shape[1:]))
    return values.astype(np.float16)
