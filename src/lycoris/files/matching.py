"""Match the names in a file to a dialect, and to a naming of the model's layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from lycoris.adapters.load_report import some
from lycoris.errors import FileError, unknown
from lycoris.files import foreign
from lycoris.files.choosing import DialectRating, rate_dialect
from lycoris.files.container.storage import get_shapes
from lycoris.files.dialects import DIALECTS, wrappers
from lycoris.files.dialects.base import Dialect, Key
from lycoris.files.dialects.components import make_component_lookup
from lycoris.files.layout import NamedLayout
from lycoris.models.families.family import Family


@dataclass
class Match:
    """A file read as one dialect, in the naming of its family that fits best.

    `strange` has the tensors whose names the dialect does not know; `elsewhere` counts those of other components.
    """

    dialect: Dialect
    naming: str
    groups: dict[str, dict[str, str]]
    """Layer as written → suffix → tensor name."""
    names: Mapping[str, str]
    """Layer as written → dotted, for the layers that the model has."""
    strange: list[str]
    elsewhere: dict[str, int]
    prefix: str
    """What the names begin with."""
    standing: DialectRating

    @property
    def complete(self) -> bool:
        """Whether every tensor belongs to a layer that the model has.

        False for a file without any tensors of the component.
        """
        return bool(self.groups) and not self.strange and all(layer in self.names for layer in self.groups)

    def used_names(self) -> list[str]:
        """Return the names of the tensors whose layers the model has.

        In the order of the file, as the file spells them.
        """
        return [name for layer, group in self.groups.items() if layer in self.names for name in group.values()]


def list_dialects(tensors: Mapping[str, Tensor], name: str | None, prefix: str | None) -> list[Dialect]:
    """Return the dialects to try for a file, by its names.

    Args:
        name: The dialect, if it is given; then it is the only one.
        prefix: A custom prefix; then the only one is a flat dialect made of it.

    Raises:
        FileError: `name` is unknown, or no dialect has any of the names.
    """
    if prefix is not None:
        return [Dialect(name=prefix, style="flat", prefixes={f"{prefix}_": ""})]
    if name is not None:
        if name not in DIALECTS:
            raise FileError(unknown("dialect", name, DIALECTS))
        return [DIALECTS[name]]
    fitting = [dialect for dialect in DIALECTS.values() if any(dialect.split(key) for key in tensors)]
    if fitting:
        return fitting
    if what := foreign.explain_kind(get_shapes(tensors), readable=True):
        raise FileError(what)
    if any(wrappers.strip_surroundings(key) != key for key in tensors):
        return list(DIALECTS.values())
    known = "; ".join(f"{d.name}: {next(iter(d.prefixes)) or 'no prefix'}..." for d in DIALECTS.values())
    raise FileError(f"its {len(tensors)} keys are of no known format: {some(tensors)}. Known are {known}")


def match_best(
    tensors: Mapping[str, Tensor],
    dialects: Iterable[Dialect],
    layout: NamedLayout,
    component: str,
    family: Family | None,
    header: Mapping[str, str],
) -> Match:
    """Match a file to each dialect and return the best match; see `DialectRating`.

    Raises `FileError` if two names in a dialect are the same tensor.
    """
    every = (_match_dialect(tensors, each, layout, component, family, header) for each in dialects)
    return max(every, key=lambda each: each.standing)


def _match_dialect(
    tensors: Mapping[str, Tensor],
    dialect: Dialect,
    layout: NamedLayout,
    component: str,
    family: Family | None,
    header: Mapping[str, str],
) -> Match:
    keys = {name: dialect.split(name) for name in tensors}
    parted = {name: key for name, key in keys.items() if key is not None}
    by_component: dict[str, dict[str, Key]] = {}
    whose = make_component_lookup(family)
    for name, key in parted.items():
        by_component.setdefault(whose(key), {})[name] = key
    mine = by_component.pop(component, {})
    groups: dict[str, dict[str, str]] = {}
    for name, key in mine.items():
        first = groups.setdefault(key.layer, {}).setdefault(key.suffix, name)
        if first != name:
            raise FileError(f"{first} and {name} are the same tensor under two names; take one of them out")
    tables = {naming: layout.map_written_names(naming, dialect.style) for naming in layout.namings}
    usual = None if layout.architecture is None else dialect.choose_naming(layout.architecture)
    counts = {each: sum(layer in table for layer in groups) for each, table in tables.items()}
    naming = max(tables, key=lambda each: (counts[each], each == usual))
    strange = [name for name, key in keys.items() if key is None]
    elsewhere = {name: len(those) for name, those in by_component.items()}
    prefix = next((key.prefix for key in mine.values()), "")
    own = rate_dialect(
        dialect, keys.values(), header, named=counts[naming], naming=naming, architecture=layout.architecture
    )
    return Match(dialect, naming, groups, tables[naming], strange, elsewhere, prefix, own)
