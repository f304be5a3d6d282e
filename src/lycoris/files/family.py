"""What a family of models is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from lycoris.files.naming import Naming

Objective = Literal["epsilon", "v", "flow", "tokens"]


@dataclass(frozen=True)
class Architecture:
    """One kind of network: a denoiser, a text encoder, a language model."""

    name: str
    classes: tuple[str, ...]
    """Names of the classes that such a network has in diffusers or transformers, and in the original code."""
    outlines: tuple[str, ...]
    """Known models of it, by the names of `lycoris.outline`."""
    namings: Mapping[str, Naming] = field(default_factory=dict)
    """Beside diffusers' own: "original" for the published code, "comfyui" where ComfyUI has others than that, "sgm" for
    the original of UNets, ... A missing one is the same as diffusers'."""
    targets: tuple[str, ...] = ()
    """Classes whose layers are usually trained, in diffusers and in the original code."""
    excludes: tuple[str, ...] = ()
    """Regular expressions for paths, in the original code, that are usually left out."""


@dataclass(frozen=True)
class Family:
    """Models that are used by the same pipelines; their adapters go by the same names."""

    name: str
    components: Mapping[str, str]
    """Component as diffusers' pipelines call it ("" for the denoiser) → name of its architecture."""
    pipelines: tuple[str, ...] = ()
    objective: Objective = "flow"
    kohya: Mapping[str, str] = field(default_factory=dict)
    """Prefix of kohya's files, such as lora_te3 → component; where several mean one, the first is written."""
    comfyui: Mapping[str, str] = field(default_factory=dict)
    """ComfyUI's name of a text encoder, such as clip_l → component."""
    versions: tuple[str, ...] = ()
    """Beginnings, in small letters, of what headers call it (`ss_base_model_version`, `modelspec.architecture`). Of
    those that fit, over all families, the longest counts."""
