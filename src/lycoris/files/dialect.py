"""What a dialect is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class Key(NamedTuple):
    """A tensor name in three parts."""

    component: str
    """Which model of a pipeline it belongs to, as diffusers names it; "" where the format has only one."""
    flat: str
    """The layer's dotted path with every dot turned into an underscore."""
    suffix: str
    """The tensor's own name."""


@dataclass(frozen=True)
class Dialect:
    """A file format that writes `<prefix>_<path with underscores>.<tensor>`."""

    name: str
    prefixes: Mapping[str, str]
    """Prefix → component, longest prefixes first where one begins another."""
    default: str
    """The prefix to write when a component has several or is not known."""

    def split(self, key: str) -> Key | None:
        """The parts of a tensor name, or None if it is not of this dialect."""
        head, dot, suffix = key.partition(".")
        for prefix, component in self.prefixes.items():
            if dot and (head == prefix + "_" or re.match(re.escape(prefix) + r"_(?!_)", head)):
                return Key(component, head[len(prefix) + 1 :], suffix)
        return None

    def join(self, path: str, suffix: str, component: str = "", prefix: str | None = None) -> str:
        """The name of a tensor of the layer at `path`."""
        if prefix is None:
            prefix = next((p for p, of in self.prefixes.items() if of == component), self.default)
        return f"{prefix}_{flatten(path)}.{suffix}"


def flatten(path: str) -> str:
    """A dotted path as underscore formats write it."""
    return path.replace(".", "_")
