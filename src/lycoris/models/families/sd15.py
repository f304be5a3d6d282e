"""Stable Diffusion 1.x."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.sgm import UNet
from lycoris.models.families.text_encoders import CLIP

UNET = Architecture(
    name="sd1.5-unet",
    classes=("UNet2DConditionModel", "UNetModel"),
    models={
        "sd-1.5": {
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
            "layers_per_block": 2,
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        },
    },
    namings={"sgm": UNet(levels_without_attention=frozenset({0}))},
    blocks=("Transformer2DModel", "SpatialTransformer"),
    attention=("Attention", "CrossAttention"),
    feed_forward=("FeedForward",),
)

FAMILY = Family(
    name="sd1.5",
    components={"": UNET.name, "text_encoder": CLIP.name},
    kohya={"lora_unet": "", "lora_te": "text_encoder", "lora_te1": "text_encoder"},
    comfyui={"clip_l": "text_encoder"},
    versions=("sd_v1", "sd_1", "stable-diffusion-v1"),
)
ARCHITECTURES = (UNET,)
