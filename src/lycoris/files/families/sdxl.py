"""Stable Diffusion XL."""

from __future__ import annotations

from lycoris.files.families.text_encoders import CLIP, CLIP_WITH_PROJECTION
from lycoris.files.family import Architecture, Family
from lycoris.files.sgm import UNet

UNET = Architecture(
    name="sdxl-unet",
    classes=("UNet2DConditionModel", "UNetModel", "SdxlUNet2DConditionModel"),
    outlines=("sdxl",),
    namings={"sgm": UNet()},
    targets=("Transformer2DModel", "SpatialTransformer"),
)

FAMILY = Family(
    name="sdxl",
    components={"": UNET.name, "text_encoder": CLIP.name, "text_encoder_2": CLIP_WITH_PROJECTION.name},
    pipelines=("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    objective="epsilon",
    kohya={"lora_unet": "", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"},
    comfyui={"clip_l": "text_encoder", "clip_g": "text_encoder_2"},
    versions=("sdxl", "stable-diffusion-xl"),
)
ARCHITECTURES = (UNET,)
