"""What a file's header says about the base model, as far as that tells known models apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lycoris.files.dialects.components import VERSION_KEYS, find_header_family
from lycoris.files.layout import NamedLayout
from lycoris.files.recognition import Fit
from lycoris.json_io import json_object
from lycoris.models import fingerprint

BASE_NAME_KEYS = ("ss_sd_model_name", "ss_base_model_name", "base_model_name_or_path", "base_model", "pretrained_model")
"""Header keys with the name, address or path of a base model."""
BASE_SETTINGS_KEYS = ("lora_adapter_metadata", "adapter_config", "lycoris_config", "training_info")
"""Header keys with settings as JSON, in which such keys may be too."""


def find_unknown_base(header: Mapping[str, str]) -> str:
    """Return the base that a header names and that no known family is called like.

    As "key = value", for a message; "" if there is none.
    """
    stated = [(key, header[key]) for key in VERSION_KEYS if header.get(key, "").strip()]
    return next((f"{key} = {value:.60}" for key, value in stated if find_header_family({key: value}) is None), "")


def describe_disagreement(header: Mapping[str, str]) -> str:
    """Return what to say about a header that names several families.

    The first one counts; "" if the header names at most one.
    """
    stated = {
        key: family for key in VERSION_KEYS if (family := find_header_family({key: header.get(key, "")})) is not None
    }
    if len({family.name for family in stated.values()}) < 2:
        return ""
    named = ", ".join(f"{family.name} ({key})" for key, family in stated.items())
    return f"its header names several bases: {named}; the first counted"


def narrow_by_header(found: list[Fit], header: Mapping[str, str]) -> list[Fit]:
    """Return those of the fits that the header names, or all if it names none.

    A fingerprint of layers decides first. Otherwise names and paths of the base in the header are compared with the
    names of the known models, and the longest match wins.
    """
    made_for = fingerprint.read_fingerprint(header)
    if made_for is not None:
        same = [each for each in found if each.outline and _hash_layers(each) == made_for.layers]
        if same:
            return same
    stated = [_normalize_name(words) for words in _collect_base_names(header)]
    named = [
        (len(name), each)
        for each in found
        if (name := _normalize_name(each.outline or "")) and any(name in t for t in stated)
    ]
    longest = max((length for length, _ in named), default=0)
    return [each for length, each in named if length == longest] or found


def list_equal_fits(found: Iterable[Fit]) -> list[str]:
    """Return the known models that a file may be for just as well as for the first.

    They have the same architecture and as many matching names and sizes.
    """
    found = list(found)
    best = found[0]
    return [
        str(each.outline)
        for each in found
        if (each.architecture, each.share, each.named, each.shaped)
        == (best.architecture, best.share, best.named, best.shaped)
    ]


def _collect_base_names(header: Mapping[str, str]) -> list[str]:
    """All that a header has to say of the base."""
    found = [header[key] for key in (*VERSION_KEYS, *BASE_NAME_KEYS) if key in header]
    for key in BASE_SETTINGS_KEYS:
        try:
            settings = json_object(header.get(key, "{}"))
        except ValueError:
            continue
        found += [value for name, value in settings.items() if isinstance(value, str) and name.endswith(BASE_NAME_KEYS)]
    return found


def _normalize_name(words: str) -> str:
    return re.sub(r"[^a-z0-9]", "", words.lower())


def _hash_layers(fit: Fit) -> str:
    return fingerprint.fingerprint_layers(
        "", NamedLayout.from_outline(fit.architecture, str(fit.outline)).layers
    ).layers
