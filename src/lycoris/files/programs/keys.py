"""Which keys a program knows: dialect → architecture → what of it. The program's function that decides is named next to
each.

A dialect is listed for the names that it usually has there; the first one is what to write for the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lycoris.models.families import FAMILIES


class KnownKeys(NamedTuple):
    """Which keys for one architecture a program knows: all but those named here.

    Each is a regular expression for an entire key without the tensor's own name, such as lora_unet_img_in.
    """

    lost: str = ""
    """Keys that it ignores."""
    misplaced: str = ""
    """Keys whose adapters it applies to other rows of the weight."""
    stops: str = ""
    """Keys for which it rejects the file."""
    named: str = ""
    """The dialect whose names of layers are all that it knows, behind any prefix; "": any names."""
    named_pattern: str = ".*"
    """The keys that `named` applies to."""
    requires: tuple[str, str] = ("", "")
    """Keys that it ignores unless the file has the tensor named second."""
    together: str = ""
    """Keys that it ignores unless all keys with the same regular expression groups are there."""
    unsure: str = ""
    """Keys that it knows in some models of the architecture only."""
    complete_groups: str = ""
    """Keys of which it requires all with the same regular expression groups, and otherwise rejects the file."""
    strict: bool = False
    """Whether it rejects the file for keys that it does not know."""


KeysByDialect = Mapping[str, Mapping[str, KnownKeys]]
ANY_ARCHITECTURE = "*"
"""Stands for every architecture, known here or not."""


def know_all(*architectures: str) -> dict[str, KnownKeys]:
    """Make entries for architectures of which a program knows all keys.

    Merge them into a table of `KeysByDialect`.
    """
    return dict.fromkeys(architectures, KnownKeys())


def know_except(*architectures: str, lost: str) -> dict[str, KnownKeys]:
    """Make entries for architectures of which a program knows all keys but those that match `lost`.

    `lost` is a regular expression for entire keys.
    """
    return dict.fromkeys(architectures, KnownKeys(lost))


EVERY_ARCHITECTURE = know_all(ANY_ARCHITECTURE)
UNETS = ("sd1.5-unet", "sd2-unet", "sdxl-unet")
CLIPS = ("clip", "clip-with-projection")
DENOISER_ARCHITECTURES = tuple(
    name for name in dict.fromkeys(family.components[""] for family in FAMILIES.values()) if name != "language-model"
)
_LAYERS = r"text_model_encoder_layers_\d+_(self_attn_(k|q|v|out)_proj|mlp_fc[12])"
_FLAT_CLIP = r"(lora|oft)_te\d?_(?!text_model_encoder_layers_\d+_(self_attn_(k|q|v|out)_proj|mlp_fc[12])$).*"
_DOTTED_CLIP = r"text_encoder\w*\.(?!text_model\.encoder\.layers\.\d+\.(self_attn\.(k|q|v|out)_proj|mlp\.fc[12])$).*"
UNET_PROJECTIONS = r".*\.attn\d\.to_.*"
"""A UNet's projections."""


T5_EMBEDDING = r".*encoder[._]embed_tokens"
"""Of T5; the same table as `shared`, by which ComfyUI and Forge know it."""
_AS_TRANSFORMER = r"transformer\..*"
"""What begins so is of a transformer."""


EXAMINED_ARCHITECTURES = frozenset(
    {
        *(
            "sd1.5-unet",
            "sd2-unet",
            "sdxl-unet",
            "sd3",
            "flux1",
            "flux2",
            "qwen-image",
            "z-image",
            "wan",
            "hunyuanvideo",
        ),
        *("hunyuanvideo-1.5", "framepack", "lumina2", "language-model", "clip", "clip-with-projection", "t5"),
    }
)
"""Architectures for which the keys that programs know were examined; nothing is claimed about any other."""


