"""InvokeAI (6.14): its converters for Krea 2 and Anima.

The names of its functions, in invokeai/backend/patches/lora_conversions, stand next to the rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from lycoris.adapters.load_report import some
from lycoris.files.programs.invokeai_routes import (
    KNOWN_ENDS,
    explain_wrong_cut,
    find_bare_pairs,
    is_cut_wrongly,
    is_flat,
    refuse,
    strip_prefix,
)
from lycoris.files.programs.routes import RoutedKeys, SentFile

NEWER_PREFIXES = ("base_model.model.transformer.", "transformer.", "diffusion_model.")
KNOWN_TENSOR_NAMES = ("lora_up.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a", "diff", "on_input", "w_norm")


def _explain_unknown(sent: SentFile, keys: Iterable[str]) -> str:
    """any_lora_layer_from_state_dict, which it asks of layers too that the model does not have."""
    strange = []
    for key in keys:
        names = set(sent.layers[key])
        lora = {"lora_A.weight", "lora_up.weight"} & names
        if not lora and ("dora_scale" in names or not names & set(KNOWN_TENSOR_NAMES)):
            strange.append(key)
    return f"knows no such algorithm, and rejects the file for {some(sorted(strange))}" if strange else ""


# _SUFFIX_TO_VALUE_KEY
_KREA2_ENDS = KNOWN_ENDS | {"lora_magnitude_vector.weight", "magnitude"}
# _KREA2_NATIVE_KOHYA_PARSING_TREE, _NATIVE_KREA2_TOP_LEVEL_RENAMES, _NATIVE_KREA2_LEAF_RENAMES
_KREA2_FLAT = re.compile(
    r"lora_unet_+((blocks|txtfusion_(layerwise|refiner)_blocks)_\d+_(attn_(w[qkvo]|gate)|mlp_(gate|up|down))"
    r"|txtfusion_projector|first|tmlp_[02]|tproj_1|txtmlp_[13]|last_linear)"
)
_KREA2_OWN = re.compile(
    r"(blocks|txtfusion\.(layerwise|refiner)_blocks)\.\d+\.(attn\.(w[qkvo]|gate)|mlp\.(gate|up|down))"
    r"|txtfusion\.projector|first|tmlp\.[02]|tproj\.1|txtmlp\.[13]|last\.linear"
)
_KREA2_DIFFUSERS = re.compile(
    r"(transformer_blocks|text_fusion\.(layerwise|refiner)_blocks)\.\d+\..*"
    r"|text_fusion\.projector|img_in|time_embed\.linear_[12]|time_mod_proj|txt_in\..*|final_layer\..*"
)


def _route_krea2(sent: SentFile) -> RoutedKeys:
    broken = [key for key in sent.layers if is_cut_wrongly(sent, key, _KREA2_ENDS)]
    if broken:
        return refuse(explain_wrong_cut(broken))
    kept = set()
    for key, names in sent.layers.items():
        path = strip_prefix(NEWER_PREFIXES, key)
        own, theirs = _KREA2_OWN.fullmatch(path), _KREA2_DIFFUSERS.fullmatch(path)
        # _maybe_convert_kohya_krea2_state_dict
        whole = _KREA2_FLAT.fullmatch(key) and set(names) <= _KREA2_ENDS
        if whole or own or theirs:
            kept.add(key)
    lost = sent.layers.keys() - kept
    return RoutedKeys(refused=_explain_unknown(sent, lost), lost=frozenset(lost))


# _KOHYA_UNET_KEY_REPLACEMENTS
_ANIMA_FLAT = re.compile(
    r"lora_unet_(llm_adapter_)?blocks_\d+_(adaln_modulation_(cross_attn|self_attn|mlp)_\d"
    r"|(cross|self)_attn_([qkv]|output|o)_proj|mlp_layer[12])"
)
_ANIMA_DOTTED = re.compile(r"lora_unet_(llm_adapter_)?blocks_\d+_|lora_te_|lora_unet_llm_adapter_")
_ANIMA_OUTSIDE = re.compile(r"lora_unet_(t_embedder|x_embedder|final_layer)_")
_ANIMA_LOKR = frozenset(f"lokr_{name}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b"))
_ANIMA = re.compile(
    r"(blocks|llm_adapter\.blocks)\.\d+\..*|t_embedder\..*|x_embedder\..*|final_layer\..*|t_embedding_norm"
)


def _route_anima(sent: SentFile) -> RoutedKeys:
    # torch.nn.RMSNorm and the like are not in AUTOCAST_MODULE_TYPE_MAPPING.
    norms = [key for key in sent.layers if strip_prefix((*NEWER_PREFIXES, "lora_unet_"), key) == "t_embedding_norm"]
    if norms:
        return refuse(f"has no patches for norms of that class, and stops at {some(sorted(norms))}")
    kron = {key for key, names in sent.layers.items() if {"lokr_w1", "lokr_w1_a"} & set(names)}
    if sent.has_prefix("lora_unet_", "lora_te_"):
        broken = [key for key in sent.layers if is_cut_wrongly(sent, key)]
        lost = {key for key in sent.layers if not _ANIMA_FLAT.fullmatch(key) and not key.startswith("lora_te_")}
        if not any(map(_ANIMA_DOTTED.match, sent.layers)):
            # apply_smart_model_patch: where no name has a dot, it searches the model for each.
            lost = {key for key in sent.layers if not _ANIMA_OUTSIDE.match(key)}
        bare: frozenset[str] = frozenset()
        scaled: frozenset[str] = frozenset()
    else:
        broken = [key for key in sent.layers if is_cut_wrongly(sent, key, KNOWN_ENDS | _ANIMA_LOKR)]
        lost = {key for key in sent.layers if is_flat(key) or not _ANIMA.fullmatch(strip_prefix(NEWER_PREFIXES, key))}
        scaled, bare = find_bare_pairs(sent)
    if broken:
        return refuse(explain_wrong_cut(broken))
    # _make_layer_patch
    bare |= {key for key in kron if "dora_scale" in sent.layers[key]}
    return RoutedKeys(
        _explain_unknown(sent, lost - kron), frozenset(lost), without_scale=scaled, without_magnitude=bare
    )


NEWER_ROUTES: Mapping[str, Callable[[SentFile], RoutedKeys]] = MappingProxyType(
    {"krea2": _route_krea2, "cosmos-predict2": _route_anima}
)
