"""Kandinsky 5, for pictures and video. Its code has the names of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.text_encoders import CLIP

_LATENTS: Mapping[str, Any] = {"in_visual_dim": 16, "out_visual_dim": 16}
_LARGE_AXES: Mapping[str, Any] = {"axes_dims": [32, 48, 48]}

TRANSFORMER = Architecture(
    name="kandinsky5",
    classes=("Kandinsky5Transformer3DModel", "DiffusionTransformer3D"),
    models={
        "kandinsky5-lite-video": {**_LATENTS, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True},
        "kandinsky5-lite-image": {
            **_LATENTS,
            **_LARGE_AXES,
            "model_dim": 2560,
            "ff_dim": 10240,
            "num_visual_blocks": 50,
        },
        "kandinsky5-pro-video": {
            **_LATENTS,
            **_LARGE_AXES,
            "model_dim": 4096,
            "ff_dim": 16384,
            "time_dim": 1024,
            "num_text_blocks": 4,
            "num_visual_blocks": 60,
            "visual_cond": True,
        },
    },
    blocks=(
        *("Kandinsky5TransformerEncoderBlock", "Kandinsky5TransformerDecoderBlock"),
        *("TransformerEncoderBlock", "TransformerDecoderBlock"),
    ),
    attention=(
        "Kandinsky5Attention",
        *("MultiheadSelfAttentionEnc", "MultiheadSelfAttentionDec", "MultiheadCrossAttention"),
    ),
    feed_forward=("Kandinsky5FeedForward", "FeedForward"),
)

FAMILY = Family(
    name="kandinsky5",
    components={"": TRANSFORMER.name, "text_encoder_2": CLIP.name},
    comfyui={"clip_l": "text_encoder_2"},
    versions=("kandinsky-5", "kandinsky5", "kandinsky_5"),
)
ARCHITECTURES = (TRANSFORMER,)
