"""Text encoders, which families share."""

from __future__ import annotations

from lycoris.files.family import Architecture
from lycoris.files.naming import Rename, Table, inside


def _openclip(root: str) -> Table:
    """OpenCLIP's own names. Its `text_projection` is called the same but stored transposed; adapters leave it alone."""
    return Table(
        (
            *inside(
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
    outlines=("clip-l", "openclip-h"),
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
    targets=("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP", "ResidualAttentionBlock"),
)

CLIP_WITH_PROJECTION = Architecture(
    name="clip-with-projection",
    classes=("CLIPTextModelWithProjection",),
    outlines=("clip-bigg", "clip-l-projection"),
    namings={"openclip": _openclip("text_model.")},
    targets=CLIP.targets,
)

T5 = Architecture(
    name="t5",
    classes=("T5EncoderModel", "UMT5EncoderModel"),
    outlines=("t5-xxl",),
    targets=("T5Attention", "T5DenseGatedActDense", "UMT5Attention", "UMT5DenseGatedActDense"),
)

TEXT_ENCODERS = (CLIP, CLIP_WITH_PROJECTION, T5)
