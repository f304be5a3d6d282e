"""Krea 2."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside

_KREA2_BLOCK = (
    Rename("attn.wq", "attn.to_q"),
    Rename("attn.wk", "attn.to_k"),
    Rename("attn.wv", "attn.to_v"),
    Rename("attn.wo", "attn.to_out.0"),
    Rename("attn.gate", "attn.to_gate"),
    Rename("attn.qknorm.qnorm", "attn.norm_q"),
    Rename("attn.qknorm.knorm", "attn.norm_k"),
    Rename("mlp", "ff"),
    Rename("prenorm", "norm1"),
    Rename("postnorm", "norm2"),
)

TRANSFORMER = Architecture(
    name="krea2",
    classes=("Krea2Transformer2DModel", "SingleStreamDiT"),
    models={"krea-2": {}},
    namings={
        "original": Table(
            (
                *rename_inside(
                    "blocks.*", "transformer_blocks.*", *_KREA2_BLOCK, Rename("mod.lin", "scale_shift_table")
                ),
                *rename_inside("txtfusion.*.*", "text_fusion.*.*", *_KREA2_BLOCK),
                Rename("txtfusion.projector", "text_fusion.projector"),
                Rename("first", "img_in"),
                Rename("tmlp.0", "time_embed.linear_1"),
                Rename("tmlp.2", "time_embed.linear_2"),
                Rename("tproj.1", "time_mod_proj"),
                Rename("txtmlp.0", "txt_in.norm"),
                Rename("txtmlp.1", "txt_in.linear_1"),
                Rename("txtmlp.3", "txt_in.linear_2"),
                Rename("last.linear", "final_layer.linear"),
                Rename("last.norm", "final_layer.norm"),
                Rename("last.modulation.lin", "final_layer.scale_shift_table"),
            )
        ),
    },
    blocks=("Krea2TransformerBlock", "Krea2TextFusionBlock", "SingleStreamBlock", "TextFusionBlock"),
    attention=("Krea2Attention", "Attention"),
    feed_forward=("Krea2SwiGLU", "SwiGLU"),
    timestep="fraction",
)

FAMILY = Family(name="krea2", components={"": TRANSFORMER.name}, versions=("krea-2", "krea2", "krea_2"))
ARCHITECTURES = (TRANSFORMER,)
