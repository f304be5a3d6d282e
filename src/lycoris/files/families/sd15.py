"""Stable Diffusion 1.x."""

from __future__ import annotations

from lycoris.files.families.text_encoders import CLIP
from lycoris.files.family import Architecture, Family
from lycoris.files.sgm import UNet

UNET = Architecture(
    name="sd1.5-unet",
    classes=("UNet2DConditionModel", "UNetModel"),
    outlines=("sd-1.5",),
    namings={"sgm": UNet(plain=frozenset({0}))},
    targets=("Transformer2DModel", "SpatialTransformer"),
)

FAMILY = Family(
    name="sd1.5",
    components={"": UNET.name, "text_encoder": CLIP.name},
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    objective="epsilon",
    kohya={"lora_unet": "", "lora_te": "text_encoder", "lora_te1": "text_encoder"},
    comfyui={"clip_l": "text_encoder"},
    versions=("sd_v1", "sd_1", "stable-diffusion-v1"),
)
ARCHITECTURES = (UNET,)
