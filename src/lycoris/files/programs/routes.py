"""Programs that look at all keys of a file before they read one: what they see, and what they make of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class SentFile:
    """A file as it reaches a program: its keys, and the denoiser's architecture."""

    layers: Mapping[str, tuple[str, ...]]
    """Key of each layer, prefix included → suffixes of its tensors entire names if they do not start with
    the key."""
    architecture: str | None
    """Of the denoiser; None: unknown."""
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
    """Why it rejects the file, as the end of a sentence that begins with the program; "" if it does not."""
    lost: frozenset[str] = frozenset()
    """Keys of layers that it ignores."""
    without_scale: frozenset[str] = frozenset()
    """Keys of layers whose alpha it ignores."""
    without_magnitude: frozenset[str] = frozenset()
    """Keys of layers whose DoRA magnitude it ignores."""


Route = Callable[[SentFile], RoutedKeys | None]
"""None: what becomes of each key does not depend on the others, and `Program.keys` says it."""
