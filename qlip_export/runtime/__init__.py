"""The light half: loads a bundle and makes images. Nothing here imports torch, diffusers or ONNX."""

from qlip_export.runtime.pipeline import Generation, Previews, TextToImage

__all__ = ["Generation", "Previews", "TextToImage"]
