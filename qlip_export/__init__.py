"""Compile text-to-image diffusion models into block engines at several activation precisions."""

__version__ = "0.1.0"
