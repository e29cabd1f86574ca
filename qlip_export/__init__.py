"""Compile text-to-image diffusion models into engines whose precision follows the prompt."""

__version__ = "0.1.0"
