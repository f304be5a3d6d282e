"""Parameters that several modules of a model own, such as output layers tied to the embeddings."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from lycoris.layers.sites import Site

Owners = dict[int, list[str]]
"""By the identity of a parameter: the names that it has, in model order."""


def spells_out(pattern: str, path: str) -> bool:
    """Return whether a pattern for paths has the last part of a path in it as a word, and not only a wildcard for it.

    For the path "model.lm_head", `.*lm_head` does and `.*head` does not.
    """
    return path.rpartition(".")[2] in re.split(r"\W+", pattern)


def find_shared_parameters(modules: Mapping[str, nn.Module]) -> Owners:
    """Return the parameters that more than one of a model's modules owns.

    Buffers are not looked at.

    Args:
        modules: by path; see `ModelSites.modules`.
    """
    found: Owners = {}
    for path, module in modules.items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    return {key: names for key, names in found.items() if len(names) > 1}


def tied_to(place: Site, shared: Owners) -> tuple[str, ...]:
    """Return the names of parameters of other modules that an adapter at a place changes as well.

    Empty where nothing is tied. Of a layer, weight and bias are looked at; of a parameter, it alone.

    Args:
        shared: from `find_shared_parameters`.
    """
    own = (place.attribute,) if place.attribute else ("weight", "bias")
    mine = {f"{place.owner}.{name}" if place.owner else name for name in own}
    names = [name for each in own for name in shared.get(id(place.module._parameters.get(each)), ())]
    return tuple(name for name in names if name not in mine)
