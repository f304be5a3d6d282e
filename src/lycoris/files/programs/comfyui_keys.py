"""Which keys ComfyUI 0.33 knows: `model_lora_keys_unet` and `model_lora_keys_clip` in its comfy/lora.py.

`diffusion_model.` and `lora_unet_` stand before its own names of a model's layers, whatever the model. For some classes
of models it knows further prefixes, and diffusers' names behind some; those are the facts below, one for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from lycoris.files.dialects import DIALECTS
from lycoris.files.programs.keys import (
    COMFYUI_CLIP,
    DOTTED_CLIP,
    T5_EMBEDDING,
    UNET_PROJECTIONS,
    UNETS,
    KnownKeys,
    know_all,
    know_except,
)
from lycoris.files.programs.taking import PROCESSOR_SUFFIXES, LayerPlace, TakenTensors
from lycoris.models.families import ARCHITECTURES
from lycoris.models.families.naming import DIFFUSERS_NAMING

OWN_PREFIXES = ("diffusion_model.", "lora_unet_")
"""What stands before the names of its own layers."""
WAN_FUN_PREFIX = "lora_unet__"
"""Flat names with this prefix are recognized as Wan's by one tensor: convert_lora_wan_fun in comfy/lora_convert.py."""
_FLUX = ("transformer.", "", "lycoris_", "lora_transformer_")


MATCHES_NOTHING = r"(?!)"
"""Matches no key."""


class ModelKeys(NamedTuple):
    """What ComfyUI knows for a class of models: prefixes and names, besides its own names behind `OWN_PREFIXES`."""

    own: tuple[str, ...] = ()
    """More of what stands before its own names."""
    diffusers: tuple[str, ...] = ()
    """What stands before diffusers' names, where they are others."""
    original: tuple[str, ...] = ()
    """What stands before the names of the published code, where they are others."""
    lost: str = MATCHES_NOTHING
    """Regular expression for keys of layers that have no place under any name."""
    lost_theirs: str = MATCHES_NOTHING
    """The same of diffusers' names and those of the published code, where they are others."""
    alike: str = MATCHES_NOTHING
    """Its own names that it knows behind `diffusers` or `original` too, for they are the same there."""
    few: bool = False
    """Whether those are so few that it cannot be said to know such files."""
    hinge: tuple[str, str] = ("", "")
    """See `KnownKeys.requires`."""


