"""Flux.3."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside

_FLUX3_BLOCK = (
    Rename("q_proj", "attn.to_q"),
    Rename("k_proj", "attn.to_k"),
    Rename("v_proj", "attn.to_v"),
    Rename("attn_out", "attn.to_out.0"),
    Rename("norm.query_norm", "attn.norm_q"),
    Rename("norm.key_norm", "attn.norm_k"),
    Rename("mlp_in", "ff.linear_in"),
    Rename("mlp_out", "ff.linear_out"),
)

TRANSFORMER = Architecture(
    name="flux3",
    classes=("Flux3Transformer2DModel", "Flux3"),
    models={"flux.3": {}},
    namings={
        "original": Table(
            (
                *rename_inside("content_mode_blocks.*.*", "mode_blocks.*.*", *_FLUX3_BLOCK),
                *rename_inside("txt_mode_blocks.*", "txt_mode_blocks.*", *_FLUX3_BLOCK),
                *rename_inside("single_blocks.*", "single_transformer_blocks.*", *_FLUX3_BLOCK),
                Rename("early_stream_modulations.*.lin", "early_stream_modulations.*.linear"),
                Rename("single_stream_modulations.*.lin", "single_stream_modulations.*.linear"),
                Rename("emb_in", "x_embedders"),
                Rename("txt_in", "context_embedder"),
                Rename("time_in.in_layer", "timestep_embedder.linear_1"),
                Rename("time_in.out_layer", "timestep_embedder.linear_2"),
                Rename("ref_time_in.in_layer", "target_timestep_embedder.linear_1"),
                Rename("ref_time_in.out_layer", "target_timestep_embedder.linear_2"),
                Rename("final_layer.image.linear", "proj_out"),
                Rename("final_layer.image.adaLN_modulation.1", "norm_out.linear", swapped=True),
            )
        ),
    },
    blocks=("Flux3ModeTransformerBlock", "Flux3SingleTransformerBlock"),
    attention=("Flux3Attention",),
    feed_forward=("Flux3FeedForward",),
)

FAMILY = Family(name="flux3", components={"": TRANSFORMER.name}, versions=("flux3", "flux-3", "flux.3", "flux_3"))
ARCHITECTURES = (TRANSFORMER,)
