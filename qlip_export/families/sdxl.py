"""Stable Diffusion XL: the same class as 1.x, told the pooled text and the image's size and crop as well."""

from __future__ import annotations

from dataclasses import replace

from qlip_export.families import ConfigValue, DenoiserInput
from qlip_export.families.unet import UNET

SIZE_AND_CROP = 6
"""Original height and width, top and left of the crop, target height and width, in pixels."""

SDXL = replace(
    UNET,
    name="sdxl",
    config=UNET.config | {"addition_embed_type": "text_time"},
    inputs=(
        *UNET.inputs,
        DenoiserInput("pooled", "added_cond_kwargs.text_embeds", ("batch", "pooled_width")),
        DenoiserInput("time_ids", "added_cond_kwargs.time_ids", ("batch", SIZE_AND_CROP)),
    ),
    dimensions=UNET.dimensions
    | {
        # The embedding takes the pooled text beside a sinusoid of each of the six numbers.
        "pooled_width": ConfigValue(
            "unet", "projection_class_embeddings_input_dim", SIZE_AND_CROP, "addition_time_embed_dim"
        )
    },
    high_precision_layers=(*UNET.high_precision_layers, r"add_embedding\.linear_[12]"),
)
