"""How a program's model stores the layers that a file names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import NamedLayout
from lycoris.files.programs import LayerPlace, Program
from lycoris.models.families.naming import Span


class Holder(NamedTuple):
    """A layer of a program's model, and the layers of diffusers that it holds.

    `name` is in the naming that was asked for; `span` has the parts in the order of the rows.
    """

    name: str
    span: Span


def find_holders(program: Program, layout: NamedLayout) -> Mapping[str, Holder]:
    """Return, for each layer of diffusers, the layer of a program's model that holds its rows.

    {} if the program's names are not known.
    """
    if not program.native_dialect or layout.architecture is None:
        return {}
    return map_holders(layout, DIALECTS[program.native_dialect].choose_naming(layout.architecture))


def map_holders(layout: NamedLayout, naming: str) -> Mapping[str, Holder]:
    """Return, for each layer of diffusers, the module of a naming that holds its rows.

    Args:
        naming: a naming of the layout's architecture.
    """
    return {part: Holder(name, span) for name, span in layout.find_spans(naming).items() for part in span.parts}


def find_place(written: Holder, holders: Mapping[str, Holder], layout: NamedLayout) -> LayerPlace:
    """Return how a program's model stores the layer that a file calls `written`.

    "" if it has one of its own under the same name, or nothing is known.
    """
    held = holders.get(written.span.parts[0])
    if held is None:
        return ""
    if len(held.span.parts) > len(written.span.parts):
        return "rows"
    geometry = layout.diffusers_layers[written.span.parts[0]]
    if held.span.swaps_halves(geometry) != written.span.swaps_halves(geometry):
        return "swapped"
    return "" if held.name == written.name else "renamed"
