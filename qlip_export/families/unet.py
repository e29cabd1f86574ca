"""`UNet2DConditionModel`: Stable Diffusion 1.x, BK-SDM and the embedded emoji model."""

from __future__ import annotations

from qlip_export.families import BlockPattern, Family

_TIME = BlockPattern(r"time_proj|time_embedding|add_time_proj|add_embedding", "time")
_STEM = BlockPattern(r"conv_in", "stem")
_OUT = BlockPattern(r"conv_norm_out|conv_act|conv_out", "out")

UNET = Family(
    name="unet",
    denoiser_class="UNet2DConditionModel",
    denoiser_folder="unet",
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