_REFINED = r"(?:layers|noise_refiner|context_refiner)[._]\d+[._]"
_ORIGINAL = ("diffusion_model.", "transformer.")
_HUNYUAN_TIMES = r".*(?:txt_in[._][tc]_embedder|time_in|guidance_in)[._].*|.*[qk]_norm"
_HUNYUAN_ALIKE = r"(?!.*(?:self_attn|mod[._]lin|attn[._](?:qkv|proj)|mlp|(?<!LN_)modulation)).*"
MODEL_KEYS: Mapping[str, ModelKeys] = MappingProxyType(
    {
        # mmdit_to_diffusers; `base_model.model.` is "format for flash-sd3 lora"
        "sd3": ModelKeys(
            diffusers=("transformer.", "base_model.model.", "lycoris_", "lora_transformer_"), alike="context_embedder"
        ),
        # flux_to_diffusers, for the classes Flux, Flux2 and Chroma
        "flux1": ModelKeys(diffusers=_FLUX),
        "flux2": ModelKeys(
            diffusers=_FLUX,
            lost_theirs=r".*(double_stream_modulation_(img|txt)|single_stream_modulation)[._]linear"
            r"|.*time_guidance_embed[._]timestep_embedder[._]linear_[12]",
        ),
        "chroma": ModelKeys(diffusers=_FLUX, lost_theirs=r".*distilled_guidance_layer[._].*"),
        "qwen-image": ModelKeys(own=("transformer.", "", "lycoris_")),
        # z_image_to_diffusers, for the class Lumina2: it knows diffusers' names of Z-Image, and not those of Lumina2.
        "z-image": ModelKeys(
            diffusers=("diffusion_model.", "transformer.", "", "lycoris_"),
            alike=rf"{_REFINED}(?:feed_forward|attention_norm\d|ffn_norm\d|adaLN_modulation).*|(?:cap|t)_embedder.*",
        ),
        "lumina2": ModelKeys(
            diffusers=("transformer.", "", "lycoris_"),
            lost_theirs=r"(?!.*[._]ffn_norm\d$).*",
            few=True,
            alike=rf"{_REFINED}(?:feed_forward|attention_norm\d|ffn_norm\d).*|(?:cap|t)_embedder.*",
        ),
        "wan": ModelKeys(
            own=(WAN_FUN_PREFIX,),
            hinge=(f"{WAN_FUN_PREFIX}.*", f"{WAN_FUN_PREFIX}blocks_0_cross_attn_k.lora_down.weight"),
        ),
        # "diffusion-pipe lora format", for the class HunyuanVideo: the published names, in the blocks.
        "hunyuanvideo": ModelKeys(original=_ORIGINAL, lost_theirs=_HUNYUAN_TIMES, alike=_HUNYUAN_ALIKE),
        "hunyuanvideo-1.5": ModelKeys(
            original=_ORIGINAL, lost_theirs=rf"{_HUNYUAN_TIMES}|.*_attn_[qkv]", alike=_HUNYUAN_ALIKE
        ),
        "hunyuanimage": ModelKeys(),
        # auraflow_to_diffusers
        "auraflow": ModelKeys(diffusers=("transformer.",)),
        # pixart_to_diffusers
        "pixart": ModelKeys(diffusers=("transformer.", "base_model.model.", "unet.base_model.model.")),
        # Its parameters called weight lose that in its keys.
        "hidream-i1": ModelKeys(own=("transformer.", "lycoris_"), lost=r".*ff_i[._]gate[._]weight"),
        "ideogram4": ModelKeys(),
        # krea2_to_diffusers; the parameter of its norms is called scale.
        "krea2": ModelKeys(
            diffusers=("diffusion_model.", "transformer.", "", "lycoris_"),
            lost=r".*[._](\w*norm\d?|norm_[qk]|txtmlp[._]0)",
            lost_theirs=r".*scale_shift_table",
        ),
        "ernie-image": ModelKeys(own=("transformer.",)),
        "cosmos-predict2": ModelKeys(),
        "ltx-video": ModelKeys(own=("",)),
        "ltx-2": ModelKeys(own=("",)),
        "mochi": ModelKeys(own=("",)),
        "kandinsky5": ModelKeys(own=("", "transformer.")),
        "minimax-h3": ModelKeys(),
    }
)
"""Denoisers but UNets, by architecture."""
MISSING_MODELS = frozenset({"flux3", "qwen-image-2.1", "sana", "framepack"})
"""Architectures of which it has no model."""

