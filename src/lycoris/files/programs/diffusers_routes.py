"""diffusers (0.42): what its converters make of all keys of a file together.

The names of its functions, in diffusers/loaders/lora_conversion_utils.py, stand next to the rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from lycoris.adapters.load_report import some
from lycoris.files.programs.routes import RoutedKeys, SentFile

LORA_PAIR = frozenset({"lora_A.weight", "lora_B.weight"})
ORIGINAL_PREFIX = "diffusion_model."


def _reject_left(sent: SentFile, keys: Iterable[str], known: frozenset[str]) -> RoutedKeys | None:
    """Rejected for tensors that a converter has no use for."""
    left = sorted(
        f"{key}.{name}" for key in keys for name in sent.layers[key] if name not in known and name != "dora_scale"
    )
    return RoutedKeys(refused=f"rejects the file for {some(left)}, which it cannot convert") if left else None


# _convert_kohya_flux2_lora_to_diffusers
_FLUX2_KOHYA = re.compile(
    r"lora_unet_(double_blocks_\d+_(img|txt)_(attn_(qkv|proj)|mlp_[02])|single_blocks_\d+_linear[12]"
    r"|(img|txt)_in|time_in_(in|out)_layer|final_layer_linear)"
)
_LOKR_NAMES = frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"))
_EXPANDED_PREFIXES = tuple(
    f"{ORIGINAL_PREFIX}{name}." for name in ("single_transformer_blocks", "transformer_blocks", "sformer_blocks")
)


def _route_flux2(sent: SentFile) -> RoutedKeys | None:
    if sent.has_suffix(".lora_down.weight"):
        kept = {
            key for key, names in sent.layers.items() if _FLUX2_KOHYA.fullmatch(key) and "lora_down.weight" in names
        }
        bare = frozenset(key for key in kept if "dora_scale" in sent.layers[key])
        return RoutedKeys(lost=frozenset(sent.layers.keys() - kept), without_magnitude=bare)
    own = [key for key in sent.layers if key.startswith(ORIGINAL_PREFIX)]
    if sent.has_suffix(*_LOKR_NAMES):
        # _convert_non_diffusers_flux2_lokr_to_diffusers
        return _reject_left(sent, own, _LOKR_NAMES | {"alpha"})
    # _convert_non_diffusers_flux2_lora_to_diffusers
    return _reject_left(sent, (key for key in own if not key.startswith(_EXPANDED_PREFIXES)), LORA_PAIR)


# _convert_non_diffusers_wan_lora_to_diffusers
_WAN_BLOCK_KEY = re.compile(r"diffusion_model\.blocks\.\d+\..*")


def _route_wan(sent: SentFile) -> RoutedKeys | None:
    own = [key for key in sent.layers if key.startswith(ORIGINAL_PREFIX)]
    if not own:
        return None
    outside = [key for key in own if not _WAN_BLOCK_KEY.fullmatch(key)]
    if len(outside) == len(own):
        return RoutedKeys(refused="rejects a file in such keys that has nothing for a block")
    scaled = sorted(key for key in outside if "alpha" in sent.layers[key])
    return RoutedKeys(refused=f"rejects the file for alpha of {some(scaled)}") if scaled else None


def _route_hunyuanvideo(sent: SentFile) -> RoutedKeys | None:
    """is_original_hunyuan_video: it is converted by that layer, and else taken as it is, for nothing."""
    own = [key for key in sent.layers if key.startswith(ORIGINAL_PREFIX)]
    if not own or any("img_attn_qkv" in name for name in sent.names):
        return None
    return _reject_left(sent, own, LORA_PAIR) or RoutedKeys(lost=frozenset(own))


def _route_pairs(sent: SentFile) -> RoutedKeys | None:
    """_convert_non_diffusers_krea2_lora_to_diffusers, _convert_non_diffusers_lumina2_lora_to_diffusers"""
    return _reject_left(sent, (key for key in sent.layers if key.startswith(ORIGINAL_PREFIX)), LORA_PAIR)


def _route_renamed(sent: SentFile) -> RoutedKeys | None:
    """Of converters that pass every tensor on, where the pipeline wants "lora" in each name."""
    own = [key for key in sent.layers if key.startswith(ORIGINAL_PREFIX)]
    return _reject_left(sent, own, frozenset(name for key in own for name in sent.layers[key] if "lora" in name))


_ROUTES: Mapping[str, Callable[[SentFile], RoutedKeys | None]] = MappingProxyType(
    {
        **dict.fromkeys(("ltx-video", "ltx-2", "hidream-i1", "ernie-image"), _route_renamed),
        "flux2": _route_flux2,
        "hunyuanvideo": _route_hunyuanvideo,
        "krea2": _route_pairs,
        "lumina2": _route_pairs,
        "wan": _route_wan,
    }
)


def route_diffusers(sent: SentFile) -> RoutedKeys | None:
    """Return what diffusers' converter makes of the keys of a file.

    None for architectures whose converter treats each key alone.
    """
    own = _ROUTES.get(sent.architecture or "")
    return None if own is None else own(sent)
