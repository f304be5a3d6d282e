"""What a dialect is: how a kind of file writes the path of a layer, the names of its tensors, and its scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from lycoris.algorithms.tensors import MAGNITUDE
from lycoris.files.dialects.suffixes import SUFFIXES, canonical, remove_adapter_name
from lycoris.files.dialects.wrappers import without_wrappers
from lycoris.models.families.family import Architecture
from lycoris.models.families.naming import DIFFUSERS

LONGEST = 500
"""Characters of a tensor name; no model has longer ones, and files from strangers may."""
Style = Literal["flat", "dotted"]
Scale = Literal["alpha", "in up", "in both", "header"]


class Key(NamedTuple):
    """A tensor name in its parts."""

    prefix: str
    component: str
    """Which model of a pipeline it belongs to, as diffusers names it, as far as the prefix tells; "" the denoiser."""
    layer: str
    """The layer's path as written: dotted, or with every dot turned into an underscore."""
    suffix: str
    """The tensor's own name, in LyCORIS' spelling."""
    spelled: str
    """The same as written."""


@dataclass(frozen=True)
class Dialect:
    """A kind of file."""

    name: str
    style: Style
    """Whether paths are dotted, or have underscores in place of dots."""
    prefixes: Mapping[str, str]
    """Beginning of a name, with what separates it from the path → component. The first one that fits counts."""
    naming: str = DIFFUSERS
    """Whose names of layers are written, where a family has several; see `models.families.family.Architecture`."""
    namings: Mapping[str, str] = field(default_factory=dict)
    """The same for single architectures."""
    spelling: Mapping[str, str] = field(default_factory=dict)
    """Tensor names that are written otherwise than LyCORIS does."""
    lengths: Mapping[str, str] = field(default_factory=lambda: {"out": MAGNITUDE, "in": MAGNITUDE})
    """Axis of DoRA's lengths → the tensor that they are; an axis that is not there cannot be held. In PEFT's
    `MAGNITUDE_VECTOR` they have its shape, which broadcasts over outputs."""
    scale: Scale = "alpha"
    """Where the scale of an adapter is: a tensor `alpha`, multiplied into a LoRA's up (or both its factors), or in the
    file's header."""
    algorithms: frozenset[str] | None = None
    """The algorithms that such files can hold; None: all."""
    kinds: frozenset[str] | None = None
    """The kinds of layers that they can hold adapters of; None: all."""
    layers: str = ""
    """Regular expression for the layers that they can hold adapters of, by their names there; "": all."""
    folder: bool = False
    """Whether such adapters are a folder with a config, without which the tensors do not tell their scale."""
    marks: tuple[str, ...] = ()
    """Header keys that files of this kind have and files that look like it do not."""

    @property
    def alike(self) -> bool:
        """Whether names are the same for every family."""
        return self.naming == DIFFUSERS and not self.namings and "unet." not in self.prefixes

    def split(self, name: str) -> Key | None:
        """The parts of a tensor name, or None if it is not of this dialect."""
        if len(name) > LONGEST:
            return None
        name = remove_adapter_name(without_wrappers(name))
        for prefix, component in self.prefixes.items():
            if name.startswith(prefix):
                parts = _split_flat(name[len(prefix) :]) if self.style == "flat" else split_dotted(name[len(prefix) :])
                if parts is not None:
                    return Key(prefix, component, *parts)
        return None

    def join(self, layer: str, suffix: str, prefix: str) -> str:
        """The name of a tensor of the layer called `layer`."""
        return f"{prefix}{flatten(layer) if self.style == 'flat' else layer}.{self.spelling.get(suffix, suffix)}"

    def prefix(self, component: str) -> str | None:
        """What the names of a component's tensors begin with; None when such files do not hold it."""
        return next((prefix for prefix, of in self.prefixes.items() if of == component), None)

    def naming_for(self, architecture: Architecture) -> str:
        """Whose names of layers are written for an architecture: those of the dialect, if it has them, else those of
        the original code, if they are others than diffusers'.
        """
        wanted = self.namings.get(architecture.name, self.naming)
        if wanted == DIFFUSERS or wanted in architecture.namings:
            return wanted
        return "original" if "original" in architecture.namings else DIFFUSERS


def flatten(path: str) -> str:
    """A dotted path as underscore formats write it."""
    return path.replace(".", "_")


def _split_flat(name: str) -> tuple[str, str, str] | None:
    layer, dot, spelled = name.partition(".")
    if not dot or layer.startswith("_"):
        return None
    return layer, canonical(spelled) or spelled, spelled


@lru_cache(maxsize=2**14)
def split_dotted(name: str) -> tuple[str, str, str] | None:
    """Layer, suffix and suffix as spelled; None where no known tensor name ends it."""
    for spelled, suffix in SUFFIXES:
        if name.endswith(spelled) and len(name) > len(spelled) + 1 and name[-len(spelled) - 1] == ".":
            return name[: -len(spelled) - 1], suffix, spelled
    return None
