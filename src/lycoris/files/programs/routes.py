"""Programs that look at all keys of a file before they read one: what they see, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SentFile:
    """A file as it reaches a program: its keys, and the denoiser's architecture."""

    layers: Mapping[str, tuple[str, ...]]
    """Each layer as its keys call it, with what they begin with → the ends of its tensors' names, as written; of names
    that do not begin with the layer's, all."""
    architecture: str | None
    """Of the denoiser; None: not known."""
    names: tuple[str, ...]
    """Of all tensors."""

    def has_suffix(self, *ends: str) -> bool:
        return any(name.endswith(ends) for name in self.names)

    def all_have_suffix(self, *ends: str) -> bool:
        return all(name.endswith(ends) for name in self.names)

    def has_prefix(self, *starts: str) -> bool:
        return any(name.startswith(starts) for name in self.names)

    def all_have_prefix(self, *starts: str) -> bool:
        return all(name.startswith(starts) for name in self.names)


@dataclass(frozen=True)
class RoutedKeys:
    """What a program makes of a file's keys.

    By default it reads all of them.
    """

    refused: str = ""
    """Why it does not take the file, as the end of a sentence that begins with the program; "" where it does."""
    lost: frozenset[str] = frozenset()
    """Layers, by their keys, that it passes over."""
    without_scale: frozenset[str] = frozenset()
    """Layers whose alpha it leaves out."""
    without_magnitude: frozenset[str] = frozenset()
    """Layers whose DoRA magnitude it leaves out."""


Route = Callable[[SentFile], RoutedKeys | None]
"""None: what becomes of each key does not depend on the others, and `Program.keys` says it."""
