"""Sana, whose feed-forwards are convolutions."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.language_models import LANGUAGE_MODEL
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.pixart import PIXART_ATTENTION, PIXART_CAPTION, PIXART_FINAL

TRANSFORMER = Architecture(
    name="sana",
    classes=("SanaTransformer2DModel", "SanaMS"),
    models={
        "sana-1600m": {},
        "sana-600m": {
            "num_attention_heads": 36,
            "num_cross_attention_heads": 16,
            "cross_attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "num_layers": 28,
        },
    },
    namings={
        "original": Table(
            (
                *PIXART_ATTENTION,
                *rename_inside(
                    "blocks.*",
                    "transformer_blocks.*",
                    Rename("mlp.inverted_conv.conv", "ff.conv_inverted"),
                    Rename("mlp.depth_conv.conv", "ff.conv_depth"),
                    Rename("mlp.point_conv.conv", "ff.conv_point"),
                ),
                Rename("x_embedder.proj", "patch_embed.proj"),
                Rename("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
                Rename("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
                Rename("t_block.1", "time_embed.linear"),
                *PIXART_CAPTION,
                Rename("attention_y_norm", "caption_norm"),
                *PIXART_FINAL,
            )
        ),
    },
    blocks=("SanaTransformerBlock", "SanaMSBlock"),
    attention=("Attention", "SanaMultiscaleLinearAttention"),
    feed_forward=("GLUMBConv",),
)

FAMILY = Family(
    name="sana",
    components={"": TRANSFORMER.name, "text_encoder": LANGUAGE_MODEL.name},
    versions=("sana",),
)
ARCHITECTURES = (TRANSFORMER,)
