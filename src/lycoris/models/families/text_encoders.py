"""Text encoders that families share."""

from __future__ import annotations

from lycoris.models.families.family import Architecture
from lycoris.models.families.naming import Rename, Table, rename_inside


def _openclip(root: str) -> Table:
    """OpenCLIP's own names. Its `text_projection` is called the same but stored transposed; adapters leave it alone."""
    return Table(
        (
            *rename_inside(
                "transformer.resblocks.*",
                f"{root}encoder.layers.*",
                Rename("attn.in_proj_weight", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                Rename("attn.out_proj", "self_attn.out_proj"),
                Rename("mlp.c_fc", "mlp.fc1"),
                Rename("mlp.c_proj", "mlp.fc2"),
                Rename("ln_1", "layer_norm1"),
                Rename("ln_2", "layer_norm2"),
            ),
            Rename("token_embedding", f"{root}embeddings.token_embedding"),
            Rename("positional_embedding", f"{root}embeddings.position_embedding"),
            Rename("ln_final", f"{root}final_layer_norm"),
        )
    )


CLIP = Architecture(
    name="clip",
    classes=("CLIPTextModel", "CLIPTextTransformer"),
    models={
        "clip-l": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
        "openclip-h": {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "projection_dim": 512,
        },
    },
    namings={
        # transformers 5 took this level out of the class; every file format keeps it.
        "text_model": Table(
            (
                Rename("text_model.embeddings", "embeddings"),
                Rename("text_model.encoder", "encoder"),
                Rename("text_model.final_layer_norm", "final_layer_norm"),
            )
        ),
        "openclip": _openclip(""),
    },
    blocks=("CLIPEncoderLayer", "ResidualAttentionBlock"),
    attention=("CLIPAttention", "CLIPSdpaAttention"),
    feed_forward=("CLIPMLP",),
)

CLIP_WITH_PROJECTION = Architecture(
    name="clip-with-projection",
    classes=("CLIPTextModelWithProjection",),
    models={
        "clip-bigg": {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
            "projection_dim": 1280,
        },
        "clip-l-projection": {
            "architectures": ["CLIPTextModelWithProjection"],
            "model_type": "clip_text_model",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
    },
    namings={"openclip": _openclip("text_model.")},
    blocks=CLIP.blocks,
    attention=CLIP.attention,
    feed_forward=CLIP.feed_forward,
)

T5_ENCODER = Architecture(
    name="t5",
    classes=("T5EncoderModel", "UMT5EncoderModel"),
    models={
        "t5-xxl": {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_layers": 24,
            "num_decoder_layers": 24,
            "num_heads": 64,
            "feed_forward_proj": "gated-gelu",
            "tie_word_embeddings": False,
            "vocab_size": 32128,
        },
    },
    blocks=("T5Block", "UMT5Block"),
    attention=("T5Attention", "UMT5Attention"),
    feed_forward=("T5DenseGatedActDense", "UMT5DenseGatedActDense"),
)

TEXT_ENCODERS = (CLIP, CLIP_WITH_PROJECTION, T5_ENCODER)
