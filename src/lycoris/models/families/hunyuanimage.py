"""HunyuanImage 2.1, a relative of HunyuanVideo for pictures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.flux1 import FLUX1_DOUBLE, FLUX1_FINAL, FLUX1_SINGLE, rename_embedder
from lycoris.models.families.hunyuanvideo import (
    COMFYUI_CONTEXT,
    CONTEXT,
    HUNYUANVIDEO_DOUBLE_ATTENTION,
    HUNYUANVIDEO_DOUBLE_REST,
    HUNYUANVIDEO_SINGLE,
    rename_time_embedding,
)
from lycoris.models.families.naming import Rename, Table, rename_inside

_HUNYUANIMAGE_INPUTS = (
    Rename("img_in", "x_embedder"),
    Rename("byt5_in.layernorm", "context_embedder_2.norm"),
    Rename("byt5_in.fc1", "context_embedder_2.linear_1"),
    Rename("byt5_in.fc2", "context_embedder_2.linear_2"),
    Rename("byt5_in.fc3", "context_embedder_2.linear_3"),
)
_TIMES: Mapping[str, str] = {
    "time_in": "time_guidance_embed.timestep_embedder",
    "time_r_in": "time_guidance_embed.timestep_embedder_r",
    "guidance_in": "time_guidance_embed.guidance_embedder",
}
_BASE: Mapping[str, Any] = {"text_embed_2_dim": 1472}

TRANSFORMER = Architecture(
    name="hunyuanimage",
    classes=("HunyuanImageTransformer2DModel", "HYImageDiffusionTransformer"),
    models={
        "hunyuanimage-2.1": _BASE,
        "hunyuanimage-2.1-distilled": {**_BASE, "guidance_embeds": True, "use_meanflow": True},
    },
    namings={
        "original": Table(
            (
                *rename_inside(
                    "double_blocks.*", "transformer_blocks.*", *HUNYUANVIDEO_DOUBLE_ATTENTION, *HUNYUANVIDEO_DOUBLE_REST
                ),
                *rename_inside("single_blocks.*", "single_transformer_blocks.*", *HUNYUANVIDEO_SINGLE),
                *CONTEXT,
                *_HUNYUANIMAGE_INPUTS,
                *(each for there, here in _TIMES.items() for each in rename_time_embedding(there, here)),
                *FLUX1_FINAL,
            )
        ),
        "comfyui": Table(
            (
                *rename_inside("double_blocks.*", "transformer_blocks.*", *FLUX1_DOUBLE),
                *rename_inside("single_blocks.*", "single_transformer_blocks.*", *FLUX1_SINGLE),
                *COMFYUI_CONTEXT,
                *_HUNYUANIMAGE_INPUTS,
                *(each for there, here in _TIMES.items() for each in rename_embedder(there, here)),
                *FLUX1_FINAL,
            )
        ),
    },
    blocks=(
        *("HunyuanImageTransformerBlock", "HunyuanImageSingleTransformerBlock"),
        "HunyuanImageIndividualTokenRefinerBlock",
        *("MMDoubleStreamBlock", "MMSingleStreamBlock"),
    ),
    attention=(
        "Attention",
        *(f"MMDoubleStreamBlock.{side}_attn_{what}" for side in ("img", "txt") for what in ("qkv", "proj")),
        "MMSingleStreamBlock.linear1",
    ),
    feed_forward=(
        "FeedForward",
        *("HunyuanImageSingleTransformerBlock.proj_mlp", "HunyuanImageSingleTransformerBlock.proj_out"),
        "MLP",
        *("MMSingleStreamBlock.linear1", "MMSingleStreamBlock.linear2"),
    ),
)

FAMILY = Family(
    name="hunyuanimage",
    components={"": TRANSFORMER.name},
    versions=("hunyuan-image", "hunyuan_image", "hunyuanimage"),
)
ARCHITECTURES = (TRANSFORMER,)
