"""What each architecture calls its blocks and layers: data, not code.

A family is found through the class name of the denoiser in `model_index.json`. Adding one is adding a file
here and a line in ``FAMILIES``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

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
class Family:
    """Names of one denoiser architecture.

    Attributes:
        name: Short name, e.g. ``unet``.
        denoiser_class: diffusers class of the denoiser.
        denoiser_folder: Its folder in the diffusers layout.
        blocks: For every granularity the block patterns, the first match wins.
        high_precision_layers: Patterns of layers whose activations never go below 16 bits.
        float32_blocks: Blocks that are computed in FP32 at every bit option (the sinusoids of the timestep).
    """

    name: str
    denoiser_class: str
    denoiser_folder: str
    blocks: dict[Granularity, tuple[BlockPattern, ...]]
    high_precision_layers: tuple[str, ...]
    float32_blocks: tuple[str, ...]

    def block_of(self, module_path: str, granularity: Granularity) -> str | None:
        """Return the block a module belongs to, or ``None`` for modules between blocks."""
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


def family_of(denoiser_class: str) -> Family:
    """Return the family of a diffusers denoiser class.

    Raises:
        QlipError: No family knows the class.
    """
    from qlip_export.families.unet import UNET

    families = {f.denoiser_class: f for f in (UNET,)}
    if denoiser_class not in families:
        raise QlipError(
            f"no family knows the denoiser class {denoiser_class!r}",
            expected=", ".join(sorted(families)),
            found=denoiser_class,
            fix="add a file to qlip_export/families/ that names its blocks and layers",
        )
    return families[denoiser_class]
