"""What each architecture calls its blocks and layers, and what it is called with: data, not code.

A family is found through the class name of the denoiser in `model_index.json` and, where models of one class
are called differently, through settings of its `config.json`. Adding one is adding a file here and a line in
``families``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qlip_export.errors import QlipError
from qlip_export.spec import Granularity, Unit


@dataclass(frozen=True)
class BlockPattern:
    """Modules whose path starts with ``pattern`` belong to block ``name`` (a regex template)."""

    pattern: str
    name: str

    def match(self, module_path: str) -> str | None:
        """Return the block name for a module path, or ``None`` where the pattern does not apply."""
        found = re.match(rf"(?:{self.pattern})(?=\.|$)", module_path)
        return found.expand(self.name) if found else None


@dataclass(frozen=True)
class DenoiserInput:
    """An input of the denoiser's graph, and what the diffusers class calls it.

    Attributes:
        name: Of the graph input.
        argument: Keyword argument of ``forward``; ``a.b`` is entry ``b`` of the dictionary ``a``.
        shape: Numbers, and names of what `Dimension` or the build's shapes say.
        divisor: What the diffusers pipeline divides the value by before the call.
    """

    name: str
    argument: str
    shape: tuple[int | str, ...]
    divisor: float = 1.0


@dataclass(frozen=True)
class ConfigValue:
    """A number that stands in the config of a component: ``key``, less ``minus`` times the key ``times``."""

    component: str
    key: str
    minus: int = 0
    times: str = ""

    def read(self, config: Mapping[str, Any]) -> Any:
        """Return the value, or ``None`` where the config has none."""
        value = config.get(self.key)
        if value is None or not self.minus:
            return value
        return value - self.minus * config[self.times]


Dimension = int | ConfigValue
"""A number of the architecture: the same for all models of a family, or read from a config."""


@dataclass(frozen=True)
class Family:
    """Names of one denoiser architecture.

    Attributes:
        name: Short name, e.g. ``unet``.
        denoiser_class: diffusers class of the denoiser.
        denoiser_folder: Its folder in the diffusers layout.
        config: Settings that its ``config.json`` must have; ``None`` and ``False`` match absence as well.
        inputs: What the graph is called with; ``latents`` and ``timestep`` come first.
        dimensions: What shapes are made of: ``latent_channels``, ``latent_size`` (of a native image), and
            what `inputs` name.
        guided: Runs are guided by a second, unconditional half of the batch.
        patch: Latents enter as tokens of ``patch`` x ``patch`` latents; 1 for convolutional stems. The graph
            packs and unpacks them: outside of it, latents are (N, C, H, W) in every family.
        blocks: For every granularity it has, the block patterns; the first match wins.
        high_precision_layers: Patterns of layers whose activations never go below 16 bits.
        float32_blocks: Blocks that are computed in FP32 at every bit option (the sinusoids of the timestep).
        position_ids: Arguments that number tokens, (tokens, 3), and what they number: ``text`` or ``image``.
        position_embedding: Module that is called with all of these, one after the other. What it returns
            depends on nothing but the shapes, so it is computed at capture.
    """

    name: str
    denoiser_class: str
    denoiser_folder: str
    inputs: tuple[DenoiserInput, ...]
    dimensions: dict[str, Dimension]
    blocks: dict[Granularity, tuple[BlockPattern, ...]]
    high_precision_layers: tuple[str, ...]
    float32_blocks: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    guided: bool = True
    patch: int = 1
    position_ids: dict[str, str] = field(default_factory=dict)
    position_embedding: str | None = None

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the graph's inputs, in order."""
        return tuple(i.name for i in self.inputs)

    def fits(self, config: Mapping[str, Any]) -> bool:
        """Say whether a denoiser of this class and config is called as this family is."""
        return all((config.get(key) or None) == (value or None) for key, value in self.config.items())

    def block_of(self, module_path: str, granularity: Granularity) -> str | None:
        """Return the block a module belongs to, or ``None`` for modules between blocks.

        Raises:
            QlipError: The family is not cut at this granularity.
        """
        if granularity not in self.blocks:
            raise QlipError(
                f"the family {self.name} is not cut at {granularity!r}",
                expected=", ".join(self.blocks),
                found=granularity,
                fix="choose another --blocks",
            )
        for pattern in self.blocks[granularity]:
            name = pattern.match(module_path)
            if name is not None:
                return name
        return None

    def units_of(
        self, layers: Sequence[str], unit: Unit, granularity: Granularity
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Return the names of a policy's units, and which of them each of ``layers`` belongs to.

        Raises:
            QlipError: A layer lies in no block.
        """
        if unit == "layer":
            return tuple(layers), tuple(range(len(layers)))
        blocks = [self.block_of(layer, granularity) for layer in layers]
        if None in blocks:
            raise QlipError(
                f"layer {layers[blocks.index(None)]!r} lies outside of all blocks",
                fix="name it in qlip_export/families/",
            )
        units = tuple(dict.fromkeys(b for b in blocks if b is not None))
        return units, tuple(units.index(b) for b in blocks if b is not None)

    def quantizes(self, layer: str) -> bool:
        """Say whether the policy may lower the activation bits of ``layer``."""
        return not any(re.fullmatch(p, layer) for p in self.high_precision_layers)


def families() -> tuple[Family, ...]:
    """Return all families; the first that fits a config is taken."""
    from qlip_export.families.flux import FLUX, FLUX_SCHNELL
    from qlip_export.families.sdxl import SDXL
    from qlip_export.families.unet import UNET

    return (UNET, SDXL, FLUX, FLUX_SCHNELL)


def family_of(denoiser_class: str, config: Mapping[str, Any]) -> Family:
    """Return the family of a diffusers denoiser class with this ``config.json``.

    Raises:
        QlipError: No family knows the class, or none is called as this config wants it.
    """
    known = [f for f in families() if f.denoiser_class == denoiser_class]
    if not known:
        raise QlipError(
            f"no family knows the denoiser class {denoiser_class!r}",
            expected=", ".join(sorted({f.denoiser_class for f in families()})),
            found=denoiser_class,
            fix="name its blocks and layers in qlip_export/families/: docs/adding-a-model.md",
        )
    for family in known:
        if family.fits(config):
            return family
    keys = sorted({key for f in known for key in f.config})
    raise QlipError(
        f"no family is called as this {denoiser_class} is",
        expected=" or ".join(f"{f.name} ({_settings(f.config, f.config)})" for f in known),
        found=_settings(config, keys),
        fix="use a text-to-image model without inpainting, class labels or image conditioning",
    )


def _settings(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    return ", ".join(f"{key} {config.get(key)}" for key in keys)
