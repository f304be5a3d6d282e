"""HunyuanVideo. ComfyUI gives its blocks the names that they have in Flux.1."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, Trained
from lycoris.models.families.flux1 import DOUBLE, FINAL, SINGLE, embedders
from lycoris.models.families.language_models import LANGUAGE_MODEL
from lycoris.models.families.naming import Rename, Table, inside, square_but_last
from lycoris.models.families.text_encoders import CLIP

_CONTEXT_TIME = "context_embedder.time_text_embed.timestep_embedder"
_CONTEXT_TEXT = "context_embedder.time_text_embed.text_embedder"
_REFINER = ("txt_in.individual_token_refiner.blocks.*", "context_embedder.token_refiner.refiner_blocks.*")


def timestep(there: str, here: str) -> tuple[Rename, ...]:
    """An embedding of two layers with an activation between them."""
    return (Rename(f"{there}.mlp.0", f"{here}.linear_1"), Rename(f"{there}.mlp.2", f"{here}.linear_2"))


DOUBLE_REST = (
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
    *inside(
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
    *timestep("txt_in.t_embedder", _CONTEXT_TIME),
    Rename("txt_in.c_embedder.linear_1", f"{_CONTEXT_TEXT}.linear_1"),
    Rename("txt_in.c_embedder.linear_2", f"{_CONTEXT_TEXT}.linear_2"),
)
COMFYUI_CONTEXT = (
    *inside(
        *_REFINER,
        Rename("self_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        Rename("self_attn.proj", "attn.to_out.0"),
        Rename("mlp.0", "ff.net.0.proj"),
        Rename("mlp.2", "ff.net.2"),
        Rename("adaLN_modulation.1", "norm_out.linear"),
    ),
    Rename(*_REFINER),
    Rename("txt_in.input_embedder", "context_embedder.proj_in"),
    *embedders("txt_in.t_embedder", _CONTEXT_TIME),
    *embedders("txt_in.c_embedder", _CONTEXT_TEXT),
)
DOUBLE_ATTENTION = (
    Rename("img_attn_qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rename("txt_attn_qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
)
SINGLE_BLOCK = (
    Rename("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), sizes=square_but_last),
    Rename("linear2", "proj_out"),
    Rename("q_norm", "attn.norm_q"),
    Rename("k_norm", "attn.norm_k"),
    Rename("modulation.linear", "norm.linear"),
)

ORIGINAL = Table(
    (
        *inside("double_blocks.*", "transformer_blocks.*", *DOUBLE_ATTENTION, *DOUBLE_REST),
        *inside("single_blocks.*", "single_transformer_blocks.*", *SINGLE_BLOCK),
        *CONTEXT,
        Rename("img_in", "x_embedder"),
        *timestep("time_in", "time_text_embed.timestep_embedder"),
        *timestep("guidance_in", "time_text_embed.guidance_embedder"),
        *embedders("vector_in", "time_text_embed.text_embedder"),
        *FINAL,
    )
)
COMFYUI = Table(
    (
        *inside("double_blocks.*", "transformer_blocks.*", *DOUBLE),
        *inside("single_blocks.*", "single_transformer_blocks.*", *SINGLE),
        *COMFYUI_CONTEXT,
        Rename("img_in", "x_embedder"),
        *embedders("time_in", "time_text_embed.timestep_embedder"),
        *embedders("guidance_in", "time_text_embed.guidance_embedder"),
        *embedders("vector_in", "time_text_embed.text_embedder"),
        *FINAL,
    )
)

BLOCKS = (
    *("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    *("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock"),
    "HunyuanVideoIndividualTokenRefinerBlock",
)
FEED_FORWARD = (
    "FeedForward",
    *(f"{block}.{layer}" for block in (BLOCKS[1], BLOCKS[3]) for layer in ("proj_mlp", "proj_out")),
)
"""In diffusers."""

TRANSFORMER = Architecture(
    name="hunyuanvideo",
    classes=("HunyuanVideoTransformer3DModel", "HYVideoDiffusionTransformer"),
    models={
        "hunyuanvideo": {},
    },
    namings={"original": ORIGINAL, "comfyui": COMFYUI},
    blocks=(*BLOCKS, "MMDoubleStreamBlock", "MMSingleStreamBlock"),
    attention=(
        "Attention",
        *(f"MMDoubleStreamBlock.{side}_attn_{what}" for side in ("img", "txt") for what in ("qkv", "proj")),
        *("IndividualTokenRefinerBlock.self_attn_qkv", "IndividualTokenRefinerBlock.self_attn_proj"),
    ),
    feed_forward=(
        *FEED_FORWARD,
        "MLP",
        *("MMSingleStreamBlock.linear1", "MMSingleStreamBlock.linear2"),
    ),
    musubi=Trained(("MMDoubleStreamBlock", "MMSingleStreamBlock"), (r".*(img_mod|txt_mod|modulation).*",)),
)

FAMILY = Family(
    name="hunyuanvideo",
    components={"": TRANSFORMER.name, "text_encoder": LANGUAGE_MODEL.name, "text_encoder_2": CLIP.name},
    kohya={"lora_unet": ""},
    comfyui={"llama": "text_encoder", "clip_l": "text_encoder_2"},
    versions=("hunyuan-video", "hunyuan_video"),
)
ARCHITECTURES = (TRANSFORMER,)
