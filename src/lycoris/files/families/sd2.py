"""Stable Diffusion 2.x."""

from __future__ import annotations

from lycoris.files.families.text_encoders import CLIP
from lycoris.files.family import Architecture, Family
from lycoris.files.sgm import UNet

UNET = Architecture(
    name="sd2-unet",
    classes=("UNet2DConditionModel", "UNetModel"),
    outlines=("sd-2.1",),
    namings={"sgm": UNet(plain=frozenset({0}))},
    targets=("Transformer2DModel", "SpatialTransformer"),
)

FAMILY = Family(
    name="sd2",
    components={"": UNET.name, "text_encoder": CLIP.name},
    pipelines=("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"),
    objective="v",
    kohya={"lora_unet": "", "lora_te": "text_encoder", "lora_te1": "text_encoder"},
    comfyui={"clip_h": "text_encoder"},
    versions=("sd_v2", "sd_2", "stable-diffusion-v2"),
)
ARCHITECTURES = (UNET,)
