"""Predict what a program makes of a file's part for one component of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from lycoris.adapters.load_report import some
from lycoris.algorithms import ALGORITHMS, DoRA
from lycoris.algorithms.base import Entry
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.tensors import ALPHA
from lycoris.files.dialects import DIALECTS
from lycoris.files.programs import Remedy, Verdict
from lycoris.files.programs.holding import Holder, find_holders, find_place
from lycoris.files.programs.part_keys import PartKeys, matches_group
from lycoris.files.programs.taking import ALPHA_AND_MAGNITUDE, LayerPlace, TakenTensors
from lycoris.models.families.naming import Span

UNIT_TOLERANCE = 1e-6
"""A scale this near to 1 is 1."""


@dataclass(frozen=True)
class FilePart(PartKeys):
    """A file's adapters for one component of a pipeline, as a program meets them."""

    @property
    def problems(self) -> list[str]:
        """Why the program rejects a file with this component, one sentence each.

        Empty if it does not, and if it knows none of the keys: see `unknown`.
        """
        title = self.program.title
        if self.unknown or (self.routed is not None and self.routed.refused):
            return []
        stopped = [self._stop_reason] if self._stop_reason else []
        if self.routed is not None:
            return stopped
        assert self.known_keys is not None
        keys = {each.key for each in self.written.values()}
        stopping = sorted(
            each.key
            for layer, each in self.written.items()
            if re.fullmatch(self.known_keys.stops, each.key) or (self.known_keys.strict and self._is_unplaced(layer))
        )
        groups = {match.groups() for key in keys if (match := re.fullmatch(self.known_keys.complete_groups, key))}
        lacking = [key for key in self._absent if matches_group(key, self.known_keys.complete_groups, groups)]
        found = [*stopped, *([f"{title} rejects the file for {some(stopping)}"] if stopping else [])]
        if lacking:
            found.append(f"{title} rejects the file, for it wants all layers of that kind, and lacks {some(lacking)}")
        return found

    @property
    def unknown(self) -> str:
        """A sentence saying that the program knows none of the component's keys.

        "" if it knows some.
        """
        if self.routed is not None and self.routed.refused:
            return ""
        taken = not self.written or not all(map(self._is_unplaced, self.written))
        if (self.known_keys is not None or self.routed is not None) and taken:
            return ""
        there, model = ", ".join(self._others), self.architecture or "this model"
        if self.architecture in self.program.missing_architectures:
            return f"{self.program.title} has no such model as {model}"
        if self.routed is None and not self.program.is_examined(self.architecture):
            return f"which keys {self.program.title} knows for {model} was not examined"
        return f"{self.program.title} does not know keys of the format {self.file_dialect} for {model}" + (
            f"; it knows {there}" if there else ", nor of any other known here"
        )

    @property
    def _stop_reason(self) -> str:
        """Why the program gives a file up at a layer that it cannot take; "" where it takes what it finds."""
        stopping = {
            layer: verdict.why
            for layer, verdict in self.verdicts.items()
            if verdict.stops and not self._is_unplaced(self._as_written(layer))
        }
        if not stopping:
            return ""
        return f"{self.program.title} rejects the file for {some(stopping)}: {next(iter(stopping.values()))}"

    @property
    def conflict(self) -> str:
        """Why the program does not accept these layers together, though it accepts each one.

        "" if it does.
        """
        stops = any(each.stops for each in self.verdicts.values())
        if self.program.explain_conflict is None or stops:
            return ""
        entries = {at: each for at, each in self.bundle.entries.items() if not self._is_unplaced(self._as_written(at))}
        return self.program.explain_conflict(replace(self.bundle, entries=entries))

    @property
    def taken_count(self) -> int:
        """The number of tensors that the program uses.

        Compared with `Program.max_unmatched` by subtraction.
        """
        return sum(len(self._find_taken(layer).names) for layer in self.written)

    def _find_taken(self, written: str) -> TakenTensors:
        """What the program makes of a layer's tensors by their names in the file."""
        own = self._of(written)
        if self._is_unplaced(written):
            return TakenTensors(frozenset())
        spelled = frozenset(own.spelled)
        return (
            TakenTensors(spelled)
            if self.program.take_tensors is None
            else self.program.take_tensors(spelled, own.own, self._place(written))
        )

    def _find_left(self, written: str) -> frozenset[str]:
        """Those that it does not look for, by LyCORIS' names."""
        own, taken = self._of(written), self._find_taken(written).names
        return frozenset(name for name, spelled in zip(own.tensors, own.spelled, strict=True) if spelled not in taken)

    @cached_property
    def verdicts(self) -> Mapping[str, Verdict]:
        """Layer → what the program makes of its adapters.

        By the names of layers in the file.
        """
        found = {layer: self._verdict(layer, stack) for layer, stack in self.bundle.entries.items()}
        pattern = self.known_keys.together if self.known_keys is not None and self.routed is None else ""
        if not pattern:
            return found
        groups = {
            layer: match.groups()
            for layer in found
            if (match := re.fullmatch(pattern, self._of(self._as_written(layer)).key))
        }
        failing = {group for layer, group in groups.items() if found[layer].reads == "not at all"}
        for layer, group in groups.items():
            if group in failing and found[layer].reads != "not at all":
                why = f"{self.program.title} takes such layers together, and leaves all out when one fails"
                found[layer] = Verdict("not at all", why, None, found[layer].remedy or "smaller")
        return found

    @cached_property
    def _among(self) -> frozenset[str]:
        """The own names of all tensors."""
        return frozenset(name for each in self.written.values() for name in each.tensors)

    @cached_property
    def _holders(self) -> Mapping[str, Holder]:
        return find_holders(self.program, self.layout)

    def _span(self, layer: str) -> Span:
        return self.layout.find_spans(self.layout.naming).get(layer, Span((layer,)))

    @cached_property
    def _layers(self) -> Mapping[str, str]:
        """Layer as written → the same in the layout's names."""
        return {self._as_written(layer): layer for layer in self.bundle.entries}

    def _place(self, written: str) -> LayerPlace:
        """How the program's model holds a layer."""
        layer = self._layers.get(written, written)
        return find_place(Holder(layer, self._span(layer)), self._holders, self.layout)

    def _verdict(self, layer: str, stack: tuple[Entry, ...]) -> Verdict:
        title, written = self.program.title, self._as_written(layer)
        key, stored = self._of(written).key, self._of(written).tensors
        known = None if self.routed is not None else self.known_keys
        if self.known_keys is None and self.routed is None and not self.program.is_examined(self.architecture):
            return Verdict("not known", f"which keys {title} knows for this model was not examined")
        if self._is_unplaced(written) or (known is not None and re.fullmatch(known.stops, key)):
            return Verdict(
                "not at all", f"{title} has no place for such keys", None, "format" if self._others else None
            )
        if known is not None and re.fullmatch(known.unsure, key):
            return Verdict(
                "not known", f"whether {title} has a place for such keys depends on the version of the model"
            )
        if "bias_indices" in stored and self.program.take_tensors is None:
            return Verdict("differently", f"{title} ignores the sparse change of the weight", None, "joined")
        verdict = self._by_the_table(layer, written, stack)
        own = unwrap_dora(stack[0].algorithm).name
        if (
            self.taken_for
            and verdict.reads != "not at all"
            and not issubclass(ALGORITHMS[own], ALGORITHMS[self.taken_for])
        ):
            why = (
                f"{title} takes an entire file for one algorithm, by its first tensors, and this one for "
                f"{self.taken_for}"
            )
            return Verdict("not at all", why, None, "lora")
        return self._otherwise(layer, stack) or verdict if verdict.reads == "as trained" else verdict

    def _otherwise(self, layer: str, stack: tuple[Entry, ...]) -> Verdict | None:
        """What becomes of a layer, all of which the program reads, for where and how the file has it."""
        title, known = self.program.title, None if self.routed is not None else self.known_keys
        own = self._of(self._as_written(layer))
        key, stored = own.key, own.tensors
        if left_out := self._left_out(stack, key, stored):
            return left_out
        if known is not None and re.fullmatch(known.misplaced, key):
            return Verdict("differently", f"{title} puts it on other rows of the weight")
        corrected = self.bundle.report.changed.get(layer)
        if corrected:
            return Verdict(
                "differently", f"{title} takes the scale that the file says; here {corrected}", None, "scale"
            )
        return None

    def _by_the_table(self, layer: str, written: str, stack: tuple[Entry, ...]) -> Verdict:
        """What the program makes of the layer's tensors that it looks for."""
        own = self._of(written)
        verdict = self.program.judge(
            stack[0],
            beside=stack[1:],
            dialect=self.dialect or self.file_dialect,
            architecture=self.architecture,
            key=own.key,
            stored=own.tensors,
            place=self._place(written),
            among=self._among,
            spelled=frozenset() if self.program.take_tensors is None else frozenset(own.spelled),
            model=self.model,
        )
        if self.program.take_tensors is not None:
            verdict = self._of_taken(written, stack, verdict) or verdict
        if not self._is_incomplete(written) or verdict.stops:
            return verdict
        why = f"{self.program.title} takes such layers together, and not all of them are there"
        return Verdict("not at all", why, None, "format" if self._others else None)

    def _of_taken(self, written: str, stack: tuple[Entry, ...], verdict: Verdict) -> Verdict | None:
        """What becomes of a layer of which the program does not look for all tensors; None: what its table says."""
        title, left, (taken, stops) = self.program.title, self._find_left(written), self._find_taken(written)
        if not taken - ALPHA_AND_MAGNITUDE:
            if verdict.reads == "not at all" and verdict.stops == stops:
                return None
            strange = some(sorted(set(self._of(written).spelled) - taken))
            why = f"{title} looks for no tensors called {strange}" + ", and rejects the file" * stops
            return Verdict("not at all", why, None, verdict.remedy or "rewritten", stops=stops)
        if verdict.reads != "as trained":
            return None
        entry = stack[0]
        plain = len(stack) == 1 and not isinstance(entry.algorithm, DoRA)
        if left - {ALPHA, "scale"}:
            remedy: Remedy = "joined" if "bias_indices" in left else "rewritten"
            return Verdict("differently", f"{title} leaves out {some(sorted(left - {ALPHA, 'scale'}))}", None, remedy)
        if "scale" in left:
            ours, its = self.scales[written]
        else:
            ours, its = entry.algorithm.scale(entry.geometry), 1.0
        if not left or abs(its - ours) <= UNIT_TOLERANCE * abs(ours):
            return None
        error = abs(its / ours - 1) if plain and ours else None
        return Verdict("differently", f"{title} does not look for {some(sorted(left))} there", error, "rewritten")

    def _left_out(self, stack: tuple[Entry, ...], key: str, stored: Collection[str]) -> Verdict | None:
        """What becomes of a layer whose scale or magnitude the program does not look for where the file has it."""
        title, dialect, (entry, *others) = self.program.title, DIALECTS[self.file_dialect], stack
        if self.routed is not None and key in self.routed.without_magnitude:
            return Verdict(
                "differently",
                f"{title} leaves DoRA's magnitude out; how far off that is depends on the base weight",
                None,
                "smaller",
            )
        scale = entry.algorithm.scale(entry.geometry)
        kept_outside = (dialect.scale == "header" and ALPHA not in stored) or dialect.is_folder
        outside = kept_outside and not self.program.reads_header
        inside = self.routed is not None and key in self.routed.without_scale
        if (outside or inside) and abs(scale - 1) > UNIT_TOLERANCE:
            where = "a file's header or config" if outside else "alpha next to such tensors"
            error = None if others or isinstance(entry.algorithm, DoRA) else abs(1 / scale - 1) if scale else None
            return Verdict("differently", f"{title} reads no scale from {where}, and takes 1", error, "scale")
        return None
