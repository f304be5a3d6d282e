"""Flux.1: dev, schnell, Kontext and the models of the same shape."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, MusubiTargets
from lycoris.models.families.naming import Rename, Table, rename_inside, split_square_last
from lycoris.models.families.text_encoders import CLIP, T5_ENCODER

FLUX1_DOUBLE_ATTENTION = (
    Rename("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rename("img_attn.proj", "attn.to_out.0"),
    Rename("img_attn.norm.query_norm", "attn.norm_q"),
    Rename("img_attn.norm.key_norm", "attn.norm_k"),
    Rename("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    Rename("txt_attn.proj", "attn.to_add_out"),
    Rename("txt_attn.norm.query_norm", "attn.norm_added_q"),
    Rename("txt_attn.norm.key_norm", "attn.norm_added_k"),
)
"""In a double block; other models of the same descent have them too."""
FLUX1_DOUBLE = (
    *FLUX1_DOUBLE_ATTENTION,
    Rename("img_mlp.0", "ff.net.0.proj"),
    Rename("img_mlp.2", "ff.net.2"),
    Rename("txt_mlp.0", "ff_context.net.0.proj"),
    Rename("txt_mlp.2", "ff_context.net.2"),
    Rename("img_mod.lin", "norm1.linear"),
    Rename("txt_mod.lin", "norm1_context.linear"),
)
FLUX1_SINGLE = (
    Rename("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), split=split_square_last),
    Rename("linear2", "proj_out"),
    Rename("norm.query_norm", "attn.norm_q"),
    Rename("norm.key_norm", "attn.norm_k"),
    Rename("modulation.lin", "norm.linear"),
)
XLABS_SINGLE = (Rename("qkv", ("attn.to_q", "attn.to_k", "attn.to_v")), Rename("proj", "proj_out"))
"""XLabs' processors of single blocks have queries, keys and values without the feed-forward that shares their layer."""
FLUX1_FINAL = (
    Rename("final_layer.linear", "proj_out"),
    Rename("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
)


def rename_embedder(there: str, here: str) -> tuple[Rename, ...]:
    """Return the renames of an embedding of two layers."""
    return (Rename(f"{there}.in_layer", f"{here}.linear_1"), Rename(f"{there}.out_layer", f"{here}.linear_2"))


FLUX1_MUSUBI = MusubiTargets(
    ("DoubleStreamBlock", "SingleStreamBlock"),
    (r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*", r".*(norm).*"),
)
"""Of Flux.2 too."""

TRANSFORMER = Architecture(
    name="flux1",
    classes=("FluxTransformer2DModel", "Flux"),
    models={
        "flux.1-dev": {"guidance_embeds": True},
        "flux.1-schnell": {"guidance_embeds": False},
    },
    namings={
        "original": Table(
            (
                *rename_inside("double_blocks.*", "transformer_blocks.*", *FLUX1_DOUBLE),
                *rename_inside("single_blocks.*", "single_transformer_blocks.*", *FLUX1_SINGLE),
                Rename("img_in", "x_embedder"),
                Rename("txt_in", "context_embedder"),
                *rename_embedder("time_in", "time_text_embed.timestep_embedder"),
                *rename_embedder("vector_in", "time_text_embed.text_embedder"),
                *rename_embedder("guidance_in", "time_text_embed.guidance_embedder"),
                *FLUX1_FINAL,
            )
        ),
        "xlabs": Table(
            (
                *rename_inside("double_blocks.*", "transformer_blocks.*", *FLUX1_DOUBLE_ATTENTION),
                *rename_inside("single_blocks.*", "single_transformer_blocks.*", *XLABS_SINGLE),
            )
        ),
    },
    blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock", "DoubleStreamBlock", "SingleStreamBlock"),
    attention=("FluxAttention", "SelfAttention"),
    feed_forward=(
        "FeedForward",
        *("FluxSingleTransformerBlock.proj_mlp", "FluxSingleTransformerBlock.proj_out"),
        *("DoubleStreamBlock.img_mlp", "DoubleStreamBlock.txt_mlp"),
        *("SingleStreamBlock.linear1", "SingleStreamBlock.linear2"),
    ),
    musubi_targets=FLUX1_MUSUBI,
    timestep="fraction",
)

FAMILY = Family(
    name="flux1",
    components={"": TRANSFORMER.name, "text_encoder": CLIP.name, "text_encoder_2": T5_ENCODER.name},
    kohya={
        "lora_unet": "",
        "lora_te1": "text_encoder",
        "lora_te3": "text_encoder_2",
        "lora_te2": "text_encoder_2",
    },
    comfyui={"clip_l": "text_encoder", "t5xxl": "text_encoder_2"},
    versions=("flux1", "flux-1", "flux.1", "flux_kontext"),
)
ARCHITECTURES = (TRANSFORMER,)