# Text encoders: model_lora_keys_clip in ComfyUI's comfy/lora.py, which Forge has too.
COMFYUI_CLIP = (
    know_except("clip", lost=f"lora_te2_.*|oft_.*|{_FLAT_CLIP}")
    | know_except(
        "clip-with-projection", lost=rf"oft_.*|(lora|oft)_te\d?_(?!{_LAYERS}$|(?<=_te[12]_)text_projection$).*"
    )
    | know_except("t5", lost=f"lora_te1?_.*|oft_.*|{T5_EMBEDDING}")
)
# One of CLIP alone is the first text encoder, whichever it is in the pipeline.
DOTTED_CLIP = know_except("clip", lost=rf"text_encoder_2\..*|{_DOTTED_CLIP}") | know_except(
    "clip-with-projection", lost=_DOTTED_CLIP
)

_PREFIXED = r"model\.diffusion_model\..*|lora_unet__.*|oft_(unet|te\d?)_.*"
"""What begins otherwise than programs expect it."""

# Forge: the same functions in packages_3rdparty/comfyui_lora_collection/lora.py, as of 2024, for the models in
# backend/diffusion_engine.
_FORGE_NORMS = r".*[._]norm[._](query|key)_norm|.*distilled_guidance_layer[._]norms[._]\d+"
"""Of Flux.1 and Chroma, whose norms over a vector have a parameter of another name there."""
_FORGE_DITS = know_except("flux1", "chroma", lost=_FORGE_NORMS)
_FORGE_OWN = know_except(*UNETS, "sd3", lost=_PREFIXED) | know_except(
    "flux1", "chroma", lost=f"{_FORGE_NORMS}|{_PREFIXED}"
)
_FORGE_NAMED: Mapping[str, KnownKeys] = {"sd3": KnownKeys(named="comfyui")} | dict.fromkeys(
    ("flux1", "chroma"), KnownKeys(_FORGE_NORMS, named="comfyui")
)
"""lora_unet_ stands before its own names of layers, of which diffusers has some too."""
_FORGE_CLIP = COMFYUI_CLIP | know_except("t5", lost=f"lora_te_.*|{T5_EMBEDDING}")
_FORGE_DOTTED_CLIP = rf"(?!text_encoder\.text_projection$)({_DOTTED_CLIP})"
_FORGE_DOTTED = (
    know_except(*UNETS, lost=f"{UNET_PROJECTIONS}|{_AS_TRANSFORMER}")
    | know_all("flux1")
    | know_except(*CLIPS, lost=_FORGE_DOTTED_CLIP)
)
FORGE_KEYS: Mapping[str, Mapping[str, KnownKeys]] = {
    "kohya": _FORGE_OWN | _FORGE_CLIP,
    "kohya-diffusers": {**know_except(*UNETS, lost=_PREFIXED), **_FORGE_NAMED, **_FORGE_CLIP},
    "comfyui": _FORGE_OWN,
    "diffusers": _FORGE_DOTTED,
    # simpletuner lycoris format
    "lycoris": know_all(*UNETS, "flux1"),
    "bare": know_except(*UNETS, lost=UNET_PROJECTIONS),
    "processors": know_all(*UNETS),
    "onetrainer-comfy": _FORGE_OWN,
    "onetrainer-kohya": _FORGE_OWN | _FORGE_CLIP,
    "onetrainer-diffusers": _FORGE_DOTTED,
    "onetrainer-legacy": know_except(*UNETS, "sd3", "chroma", lost="lora_transformer_.*")
    | {each: known._replace(lost="lora_transformer_.*|" + known.lost) for each, known in _FORGE_NAMED.items()}
    | know_except("flux1", lost="lora_unet_.*")
    | _FORGE_CLIP,
    "ai-toolkit": know_except("flux1", lost=r"diffusion_model\..*")
    | {
        "sd3": KnownKeys(r"transformer\..*", named="comfyui"),
        "chroma": KnownKeys(rf"transformer\..*|{_FORGE_NORMS}", named="comfyui"),
    },
    "musubi": _FORGE_DITS | know_all("sd3"),
    "musubi-other": _FORGE_DITS | know_all("sd3"),
}

