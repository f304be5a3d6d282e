"""Which of a component's keys a program knows, and where it puts them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from lycoris.adapters.bundle import Bundle
from lycoris.files.dialects import DIALECTS
from lycoris.files.dialects.base import flatten
from lycoris.files.layout import NamedLayout
from lycoris.files.programs import Program
from lycoris.files.programs.keys import KnownKeys
from lycoris.files.programs.routes import RoutedKeys
from lycoris.files.programs.written import WrittenLayer


@dataclass(frozen=True)
class PartKeys:
    """A file's keys for one component of a pipeline, as a program knows them.

    `component` is "" for the denoiser.
    """

    program: Program
    component: str
    file_dialect: str
    """The dialect of the file."""
    layout: NamedLayout
    bundle: Bundle
    written: Mapping[str, WrittenLayer]
    """By layer as written."""
    routed: RoutedKeys | None = None
    """What the program makes of all keys of the file together; None: each is treated alone, as `Program.keys` says."""
    taken_for: str = ""
    """The algorithm that the program takes the entire file for; "": each layer has its own."""
    family: str | None = None
    model: str = ""
    """The known model that the component is taken to be; "" not known."""
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Layer as written → the scale stored as a tensor of its own, and the one that alpha gives."""

    @property
    def architecture(self) -> str | None:
        return None if self.layout.architecture is None else self.layout.architecture.name

    @property
    def prefix(self) -> str:
        """What the component's keys begin with.

        Taken from the first one; "" if there are none.
        """
        return next((each.key.removesuffix(layer) for layer, each in self.written.items()), "")

    @cached_property
    def dialect(self) -> str:
        """The dialect that usually has such keys for this component.

        The file's, or, if its layers have other names than that has for the model, one the program knows that does; ""
        if there is none.
        """
        own, architecture = DIALECTS[self.file_dialect], self.layout.architecture
        # Text encoders have other names only by a level that some versions of a class have.
        if (
            architecture is None
            or self.component
            or own.is_folder
            or own.choose_naming(architecture) == self.layout.naming
        ):
            return self.file_dialect
        if all(each.choose_naming(architecture) != self.layout.naming for each in DIALECTS.values()):
            # Names that are only read.
            return self.file_dialect
        alike = (
            each.name
            for each in DIALECTS.values()
            if self.prefix in each.prefixes and each.choose_naming(architecture) == self.layout.naming
        )
        return next((name for name in alike if self.program.find_keys(name, architecture.name)), "")

    @cached_property
    def known_keys(self) -> KnownKeys | None:
        by_naming, architecture = self.program.by_naming, self.architecture
        named = (
            by_naming(architecture, self.layout.naming) if by_naming and architecture and not self.component else None
        )
        return named or self.program.find_keys(self.dialect, architecture, *self._finer)

    @property
    def _finer(self) -> tuple[str, ...]:
        """Other names of what the architecture is here."""
        return (f"{self.family}/{self.architecture}", self.model)

    @property
    def elsewhere(self) -> list[str]:
        """Dialects that the program knows for this architecture.

        The file's own may be among them.
        """
        return [each for each in self.program.keys if self.program.find_keys(each, self.architecture, *self._finer)]

    @property
    def _others(self) -> list[str]:
        """The dialects that it does know for this architecture, but that of the file."""
        return [each for each in self.elsewhere if each != self.file_dialect]

    def _of(self, written: str) -> WrittenLayer:
        """What the file has for a layer; nothing where PEFT has names of its own, as for IA3."""
        found = self.written.get(written) or self.written.get(written.removesuffix(".weight"))
        return found or WrittenLayer(self.prefix + written, {})

    def _as_written(self, layer: str) -> str:
        return flatten(layer) if DIALECTS[self.file_dialect].style == "flat" else layer

    @cached_property
    def _known_names(self) -> Collection[str] | None:
        """The layers' names, as written, that the program knows; None: any."""
        architecture, named = self.layout.architecture, self.known_keys.named if self.known_keys else ""
        if architecture is None or not named:
            return None
        return self.layout.map_written_names(
            DIALECTS[named].choose_naming(architecture), DIALECTS[self.file_dialect].style
        )

    @cached_property
    def _absent(self) -> list[str]:
        """Keys of layers that the file has nothing for."""
        keys = {each.key for each in self.written.values()}
        written = self.layout.map_written_names(self.layout.naming, DIALECTS[self.file_dialect].style)
        # A layer that goes by two names counts once, by the longer.
        own = {layer: self.prefix + name for name, layer in written.items()}
        return [key for key in own.values() if key not in keys]

    @cached_property
    def _incomplete(self) -> set[tuple[str | None, ...]]:
        """Groups of keys that go together, of which the file lacks some."""
        together = self.known_keys.together if self.known_keys is not None else ""
        return {match.groups() for key in self._absent if together and (match := re.fullmatch(together, key))}

    def _is_incomplete(self, written: str) -> bool:
        """Whether it is of layers that the program takes together only, and others of them are not there."""
        together = self.known_keys.together if self.known_keys is not None and self.routed is None else ""
        return bool(together) and matches_group(self._of(written).key, together, self._incomplete)

    def _is_unplaced(self, written: str) -> bool:
        """Whether the program has no place for a layer's keys."""
        if self.routed is not None:
            return self._of(written).key in self.routed.lost
        if self.known_keys is None:
            return True
        own = self._of(written)
        # What looks for tensors by their names looks for keys as the file has them.
        key = own.key if self.program.take_tensors is None else own.own
        unnamed = (
            self._known_names is not None
            and written not in self._known_names
            and bool(re.fullmatch(self.known_keys.named_pattern, own.key))
        )
        unhinged = bool(re.fullmatch(self.known_keys.requires[0], own.key)) and not self._has(
            self.known_keys.requires[1]
        )
        return not key or unnamed or unhinged or bool(re.fullmatch(self.known_keys.lost, key))

    def _has(self, name: str) -> bool:
        """Whether the file has a tensor."""
        return any(name in each.names for each in self.written.values())


def matches_group(key: str, pattern: str, groups: set[tuple[str | None, ...]]) -> bool:
    """Return whether a key matches a pattern with groups that are among these."""
    match = re.fullmatch(pattern, key)
    return match is not None and match.groups() in groups
