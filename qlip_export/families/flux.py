"""`FluxTransformer2DModel`: FLUX.1-dev, which takes the guidance scale as an input, and FLUX.1-schnell."""

from __future__ import annotations

from dataclasses import replace

from qlip_export.families import BlockPattern, ConfigValue, DenoiserInput, Family

# Modulation and gates come from the timestep's embedding: `norm` holds the Linear that makes them.
_TIME = BlockPattern(r"time_text_embed", "time")
_STEM = BlockPattern(r"x_embedder|context_embedder", "stem")
_OUT = BlockPattern(r"norm_out|proj_out", "out")

FLUX = Family(
    name="flux",
    denoiser_class="FluxTransformer2DModel",
    denoiser_folder="transformer",
    config={"guidance_embeds": True},
    inputs=(
        DenoiserInput(
            "latents", "hidden_states", ("batch", "latent_channels", "latent_height", "latent_width")
        ),
        DenoiserInput("timestep", "timestep", (1,), divisor=1000.0),
        DenoiserInput("text", "encoder_hidden_states", ("batch", "text_length", "text_width")),
        DenoiserInput("pooled", "pooled_projections", ("batch", "pooled_width")),
        DenoiserInput("guidance", "guidance", (1,)),
    ),
    dimensions={
        "latent_channels": ConfigValue("vae", "latent_channels"),
        "latent_size": 128,
        "text_length": 512,
        "text_width": ConfigValue("transformer", "joint_attention_dim"),
        "pooled_width": ConfigValue("transformer", "pooled_projection_dim"),
    },
    guided=False,
    patch=2,
    position_ids={"txt_ids": "text", "img_ids": "image"},
    position_embedding="pos_embed",
    blocks={
        "coarse": (
            _TIME,
            _STEM,
            BlockPattern(r"((?:single_)?transformer_blocks\.\d+)", r"\1"),
            _OUT,
        ),
        "fine": (
            _TIME,
            _STEM,
            BlockPattern(r"(transformer_blocks\.\d+)\.(?:norm1|norm1_context|attn)", r"\1.attn"),
            BlockPattern(r"(transformer_blocks\.\d+)\.(?:norm2|norm2_context|ff|ff_context)", r"\1.ff"),
            BlockPattern(r"(single_transformer_blocks\.\d+)", r"\1"),
            _OUT,
        ),
        "whole": (_TIME, BlockPattern(r".*", "denoiser")),
    },
    # As in the UNet: what reads the timestep's embedding instead of the image's or the text's tokens.
    high_precision_layers=(
        r"time_text_embed\..*",
        r"transformer_blocks\.\d+\.norm1(_context)?\.linear",
        r"single_transformer_blocks\.\d+\.norm\.linear",
        r"norm_out\.linear",
    ),
    float32_blocks=("time",),
)

FLUX_SCHNELL = replace(
    FLUX,
    name="flux-schnell",
    config={"guidance_embeds": False},
    inputs=tuple(i for i in FLUX.inputs if i.name != "guidance"),
    dimensions=FLUX.dimensions | {"text_length": 256},
)