# WebUI: assign_network_names_to_compvis_modules, convert_diffusers_name_to_compvis and load_network in
# extensions-builtin/Lora/networks.py; it has models of these families only. What is said of one model or family is
# under its name, which counts before that of the architecture.
_WEBUI_TOGETHER = r"lora_te{}_text_model_encoder_layers_(\d+)_self_attn_(?:q|k|v|out)_proj"
"""torch.nn.MultiheadAttention"""
_WEBUI_CLIP: Mapping[str, KnownKeys] = {
    "clip": KnownKeys(
        lost=r"(lora|oft)_te_(?!text_model_encoder_layers_).*|(lora_te2|oft_te\d?)_.*",
        unsure=r"lora_te_text_model_encoder_layers_\d+_layer_norm[12]",
    ),
    "clip-l": KnownKeys(lost=r"lora_te_(?!text_model_encoder_layers_).*|(lora_te2|oft_te\d?)_.*"),
    "openclip-h": KnownKeys(lost=rf"lora_te\d_.*|oft_te\d?_.*|{_FLAT_CLIP}", together=_WEBUI_TOGETHER.format("")),
    "sdxl/clip": KnownKeys(lost=r"(?!lora_te1_).*"),
    "clip-with-projection": KnownKeys(lost=rf"(?!lora_te2_).*|{_FLAT_CLIP}", together=_WEBUI_TOGETHER.format("2")),
} | {
    f"{family.name}/{encoder}": KnownKeys(lost=".*")
    for family in FAMILIES.values()
    for component, encoder in family.components.items()
    if component and family.components[""] not in UNETS and encoder in CLIPS
}
_WEBUI_UNETS = r"lora_unet__.*|oft_unet_.*|lora_unet_conv_norm_out"
_WEBUI: Mapping[str, KnownKeys] = {**know_except("sd1.5-unet", "sd2-unet", lost=_WEBUI_UNETS), **_WEBUI_CLIP}
_WEBUI_SGM = know_except("sdxl-unet", lost="lora_unet__.*") | know_all("sd3")
_WEBUI_SDXL: Mapping[str, KnownKeys] = {"sd3": KnownKeys(named="comfyui")} | know_except(
    "sdxl-unet", lost=rf"{_WEBUI_UNETS}|lora_unet_(add_embedding_linear_[12]|up_blocks_0_upsamplers_0_conv)"
)
# diffusers_weight_mapping in modules/models/sd3/sd3_model.py: what it maps of the context's attention is called
# otherwise, by its model and by diffusers.
_WEBUI_SD3: Mapping[str, KnownKeys] = {
    "sd3": KnownKeys(
        lost=r"(?!transformer\.transformer_blocks\.\d+\.attn\.to_(q|k|v|out\.0)$).*",
        together=r"transformer\.transformer_blocks\.(\d+)\.attn\.to_(?:q|k|v)",
    )
}
WEBUI_KEYS: Mapping[str, Mapping[str, KnownKeys]] = {
    "kohya": {**_WEBUI, **_WEBUI_SGM},
    "kohya-diffusers": {**_WEBUI, **_WEBUI_SDXL},
    "onetrainer-kohya": {**_WEBUI, **_WEBUI_SGM},
    "onetrainer-legacy": {
        name: known._replace(lost="|".join(filter(None, ("lora_transformer_.*", known.lost))))
        for name, known in {**_WEBUI, **_WEBUI_SDXL}.items()
    },
    "diffusers": _WEBUI_SD3,
    "onetrainer-diffusers": _WEBUI_SD3,
    "ai-toolkit": _WEBUI_SD3,
}

