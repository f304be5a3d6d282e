"""HunyuanVideo-1.5. Queries, keys and values are apart in the original code and together in ComfyUI."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, MusubiTargets
from lycoris.models.families.flux1 import FLUX1_DOUBLE, FLUX1_FINAL, rename_embedder
from lycoris.models.families.hunyuanvideo import (
    COMFYUI_CONTEXT,
    CONTEXT,
    HUNYUANVIDEO_DOUBLE_REST,
    rename_time_embedding,
)
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.text_encoders import T5_ENCODER

_HUNYUANVIDEO15_INPUTS = (
    Rename("img_in", "x_embedder"),
    Rename("byt5_in.layernorm", "context_embedder_2.norm"),
    Rename("byt5_in.fc1", "context_embedder_2.linear_1"),
    Rename("byt5_in.fc2", "context_embedder_2.linear_2"),
    Rename("byt5_in.fc3", "context_embedder_2.linear_3"),
    Rename("vision_in.proj.0", "image_embedder.norm_in"),
    Rename("vision_in.proj.1", "image_embedder.linear_1"),
    Rename("vision_in.proj.3", "image_embedder.linear_2"),
    Rename("vision_in.proj.4", "image_embedder.norm_out"),
    Rename("cond_type_embedding", "cond_type_embed"),
)

TRANSFORMER = Architecture(
    name="hunyuanvideo-1.5",
    classes=("HunyuanVideo15Transformer3DModel", "HunyuanVideo_1_5_DiffusionTransformer"),
    models={
        "hunyuanvideo-1.5": {},
    },
    namings={
        "original": Table(
            (
                *rename_inside(
                    "double_blocks.*",
                    "transformer_blocks.*",
                    Rename("img_attn_q", "attn.to_q"),
                    Rename("img_attn_k", "attn.to_k"),
                    Rename("img_attn_v", "attn.to_v"),
                    Rename("txt_attn_q", "attn.add_q_proj"),
                    Rename("txt_attn_k", "attn.add_k_proj"),
                    Rename("txt_attn_v", "attn.add_v_proj"),
                    *HUNYUANVIDEO_DOUBLE_REST,
                ),
                *CONTEXT,
                *_HUNYUANVIDEO15_INPUTS,
                *rename_time_embedding("time_in", "time_embed.timestep_embedder"),
                *rename_time_embedding("time_r_in", "time_embed.timestep_embedder_r"),
                *FLUX1_FINAL,
            )
        ),
        "comfyui": Table(
            (
                *rename_inside("double_blocks.*", "transformer_blocks.*", *FLUX1_DOUBLE),
                *COMFYUI_CONTEXT,
                *_HUNYUANVIDEO15_INPUTS,
                *rename_embedder("time_in", "time_embed.timestep_embedder"),
                *rename_embedder("time_r_in", "time_embed.timestep_embedder_r"),
                *FLUX1_FINAL,
            )
        ),
    },
    blocks=(
        *("HunyuanVideo15TransformerBlock", "HunyuanVideo15IndividualTokenRefinerBlock"),
        "MMDoubleStreamBlock",
    ),
    attention=(
        "Attention",
        *(f"MMDoubleStreamBlock.{side}_attn_{what}" for side in ("img", "txt") for what in ("q", "k", "v", "proj")),
    ),
    feed_forward=("FeedForward", "MLP"),
    musubi_targets=MusubiTargets(("MMDoubleStreamBlock",), (r".*(_in).*",)),
)

FAMILY = Family(
    name="hunyuanvideo-1.5",
    components={"": TRANSFORMER.name, "text_encoder_2": T5_ENCODER.name},
    kohya={"lora_unet": ""},
    versions=("hunyuan-video-1.5", "hunyuan_video_1_5"),
)
ARCHITECTURES = (TRANSFORMER,)
