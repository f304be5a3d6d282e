"""InvokeAI (6.14): which of its converters takes a file, by all keys, and what of it that keeps.

The names of its functions, in invokeai/backend/patches/lora_conversions, stand next to the rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType

from lycoris.adapters.load_report import some
from lycoris.files.programs.routes import RoutedKeys, SentFile

PEFT_PAIR = ("lora_A.weight", "lora_B.weight")
PAIR_NAMES = (*PEFT_PAIR, "lora.down.weight", "lora.up.weight")
LOKR_NAMES = tuple(f"lokr_{name}" for name in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2"))
LOHA_NAMES = tuple(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
FLUX_BLOCKS = ("double_blocks.", "single_blocks.")
UNKNOWN_FLUX_FORMAT = "finds no format of its own for Flux in these keys, and rejects the file"


def refuse(why: str) -> RoutedKeys:
    return RoutedKeys(refused=why)


def is_flat(key: str) -> bool:
    return "." not in key


# _group_state, convert_sdxl_keys_to_diffusers_format
_SGM = re.compile(r"lora_unet_((in|out)put_blocks_|middle_block_|time_embed_|label_emb_|out_\d).*")


def _route_unet(sent: SentFile) -> RoutedKeys:
    if not all(map(is_flat, sent.layers)):
        return refuse("takes names with underscores only for this model, and rejects the file")
    own = {key for key in sent.layers if key.startswith("lora_unet_")}
    stability = {key for key in own if _SGM.fullmatch(key)}
    known: tuple[str, ...] = ("lora_unet_", "lora_te_")
    if sent.architecture == "sdxl-unet":
        known = ("lora_unet_", "lora_te1_", "lora_te2_")
        strange = [key for key in sent.layers if not key.startswith(known)]
        if strange:
            return refuse(f"rejects the file for {some(sorted(strange))}, which begin otherwise than it knows")
        if stability and stability != own:
            return refuse("rejects the file, for only some of its keys have the original code's names of layers")
        stability = set()
    return RoutedKeys(lost=frozenset(stability | {key for key in sent.layers if not key.startswith(known)}))


# FLUX_KOHYA_TRANSFORMER_KEY_REGEX and the others of flux_kohya_lora_conversion_utils
_KOHYA = re.compile(
    r"lora_unet_(\w+_blocks)_(\d+)_((img|txt)_(attn|mlp|mod)|linear[12]|modulation).*|lora_unet_final_layer_linear.*"
    r"|lora_te1_text_model_encoder_layers_\d+_(mlp|self_attn)_\w+"
    r"|lora_te2_encoder_block_\d+_layer_\d+_(DenseReluDense|SelfAttention)_\w+"
)
_KOHYA_BLOCK = re.compile(
    r"lora_unet_((double_blocks_\d+_((img|txt)_(attn_(qkv|proj)|mlp_[02]|mod_lin)))|single_blocks_\d+_(linear[12]|modulation_lin))"
)
# FLUX_ONETRAINER_TRANSFORMER_KEY_REGEX
_ONETRAINER = re.compile(
    r"lora_transformer_(?P<block>(single_)?transformer_blocks)_(?P<at>\d+)_(?P<name>\w+)"
    r"|lora_te1_text_model_encoder_layers_\d+_(mlp|self_attn)_\w+"
    r"|lora_te2_encoder_block_\d+_layer_\d+_(DenseReluDense|SelfAttention)_\w+"
)
# lora_layers_from_flux_diffusers_grouped_state_dict
_DOUBLE = re.compile(
    r"transformer_blocks\.(\d+)\.(norm1(_context)?\.linear|ff(_context)?\.net\.(0\.proj|2)|attn\.(to_out\.0|to_add_out))"
)
_SINGLE = re.compile(r"single_transformer_blocks\.\d+\.(norm\.linear|attn\.to_[qkv]|proj_mlp|proj_out)")
_TOGETHER = re.compile(r"transformer_blocks\.(\d+)\.attn\.(?:to_([qkv])|add_([qkv])_proj)")
_OUTSIDE = frozenset(
    {f"time_text_embed.{which}_embedder.linear_{n}" for which in ("timestep", "text") for n in (1, 2)}
    | {"context_embedder", "x_embedder", "proj_out"}
)


def _explain_diffusers_names(paths: Iterable[str]) -> str:
    """Why its table of diffusers' names for Flux.1 does not take these layers; "" where it does."""
    groups: dict[tuple[str, bool], set[str]] = {}
    strange = []
    for path in paths:
        if match := _TOGETHER.fullmatch(path):
            at, plain, added = match.groups()
            groups.setdefault((at, bool(added)), set()).add(plain or added)
        elif path not in _OUTSIDE and not _DOUBLE.fullmatch(path) and not _SINGLE.fullmatch(path):
            strange.append(path)
    if strange:
        return f"rejects the file for {some(sorted(strange))}"
    parted = sorted(
        f"transformer_blocks.{at}.attn.{'add_*_proj' if added else 'to_*'}"
        for (at, added), found in groups.items()
        if len(found) < 3
    )
    return (
        f"rejects the file, for it wants q, k and v together, and some are missing of {some(parted)}" if parted else ""
    )


