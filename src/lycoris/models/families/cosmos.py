"""Cosmos-Predict2, and Anima, which has the denoiser of its 2B model and a text adapter next to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.text_encoders import T5_ENCODER

_COSMOS_ATTENTION = (
    Rename("q_proj", "to_q"),
    Rename("k_proj", "to_k"),
    Rename("v_proj", "to_v"),
    Rename("output_proj", "to_out.0"),
    Rename("q_norm", "norm_q"),
    Rename("k_norm", "norm_k"),
)
_PREDICT2: Mapping[str, Any] = {"extra_pos_embed_type": None}
_SMALL: Mapping[str, Any] = {"num_attention_heads": 16, **_PREDICT2}
_LARGE: Mapping[str, Any] = {"num_attention_heads": 40, "num_layers": 36, **_PREDICT2}

TRANSFORMER = Architecture(
    name="cosmos-predict2",
    classes=("CosmosTransformer3DModel", "MiniTrainDIT", "Anima"),
    models={
        "cosmos-predict2-2b": {**_SMALL, "rope_scale": [1.0, 4.0, 4.0]},
        "cosmos-predict2-14b": {**_LARGE, "rope_scale": [1.0, 4.0, 4.0]},
        "cosmos-predict2-2b-video": {**_SMALL, "in_channels": 17, "rope_scale": [1.0, 3.0, 3.0]},
        "cosmos-predict2-14b-video": {**_LARGE, "in_channels": 17, "rope_scale": [20 / 24, 2.0, 2.0]},
    },
    namings={
        "original": Table(
            (
                *rename_inside("blocks.*.self_attn", "transformer_blocks.*.attn1", *_COSMOS_ATTENTION),
                *rename_inside("blocks.*.cross_attn", "transformer_blocks.*.attn2", *_COSMOS_ATTENTION),
                *rename_inside(
                    "blocks.*",
                    "transformer_blocks.*",
                    Rename("adaln_modulation_self_attn.1", "norm1.linear_1"),
                    Rename("adaln_modulation_self_attn.2", "norm1.linear_2"),
                    Rename("adaln_modulation_cross_attn.1", "norm2.linear_1"),
                    Rename("adaln_modulation_cross_attn.2", "norm2.linear_2"),
                    Rename("adaln_modulation_mlp.1", "norm3.linear_1"),
                    Rename("adaln_modulation_mlp.2", "norm3.linear_2"),
                    Rename("mlp.layer1", "ff.net.0.proj"),
                    Rename("mlp.layer2", "ff.net.2"),
                ),
                Rename("t_embedder.1", "time_embed.t_embedder"),
                Rename("t_embedding_norm", "time_embed.norm"),
                Rename("x_embedder.proj.1", "patch_embed.proj"),
                Rename("final_layer.adaln_modulation.1", "norm_out.linear_1"),
                Rename("final_layer.adaln_modulation.2", "norm_out.linear_2"),
                Rename("final_layer.linear", "proj_out"),
            )
        ),
    },
    blocks=("CosmosTransformerBlock", "Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
    attention=("Attention", "CosmosAttention"),
    feed_forward=("FeedForward", "GPT2FeedForward"),
)

FAMILY = Family(
    name="cosmos-predict2",
    components={"": TRANSFORMER.name, "text_encoder": T5_ENCODER.name},
    comfyui={"t5xxl": "text_encoder"},
    versions=("cosmos-predict2", "cosmos_predict2", "cosmos2", "anima"),
)
ARCHITECTURES = (TRANSFORMER,)
