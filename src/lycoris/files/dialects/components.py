"""Which component of a pipeline a tensor is for: families number text encoders differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lycoris.files.dialects.base import Dialect, Key
from lycoris.models.families import FAMILIES
from lycoris.models.families.family import Architecture, Family

FAMILY_KEY = "lycoris_family"
"""Header key under which this library names it."""
VERSION_KEYS = (FAMILY_KEY, "ss_base_model_version", "modelspec.architecture")
"""Header keys that name the family of the base model."""

COMFYUI_ENCODER_PREFIX = "text_encoders."


def find_header_family(header: Mapping[str, str]) -> Family | None:
    """Return the family that a file's header names, or None.

    The first of `VERSION_KEYS` that names one counts, and of families that fit the one with the longest match.
    """
    for key in VERSION_KEYS:
        stated = header.get(key, "").lower()
        # The longest beginning: "flux" is one of "flux.2" too.
        fitting = [
            (len(version), family)
            for family in FAMILIES.values()
            for version in (family.name, *family.versions)
            if stated.startswith(version)
        ]
        if stated and fitting:
            return max(fitting, key=lambda each: each[0])[1]
    return None


def find_family(architectures: Mapping[str, Architecture | None]) -> Family | None:
    """Return the family whose components these are.

    Args:
        architectures: Component → architecture; None for one that is not known.

    Returns:
        None if no family has all of them, or if several do and the denoiser is not among them.
    """
    given = {component: each.name for component, each in architectures.items() if each is not None}
    fitting = [family for family in FAMILIES.values() if given and given.items() <= family.components.items()]
    return fitting[0] if len(fitting) == 1 or (fitting and "" in given) else None


def make_component_lookup(family: Family | None) -> Callable[[Key], str]:
    """Return a function from a key to the name of its component.

    Without a family, text encoders have the usual numbers.
    """
    if family is None:
        return lambda key: key.component
    own = dict(family.kohya) | {
        f"{COMFYUI_ENCODER_PREFIX}{name}.transformer": of for name, of in family.comfyui.items()
    }
    return lambda key: own.get(key.prefix.rstrip("_."), key.component)


def find_prefix(dialect: Dialect, family: Family | None, component: str) -> str | None:
    """Return what the names of a component's tensors begin with in a dialect.

    `family` matters for text encoders; None: the usual numbers. Returns None if such files cannot hold the component.
    """
    if family is not None and component:
        named = [name for name, of in family.kohya.items() if of == component]
        named += [
            f"{COMFYUI_ENCODER_PREFIX}{name}.transformer" for name, of in family.comfyui.items() if of == component
        ]
        for prefix in dialect.prefixes:
            if prefix.rstrip("_.") in named[:1] or (
                prefix.startswith(COMFYUI_ENCODER_PREFIX) and prefix.rstrip(".") in named
            ):
                return prefix
    return dialect.find_prefix(component)
