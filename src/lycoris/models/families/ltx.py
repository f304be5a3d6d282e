"""LTX-Video."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.text_encoders import T5_ENCODER

LTX_NORMS = rename_inside(
    "transformer_blocks.*.*", "transformer_blocks.*.*", Rename("q_norm", "norm_q"), Rename("k_norm", "norm_k")
)
"""Of attention layers, of LTX-2 too."""

TRANSFORMER = Architecture(
    name="ltx-video",
    classes=("LTXVideoTransformer3DModel", "LTXVModel"),
    models={
        "ltx-video-2b": {},
        "ltx-video-13b": {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48},
    },
    namings={
        "original": Table((*LTX_NORMS, Rename("patchify_proj", "proj_in"), Rename("adaln_single", "time_embed"))),
    },
    blocks=("LTXVideoTransformerBlock",),
    attention=("LTXAttention",),
    feed_forward=("FeedForward",),
)

FAMILY = Family(
    name="ltx-video",
    components={"": TRANSFORMER.name, "text_encoder": T5_ENCODER.name},
    comfyui={"t5xxl": "text_encoder"},
    versions=("ltx-video", "ltx_video", "ltxv"),
)
ARCHITECTURES = (TRANSFORMER,)
