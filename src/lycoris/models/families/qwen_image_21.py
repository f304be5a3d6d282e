"""Qwen-Image 2.1, another network than Qwen-Image. Its code has the names of diffusers; ComfyUI joins two of them."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table

TRANSFORMER = Architecture(
    name="qwen-image-2.1",
    classes=("QwenImage21Transformer2DModel",),
    models={"qwen-image-2.1": {}},
    namings={
        "comfyui": Table(
            (
                Rename(
                    "transformer_blocks.*.img_mlp.gate_up",
                    ("transformer_blocks.*.img_mlp.gate_layer", "transformer_blocks.*.img_mlp.proj"),
                ),
            )
        )
    },
    blocks=("QwenImage21TransformerBlock",),
    attention=("QwenImage21Attention",),
    feed_forward=("QwenImage21SwiGLUFeedForward",),
    timestep="fraction",
)

FAMILY = Family(
    name="qwen-image-2.1",
    components={"": TRANSFORMER.name},
    versions=("qwen-image-2.1", "qwen_image_2.1", "qwen_image_2_1", "qwen-image-21"),
)
ARCHITECTURES = (TRANSFORMER,)
