"""How the tensors of adapters are spelled, whatever their layer is called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType

from lycoris.algorithms import ALGORITHMS
from lycoris.algorithms.tensors import ALPHA

SPELLING_VARIANTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "lora_up.weight": (
            "lora_B.weight",
            "lora_B",
            "lora.up.weight",
            "lora_linear_layer.up.weight",
            "lora_layer.up.weight",
            "lora_embedding_B",
        ),
        "lora_down.weight": (
            "lora_A.weight",
            "lora_A",
            "lora.down.weight",
            "lora_linear_layer.down.weight",
            "lora_layer.down.weight",
            "lora_embedding_A",
        ),
        "lora_up.bias": ("lora_B.bias",),
        # The second is ai-toolkit's.
        "lora_magnitude_vector": ("lora_magnitude_vector.weight", "magnitude"),
        # FastVideo's for parameters that are called neither weight nor bias, and ComfyUI's for parameters by name.
        "diff": ("diff_param", "weight.diff"),
        "diff_b": ("bias.diff", "bias.diff_param"),
        "set_weight": ("set_param", "weight.set_weight", "weight.set_param"),
        "bias.set_weight": ("bias.set_param",),
    }
)
"""LyCORIS' spelling → others that mean the same."""

MAX_OFT_PARTS = 8
"""The most parts of a layer that sd-scripts rotates separately; Flux.1's have up to four."""

MAGNITUDE_VECTOR = "lora_magnitude_vector"
"""PEFT's name of DoRA's magnitude, one value per output."""

FOREIGN_SUFFIXES = (
    "lora_up.bias",
    MAGNITUDE_VECTOR,
    "scale",
    "oft_diag",
    "bias_indices",
    "bias_values",
    "bias_size",
    "bias",
    "reshape_weight",
    "lokr_t1",
    "oft_R.weight",
    "ia3_l",
    "bm.weight",
    *(f"oft_blocks.{part}" for part in range(MAX_OFT_PARTS)),
)
"""Tensors that `lycoris.files.dialects.forms` converts to other forms, or refuses, before an algorithm sees them."""

OWN_SUFFIXES = frozenset(
    {ALPHA, *FOREIGN_SUFFIXES, *(name for algorithm in ALGORITHMS.values() for name in algorithm.tensor_names.values())}
)

_CANONICAL: Mapping[str, str] = MappingProxyType(
    {name: name for name in OWN_SUFFIXES}
    | {other: name for name, others in SPELLING_VARIANTS.items() for other in others}
)

SUFFIX_SPELLINGS = tuple(sorted(_CANONICAL.items(), key=lambda item: -len(item[0])))
"""Spelling and LyCORIS' own, longest first: a shorter one may end a longer one."""


_NAMED = re.compile(
    r"(.+\.(?:lora_[AB]|lora_magnitude_vector))\.[^.]+(\.(?:weight|bias))"
    r"|(.+\.(?:hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)))\.[^.]+"
)


@lru_cache(maxsize=2**14)
def remove_adapter_name(key: str) -> str:
    """Return a tensor's name without the adapter's.

    PEFT puts one into each name while a model is in memory: `lora_A.default.weight`.
    """
    found = _NAMED.fullmatch(key)
    return key if found is None else f"{found[1] or found[3]}{found[2] or ''}"


def find_canonical_suffix(spelled: str) -> str | None:
    """Return a tensor's own name in LyCORIS' spelling.

    None if no known tensor is spelled so.
    """
    return _CANONICAL.get(spelled)
