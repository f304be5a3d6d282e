"""HunyuanVideo-1.5. Queries, keys and values are apart in the original code and together in ComfyUI."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, Trained
from lycoris.models.families.flux1 import DOUBLE, FINAL, embedders
from lycoris.models.families.hunyuanvideo import COMFYUI_CONTEXT, CONTEXT, DOUBLE_REST, timestep
from lycoris.models.families.naming import Rename, Table, inside
from lycoris.models.families.text_encoders import T5

_INPUTS = (
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
                *inside(
                    "double_blocks.*",
                    "transformer_blocks.*",
                    Rename("img_attn_q", "attn.to_q"),
                    Rename("img_attn_k", "attn.to_k"),
                    Rename("img_attn_v", "attn.to_v"),
                    Rename("txt_attn_q", "attn.add_q_proj"),
                    Rename("txt_attn_k", "attn.add_k_proj"),
                    Rename("txt_attn_v", "attn.add_v_proj"),
                    *DOUBLE_REST,
                ),
                *CONTEXT,
                *_INPUTS,
                *timestep("time_in", "time_embed.timestep_embedder"),
                *timestep("time_r_in", "time_embed.timestep_embedder_r"),
                *FINAL,
            )
        ),
        "comfyui": Table(
            (
                *inside("double_blocks.*", "transformer_blocks.*", *DOUBLE),
                *COMFYUI_CONTEXT,
                *_INPUTS,
                *embedders("time_in", "time_embed.timestep_embedder"),
                *embedders("time_r_in", "time_embed.timestep_embedder_r"),
                *FINAL,
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
    musubi=Trained(("MMDoubleStreamBlock",), (r".*(_in).*",)),
)

FAMILY = Family(
    name="hunyuanvideo-1.5",
    components={"": TRANSFORMER.name, "text_encoder_2": T5.name},
    kohya={"lora_unet": ""},
    versions=("hunyuan-video-1.5", "hunyuan_video_1_5"),
)
ARCHITECTURES = (TRANSFORMER,)
