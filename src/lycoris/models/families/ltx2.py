"""LTX-2 and 2.3, of pictures and sound."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.ltx import LTX_NORMS
from lycoris.models.families.naming import Rename, Table

_GATED = ("gated_attn", "cross_attn_mod", "audio_gated_attn", "audio_cross_attn_mod", "perturbed_attn")

TRANSFORMER = Architecture(
    name="ltx-2",
    classes=("LTX2VideoTransformer3DModel", "LTXAVModel"),
    models={
        "ltx-2": {"rope_type": "split"},
        "ltx-2.3": {"rope_type": "split", "use_prompt_embeddings": False, **dict.fromkeys(_GATED, True)},
    },
    namings={
        "original": Table(
            (
                *LTX_NORMS,
                Rename(
                    "transformer_blocks.*.scale_shift_table_a2v_ca_video",
                    "transformer_blocks.*.video_a2v_cross_attn_scale_shift_table",
                ),
                Rename(
                    "transformer_blocks.*.scale_shift_table_a2v_ca_audio",
                    "transformer_blocks.*.audio_a2v_cross_attn_scale_shift_table",
                ),
                Rename("patchify_proj", "proj_in"),
                Rename("audio_patchify_proj", "audio_proj_in"),
                Rename("adaln_single", "time_embed"),
                Rename("audio_adaln_single", "audio_time_embed"),
                Rename("prompt_adaln_single", "prompt_adaln"),
                Rename("audio_prompt_adaln_single", "audio_prompt_adaln"),
                Rename("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
                Rename("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
                Rename("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
                Rename("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
            )
        ),
    },
    blocks=("LTX2VideoTransformerBlock",),
    attention=("LTX2Attention",),
    feed_forward=("FeedForward",),
)

FAMILY = Family(name="ltx-2", components={"": TRANSFORMER.name}, versions=("ltx-2", "ltx2", "ltx_2", "ltx-av", "ltxav"))
ARCHITECTURES = (TRANSFORMER,)
