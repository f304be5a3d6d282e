"""What defines a family of models; everything known about one is in its module of this package."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lycoris.models.families.naming import Naming

TimestepUnit = Literal["steps", "fraction", "reversed", "reversed steps"]
"""fraction: t/T. reversed: 1 - t/T. reversed steps: T - t. steps: t itself, 0 (clean) to T (noise)."""
ModelConfig = Mapping[str, Any]
"""What a known model's class is made with, where it differs from the defaults of the class."""


class MusubiTargets(NamedTuple):
    """The layers of a model that Musubi Tuner trains.

    All linear layers inside modules of these classes, except those that a pattern excludes.
    """

    targets: Sequence[str]
    """Classes of modules, in the code that it runs, whose linear layers are trained."""
    excludes: Sequence[str] = ()
    """Regular expressions that match entire paths of layers that are left out."""


@dataclass(frozen=True)
class Architecture:
    """One kind of network: a denoiser, a text encoder, a language model.

    All known models of an architecture have the same names of layers, in different numbers and sizes.
    """

    name: str
    classes: tuple[str, ...]
    """Names of the classes that such a network has: first of diffusers or transformers, then of the original code."""
    models: Mapping[str, ModelConfig] = field(default_factory=dict)
    """Known models of it: name (of its outline too, which `make models` writes) → what the class is made with."""
    namings: Mapping[str, Naming] = field(default_factory=dict)
    """Besides diffusers' own: "original" for the published code, "comfyui" where ComfyUI has others, "sgm" for the
    original of UNets, ... A missing one is the same as diffusers'."""
    blocks: tuple[str, ...] = ()
    """Classes of its transformer blocks in diffusers and in the original code; presets mean all layers in them."""
    attention: tuple[str, ...] = ()
    """Classes of attention layers in them, of both codes."""
    feed_forward: tuple[str, ...] = ()
    """Classes of feed-forwards in them, of both codes."""
    musubi_targets: MusubiTargets | None = None
    """What Musubi Tuner trains; None for a model that it does not recognize by its classes."""
    timestep: TimestepUnit = "steps"
    """What diffusers' pipelines hand to its first class as the timestep."""

    @property
    def outlines(self) -> tuple[str, ...]:
        """Names of the known models, as in `lycoris.models.outline`.

        In the order of `models`.
        """
        return tuple(self.models)


@dataclass(frozen=True)
class Family:
    """Models that the same pipelines use; their adapter files have the same names.

    A family is defined by its components: the denoiser's architecture and those of its text encoders.
    """

    name: str
    components: Mapping[str, str]
    """Component as diffusers' pipelines call it ("" for the denoiser) → name of its architecture."""
    kohya: Mapping[str, str] = field(default_factory=lambda: {"lora_unet": ""})
    """Prefix of kohya's files, such as lora_te3 → component; where several mean one, the first is written."""
    comfyui: Mapping[str, str] = field(default_factory=dict)
    """ComfyUI's name of a text encoder, such as clip_l → component."""
    versions: tuple[str, ...] = ()
    """Beginnings, in small letters, of what headers call it (`ss_base_model_version`, `modelspec.architecture`). Of
    those that fit, over all families, the longest counts."""