def _find_flux_version(sent: SentFile) -> str:
    """is_state_dict_likely_in_flux_diffusers_format: for which Flux it is; "" for none."""
    if not sent.all_have_suffix(*PAIR_NAMES):
        return ""
    for prefix in ("transformer.", "base_model.model."):
        wanted = ("single_transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_q_proj")
        if all(set(PEFT_PAIR) <= set(sent.layers.get(prefix + name, ())) for name in wanted):
            return "flux1"
    second = any(
        mark in name for name in sent.names for mark in ("to_qkv_mlp_proj", "ff.linear_in", "ff_context.linear_in")
    )
    single = any(
        key.startswith(f"{prefix}single_transformer_blocks.") and "to_qkv_mlp_proj" in key
        for key in sent.layers
        for prefix in ("transformer.", "base_model.model.", "")
    )
    double = sent.has_prefix(
        "transformer.transformer_blocks.", "base_model.model.transformer_blocks.", "transformer_blocks."
    )
    return "flux2" if second and (single or double) else ""


def _explain_kohya_names(sent: SentFile) -> str:
    """Which layers of a file in kohya's format have names that it does not have there; "" where the file is another."""
    strange = [key for key in sent.layers if not _KOHYA.fullmatch(key)]
    if not all(map(is_flat, sent.layers)) or not all(key.startswith(("lora_unet_", "lora_te")) for key in sent.layers):
        return ""
    return f"rejects the file for {some(sorted(strange))}"


def strip_prefix(prefixes: tuple[str, ...], key: str) -> str:
    return next((key.removeprefix(each) for each in prefixes if key.startswith(each)), key)


def _find_long_names(sent: SentFile, keys: Iterable[str]) -> list[str]:
    """Layers whose tensors have names of other than two parts, which it takes for a part of the path."""
    return sorted(key for key in keys if any(name.count(".") != 1 for name in sent.layers[key]))


def _route_invokeai_flux1(sent: SentFile) -> RoutedKeys:
    if kind := _find_flux_version(sent):
        if kind == "flux2":
            return RoutedKeys(lost=frozenset(sent.layers))
        why = _explain_diffusers_names(strip_prefix(("base_model.model.", "transformer."), key) for key in sent.layers)
        broken = _find_long_names(sent, sent.layers)
        return refuse(why or (f"rejects the file for {some(broken)}" if broken else ""))
    if all(map(_KOHYA.fullmatch, sent.layers)):
        kept = {key for key in sent.layers if _KOHYA_BLOCK.fullmatch(key) or key.startswith("lora_te")}
        return RoutedKeys(lost=frozenset(sent.layers.keys() - kept))
    if all(map(_ONETRAINER.fullmatch, sent.layers)):
        return refuse(_explain_flat_names(sent.layers))
    return _route_original_names(sent)


