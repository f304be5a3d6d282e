"""Which component of a pipeline a tensor is for: text encoders are counted differently from family to family."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lycoris.files.dialects.base import Dialect, Key
from lycoris.models.families import FAMILIES
from lycoris.models.families.family import Architecture, Family

FAMILY = "lycoris_family"
"""Header key under which this library names it."""
VERSION_KEYS = (FAMILY, "ss_base_model_version", "modelspec.architecture")
"""Header keys that name the family of the base model."""

COMFYUI = "text_encoders."


def family_in(header: Mapping[str, str]) -> Family | None:
    """The family that a file's header names."""
    for key in VERSION_KEYS:
        told = header.get(key, "").lower()
        # The longest beginning: "flux" is one of "flux.2" too.
        fitting = [
            (len(version), family)
            for family in FAMILIES.values()
            for version in (family.name, *family.versions)
            if told.startswith(version)
        ]
        if told and fitting:
            return max(fitting, key=lambda each: each[0])[1]
    return None


def family_of(architectures: Mapping[str, Architecture | None]) -> Family | None:
    """The family whose components these are; None when several or none have them."""
    given = {component: each.name for component, each in architectures.items() if each is not None}
    fitting = [family for family in FAMILIES.values() if given and given.items() <= family.components.items()]
    return fitting[0] if len(fitting) == 1 or (fitting and "" in given) else None


def component_of(family: Family | None) -> Callable[[Key], str]:
    """What tells the component of a key; without a family, by the usual count."""
    if family is None:
        return lambda key: key.component
    own = dict(family.kohya) | {f"{COMFYUI}{name}.transformer": of for name, of in family.comfyui.items()}
    return lambda key: own.get(key.prefix.rstrip("_."), key.component)


def prefix_of(dialect: Dialect, family: Family | None, component: str) -> str | None:
    """What the names of a component's tensors begin with; None when such files do not hold it."""
    if family is not None and component:
        named = [name for name, of in family.kohya.items() if of == component]
        named += [f"{COMFYUI}{name}.transformer" for name, of in family.comfyui.items() if of == component]
        for prefix in dialect.prefixes:
            if prefix.rstrip("_.") in named[:1] or (prefix.startswith(COMFYUI) and prefix.rstrip(".") in named):
                return prefix
    return dialect.prefix(component)
