"""Mochi 1. The first layers of its feed-forwards have gate and value the other way round."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.text_encoders import T5_ENCODER

_LAST = 47
"""The last of its blocks, in which the modulation of the text has another class and name."""

TRANSFORMER = Architecture(
    name="mochi",
    classes=("MochiTransformer3DModel", "AsymmDiTJoint"),
    models={"mochi-1": {}},
    namings={
        "original": Table(
            (
                Rename(f"blocks.{_LAST}.mod_y", f"transformer_blocks.{_LAST}.norm1_context.linear_1"),
                *rename_inside(
                    "blocks.*",
                    "transformer_blocks.*",
                    Rename("mod_x", "norm1.linear"),
                    Rename("mod_y", "norm1_context.linear"),
                    Rename("attn.qkv_x", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
                    Rename("attn.qkv_y", ("attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj")),
                    Rename("attn.q_norm_x", "attn1.norm_q"),
                    Rename("attn.k_norm_x", "attn1.norm_k"),
                    Rename("attn.q_norm_y", "attn1.norm_added_q"),
                    Rename("attn.k_norm_y", "attn1.norm_added_k"),
                    Rename("attn.proj_x", "attn1.to_out.0"),
                    Rename("attn.proj_y", "attn1.to_add_out"),
                    Rename("mlp_x.w1", "ff.net.0.proj", gated=True),
                    Rename("mlp_x.w2", "ff.net.2"),
                    Rename("mlp_y.w1", "ff_context.net.0.proj", gated=True),
                    Rename("mlp_y.w2", "ff_context.net.2"),
                ),
                Rename("x_embedder.proj", "patch_embed.proj"),
                Rename("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
                Rename("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
                Rename("t5_y_embedder", "time_embed.pooler"),
                Rename("t5_yproj", "time_embed.caption_proj"),
                Rename("final_layer.mod", "norm_out.linear", swapped=True),
                Rename("final_layer.linear", "proj_out"),
            )
        ),
    },
    blocks=("MochiTransformerBlock", "AsymmetricJointBlock"),
    attention=("MochiAttention", "AsymmetricAttention"),
    feed_forward=("FeedForward",),
    timestep="reversed steps",  # its scheduler has `invert_sigmas`: its timesteps run from 0 (noise) to T (clean)
)

FAMILY = Family(
    name="mochi",
    components={"": TRANSFORMER.name, "text_encoder": T5_ENCODER.name},
    comfyui={"t5xxl": "text_encoder"},
    versions=("mochi", "genmo"),
)
ARCHITECTURES = (TRANSFORMER,)