def _explain_flat_names(keys: Iterable[str]) -> str:
    """insert_periods_into_kohya_key, which takes the first word that fits: of ff_context it takes ff."""
    paths, strange = [], []
    for key in keys:
        match = _ONETRAINER.fullmatch(key)
        if match is None or match["block"] is None:
            continue
        name = match["name"]
        for there in ("norm1_linear", "norm_linear"):
            name = there.replace("_", ".") if name == there else name
        name = re.sub(r"^attn_", "attn.", name).replace("to_out_0", "to_out.0")
        name = re.sub(r"^ff_net_(\d)(_proj)?$", lambda m: f"ff.net.{m[1]}{'.proj' if m[2] else ''}", name)
        if name.startswith(("ff_context", "norm1_context")):
            strange.append(key)
        paths.append(f"{match['block']}.{match['at']}.{name}")
    return f"rejects the file for {some(sorted(strange))}" if strange else _explain_diffusers_names(paths)


def _route_original_names(sent: SentFile) -> RoutedKeys:
    """The original code's names, behind `diffusion_model.`."""
    if strange := _explain_kohya_names(sent):
        return refuse(strange)
    if sent.has_prefix(*(f"diffusion_model.{each}" for each in FLUX_BLOCKS)) and not sent.has_suffix(
        *LOKR_NAMES, *LOHA_NAMES
    ):
        # is_state_dict_likely_in_flux_aitoolkit_format
        own = [key for key in sent.layers if key.startswith("diffusion_model.")]
        alone = [key for key in sent.layers if "." not in key]
        broken = [*_find_long_names(sent, own), *alone, *_find_cut_short(sent)]
        if broken:
            return refuse(
                f"takes tensors with two-part names only in such keys, such as lora_A.weight, and rejects the file for "
                f"{some(broken)}"
            )
        return RoutedKeys(lost=frozenset(sent.layers.keys() - set(own)))
    ends = (*PEFT_PAIR, *LOKR_NAMES, *LOHA_NAMES, "alpha", "dora_scale", "diff")
    prefixes = ("diffusion_model.", "base_model.model.")
    blocks = tuple(prefix + each for prefix in prefixes for each in FLUX_BLOCKS)
    if sent.all_have_suffix(*ends) and sent.has_prefix(*blocks) and sent.all_have_prefix(*prefixes):
        return RoutedKeys()
    return refuse(UNKNOWN_FLUX_FORMAT)


def _find_cut_short(sent: SentFile) -> list[str]:
    """Layers of one step whose tensors have names of one part, so that nothing is left of the layer."""
    return [key for key, names in sent.layers.items() if key.count(".") < 1 and any("." not in name for name in names)]


# convert_bfl_lora_patch_to_diffusers, _convert_bfl_layer_to_diffusers
_FLUX2 = re.compile(
    r"double_blocks\.\d+\.((img|txt)_(attn\.(qkv|proj)|mlp\.[02]))|single_blocks\.\d+\.linear[12]|(img|txt)_in"
    r"|double_stream_modulation_(img|txt)\.lin|single_stream_modulation\.lin|final_layer\.linear|time_in\.(in|out)_layer"
)


