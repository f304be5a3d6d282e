"""Move adapters from the layers of a file's naming to those of a model: renamed, split, joined, halves swapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lycoris.algorithms import rows
from lycoris.algorithms.base import Entry
from lycoris.algorithms.row_selection import RowBlock
from lycoris.errors import FileError
from lycoris.files.layout import NamedLayout
from lycoris.models.families.naming import Span

Stack = tuple[Entry, ...]


@dataclass
class PlacedStacks:
    """Stacks under the model's own names, and notes on those that had to change.

    `place_stacks` makes it, and `add` puts more in.
    """

    dense: bool
    """Whether a dense difference may stand for what cannot be said otherwise."""
    shared: bool
    """Whether layers may have slices of one adapter, as a model can and a file cannot."""

    entries: dict[str, Stack] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """Layer → what its algorithm had to become."""
    refused: dict[str, str] = field(default_factory=dict)
    """Layer → why that is impossible."""

    def add(self, stacks: Mapping[str, Stack]) -> None:
        """Add stacks under the names that they have.

        Unless `shared`, slices are replaced by adapters of their own; a layer for which that is impossible goes to
        `refused`.
        """
        if self.shared:
            self.entries |= stacks
        for name, stack in () if self.shared else stacks.items():
            self._add_without_slices(name, stack)

    def _add_without_slices(self, name: str, stack: Stack) -> None:
        try:
            self.entries[name] = self.remove_slices(stack, name)
        except FileError as error:
            self.refused[name] = str(error)

    def remove_slices(self, stack: Stack, name: str) -> Stack:
        """Return a stack with each slice replaced by an adapter of its own.

        Raises `FileError` where only a dense difference could stand for one and `dense` is False.
        """
        return tuple(_take_note(rows.separate_slice(entry, name, dense=self.dense), self, name) for entry in stack)


def place_stacks(
    stacks: Mapping[str, Stack], layout: NamedLayout, naming: str, *, dense: bool = True, shared: bool = False
) -> PlacedStacks:
    """Put stacks under the names of a naming onto the layers of a model.

    Args:
        stacks: By name in `naming`.
        layout: The model, in its own naming.
        dense: Whether a dense difference may replace what cannot be split or joined otherwise; see
            `lycoris.algorithms.rows`.
        shared: Whether layers may have slices of one adapter, as in a model; False for files, which cannot store
            slices.

    Returns:
        What was placed; layers that were impossible are in `refused`, with the reason.
    """
    found = PlacedStacks(dense, shared)
    if naming == layout.naming:
        found.add(stacks)
        return found
    theirs, own = layout.find_spans(naming), layout.find_spans(layout.naming)
    held = {span.parts: name for name, span in own.items()}
    waiting: dict[str, dict[str, Stack]] = {}
    holder = {part: name for name, span in own.items() for part in span.parts}
    for name, stack in stacks.items():
        span = theirs[name]
        try:
            if span.parts in held:
                to = held[span.parts]
                g = stack[0].geometry
                found.entries[to] = _swap_stack(stack, span.swaps_halves(g) != own[to].swaps_halves(g), found, to)
                continue
            for part, single in _split_stack(stack, span, layout, found).items():
                if (part,) in held:
                    found.add({held[part,]: single})
                else:
                    waiting.setdefault(holder[part], {})[part] = single
        except FileError as error:
            found.refused[name] = str(error)
    for name, parts in waiting.items():
        _join_parts(parts, own[name], layout, found, name)
    return found


def separate_stacks(stacks: Mapping[str, Stack], *, dense: bool = True) -> PlacedStacks:
    """Return stacks under the same names with each slice replaced by an adapter of its own.

    `dense` as in `place_stacks`; layers where that is impossible are in `refused`.
    """
    found = PlacedStacks(dense, shared=False)
    found.add(stacks)
    return found


def _swap_stack(stack: Stack, swapped: bool, found: PlacedStacks, name: str) -> Stack:
    if not swapped:
        return stack if found.shared else found.remove_slices(stack, name)
    moved = tuple(_take_note(rows.share_swapped_halves(entry, name, dense=found.dense), found, name) for entry in stack)
    return moved if found.shared else found.remove_slices(moved, name)


def _split_stack(stack: Stack, span: Span, layout: NamedLayout, found: PlacedStacks) -> dict[str, Stack]:
    """A stack for each layer that a module holds."""
    if len(span.parts) == 1:
        return {span.parts[0]: stack}
    parts, start = {}, 0
    for part in span.parts:
        geometry = layout.diffusers_layers[part]
        at = slice(start, start + geometry.out_features)
        # Parts that are joined again, in another way, may turn out to be all of it.
        steps = (rows.share_rows(entry, at, geometry, part, dense=found.dense) for entry in stack)
        parts[part] = tuple(_take_note(step, found, part) for step in steps)
        start = at.stop
    return parts


def _join_parts(parts: Mapping[str, Stack], span: Span, layout: NamedLayout, found: PlacedStacks, name: str) -> None:
    """One stack from those of the layers that a module holds; what is missing gets nothing."""
    try:
        found.entries[name] = _join_stacks(parts, span, layout, found, name)
    except FileError as error:
        found.refused[name] = str(error)


def _join_stacks(parts: Mapping[str, Stack], span: Span, layout: NamedLayout, found: PlacedStacks, name: str) -> Stack:
    geometry = layout.layers[name]
    starts, start = {}, 0
    for part in span.parts:
        starts[part] = start
        start += layout.diffusers_layers[part].out_features
    levels = max(map(len, parts.values()))
    stack = []
    for level in range(levels):
        some = [RowBlock(starts[part], own[level]) for part, own in parts.items() if level < len(own)]
        stack.append(_take_note(rows.join_rows(some, geometry, name, dense=found.dense), found, name))
    return tuple(stack)


def _take_note(step: rows.Step, found: PlacedStacks, name: str) -> Entry:
    if step.note:
        found.notes[name] = step.note
    return step.entry
