"""What a file's header says of the base model, as far as that tells known models apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from lycoris.files.dialects.components import VERSION_KEYS, family_in
from lycoris.files.layout import Layout
from lycoris.files.recognition import Fit
from lycoris.json_io import json_object
from lycoris.models import fingerprint

NAMES = ("ss_sd_model_name", "ss_base_model_name", "base_model_name_or_path", "base_model", "pretrained_model")
"""Header keys with the name, address or path of a base model."""
SETTINGS = ("lora_adapter_metadata", "adapter_config", "lycoris_config", "training_info")
"""Header keys with settings as JSON, in which such keys may be too."""


def unknown_base(header: Mapping[str, str]) -> str:
    """The base that a header names and no known family is called like; "" where there is none."""
    told = [(key, header[key]) for key in VERSION_KEYS if header.get(key, "").strip()]
    return next((f"{key} = {value:.60}" for key, value in told if family_in({key: value}) is None), "")


def disagreement(header: Mapping[str, str]) -> str:
    """What is to be said of a header that names several families; "" where it does not."""
    told = {key: family for key in VERSION_KEYS if (family := family_in({key: header.get(key, "")})) is not None}
    if len({family.name for family in told.values()}) < 2:
        return ""
    named = ", ".join(f"{family.name} ({key})" for key, family in told.items())
    return f"its header names several bases: {named}; the first counted"


def narrow(found: list[Fit], header: Mapping[str, str]) -> list[Fit]:
    """Of models that fit, those that the header names; all where it names none of them."""
    made_for = fingerprint.told_by(header)
    if made_for is not None:
        same = [each for each in found if each.outline and _layers(each) == made_for.layers]
        if same:
            return same
    told = [_plain(words) for words in _words(header)]
    named = [
        (len(name), each) for each in found if (name := _plain(each.outline or "")) and any(name in t for t in told)
    ]
    longest = max((length for length, _ in named), default=0)
    return [each for length, each in named if length == longest] or found


def variants(found: Iterable[Fit]) -> list[str]:
    """The names of the models that a file may be for as well as the first: it has as much of what they have."""
    found = list(found)
    best = found[0]
    return [
        str(each.outline)
        for each in found
        if (each.architecture, each.share, each.named, each.shaped)
        == (best.architecture, best.share, best.named, best.shaped)
    ]


def _words(header: Mapping[str, str]) -> list[str]:
    """All that a header has to say of the base."""
    found = [header[key] for key in (*VERSION_KEYS, *NAMES) if key in header]
    for key in SETTINGS:
        try:
            told = json_object(header.get(key, "{}"))
        except ValueError:
            continue
        found += [value for name, value in told.items() if isinstance(value, str) and name.endswith(NAMES)]
    return found


def _plain(words: str) -> str:
    return re.sub(r"[^a-z0-9]", "", words.lower())


def _layers(fit: Fit) -> str:
    return fingerprint.of_layers("", Layout.from_outline(fit.architecture, str(fit.outline)).layers).layers