_SPELLED = frozenset(
    {
        *(
            "alpha",
            "dora_scale",
            "reshape_weight",
            "diff",
            "diff_b",
            "set_weight",
            "bias.set_weight",
            "w_norm",
            "b_norm",
        ),
        *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "lora_B.weight", "lora_A.weight"),
        *("lora.up.weight", "lora.down.weight", "lora_B", "lora_A"),
        *("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
        *("lora_B.default.weight", "lora_A.default.weight"),
        *(f"hada_{each}" for each in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{each}" for each in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *(f"{each}.weight" for each in ("a1", "a2", "b1", "b2")),
        *("oft_blocks", "rescale"),
        *PROCESSOR_SUFFIXES,
    }
)
"""Names of tensors that it looks for: load_lora in comfy/lora.py, and comfy/weight_adapter."""


def take_by_comfyui(names: frozenset[str], key: str, place: LayerPlace = "") -> TakenTensors:
    """Return the tensors that ComfyUI looks for behind a layer's key.

    Each bias has a key of its own behind `diffusion_model.`.
    """
    biases = {"bias.diff"} if key.startswith("diffusion_model.") and not place else set()
    return TakenTensors(names & (_SPELLED | biases))


_PREFIXES = sorted(
    {
        prefix
        for dialect in DIALECTS.values()
        for prefix, component in dialect.prefixes.items()
        if prefix and not component
    }
    | {"unet.base_model.model.", "text_encoder", "lora_te", "oft_te"}
)


def find_known(architecture: str, naming: str) -> KnownKeys | None:
    """Return what ComfyUI knows of keys with a naming's names of an architecture's layers.

    None for UNets and text encoders, which `COMFYUI_KEYS` lists by dialect.
    """
    model = MODEL_KEYS.get(architecture)
    if model is None:
        return None
    own = (*OWN_PREFIXES, *model.own)
    if naming == DIALECTS["comfyui"].choose_naming(ARCHITECTURES[architecture]):
        others = _match_behind((*model.diffusers, *model.original), model.alike)
        return KnownKeys(f"(?!{_match_behind(own)}|{others}).*|{model.lost}", requires=model.hinge)
    theirs = model.diffusers if naming == DIFFUSERS_NAMING else model.original
    rest = _match_behind(tuple(prefix for prefix in own if prefix not in theirs))
    lost = f"(?!{_match_behind((*own, *theirs))}).*|{model.lost}|(?!{rest})(?:{model.lost_theirs})"
    return KnownKeys(lost, named="comfyui", named_pattern=rest, requires=model.hinge)


def _match_behind(prefixes: tuple[str, ...], names: str = ".*") -> str:
    """Regular expression for whole keys that have one of the prefixes and such a name."""
    bare = rf"(?!{'|'.join(map(re.escape, _PREFIXES))})"
    spelled = {"": bare, "lora_unet_": "lora_unet_(?!_)"}
    return rf"(?:{'|'.join(spelled.get(each, re.escape(each)) for each in prefixes) or MATCHES_NOTHING})(?:{names})\Z"


def _list_known(dialect: str) -> dict[str, KnownKeys]:
    """Of the denoisers in `MODEL_KEYS`, those that it knows by the names of a dialect."""
    prefixes = {prefix for prefix, component in DIALECTS[dialect].prefixes.items() if not component}
    found = {}
    for name, model in MODEL_KEYS.items():
        naming, own = (DIALECTS[each].choose_naming(ARCHITECTURES[name]) for each in (dialect, "comfyui"))
        theirs = model.diffusers if naming == DIFFUSERS_NAMING else model.original
        behind = {*OWN_PREFIXES, *model.own} if naming == own else set() if model.few else {*theirs}
        there = find_known(name, naming) if prefixes & behind else None
        if there is not None:
            found[name] = there
    return found


# `unet.` is before `attn1.processor.to_q`, which newer files do not have.
_DOTTED = know_except(*UNETS, lost=rf"{UNET_PROJECTIONS}|transformer\..*") | DOTTED_CLIP
_HEAD = r".*lm_head"
_OWN_ENCODERS = (
    know_all(*DOTTED_CLIP) | know_except("t5", lost=T5_EMBEDDING) | know_except("language-model", lost=_HEAD)
)
_FLAT_UNETS = know_except(*UNETS, lost="(?!lora_unet_(?!_)).*")
_OWN_UNETS = know_except(*UNETS, lost=r"(?!diffusion_model\.).*")
_FLAT = _FLAT_UNETS | COMFYUI_CLIP
# T5 alone is counted as the first text encoder. One language model alone has `lora_te_`.
_T5_ALONE = ("chroma", "pixart", "ltx-video", "mochi", "cosmos-predict2")
_FLAT_ENCODERS: Mapping[str, KnownKeys] = {
    **_FLAT,
    **{f"{family}/t5": KnownKeys(rf"(?!lora_te1_).*|{T5_EMBEDDING}") for family in _T5_ALONE},
    **{f"{family}/language-model": KnownKeys(f"(?!lora_te_).*|{_HEAD}") for family in ("z-image", "lumina2")},
}
COMFYUI_KEYS: Mapping[str, Mapping[str, KnownKeys]] = MappingProxyType(
    {
        "comfyui": _list_known("comfyui") | _OWN_UNETS | _OWN_ENCODERS,
        "kohya": {**_list_known("kohya"), **_FLAT_ENCODERS},
        "kohya-diffusers": {**_list_known("kohya-diffusers"), **_FLAT_ENCODERS},
        # unet_to_diffusers
        "lycoris": _list_known("lycoris") | know_all(*UNETS),
        "diffusers": _list_known("diffusers") | _DOTTED,
        # `unet.` and nothing else, before the processors' names
        "processors": know_except(*UNETS, lost=r"transformer\..*"),
        "musubi": _list_known("musubi"),
        "musubi-other": _list_known("musubi-other"),
        "onetrainer-comfy": _list_known("onetrainer-comfy") | _OWN_UNETS | _OWN_ENCODERS,
        "onetrainer-kohya": {**_list_known("onetrainer-kohya"), **_FLAT_ENCODERS},
        "onetrainer-diffusers": _list_known("onetrainer-diffusers") | _DOTTED,
        "onetrainer-legacy": {**_list_known("onetrainer-legacy"), **_FLAT_ENCODERS},
        "ai-toolkit": _list_known("ai-toolkit"),
        # unet_to_diffusers: without a prefix
        "bare": _list_known("bare") | know_except(*UNETS, lost=UNET_PROJECTIONS),
        "onetrainer-original": _list_known("onetrainer-original"),
        # Without the folder's config its scale is that of alpha = rank.
        "peft": _list_known("peft"),
    }
)
