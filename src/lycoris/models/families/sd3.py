"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.text_encoders import CLIP_WITH_PROJECTION, T5_ENCODER

MMDIT = Table(
    (
        *rename_inside(
            "joint_blocks.*.x_block",
            "transformer_blocks.*",
            Rename("attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
            Rename("attn.proj", "attn.to_out.0"),
            Rename("attn.ln_q", "attn.norm_q"),
            Rename("attn.ln_k", "attn.norm_k"),
            Rename("attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v")),
            Rename("attn2.proj", "attn2.to_out.0"),
            Rename("attn2.ln_q", "attn2.norm_q"),
            Rename("attn2.ln_k", "attn2.norm_k"),
            Rename("mlp.fc1", "ff.net.0.proj"),
            Rename("mlp.fc2", "ff.net.2"),
            Rename("adaLN_modulation.1", "norm1.linear"),
        ),
        *rename_inside(
            "joint_blocks.*.context_block",
            "transformer_blocks.*",
            Rename("attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
            Rename("attn.proj", "attn.to_add_out"),
            Rename("attn.ln_q", "attn.norm_added_q"),
            Rename("attn.ln_k", "attn.norm_added_k"),
            Rename("mlp.fc1", "ff_context.net.0.proj"),
            Rename("mlp.fc2", "ff_context.net.2"),
            # Of two chunks in the last block, where diffusers has them the other way round.
            Rename("adaLN_modulation.1", "norm1_context.linear", swapped=True),
        ),
        Rename("x_embedder", "pos_embed"),
        Rename("t_embedder.mlp.0", "time_text_embed.timestep_embedder.linear_1"),
        Rename("t_embedder.mlp.2", "time_text_embed.timestep_embedder.linear_2"),
        Rename("y_embedder.mlp.0", "time_text_embed.text_embedder.linear_1"),
        Rename("y_embedder.mlp.2", "time_text_embed.text_embedder.linear_2"),
        Rename("final_layer.linear", "proj_out"),
        Rename("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
    )
)

TRANSFORMER = Architecture(
    name="sd3",
    classes=("SD3Transformer2DModel", "MMDiT"),
    models={
        "sd3-medium": {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 192,
        },
        "sd3.5-medium": {
            "sample_size": 128,
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        },
        "sd3.5-large": {
            "sample_size": 128,
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
    },
    namings={"original": MMDIT},
    blocks=("JointTransformerBlock", "SD3SingleTransformerBlock", "JointBlock", "MMDiTBlock", "SingleDiTBlock"),
    attention=("Attention", "SelfAttention", "AttentionLinears"),
    feed_forward=("FeedForward", "Mlp", "MLP"),
)

FAMILY = Family(
    name="sd3",
    components={
        "": TRANSFORMER.name,
        "text_encoder": CLIP_WITH_PROJECTION.name,
        "text_encoder_2": CLIP_WITH_PROJECTION.name,
        "text_encoder_3": T5_ENCODER.name,
    },
    kohya={
        "lora_unet": "",
        "lora_te1": "text_encoder",
        "lora_te2": "text_encoder_2",
        "lora_te3": "text_encoder_3",
    },
    comfyui={"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5xxl": "text_encoder_3"},
    versions=("sd3", "stable-diffusion-3"),
)
ARCHITECTURES = (TRANSFORMER,)
