"""Qwen-Image, its editing models and the layered one. The original code has the names of diffusers."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, MusubiTargets

TRANSFORMER = Architecture(
    name="qwen-image",
    classes=("QwenImageTransformer2DModel",),
    models={
        "qwen-image": {},
    },
    blocks=("QwenImageTransformerBlock",),
    attention=("Attention",),
    feed_forward=("FeedForward",),
    musubi_targets=MusubiTargets(("QwenImageTransformerBlock",), (r".*(_mod_).*",)),
    timestep="fraction",
)

FAMILY = Family(
    name="qwen-image",
    components={"": TRANSFORMER.name},
    kohya={"lora_unet": ""},
    versions=("qwen-image", "qwen_image"),
)
ARCHITECTURES = (TRANSFORMER,)
