"""Where a file says the scale of its LoRA beside tensors of their own: in its header, or in a config next to it."""

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
from lycoris.files.peft.config import LORA_METADATA, Config
from lycoris.json_io import json_object, read_json
from lycoris.targeting.recipe import settings_of

BESIDE = "lycoris_beside"
"""Key under which the config next to a file goes along with its header while it is read; no file has it."""
LYCORIS_CONFIG = "lycoris_config.json"
LARGEST = 4 * 2**20
"""Bytes that a config may have."""
DENOISERS = ("transformer", "unet", "diffusion_model", "model.diffusion_model")
"""What settings call the denoiser."""

Alpha = Callable[[str, int], float | None]
"""Path of a layer and its rank → alpha."""


class Source(NamedTuple):
    """A place that tells scales."""

    name: str
    alpha: Alpha


def beside(path: str | os.PathLike[str]) -> dict[str, str]:
    """The config that is next to a file, under `BESIDE`; nothing where there is none, or none that can be read."""
    for name in (CONFIG, LYCORIS_CONFIG):
        there = Path(path).parent / name
        try:
            if there.is_file() and there.stat().st_size <= LARGEST and isinstance(read_json(there), dict):
                return {BESIDE: f"{name}\n{there.read_text(encoding='utf-8-sig')}"}
        except (ConfigError, OSError, ValueError):
            continue
    return {}


def sources(header: Mapping[str, str], dialect: Dialect, prefix: str) -> list[Source]:
    """The places beside the tensors that tell scales of a component, the one that counts first.

    Raises `FileError` for settings that cannot be read.
    """
    component = prefix.rstrip("._")
    found = []
    if LORA_METADATA in header:
        own = _of_component(_read(header[LORA_METADATA], f"its header's {LORA_METADATA}"), component)
        found += [Source(f"the header's {LORA_METADATA}", _by_config(own))] if own else []
    name, _, text = header.get(BESIDE, "").partition("\n")
    if name == CONFIG and dialect.style == "dotted":
        own = _read(text, name)
        found += [Source(f"the {name} beside it", _same_rank(own))] if own.get("peft_type") in (None, "LORA") else []
    if name == LYCORIS_CONFIG and dialect.style == "flat":
        own = _read(text, name)
        found += _name_alpha(f"the {name} beside it", own.get("linear_dim"), own.get("linear_alpha"))
    if dialect.scale == "alpha":
        found += _name_alpha(
            "the header's ss_network_alpha", header.get("ss_network_dim"), header.get("ss_network_alpha")
        )
    return found


def _read(text: str, what: str) -> dict[str, Any]:
    try:
        return json_object(text)
    except ValueError as error:
        raise FileError(f"{what} is no JSON object: {error}") from error


def _of_component(told: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The settings of a component: behind its name and a dot, in an object of that name, or without any name."""
    names = [component, *(DENOISERS if component in ("", *DENOISERS) else ())]
    for name in names:
        inner = told.get(name)
        if name and isinstance(inner, dict):
            return dict(inner)
        own = {key[len(name) + 1 :]: value for key, value in told.items() if name and key.startswith(f"{name}.")}
        if own:
            return own
    return dict(told) if component in ("", *DENOISERS) and {"r", "lora_alpha"} & told.keys() else {}


def _by_config(own: Mapping[str, Any]) -> Alpha:
    config = Config.parse({**own, "peft_type": "LORA"})
    return lambda path, rank: config.scale(path) * rank


def _same_rank(own: Mapping[str, Any]) -> Alpha:
    """By a config that may be of another file: only for layers that have its rank."""
    config = Config.parse({**own, "peft_type": "LORA"})
    return lambda path, rank: config.scale(path) * rank if config.rank(path) == rank else None


def _name_alpha(name: str, dim: Any, alpha: Any) -> list[Source]:
    """One alpha for all layers of one rank."""
    rank, number = _number(dim), _number(alpha)
    if rank is None or number is None or rank < 1:
        return []
    return [Source(name, lambda _, own: number if own == rank else None)]


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


@dataclass
class Scales:
    """The scales of a component's layers, and what is to be said of where they are from."""

    dialect: Dialect
    sources: Sequence[Source]
    taken: Counter[str] = field(default_factory=Counter)
    """Source → layers."""
    unsaid: int = 0
    """Layers of whose scale nothing is said."""
    agreeing: Counter[str] = field(default_factory=Counter)
    contradicting: dict[str, tuple[str, float, float, str]] = field(default_factory=dict)
    """Source → an example: layer, its alpha there, the alpha that counted, and whose that is."""
    rewritten: bool = False
    """Whether alphas are otherwise than the settings by design."""

    @classmethod
    def of(cls, header: Mapping[str, str], dialect: Dialect, prefix: str) -> Scales:
        settings = settings_of(header)
        own = {"rs_lora", "block_alphas", "block_dims", "conv_block_alphas"} & settings.keys()
        return cls(dialect, sources(header, dialect, prefix), rewritten=bool(own))

    def alpha(self, path: str, rank: int, tensor: float | None) -> float | None:
        """The alpha of a layer whose own tensor says `tensor`; None where nothing does."""
        told = [(each.name, own) for each in self.sources if (own := each.alpha(path, rank)) is not None]
        if tensor is not None:
            told.insert(0, ("its alpha tensors", tensor))
        if not told:
            self.unsaid += 1
            return None
        first, counted = told[0]
        self.taken[first] += 1
        for name, other in told[1:]:
            if math.isclose(other, counted, rel_tol=1e-3):
                self.agreeing[name] += 1
            else:
                self.contradicting.setdefault(name, (path, other, counted, first))
        return counted

    def remarks(self) -> list[str]:
        """What was taken from where, what contradicts it, and what is said nowhere."""
        found = []
        for name, count in self.taken.items():
            usual = name == "its alpha tensors" or (self.dialect.scale == "header" and LORA_METADATA in name)
            found += [] if usual else [f"the scale of {count} layers without an alpha tensor is from {name}"]
        for name, (layer, other, counted, first) in self.contradicting.items():
            if not self.agreeing[name] and not self.rewritten:
                found.append(f"{name} says alpha {other:g} for {layer}, {first} {counted:g}; the latter counted")
        if self.unsaid and (self.dialect.scale == "header" or self.dialect.style == "flat"):
            found.append(f"nothing tells the scale of {self.unsaid} layers; 1 was taken")
        return found
