"""Stable Diffusion XL."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.sgm import UNet
from lycoris.models.families.text_encoders import CLIP, CLIP_WITH_PROJECTION

UNET = Architecture(
    name="sdxl-unet",
    classes=("UNet2DConditionModel", "UNetModel", "SdxlUNet2DConditionModel"),
    models={
        "sdxl": {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    },
    namings={"sgm": UNet()},
    blocks=("Transformer2DModel", "SpatialTransformer"),
    attention=("Attention", "CrossAttention"),
    feed_forward=("FeedForward",),
)

FAMILY = Family(
    name="sdxl",
    components={"": UNET.name, "text_encoder": CLIP.name, "text_encoder_2": CLIP_WITH_PROJECTION.name},
    kohya={"lora_unet": "", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"},
    comfyui={"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    versions=("sdxl", "stable-diffusion-xl"),
)
ARCHITECTURES = (UNET,)
