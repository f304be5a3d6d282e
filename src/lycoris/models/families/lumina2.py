"""Lumina-Image 2.0."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.language_models import LANGUAGE_MODEL
from lycoris.models.families.naming import Rename, Table, rename_inside, split_square_first

TRANSFORMER = Architecture(
    name="lumina2",
    classes=("Lumina2Transformer2DModel", "NextDiT"),
    models={
        "lumina2": {"cap_feat_dim": 2304},
    },
    namings={
        "original": Table(
            (
                # Without a modulation, its norms are plain here.
                Rename("context_refiner.*.attention_norm1", "context_refiner.*.norm1"),
                *rename_inside(
                    "*.*",
                    "*.*",
                    Rename("attention.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), split=split_square_first),
                    Rename("attention.out", "attn.to_out.0"),
                    Rename("attention.q_norm", "attn.norm_q"),
                    Rename("attention.k_norm", "attn.norm_k"),
                    Rename("feed_forward.w1", "feed_forward.linear_1"),
                    Rename("feed_forward.w2", "feed_forward.linear_2"),
                    Rename("feed_forward.w3", "feed_forward.linear_3"),
                    Rename("adaLN_modulation.1", "norm1.linear"),
                    Rename("attention_norm1", "norm1.norm"),
                    Rename("attention_norm2", "norm2"),
                ),
                Rename("cap_embedder", "time_caption_embed.caption_embedder"),
                Rename("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
                Rename("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
                Rename("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
                Rename("final_layer.linear", "norm_out.linear_2"),
            )
        )
    },
    blocks=("Lumina2TransformerBlock", "JointTransformerBlock", "FinalLayer"),
    attention=("Attention", "JointAttention"),
    feed_forward=("LuminaFeedForward", "FeedForward"),
    timestep="reversed",
)

FAMILY = Family(
    name="lumina2",
    components={"": TRANSFORMER.name, "text_encoder": LANGUAGE_MODEL.name},
    kohya={"lora_unet": "", "lora_te": "text_encoder", "lora_te1": "text_encoder"},
    comfyui={"gemma2_2b": "text_encoder"},
    versions=("lumina2", "lumina-2"),
)
ARCHITECTURES = (TRANSFORMER,)
