"""HunyuanVideo. ComfyUI gives its blocks the names that they have in Flux.1."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, MusubiTargets
from lycoris.models.families.flux1 import FLUX1_DOUBLE, FLUX1_FINAL, FLUX1_SINGLE, rename_embedder
from lycoris.models.families.language_models import LANGUAGE_MODEL
from lycoris.models.families.naming import Rename, Table, rename_inside, split_square_last
from lycoris.models.families.text_encoders import CLIP

_CONTEXT_TIME = "context_embedder.time_text_embed.timestep_embedder"
_CONTEXT_TEXT = "context_embedder.time_text_embed.text_embedder"
_REFINER = ("txt_in.individual_token_refiner.blocks.*", "context_embedder.token_refiner.refiner_blocks.*")


def rename_time_embedding(there: str, here: str) -> tuple[Rename, ...]:
    """Return the renames of an embedding of two layers with an activation between them."""
    return (Rename(f"{there}.mlp.0", f"{here}.linear_1"), Rename(f"{there}.mlp.2", f"{here}.linear_2"))


HUNYUANVIDEO_DOUBLE_REST = (
    Rename("img_attn_proj", "attn.to_out.0"),
    Rename("img_attn_q_norm", "attn.norm_q"),
    Rename("img_attn_k_norm", "attn.norm_k"),
    Rename("txt_attn_proj", "attn.to_add_out"),
    Rename("txt_attn_q_norm", "attn.norm_added_q"),
    Rename("txt_attn_k_norm", "attn.norm_added_k"),
    Rename("img_mlp.fc1", "ff.net.0.proj"),
    Rename("img_mlp.fc2", "ff.net.2"),
    Rename("txt_mlp.fc1", "ff_context.net.0.proj"),
    Rename("txt_mlp.fc2", "ff_context.net.2"),
    Rename("img_mod.linear", "norm1.linear"),
    Rename("txt_mod.linear", "norm1_context.linear"),
)
"""In a double block, but for queries, keys and values."""
CONTEXT = (
    *rename_inside(
        *_REFINER,
        Rename("self_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        Rename("self_attn_proj", "attn.to_out.0"),
        Rename("mlp.fc1", "ff.net.0.proj"),
        Rename("mlp.fc2", "ff.net.2"),
        # Two chunks, but gates: they are not exchanged.
        Rename("adaLN_modulation.1", "norm_out.linear"),
    ),
    Rename(*_REFINER),
    Rename("txt_in.input_embedder", "context_embedder.proj_in"),
    *rename_time_embedding("txt_in.t_embedder", _CONTEXT_TIME),
    Rename("txt_in.c_embedder.linear_1", f"{_CONTEXT_TEXT}.linear_1"),
    Rename("txt_in.c_embedder.linear_2", f"{_CONTEXT_TEXT}.linear_2"),
)
COMFYUI_CONTEXT = (
    *rename_inside(
        *_REFINER,
        Rename("self_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        Rename("self_attn.proj", "attn.to_out.0"),
        Rename("mlp.0", "ff.net.0.proj"),
        Rename("mlp.2", "ff.net.2"),
        Rename("adaLN_modulation.1", "norm_out.linear"),
    ),
    Rename(*_REFINER),
    Rename("txt_in.input_embedder", "context_embedder.proj_in"),
    *rename_embedder("txt_in.t_embedder", _CONTEXT_TIME),
    *rename_embedder("txt_in.c_embedder", _CONTEXT_TEXT),
)
HUNYUANVIDEO_DOUBLE_ATTENTION = (
    Rename("img_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rename("txt_attn_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
)
HUNYUANVIDEO_SINGLE = (
    Rename("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), split=split_square_last),
    Rename("linear2", "proj_out"),
    Rename("q_norm", "attn.norm_q"),
    Rename("k_norm", "attn.norm_k"),
    Rename("modulation.linear", "norm.linear"),
)

HUNYUANVIDEO_ORIGINAL = Table(
    (
        *rename_inside(
            "double_blocks.*", "transformer_blocks.*", *HUNYUANVIDEO_DOUBLE_ATTENTION, *HUNYUANVIDEO_DOUBLE_REST
        ),
        *rename_inside("single_blocks.*", "single_transformer_blocks.*", *HUNYUANVIDEO_SINGLE),
        *CONTEXT,
        Rename("img_in", "x_embedder"),
        *rename_time_embedding("time_in", "time_text_embed.timestep_embedder"),
        *rename_time_embedding("guidance_in", "time_text_embed.guidance_embedder"),
        *rename_embedder("vector_in", "time_text_embed.text_embedder"),
        *FLUX1_FINAL,
    )
)
HUNYUANVIDEO_COMFYUI = Table(
    (
        *rename_inside("double_blocks.*", "transformer_blocks.*", *FLUX1_DOUBLE),
        *rename_inside("single_blocks.*", "single_transformer_blocks.*", *FLUX1_SINGLE),
        *COMFYUI_CONTEXT,
        Rename("img_in", "x_embedder"),
        *rename_embedder("time_in", "time_text_embed.timestep_embedder"),
        *rename_embedder("guidance_in", "time_text_embed.guidance_embedder"),
        *rename_embedder("vector_in", "time_text_embed.text_embedder"),
        *FLUX1_FINAL,
    )
)

HUNYUANVIDEO_BLOCKS = (
    *("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    *("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock"),
    "HunyuanVideoIndividualTokenRefinerBlock",
)
HUNYUANVIDEO_FEED_FORWARD = (
    "FeedForward",
    *(
        f"{block}.{layer}"
        for block in (HUNYUANVIDEO_BLOCKS[1], HUNYUANVIDEO_BLOCKS[3])
        for layer in ("proj_mlp", "proj_out")
    ),
)
"""In diffusers."""

TRANSFORMER = Architecture(
    name="hunyuanvideo",
    classes=("HunyuanVideoTransformer3DModel", "HYVideoDiffusionTransformer"),
    models={
        "hunyuanvideo": {},
    },
    namings={"original": HUNYUANVIDEO_ORIGINAL, "comfyui": HUNYUANVIDEO_COMFYUI},
    blocks=(*HUNYUANVIDEO_BLOCKS, "MMDoubleStreamBlock", "MMSingleStreamBlock"),
    attention=(
        "Attention",
        *(f"MMDoubleStreamBlock.{side}_attn_{what}" for side in ("img", "txt") for what in ("qkv", "proj")),
        *("IndividualTokenRefinerBlock.self_attn_qkv", "IndividualTokenRefinerBlock.self_attn_proj"),
    ),
    feed_forward=(
        *HUNYUANVIDEO_FEED_FORWARD,
        "MLP",
        *("MMSingleStreamBlock.linear1", "MMSingleStreamBlock.linear2"),
    ),
    musubi_targets=MusubiTargets(
        ("MMDoubleStreamBlock", "MMSingleStreamBlock"), (r".*(img_mod|txt_mod|modulation).*",)
    ),
)

FAMILY = Family(
    name="hunyuanvideo",
    components={"": TRANSFORMER.name, "text_encoder": LANGUAGE_MODEL.name, "text_encoder_2": CLIP.name},
    kohya={"lora_unet": ""},
    comfyui={"llama": "text_encoder", "clip_l": "text_encoder_2"},
    versions=("hunyuan-video", "hunyuan_video"),
)
ARCHITECTURES = (TRANSFORMER,)
