"""The light half: loads a bundle and makes images. Nothing here imports torch, diffusers or ONNX."""

from qlip_export.runtime.pipeline import Generation, TextToImage

__all__ = ["Generation", "TextToImage"]