def _route_invokeai_flux2(sent: SentFile) -> RoutedKeys:
    kind = _find_flux_version(sent)
    if kind == "flux2":
        return RoutedKeys()
    if kind == "flux1":
        return _route_invokeai_flux1(sent)
    if all(map(_KOHYA.fullmatch, sent.layers)):
        kept = {key for key in sent.layers if _KOHYA_BLOCK.fullmatch(key) or key.startswith("lora_te")}
        kept = {key for key in kept if "_mod_lin" not in key and "_modulation_lin" not in key}
        return RoutedKeys(lost=frozenset(sent.layers.keys() - kept | _find_badly_split(sent, kept)))
    if all(map(_ONETRAINER.fullmatch, sent.layers)):
        why = _explain_flat_names(sent.layers)
        lost = {key for key in sent.layers if re.search(r"_attn_(to|add)_[qkv](_proj)?$", key)}
        return RoutedKeys(why, frozenset(lost))
    found = _route_original_names(sent)
    if found.refused:
        return found
    names = {key: strip_prefix(("diffusion_model.", "base_model.model."), key) for key in sent.layers}
    lost = {key for key, name in names.items() if not _FLUX2.fullmatch(name)} | found.lost
    fused = {key for key in sent.layers if key.endswith("_attn.qkv")}
    if sent.has_suffix(*LOKR_NAMES, *LOHA_NAMES):
        # lora_model_from_flux2_bfl_peft_state_dict
        taken = {key for key in fused if {"lora_A.weight", "lokr_w1", "lokr_w1_a"} & set(sent.layers[key])}
        bare = {key for key in taken if "dora_scale" in sent.layers[key]}
        return RoutedKeys(lost=frozenset(lost | fused - taken), without_magnitude=frozenset(bare))
    return RoutedKeys(lost=frozenset(lost | _find_badly_split(sent, fused)))


def _find_badly_split(sent: SentFile, keys: Iterable[str]) -> set[str]:
    """Projections to q, k and v together, which it parts for plain LoRA only."""
    return {
        key
        for key in keys
        if key.endswith("attn_qkv" if is_flat(key) else "attn.qkv")
        and ("dora_scale" in sent.layers[key] or not {"lora_up.weight", "lora_A.weight"} & set(sent.layers[key]))
    }


