"""PixArt: Alpha and Sigma."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.text_encoders import T5_ENCODER

PIXART_ATTENTION = rename_inside(
    "blocks.*",
    "transformer_blocks.*",
    Rename("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    Rename("attn.proj", "attn1.to_out.0"),
    Rename("cross_attn.q_linear", "attn2.to_q"),
    Rename("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
    Rename("cross_attn.proj", "attn2.to_out.0"),
)
"""Of Sana too."""
PIXART_CAPTION = (
    Rename("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    Rename("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
)
PIXART_FINAL = (
    Rename("final_layer.linear", "proj_out"),
    Rename("final_layer.scale_shift_table", "scale_shift_table"),
    Rename("blocks.*.scale_shift_table", "transformer_blocks.*.scale_shift_table"),
)

TRANSFORMER = Architecture(
    name="pixart",
    classes=("PixArtTransformer2DModel", "PixArtMS"),
    models={
        "pixart-alpha": {"caption_channels": 4096, "use_additional_conditions": True},
        "pixart-sigma": {"caption_channels": 4096, "use_additional_conditions": False},
    },
    namings={
        "original": Table(
            (
                *PIXART_ATTENTION,
                *rename_inside(
                    "blocks.*",
                    "transformer_blocks.*",
                    Rename("mlp.fc1", "ff.net.0.proj"),
                    Rename("mlp.fc2", "ff.net.2"),
                ),
                Rename("x_embedder.proj", "pos_embed.proj"),
                Rename("t_embedder.mlp.0", "adaln_single.emb.timestep_embedder.linear_1"),
                Rename("t_embedder.mlp.2", "adaln_single.emb.timestep_embedder.linear_2"),
                Rename("csize_embedder.mlp.0", "adaln_single.emb.resolution_embedder.linear_1"),
                Rename("csize_embedder.mlp.2", "adaln_single.emb.resolution_embedder.linear_2"),
                Rename("ar_embedder.mlp.0", "adaln_single.emb.aspect_ratio_embedder.linear_1"),
                Rename("ar_embedder.mlp.2", "adaln_single.emb.aspect_ratio_embedder.linear_2"),
                Rename("t_block.1", "adaln_single.linear"),
                *PIXART_CAPTION,
                *PIXART_FINAL,
            )
        ),
    },
    blocks=("BasicTransformerBlock", "PixArtBlock", "PixArtMSBlock"),
    attention=("Attention",),
    feed_forward=("FeedForward",),
)

FAMILY = Family(
    name="pixart",
    components={"": TRANSFORMER.name, "text_encoder": T5_ENCODER.name},
    comfyui={"t5xxl": "text_encoder"},
    versions=("pixart",),
)
ARCHITECTURES = (TRANSFORMER,)