# InvokeAI: invokeai/backend/patches/lora_conversions, one file for each of these.
_INVOKEAI_FLUX = KnownKeys(
    # FLUX_KOHYA_TRANSFORMER_KEY_REGEX
    lost="lora_unet_final_layer_.*",
    stops=r"lora_unet_(?!final_layer_|\w+_blocks_\d+_(img|txt)_(attn|mlp|mod)|\w+_blocks_\d+_(linear[12]|modulation)).*",
)
# FLUX_KOHYA_T5_KEY_REGEX
_INVOKEAI_ENCODERS = know_except(*CLIPS, lost=_FLAT_CLIP) | {"t5": KnownKeys(stops="lora_te(?!2_).*")}
# _KOHYA_SUBMODULE_MAP and _NATIVE_TO_DIFFUSERS_PATH_RULES
_INVOKEAI_WAN = r"(?!lora_unet_blocks_\d+_((self|cross)_attn_[qkvo]|ffn_[02])$).*"
_INVOKEAI_DOTTED_WAN = r"(?!diffusion_model\.blocks\.\d+\.((self|cross)_attn\.[qkvo]|ffn\.[02])$).*"
_INVOKEAI_DIFFUSERS = know_all("flux1", "flux2", "z-image", "qwen-image") | know_except(
    "wan", lost=r"transformer\.(?!blocks\.).*"
)
INVOKEAI_KEYS: Mapping[str, Mapping[str, KnownKeys]] = {
    "kohya": know_all(*UNETS, "flux2", "qwen-image")
    | {"flux1": _INVOKEAI_FLUX}
    | know_except("wan", lost=_INVOKEAI_WAN)
    | _INVOKEAI_ENCODERS,
    "kohya-diffusers": know_all(*UNETS, "qwen-image") | _INVOKEAI_ENCODERS,
    "diffusers": _INVOKEAI_DIFFUSERS,
    "musubi": know_all("flux2", "qwen-image") | {"flux1": _INVOKEAI_FLUX} | know_except("wan", lost=_INVOKEAI_WAN),
    # is_state_dict_likely_in_flux_bfl_peft_format: lora_A and lora_B, or LyCORIS' tensors
    "musubi-other": know_all("flux1", "flux2") | know_except("wan", lost=_INVOKEAI_DOTTED_WAN),
    "onetrainer-comfy": know_all("flux1", "flux2") | know_except("wan", lost=_INVOKEAI_DOTTED_WAN),
    "onetrainer-kohya": know_all(*UNETS) | {"flux1": _INVOKEAI_FLUX} | _INVOKEAI_ENCODERS,
    "onetrainer-diffusers": _INVOKEAI_DIFFUSERS,
    # FLUX_ONETRAINER_TRANSFORMER_KEY_REGEX
    "onetrainer-legacy": {"flux1": KnownKeys(stops=r"(?!lora_transformer_(single_)?transformer_blocks_\d+_).*")}
    | _INVOKEAI_ENCODERS,
}

