"""The layers of a denoiser: what is put on grids, and what has bits."""

from __future__ import annotations

from torch import nn


def layers_of(denoiser: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Return every Conv2d and Linear of a module by its path, in module order."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
