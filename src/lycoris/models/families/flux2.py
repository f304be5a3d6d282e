"""Flux.2: dev and Klein."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.flux1 import FLUX1_DOUBLE_ATTENTION, FLUX1_FINAL, FLUX1_MUSUBI, rename_embedder
from lycoris.models.families.naming import Rename, Table, rename_inside

TRANSFORMER = Architecture(
    name="flux2",
    classes=("Flux2Transformer2DModel", "Flux2"),
    models={
        "flux.2-dev": {},
        "flux.2-klein-4b": {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "flux.2-klein-9b": {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
    },
    namings={
        "original": Table(
            (
                *rename_inside(
                    "double_blocks.*",
                    "transformer_blocks.*",
                    *FLUX1_DOUBLE_ATTENTION,
                    Rename("img_mlp.0", "ff.linear_in"),
                    Rename("img_mlp.2", "ff.linear_out"),
                    Rename("txt_mlp.0", "ff_context.linear_in"),
                    Rename("txt_mlp.2", "ff_context.linear_out"),
                ),
                *rename_inside(
                    "single_blocks.*",
                    "single_transformer_blocks.*",
                    Rename("linear1", "attn.to_qkv_mlp_proj"),
                    Rename("linear2", "attn.to_out"),
                    Rename("norm.query_norm", "attn.norm_q"),
                    Rename("norm.key_norm", "attn.norm_k"),
                ),
                Rename("img_in", "x_embedder"),
                Rename("txt_in", "context_embedder"),
                *rename_embedder("time_in", "time_guidance_embed.timestep_embedder"),
                *rename_embedder("guidance_in", "time_guidance_embed.guidance_embedder"),
                Rename("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
                Rename("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
                Rename("single_stream_modulation.lin", "single_stream_modulation.linear"),
                *FLUX1_FINAL,
            )
        )
    },
    blocks=("Flux2TransformerBlock", "Flux2SingleTransformerBlock", "DoubleStreamBlock", "SingleStreamBlock"),
    attention=("Flux2Attention", "Flux2ParallelSelfAttention", "SelfAttention"),
    feed_forward=(
        "Flux2FeedForward",
        "Flux2ParallelSelfAttention",
        *("DoubleStreamBlock.img_mlp", "DoubleStreamBlock.txt_mlp"),
        *("SingleStreamBlock.linear1", "SingleStreamBlock.linear2"),
    ),
    musubi_targets=FLUX1_MUSUBI,
    timestep="fraction",
)

FAMILY = Family(
    name="flux2",
    components={"": TRANSFORMER.name},
    kohya={"lora_unet": ""},
    versions=("flux2", "flux-2", "flux.2", "flux_2"),
)
ARCHITECTURES = (TRANSFORMER,)
