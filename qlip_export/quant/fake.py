"""The quantized denoiser in torch: the same grids as the engines, at any bits for any layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from qlip_export.errors import QlipError
from qlip_export.quant.ranges import activation_scale


def fake_quantize(x: Tensor, threshold: float, bits: int) -> Tensor:
    """Round ``x`` to what a container of ``bits`` holds, as float32.

    Up to 8 bits: the symmetric grid of the engines, ties to even. 9 to 16 bits: FP16. 32: ``x`` itself.
    """
    if bits <= 8:
        scale, limit = activation_scale(threshold, bits), 2 ** (bits - 1) - 1
        # INT8's lowest code is reachable in the engines, so it is here.
        lowest = -128 if bits == 8 else -limit
        return torch.clamp(torch.round(x / scale), lowest, limit) * scale
    if bits <= 16:
        return x.half().float()
    return x


class FakeQuantizer:
    """Quantizes the inputs of a denoiser's layers as it runs, through hooks.

    Layers that are not named in `set_bits` stay as they are.
    """

    def __init__(self, denoiser: nn.Module, thresholds: Mapping[int, Mapping[str, float]]) -> None:
        """Attach to ``denoiser``.

        Args:
            denoiser: Its Conv2d and Linear modules are the layers, by their module path.
            thresholds: Clipping threshold by bits (those up to 8) and layer.
        """
        self._thresholds = thresholds
        self._bits: dict[str, int] = {}
        self._layers = {
            name: module
            for name, module in denoiser.named_modules()
            if isinstance(module, (nn.Conv2d, nn.Linear))
        }
        self._handles = [
            module.register_forward_pre_hook(self._hook(name)) for name, module in self._layers.items()
        ]

    def set_bits(self, bits: Mapping[str, int]) -> None:
        """Choose the activation bits of layers from now on.

        Raises:
            QlipError: No such layer, or no range for it at these bits.
        """
        for name, option in bits.items():
            if name not in self._layers:
                raise QlipError(f"the denoiser has no layer {name!r}")
            if option <= 8 and name not in self._thresholds.get(option, {}):
                raise QlipError(f"no {option}-bit range for layer {name!r}", fix="calibrate again")
        self._bits = dict(bits)

    def remove(self) -> None:
        """Detach from the denoiser."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...] | None]:
        def quantize_input(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            bits = self._bits.get(name)
            if bits is None:
                return None
            threshold = self._thresholds[bits][name] if bits <= 8 else 0.0
            return (fake_quantize(args[0], threshold, bits), *args[1:])

        return quantize_input
