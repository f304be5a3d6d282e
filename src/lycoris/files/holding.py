"""How the model of a program holds the layers that a file names."""

from __future__ import annotations

from collections.abc import Mapping

from lycoris.families.naming import Span
from lycoris.files.consumers import Consumer, Place
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import Layout


def holders(program: Consumer, layout: Layout) -> Mapping[str, Span]:
    """Layer of diffusers → the layer of the program's model that has its rows; none where its names are not known."""
    if not program.own or layout.architecture is None:
        return {}
    own = layout.spans(DIALECTS[program.own].naming_for(layout.architecture))
    return {part: span for span in own.values() for part in span.parts}


def place_of(written: Span, holders: Mapping[str, Span], layout: Layout) -> Place:
    """How the program's model holds what a file calls one layer."""
    held = holders.get(written.parts[0])
    if held is None:
        return ""
    if len(held.parts) > len(written.parts):
        return "rows"
    geometry = layout.middle[written.parts[0]]
    return "swapped" if held.swaps(geometry) != written.swaps(geometry) else ""
