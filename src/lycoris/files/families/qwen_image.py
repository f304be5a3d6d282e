"""Qwen-Image, its editing models and the layered one. The original code has the names of diffusers."""

from __future__ import annotations

from lycoris.files.family import Architecture, Family

TRANSFORMER = Architecture(
    name="qwen-image",
    classes=("QwenImageTransformer2DModel",),
    outlines=("qwen-image",),
    targets=("QwenImageTransformerBlock",),
    excludes=(r".*(_mod_).*",),
)

FAMILY = Family(
    name="qwen-image",
    components={"": TRANSFORMER.name},
    pipelines=(
        "QwenImagePipeline",
        "QwenImageImg2ImgPipeline",
        "QwenImageInpaintPipeline",
        "QwenImageEditPipeline",
        "QwenImageEditInpaintPipeline",
        "QwenImageEditPlusPipeline",
        "QwenImageLayeredPipeline",
    ),
    kohya={"lora_unet": ""},
    versions=("qwen-image", "qwen_image"),
)
ARCHITECTURES = (TRANSFORMER,)
