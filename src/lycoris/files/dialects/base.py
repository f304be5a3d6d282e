"""What a dialect defines: how a kind of file writes paths of layers, names of tensors, and the scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, NamedTuple

from lycoris.algorithms.tensors import MAGNITUDE
from lycoris.files.dialects.suffixes import SUFFIX_SPELLINGS, find_canonical_suffix, remove_adapter_name
from lycoris.files.dialects.wrappers import strip_wrappers
from lycoris.models.families.family import Architecture
from lycoris.models.families.naming import DIFFUSERS_NAMING

LONGEST_NAME = 500
"""Characters of a tensor name; no model has longer ones, and files from strangers may."""
Style = Literal["flat", "dotted"]
Scale = Literal["alpha", "in up", "in both", "header"]


class Key(NamedTuple):
    """A tensor name, split into its parts.

    The name is `prefix + layer + "." + spelled`, apart from wrappers and adapter names that were removed.
    """

    prefix: str
    component: str
    """Component of a pipeline, as diffusers names it and as far as the prefix determines it; "" for the denoiser."""
    layer: str
    """The layer's path as written: dotted, or with underscores for dots."""
    suffix: str
    """The tensor's own name, in LyCORIS' spelling."""
    spelled: str
    """The same as written."""


@dataclass(frozen=True)
class Dialect:
    """A kind of file: how it names layers and tensors, where it stores the scale, and what it can hold.

    Used in both directions: `split` parses a name, `join` makes one.
    """

    name: str
    style: Style
    """Whether paths are dotted, or have underscores in place of dots."""
    prefixes: Mapping[str, str]
    """Beginning of a name, with what separates it from the path → component. The first one that fits counts."""
    naming: str = DIFFUSERS_NAMING
    """Whose names of layers are written, where a family has several; see `models.families.family.Architecture`."""
    namings: Mapping[str, str] = field(default_factory=dict)
    """The same for single architectures."""
    spelling: Mapping[str, str] = field(default_factory=dict)
    """LyCORIS' tensor name → the one that is written, where they differ."""
    magnitudes: Mapping[str, str] = field(default_factory=lambda: {"out": MAGNITUDE, "in": MAGNITUDE})
    """Axis of DoRA's magnitude → the tensor that stores it; an axis that is missing cannot be stored. PEFT's
    `MAGNITUDE_VECTOR` has a shape that broadcasts over outputs."""
    scale: Scale = "alpha"
    """Where the scale of an adapter is: a tensor `alpha`, multiplied into a LoRA's up (or both its factors), or in the
    file's header."""
    algorithms: frozenset[str] | None = None
    """The algorithms that such files can hold; None: all."""
    kinds: frozenset[str] | None = None
    """The kinds of layers that they can hold adapters of; None: all."""
    layer_pattern: str = ""
    """Regular expression for the layers that they can hold adapters of, by their names there; "": all."""
    is_folder: bool = False
    """Whether such adapters are a folder with a config, which stores their scale."""
    header_marks: tuple[str, ...] = ()
    """Header keys that files of this kind have and files that look like it do not."""

    @property
    def is_universal(self) -> bool:
        """Whether names are the same for every family.

        If so, a file can be written without knowing the model.
        """
        return self.naming == DIFFUSERS_NAMING and not self.namings and "unet." not in self.prefixes

    def split(self, name: str) -> Key | None:
        """Return the parts of a tensor name, or None if it is not of this dialect.

        The first prefix that fits counts. A flat name may have any suffix, a dotted one must end in a known tensor
        name.
        """
        if len(name) > LONGEST_NAME:
            return None
        name = _strip_name(name)
        if not name.startswith((*self.prefixes,)):
            return None
        for prefix, component in self.prefixes.items():
            if name.startswith(prefix):
                parts = (
                    _split_flat_name(name[len(prefix) :])
                    if self.style == "flat"
                    else split_dotted_name(name[len(prefix) :])
                )
                if parts is not None:
                    return Key(prefix, component, *parts)
        return None

    def join(self, layer: str, suffix: str, prefix: str) -> str:
        """Return the name of a tensor of a layer.

        Args:
            layer: The path of the layer, dotted.
            suffix: The tensor's own name in LyCORIS' spelling.
            prefix: What the name begins with.
        """
        return f"{prefix}{flatten(layer) if self.style == 'flat' else layer}.{self.spelling.get(suffix, suffix)}"

    def find_prefix(self, component: str) -> str | None:
        """Return what the names of a component's tensors begin with.

        None if such files cannot hold the component.
        """
        return next((prefix for prefix, of in self.prefixes.items() if of == component), None)

    def choose_naming(self, architecture: Architecture) -> str:
        """Return the naming in which the layers of an architecture are written.

        The dialect's own if the architecture has it; otherwise that of the original code, or diffusers' if there is
        none.
        """
        wanted = self.namings.get(architecture.name, self.naming)
        if wanted == DIFFUSERS_NAMING or wanted in architecture.namings:
            return wanted
        return "original" if "original" in architecture.namings else DIFFUSERS_NAMING


def flatten(path: str) -> str:
    """Return a dotted path with underscores, as flat dialects write it.

    Not invertible: names themselves contain underscores.
    """
    return path.replace(".", "_")


def _split_flat_name(name: str) -> tuple[str, str, str] | None:
    layer, dot, spelled = name.partition(".")
    if not dot or layer.startswith("_"):
        return None
    return layer, find_canonical_suffix(spelled) or spelled, spelled


@lru_cache(maxsize=2**14)  # every dialect asks for all names of a file
def _strip_name(name: str) -> str:
    """A tensor's name without the steps of wrappers and without the adapter's name."""
    return remove_adapter_name(strip_wrappers(name))


@lru_cache(maxsize=2**14)
def split_dotted_name(name: str) -> tuple[str, str, str] | None:
    """Split a name into layer, suffix, and the suffix as spelled.

    None if it does not end in the name of a known tensor. The longest known name counts.
    """
    for spelled, suffix in SUFFIX_SPELLINGS:
        if name.endswith(spelled) and len(name) > len(spelled) + 1 and name[-len(spelled) - 1] == ".":
            return name[: -len(spelled) - 1], suffix, spelled
    return None