KNOWN_ENDS = frozenset({"lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "dora_scale", "alpha"})


def is_cut_wrongly(sent: SentFile, key: str, known: Collection[str] = KNOWN_ENDS) -> bool:
    """Return whether `_group_by_layer` splits a name at the wrong place into layer and tensor.

    `known` are the tensor names it recognizes; others have to have two parts.
    """
    return not is_flat(key) and any(
        name not in known and (name.count(".") != 1 or name in ("up.weight", "down.weight"))
        for name in sent.layers[key]
    )


def find_bare_pairs(sent: SentFile) -> tuple[frozenset[str], frozenset[str]]:
    """Return the layers of which InvokeAI reads nothing but lora_A and lora_B.

    Returns:
        Those that have an alpha, and those that have a magnitude.
    """
    pairs = {key: set(names) for key, names in sent.layers.items() if "lora_A.weight" in names}
    scaled = frozenset(key for key, names in pairs.items() if "alpha" in names)
    return scaled, frozenset(key for key, names in pairs.items() if "dora_scale" in names)


def explain_wrong_cut(keys: Iterable[str]) -> str:
    return (
        "takes the last two dots of a name for the end of the layer's, which is right for LoRA only, and rejects the "
        f"file for {some(sorted(keys))}"
    )


_Z_IMAGE = re.compile(
    r"lora_unet__(layers|context_refiner|noise_refiner)_\d+_(attention|feed_forward)_(to_[kqv]|w[123])"
)


def _route_z_image(sent: SentFile) -> RoutedKeys:
    broken = [key for key in sent.layers if is_cut_wrongly(sent, key)]
    if broken:
        return refuse(explain_wrong_cut(broken))
    prefixes: tuple[str, ...] = ("base_model.model.transformer.", "transformer.", "diffusion_model.")
    prefixes += ("base_model.model.text_encoder.", "text_encoder.")
    lost = {key for key in sent.layers if is_flat(key) and not _Z_IMAGE.fullmatch(key)}
    lost |= {key for key in sent.layers if key.endswith((".attention.qkv", ".attention.out"))}
    lost |= {key for key in sent.layers if strip_prefix(prefixes, key).startswith(("final_layer.", "x_embedder"))}
    scaled, bare = find_bare_pairs(sent)
    return RoutedKeys(lost=frozenset(lost), without_scale=scaled, without_magnitude=bare)


# _KOHYA_MODULE_MAP
_QWEN = re.compile(
    r"lora_unet_transformer_blocks_\d+_(attn_(add_[qkv]_proj|to_add_out|to_out_0|to_[qkv])"
    r"|(img|txt)_(mlp_net_(0_proj|2)|mod_1))"
)


def _route_qwen(sent: SentFile) -> RoutedKeys:
    if sent.has_prefix("lora_unet_transformer_blocks_"):
        # _convert_kohya_format
        dotted = [key for key in sent.layers if not is_flat(key)]
        return RoutedKeys(lost=frozenset([*(key for key in sent.layers if not _QWEN.fullmatch(key)), *dotted]))
    broken = [key for key in sent.layers if is_cut_wrongly(sent, key)]
    if broken:
        return refuse(explain_wrong_cut(broken))
    lost = {key for key in sent.layers if key.startswith(("diffusion_model.", "lora_", "lycoris_", "base_model."))}
    scaled, bare = find_bare_pairs(sent)
    return RoutedKeys(lost=frozenset(lost), without_scale=scaled, without_magnitude=bare)


# _KOHYA_WAN_RE, _KOHYA_SUBMODULE_MAP
_WAN = re.compile(
    r"lora_unet_blocks_\d+_(attn[12]_(to_[qkv]|to_out_0|norm_[qk])|(self|cross)_attn_([qkvo]|norm_[qk])|ffn_(net_0_proj|net_2|[02]))"
)
_WAN_LIKE = re.compile(
    r".*lora_unet_blocks_\d+_(attn[12]_(to_[qkv]|to_out_0|norm_[qk])|(self|cross)_attn_[qkvo](_.*)?|ffn_(\d+|net_\d+(_proj)?)).*"
)
_WAN_DOTTED = re.compile(
    r"blocks\.\d+\.(attn[12]\..*|ffn\.net\..*|(self|cross)_attn\.([qkvo]|norm_[qk])|ffn\.[02]|norm2|scale_shift_table)"
)


def _route_invokeai_wan(sent: SentFile) -> RoutedKeys:
    if any(map(_WAN_LIKE.fullmatch, sent.layers)):
        taken = {key for key in sent.layers if _WAN.fullmatch(key)}
        norms = [key for key in taken if key.endswith(("norm_q", "norm_k"))]
        if norms:
            # torch.nn.RMSNorm is not in AUTOCAST_MODULE_TYPE_MAPPING.
            return refuse(f"has no patches for norms of that class, and stops at {some(sorted(norms))}")
        return RoutedKeys(lost=frozenset(sent.layers.keys() - taken))
    prefixes = ("base_model.model.transformer.", "transformer.", "diffusion_model.")
    paths = {key: strip_prefix(prefixes, key) for key in sent.layers}
    inside = {key for key, path in paths.items() if path.startswith("blocks.")}
    broken = [key for key in inside if is_cut_wrongly(sent, key)]
    if broken:
        return refuse(explain_wrong_cut(broken))
    return RoutedKeys(lost=frozenset(key for key in sent.layers if not _WAN_DOTTED.fullmatch(paths[key])))


INVOKEAI_ROUTES: Mapping[str, Callable[[SentFile], RoutedKeys]] = MappingProxyType(
    {
        **dict.fromkeys(("sd1.5-unet", "sd2-unet", "sdxl-unet"), _route_unet),
        "flux1": _route_invokeai_flux1,
        "flux2": _route_invokeai_flux2,
        "z-image": _route_z_image,
        "qwen-image": _route_qwen,
        "wan": _route_invokeai_wan,
    }
)
