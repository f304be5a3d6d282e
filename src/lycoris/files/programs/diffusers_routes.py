"""diffusers (0.42): what its converters make of all keys of a file together.

The names of its functions, in diffusers/loaders/lora_conversion_utils.py, stand beside the rules.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

from lycoris.adapters.load_report import some
from lycoris.files.programs.routes import Routed, Sent

PAIR = frozenset({"lora_A.weight", "lora_B.weight"})
OWN = "diffusion_model."


def _reject_left(sent: Sent, keys: Iterable[str], known: frozenset[str]) -> Routed | None:
    """Rejected for tensors that a converter has no use for."""
    left = sorted(
        f"{key}.{name}" for key in keys for name in sent.layers[key] if name not in known and name != "dora_scale"
    )
    return Routed(refused=f"rejects the file for {some(left)}, which it cannot convert") if left else None


# _convert_kohya_flux2_lora_to_diffusers
_FLUX2_KOHYA = re.compile(
    r"lora_unet_(double_blocks_\d+_(img|txt)_(attn_(qkv|proj)|mlp_[02])|single_blocks_\d+_linear[12]"
    r"|(img|txt)_in|time_in_(in|out)_layer|final_layer_linear)"
)
_LOKR = frozenset(f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b"))
_EXPANDED = tuple(f"{OWN}{name}." for name in ("single_transformer_blocks", "transformer_blocks", "sformer_blocks"))


def _flux2(sent: Sent) -> Routed | None:
    if sent.any_ends(".lora_down.weight"):
        kept = {
            key for key, names in sent.layers.items() if _FLUX2_KOHYA.fullmatch(key) and "lora_down.weight" in names
        }
        bare = frozenset(key for key in kept if "dora_scale" in sent.layers[key])
        return Routed(lost=frozenset(sent.layers.keys() - kept), without_lengths=bare)
    own = [key for key in sent.layers if key.startswith(OWN)]
    if sent.any_ends(*_LOKR):
        # _convert_non_diffusers_flux2_lokr_to_diffusers
        return _reject_left(sent, own, _LOKR | {"alpha"})
    # _convert_non_diffusers_flux2_lora_to_diffusers
    return _reject_left(sent, (key for key in own if not key.startswith(_EXPANDED)), PAIR)


# _convert_non_diffusers_wan_lora_to_diffusers
_WAN_BLOCKS = re.compile(r"diffusion_model\.blocks\.\d+\..*")


def _wan(sent: Sent) -> Routed | None:
    own = [key for key in sent.layers if key.startswith(OWN)]
    if not own:
        return None
    outside = [key for key in own if not _WAN_BLOCKS.fullmatch(key)]
    if len(outside) == len(own):
        return Routed(refused="rejects a file in such keys that has nothing for a block")
    scaled = sorted(key for key in outside if "alpha" in sent.layers[key])
    return Routed(refused=f"rejects the file for alpha of {some(scaled)}") if scaled else None


def _hunyuanvideo(sent: Sent) -> Routed | None:
    """is_original_hunyuan_video: it is converted by that layer, and else taken as it is, for nothing."""
    own = [key for key in sent.layers if key.startswith(OWN)]
    if not own or any("img_attn_qkv" in name for name in sent.names):
        return None
    return _reject_left(sent, own, PAIR) or Routed(lost=frozenset(own))


def _pairs_only(sent: Sent) -> Routed | None:
    """_convert_non_diffusers_krea2_lora_to_diffusers, _convert_non_diffusers_lumina2_lora_to_diffusers"""
    return _reject_left(sent, (key for key in sent.layers if key.startswith(OWN)), PAIR)


def _only_renamed(sent: Sent) -> Routed | None:
    """Of converters that pass every tensor on, where the pipeline wants "lora" in each name."""
    own = [key for key in sent.layers if key.startswith(OWN)]
    return _reject_left(sent, own, frozenset(name for key in own for name in sent.layers[key] if "lora" in name))


_ROUTES: Mapping[str, Callable[[Sent], Routed | None]] = MappingProxyType(
    {
        **dict.fromkeys(("ltx-video", "ltx-2", "hidream-i1", "ernie-image"), _only_renamed),
        "flux2": _flux2,
        "hunyuanvideo": _hunyuanvideo,
        "krea2": _pairs_only,
        "lumina2": _pairs_only,
        "wan": _wan,
    }
)


def route(sent: Sent) -> Routed | None:
    own = _ROUTES.get(sent.architecture or "")
    return None if own is None else own(sent)
