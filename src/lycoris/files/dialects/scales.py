"""Find the scale of a LoRA outside its tensors: in the header, or in a config next to the file."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lycoris.errors import ConfigError, FileError
from lycoris.files.container.kinds import CONFIG
from lycoris.files.dialects.base import Dialect
from lycoris.files.peft.config import LARGEST_CONFIG, LORA_METADATA, PeftConfig
from lycoris.json_io import json_object, read_json
from lycoris.targeting.recipe import settings_of

ADJACENT_CONFIG = "lycoris_beside"
"""Key under which the config next to a file goes along with its header while it is read; no file has it."""
LYCORIS_CONFIG = "lycoris_config.json"
DENOISER_NAMES = ("transformer", "unet", "diffusion_model", "model.diffusion_model")
"""What settings call the denoiser."""

Alpha = Callable[[str, int], float | None]
"""Path of a layer and its rank → alpha."""


class ScaleSource(NamedTuple):
    """A place that stores scales: a function from layer and rank to alpha.

    `alpha` returns None for a layer of which the place says nothing; `name` is for messages.
    """

    name: str
    alpha: Alpha


def read_adjacent_config(path: str | os.PathLike[str]) -> dict[str, str]:
    """Return the config next to a file, under `ADJACENT_CONFIG`.

    Merge it into the header to make it available to `find_scale_sources`. {} if there is no config or it cannot be
    read.
    """
    for name in (CONFIG, LYCORIS_CONFIG):
        there = Path(path).parent / name
        try:
            if there.is_file() and there.stat().st_size <= LARGEST_CONFIG and isinstance(read_json(there), dict):
                return {ADJACENT_CONFIG: f"{name}\n{there.read_text(encoding='utf-8-sig')}"}
        except (ConfigError, OSError, ValueError):
            continue
    return {}


def find_scale_sources(header: Mapping[str, str], dialect: Dialect, prefix: str) -> list[ScaleSource]:
    """Return the places other than tensors that store scales of a component, the one that takes precedence first.

    A config next to a file may belong to another file, so it only counts for layers that have its rank.

    Raises:
        FileError: Settings are there but cannot be read.
    """
    component = prefix.rstrip("._")
    found = []
    if LORA_METADATA in header:
        own = _select_component(_parse_settings(header[LORA_METADATA], f"its header's {LORA_METADATA}"), component)
        found += [ScaleSource(f"the header's {LORA_METADATA}", _read_alpha(own))] if own else []
    name, _, text = header.get(ADJACENT_CONFIG, "").partition("\n")
    if name == CONFIG and dialect.style == "dotted":
        own = _parse_settings(text, name)
        found += (
            [ScaleSource(f"the {name} next to it", _read_alpha_at_same_rank(own))]
            if own.get("peft_type") in (None, "LORA")
            else []
        )
    if name == LYCORIS_CONFIG and dialect.style == "flat":
        own = _parse_settings(text, name)
        found += _make_alpha_source(f"the {name} next to it", own.get("linear_dim"), own.get("linear_alpha"))
    if dialect.scale == "alpha":
        found += _make_alpha_source(
            "the header's ss_network_alpha", header.get("ss_network_dim"), header.get("ss_network_alpha")
        )
    return found


def _parse_settings(text: str, what: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise FileError(f"{what} is no JSON object: {error}") from error


def _select_component(settings: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The settings of a component: behind its name and a dot, in an object of that name, or without any name."""
    names = [component, *(DENOISER_NAMES if component in ("", *DENOISER_NAMES) else ())]
    for name in names:
        inner = settings.get(name)
        if name and isinstance(inner, dict):
            return dict(inner)
        own = {key[len(name) + 1 :]: value for key, value in settings.items() if name and key.startswith(f"{name}.")}
        if own:
            return own
    return dict(settings) if component in ("", *DENOISER_NAMES) and {"r", "lora_alpha"} & settings.keys() else {}


def _read_alpha(own: Mapping[str, Any]) -> Alpha:
    config = PeftConfig.parse({**own, "peft_type": "LORA"})
    return lambda path, rank: config.get_scale(path) * rank


def _read_alpha_at_same_rank(own: Mapping[str, Any]) -> Alpha:
    """By a config that may be of another file: only for layers that have its rank."""
    config = PeftConfig.parse({**own, "peft_type": "LORA"})
    return lambda path, rank: config.get_scale(path) * rank if config.get_rank(path) == rank else None


def _make_alpha_source(name: str, dim: Any, alpha: Any) -> list[ScaleSource]:
    """One alpha for all layers of one rank."""
    rank, number = _parse_number(dim), _parse_number(alpha)
    if rank is None or number is None or rank < 1:
        return []
    return [ScaleSource(name, lambda _, own: number if own == rank else None)]


def _parse_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@dataclass
class ScaleReader:
    """Chooses the alpha of each layer of a component and records where it came from.

    Call `choose_alpha` for every layer, then `describe_sources`.
    """

    dialect: Dialect
    sources: Sequence[ScaleSource]
    used: Counter[str] = field(default_factory=Counter)
    """Source → layers."""
    unknown: int = 0
    """Layers of whose scale nothing is said."""
    agreeing: Counter[str] = field(default_factory=Counter)
    contradicting: dict[str, tuple[str, float, float, str]] = field(default_factory=dict)
    """Source → an example: layer, its alpha there, the alpha that counted, and whose that is."""
    rewritten: bool = False
    """Whether alphas are otherwise than the settings by design."""

    @classmethod
    def from_header(cls, header: Mapping[str, str], dialect: Dialect, prefix: str) -> ScaleReader:
        """Make a reader for a component of a file.

        `prefix` is what the names of the component's tensors begin with.
        """
        settings = settings_of(header)
        own = {"rs_lora", "block_alphas", "block_dims", "conv_block_alphas"} & settings.keys()
        return cls(dialect, find_scale_sources(header, dialect, prefix), rewritten=bool(own))

    def choose_alpha(self, path: str, rank: int, tensor: float | None) -> float | None:
        """Return the alpha of a layer, or None if nothing stores it.

        Args:
            path: The layer, by its dotted name.
            rank: Its rank.
            tensor: What its alpha tensor says, which takes precedence; None if it has none.
        """
        stored = [(each.name, own) for each in self.sources if (own := each.alpha(path, rank)) is not None]
        if tensor is not None:
            stored.insert(0, ("its alpha tensors", tensor))
        if not stored:
            self.unknown += 1
            return None
        first, counted = stored[0]
        self.used[first] += 1
        for name, other in stored[1:]:
            if math.isclose(other, counted, rel_tol=1e-3):
                self.agreeing[name] += 1
            else:
                self.contradicting.setdefault(name, (path, other, counted, first))
        return counted

    def describe_sources(self) -> list[str]:
        """Return remarks on scales that were not in alpha tensors, on contradictions, and on layers without any.

        Empty for a file where all is as usual for its dialect.
        """
        found = []
        for name, count in self.used.items():
            usual = name == "its alpha tensors" or (self.dialect.scale == "header" and LORA_METADATA in name)
            found += [] if usual else [f"the scale of {count} layers without an alpha tensor is from {name}"]
        for name, (layer, other, counted, first) in self.contradicting.items():
            if not self.agreeing[name] and not self.rewritten:
                found.append(f"{name} says alpha {other:g} for {layer}, {first} {counted:g}; the latter counted")
        if self.unknown and (self.dialect.scale == "header" or self.dialect.style == "flat"):
            found.append(f"the scale of {self.unknown} layers is not stored; 1 was used")
        return found
