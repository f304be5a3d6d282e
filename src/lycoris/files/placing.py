"""From the layers of a file's naming to those of a model: renamed, cut, joined, with halves exchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lycoris import rows
from lycoris.algorithm import Entry, Part
from lycoris.errors import FileError
from lycoris.files.layout import Layout
from lycoris.files.naming import Span

Stack = tuple[Entry, ...]


@dataclass
class Places:
    """Stacks by the model's own names."""

    dense: bool
    """Whether a dense difference may stand for what cannot be said otherwise."""

    entries: dict[str, Stack] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Layer → what its algorithm had to become."""
    refused: dict[str, str] = field(default_factory=dict)
    """Layer → why that is impossible."""


def place(stacks: Mapping[str, Stack], layout: Layout, naming: str, *, dense: bool = True) -> Places:
    """Stacks by the names of a naming, put onto the layers of a model; `dense` as in `lycoris.rows`."""
    found = Places(dense=dense)
    if naming == layout.naming:
        found.entries = dict(stacks)
        return found
    theirs, own = layout.spans(naming), layout.spans(layout.naming)
    whole = {span.parts: name for name, span in own.items()}
    waiting: dict[str, dict[str, Stack]] = {}
    holder = {part: name for name, span in own.items() for part in span.parts}
    for name, stack in stacks.items():
        span = theirs[name]
        try:
            if span.parts in whole:
                to = whole[span.parts]
                g = stack[0].geometry
                found.entries[to] = _turned(stack, span.swaps(g) != own[to].swaps(g), found, to)
                continue
            for part, single in _parted(stack, span, layout, found).items():
                if (part,) in whole:
                    found.entries[whole[part,]] = single
                else:
                    waiting.setdefault(holder[part], {})[part] = single
        except FileError as error:
            found.refused[name] = str(error)
    for name, parts in waiting.items():
        _join(parts, own[name], layout, found, name)
    return found


def _turned(stack: Stack, turn: bool, found: Places, name: str) -> Stack:
    if not turn:
        return stack
    return tuple(_noted(rows.swapped(entry, name, dense=found.dense), found, name) for entry in stack)


def _parted(stack: Stack, span: Span, layout: Layout, found: Places) -> dict[str, Stack]:
    """A stack for each layer that a module holds."""
    if len(span.parts) == 1:
        return {span.parts[0]: stack}
    parts, start = {}, 0
    for part in span.parts:
        geometry = layout.middle[part]
        at = slice(start, start + geometry.out_features)
        own = [_noted(rows.take(entry, at, part, dense=found.dense), found, part) for entry in stack]
        # A bias may be one that only other parts have.
        parts[part] = tuple(rows.on(entry, geometry, part) for entry in own)
        start = at.stop
    return parts


def _join(parts: Mapping[str, Stack], span: Span, layout: Layout, found: Places, name: str) -> None:
    """One stack from those of the layers that a module holds; what is missing gets nothing."""
    try:
        found.entries[name] = _joined(parts, span, layout, found, name)
    except FileError as error:
        found.refused[name] = str(error)


def _joined(parts: Mapping[str, Stack], span: Span, layout: Layout, found: Places, name: str) -> Stack:
    geometry = layout.layers[name]
    starts, start = {}, 0
    for part in span.parts:
        starts[part] = start
        start += layout.middle[part].out_features
    levels = max(map(len, parts.values()))
    stack = []
    for level in range(levels):
        some = [Part(starts[part], own[level]) for part, own in parts.items() if level < len(own)]
        stack.append(_noted(rows.join(some, geometry, name, dense=found.dense), found, name))
    return tuple(stack)


def _noted(step: rows.Step, found: Places, name: str) -> Entry:
    if step.note:
        found.notes[name] = step.note
    return step.entry