# diffusers: lora_state_dict of the pipelines, and lora_conversion_utils.
_NO_LOADER = ("hunyuanvideo-1.5", "pixart", "hunyuanimage", "cosmos-predict2")
"""Their pipelines have no load_lora_weights."""
_DIFFUSERS = tuple(name for name in DENOISER_ARCHITECTURES if name not in _NO_LOADER)
_NEWER = (
    *("chroma", "qwen-image-2.1", "auraflow", "sana", "hidream-i1", "ideogram4", "krea2", "ernie-image"),
    *("ltx-video", "ltx-2", "mochi", "kandinsky5", "flux3", "minimax-h3"),
)
_DIFFUSERS_ENCODERS = know_except(*CLIPS, lost=_FLAT_CLIP)
_WAN_FLAT_BLOCKS = r"lora_unet_(blocks)_\d+_(?:(?:self|cross)_attn_[qkvo]|ffn_[02])"
_WAN_IMAGE = r"lora_unet_blocks_\d+_cross_attn_[kv](_img)"
_FLUX_SWAPPED = r"diffusion_model\.final_layer\.adaLN_modulation\.1"
_FLAT_FAMILIES = {
    # _convert_kohya_flux_lora_to_diffusers, _convert_kohya_flux2_lora_to_diffusers
    "flux1": KnownKeys(lost=r"lora_unet_(?!(double|single)_blocks_).*"),
    "flux2": KnownKeys(lost=r"lora_unet_(double_stream_|single_stream_|final_layer_adaLN_).*"),
    # _convert_musubi_wan_lora_to_diffusers
    "wan": KnownKeys(
        complete_groups=rf"{_WAN_FLAT_BLOCKS}|{_WAN_IMAGE}", stops=rf"(?!(?:{_WAN_FLAT_BLOCKS}|{_WAN_IMAGE})$).*"
    ),
} | know_all("qwen-image", "z-image", "minimax-h3")
"""Of MiniMax-H3: _convert_non_diffusers_minimax_h3_lora_to_diffusers, for its own names with or without a prefix."""
# _convert_non_diffusers_wan_lora_to_diffusers, which has no alpha for what is not in a block
_DOTTED_WAN = r"blocks\.\d+\.((self|cross)_attn\.[qkvo]|cross_attn\.[kv]_img|ffn\.[02])"
_WAN_NORMS = r"blocks\.\d+\.(norm3|(self|cross)_attn\.norm_[qk])"
_WAN_WITH_ALPHA = KnownKeys(stops=rf"diffusion_model\.(?!({_DOTTED_WAN}|{_WAN_NORMS})$).*")
_WAN_WITHOUT = KnownKeys(
    stops=rf"diffusion_model\.(?!({_DOTTED_WAN}|{_WAN_NORMS}|(text|time)_embedding\.[02]|time_projection\.1|head\.head|img_emb\.proj\.[13])$).*",
)
_Z_IMAGE_LOST = r"diffusion_model\.(.*\.attention\.qkv|x_embedder|final_layer\..*)"
DIFFUSERS_KEYS: Mapping[str, Mapping[str, KnownKeys]] = {
    "diffusers": know_all(*_DIFFUSERS, *CLIPS),
    "kohya": _FLAT_FAMILIES | know_all(*UNETS) | _DIFFUSERS_ENCODERS,
    # _convert_unet_lora_key knows add_embedding by sgm's name only.
    "kohya-diffusers": know_all("sd1.5-unet", "sd2-unet", "qwen-image", "z-image")
    | know_except("sdxl-unet", lost="lora_unet_add_embedding_.*")
    | _DIFFUSERS_ENCODERS,
    "musubi": _FLAT_FAMILIES,
    # _convert_non_diffusers_flux2_lora_to_diffusers, _convert_hunyuan_video_lora_to_diffusers,
    # _convert_non_diffusers_lumina2_lora_to_diffusers
    "musubi-other": {
        "flux2": KnownKeys(misplaced=_FLUX_SWAPPED),
        "wan": _WAN_WITHOUT,
        # by the first block that is there
        "hunyuanvideo": KnownKeys(
            misplaced=_FLUX_SWAPPED,
            stops=r"diffusion_model\.txt_in\.individual_token_refiner\.blocks\.\d+\.self_attn_qkv",
        ),
        "lumina2": KnownKeys(
            complete_groups=r"diffusion_model\.(layers|noise_refiner|context_refiner)\.\d+\.(?:attention\.(?:qkv|out)|feed.*|adaLN.*)",
            stops=r"diffusion_model\.(?!(layers|noise_refiner|context_refiner)\.).*",
        ),
        # _convert_non_diffusers_ltxv_lora_to_diffusers takes the prefix away and renames nothing.
        "ltx-video": KnownKeys(lost=r"diffusion_model\.(patchify_proj|adaln_single\.).*"),
    }
    | know_all("qwen-image", "z-image", "qwen-image-2.1", "hidream-i1", "krea2", "ernie-image", "ltx-2", "minimax-h3"),
    "onetrainer-diffusers": know_all(*_DIFFUSERS, *CLIPS),
    "onetrainer-kohya": _FLAT_FAMILIES | know_all(*UNETS) | _DIFFUSERS_ENCODERS,
    # _convert_lycoris_flux2_lokr_to_diffusers: blocks only
    "lycoris": {"flux2": KnownKeys(stops=r"lycoris_(?!(single_)?transformer_blocks_).*")},
    # lora_up and lora_down: Flux.1's go through the converter of kohya's names.
    "comfyui": {
        "flux1": KnownKeys(lost=r"diffusion_model\.(?!(double|single)_blocks\.).*"),
        "wan": _WAN_WITH_ALPHA,
        "z-image": KnownKeys(lost=_Z_IMAGE_LOST),
    }
    | know_all("qwen-image", "flux2", "minimax-h3"),
    "onetrainer-comfy": {
        "wan": _WAN_WITH_ALPHA,
        "z-image": KnownKeys(lost=_Z_IMAGE_LOST, stops=r"diffusion_model\..*\.attention\.out"),
    }
    | know_all("qwen-image", "flux2", "minimax-h3"),
    # _convert_mixture_state_dict_to_diffusers
    "onetrainer-legacy": {
        "flux1": KnownKeys(
            stops=r"lora_transformer_(transformer_blocks_\d+_(norm|ff)|single_transformer_blocks_\d+_(norm|proj)).*",
            lost=r"lora_unet_.*",
        )
    }
    | know_except("sd1.5-unet", "sd2-unet", lost="lora_transformer_.*")
    | know_except("sdxl-unet", lost="lora_transformer_.*|lora_unet_add_embedding_.*")
    | _DIFFUSERS_ENCODERS,
    # The names themselves, behind `unet.`
    # _convert_xlabs_flux_lora_to_diffusers
    "processors": know_all(*UNETS) | {"flux1": KnownKeys(lost=r"(?!(double|single)_blocks\.).*")},
    "bare": know_all("qwen-image", "z-image", "qwen-image-2.1", "minimax-h3"),
    "onetrainer-original": know_all("qwen-image", "z-image", "qwen-image-2.1", "minimax-h3"),
    "ai-toolkit": know_all("qwen-image", "z-image")
    | know_except("sd3", "flux1", "flux2", "hunyuanvideo", "framepack", "lumina2", lost=r"diffusion_model\..*")
    | know_except(*_NEWER, lost=r"diffusion_model\..*")
    | know_all("ltx-video", "ltx-2")
    | {"wan": KnownKeys(stops=r"diffusion_model\..*")},
}
# Both walk the model's own modules.
PEFT_KEYS: Mapping[str, Mapping[str, KnownKeys]] = {"peft": EVERY_ARCHITECTURE}
SIMPLETUNER_KEYS: Mapping[str, Mapping[str, KnownKeys]] = {"lycoris": EVERY_ARCHITECTURE}

