"""Wan 2.1 and 2.2. An A14B model of 2.2 is two networks: `transformer_2` takes over when little noise is left."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, MusubiTargets
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.text_encoders import T5_ENCODER

_WAN_ATTENTION = (
    Rename("q", "to_q"),
    Rename("k", "to_k"),
    Rename("v", "to_v"),
    Rename("o", "to_out.0"),
    Rename("k_img", "add_k_proj"),
    Rename("v_img", "add_v_proj"),
    Rename("norm_k_img", "norm_added_k"),
)

TRANSFORMER = Architecture(
    name="wan",
    classes=("WanTransformer3DModel", "WanModel"),
    models={
        "wan2.1-t2v-14b": {},
        "wan2.1-t2v-1.3b": {"ffn_dim": 8960, "num_attention_heads": 12, "num_layers": 30},
        "wan2.1-i2v-14b": {"image_dim": 1280, "added_kv_proj_dim": 5120, "in_channels": 36},
        "wan2.2-i2v-a14b": {"in_channels": 36},
        "wan2.2-ti2v-5b": {
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
            "num_attention_heads": 24,
            "num_layers": 30,
        },
    },
    namings={
        "original": Table(
            (
                *rename_inside("blocks.*.self_attn", "blocks.*.attn1", *_WAN_ATTENTION),
                *rename_inside("blocks.*.cross_attn", "blocks.*.attn2", *_WAN_ATTENTION),
                *rename_inside(
                    "blocks.*",
                    "blocks.*",
                    Rename("self_attn", "attn1"),
                    Rename("cross_attn", "attn2"),
                    Rename("ffn.0", "ffn.net.0.proj"),
                    Rename("ffn.2", "ffn.net.2"),
                    # Numbered in the order of use here, by kind there.
                    Rename("norm3", "norm2"),
                    Rename("norm2", "norm3"),
                    Rename("modulation", "scale_shift_table"),
                ),
                *rename_inside(
                    "img_emb.proj",
                    "condition_embedder.image_embedder",
                    Rename("0", "norm1"),
                    Rename("1", "ff.net.0.proj"),
                    Rename("3", "ff.net.2"),
                    Rename("4", "norm2"),
                ),
                Rename("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
                Rename("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
                Rename("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
                Rename("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
                Rename("time_projection.1", "condition_embedder.time_proj"),
                Rename("head.modulation", "scale_shift_table"),
                Rename("head.head", "proj_out"),
            )
        )
    },
    blocks=("WanTransformerBlock", "WanVACETransformerBlock", "WanAttentionBlock"),
    attention=(
        "WanAttention",
        *("WanSelfAttention", "WanCrossAttention", "WanT2VCrossAttention", "WanI2VCrossAttention"),
    ),
    feed_forward=("FeedForward", "WanAttentionBlock.ffn"),
    musubi_targets=MusubiTargets(
        ("WanAttentionBlock",),
        (r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",),
    ),
)

FAMILY = Family(
    name="wan",
    components={"": TRANSFORMER.name, "transformer_2": TRANSFORMER.name, "text_encoder": T5_ENCODER.name},
    kohya={"lora_unet": ""},
    comfyui={"umt5xxl": "text_encoder"},
    versions=("wan",),
)
ARCHITECTURES = (TRANSFORMER,)
