"""How the model of a program holds the layers that a file names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import Layout
from lycoris.files.programs import Place, Program
from lycoris.models.families.naming import Span


class Holder(NamedTuple):
    """A layer of a program's model."""

    name: str
    span: Span


def holders(program: Program, layout: Layout) -> Mapping[str, Holder]:
    """Layer of diffusers → the layer of the program's model that has its rows; none where its names are not known."""
    if not program.own or layout.architecture is None:
        return {}
    return holding(layout, DIALECTS[program.own].naming_for(layout.architecture))


def holding(layout: Layout, naming: str) -> Mapping[str, Holder]:
    """Layer of diffusers → the layer of a naming that has its rows."""
    return {part: Holder(name, span) for name, span in layout.spans(naming).items() for part in span.parts}


def place_of(written: Holder, holders: Mapping[str, Holder], layout: Layout) -> Place:
    """How the program's model holds what a file calls one layer."""
    held = holders.get(written.span.parts[0])
    if held is None:
        return ""
    if len(held.span.parts) > len(written.span.parts):
        return "rows"
    geometry = layout.middle[written.span.parts[0]]
    if held.span.swaps(geometry) != written.span.swaps(geometry):
        return "swapped"
    return "" if held.name == written.name else "renamed"
