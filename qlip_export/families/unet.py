"""`UNet2DConditionModel`: Stable Diffusion 1.x, BK-SDM and the embedded emoji model."""

from __future__ import annotations

from qlip_export.families import BlockPattern, ConfigValue, DenoiserInput, Family

_TIME = BlockPattern(r"time_proj|time_embedding|add_time_proj|add_embedding", "time")
_STEM = BlockPattern(r"conv_in", "stem")
_OUT = BlockPattern(r"conv_norm_out|conv_act|conv_out", "out")

UNET = Family(
    name="unet",
    denoiser_class="UNet2DConditionModel",
    denoiser_folder="unet",
    config={"addition_embed_type": None, "class_embed_type": None, "encoder_hid_dim_type": None},
    inputs=(
        DenoiserInput("latents", "sample", ("batch", "latent_channels", "latent_height", "latent_width")),
        DenoiserInput("timestep", "timestep", (1,)),
        DenoiserInput("text", "encoder_hidden_states", ("batch", "text_length", "text_width")),
    ),
    dimensions={
        "latent_channels": ConfigValue("unet", "in_channels"),
        "latent_size": ConfigValue("unet", "sample_size"),
        "text_length": ConfigValue("text_encoder", "max_position_embeddings"),
        "text_width": ConfigValue("unet", "cross_attention_dim"),
    },
    blocks={
        "coarse": (
            _TIME,
            _STEM,
            BlockPattern(r"((?:down|up)_blocks\.\d+|mid_block)", r"\1"),
            _OUT,
        ),
        "fine": (
            _TIME,
            _STEM,
            BlockPattern(
                r"((?:(?:down|up)_blocks\.\d+|mid_block)\.(?:resnets|attentions|downsamplers|upsamplers)\.\d+)",
                r"\1",
            ),
            _OUT,
        ),
        "whole": (_TIME, BlockPattern(r".*", "denoiser")),
    },
    # The paper quantizes 141 of BK-SDM-Tiny's 151 layers; these ten are what it leaves out (our reading).
    high_precision_layers=(r"time_embedding\.linear_[12]", r".*\.conv_shortcut"),
    # Timesteps up to 1000 have no place in 8 mantissa bits: at 16 bits the embedding is off by 40 %.
    float32_blocks=("time",),
)