# musubi-tuner: load_safetensors_with_lora_and_fp8 merges into every weight that it has a name for; of the models in
# MUSUBI_NETWORKS create_arch_network_from_weights makes adapters for the layers in certain classes of blocks.
_MUSUBI_OWN = dict.fromkeys(
    ("hunyuanvideo-1.5", "framepack", "wan", "flux2", "qwen-image", "z-image", "krea2"), KnownKeys(named="musubi")
)
MUSUBI_NETWORKS: Mapping[str, KnownKeys] = {
    **dict.fromkeys(
        ("hunyuanvideo", "flux1"), KnownKeys(lost=r"lora_unet_(?!(double|single)_blocks_\d+_).*", named="musubi")
    ),
    "kandinsky5": KnownKeys(lost=r"lora_unet_(?!(text|visual)_transformer_blocks_\d+_).*", named="musubi"),
    # load_state_dict(strict=True)
    "ideogram4": KnownKeys(lost=r"lora_unet_(?!layers_\d+_).*", named="musubi", strict=True),
}
MUSUBI_KEYS: Mapping[str, Mapping[str, KnownKeys]] = {
    dialect: {**_MUSUBI_OWN, **MUSUBI_NETWORKS}
    for dialect in ("musubi", "kohya", "onetrainer-kohya", "kohya-diffusers")
}
