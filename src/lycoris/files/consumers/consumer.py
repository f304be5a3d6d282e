"""What a consumer is: a program that reads adapter files, as a table of what it does with which adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, NamedTuple

from lycoris.algorithm import Affine
from lycoris.algorithms import DoRA, Replace, below_lengths
from lycoris.bundle import Bundle, Entry
from lycoris.files.consumers.keys import ALL, Keys, Known
from lycoris.geometry import Kind

Reads = Literal["as trained", "differently", "not at all"]
Remedy = Literal[
    "plain",
    "dense",
    "lora",
    "no core",
    "flat w2",
    "whole w1",
    "unlimited",
    "both norms",
    "both diffs",
    "joined",
    "anew",
    "scale",
]
"""Names of exports, which `lycoris.files.portable` makes."""


class Verdict(NamedTuple):
    """What a program makes of one layer's adapter, at strength 1."""

    reads: Reads
    why: str
    """In one sentence."""
    error: float | None = None
    """‖Δ' - Δ‖ / ‖Δ‖ of the changes to the weight, where the adapter's tensors alone determine it."""
    remedy: Remedy | None = None
    """The export that makes it right; None where none is needed, or none is known."""


class Case(NamedTuple):
    """A layer's adapter in a file, and what lies below it where that is known."""

    entry: Entry
    base: Affine | None = None
    beside: tuple[Entry, ...] = ()
    """What the file has for the layer besides."""
    dialect: str = ""
    architecture: str | None = None
    """None: not known."""
    key: str = ""
    """The layer as its keys call it, with what they begin with; "" not known."""
    stored: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    """The shapes of its tensors in the file, by their names in LyCORIS' files; none: as LyCORIS writes them."""

    @property
    def name(self) -> str:
        """Of the algorithm, under DoRA's lengths if it has them; a file of DyLoRA is one of LoRA."""
        algorithm = self.entry.algorithm
        name = below_lengths(algorithm).name
        return "lora" if name == "dylora" else name

    @property
    def dora(self) -> str:
        """The axis of DoRA's lengths; "" without them."""
        algorithm = self.entry.algorithm
        return algorithm.axis if isinstance(algorithm, DoRA) else ""

    @property
    def dimensions(self) -> int:
        """Of the kernel; 0 for everything but convolutions."""
        return len(self.entry.geometry.kernel) if self.entry.geometry.kind == "conv" else 0


Test = Callable[[Case], bool]


class Row(NamedTuple):
    """One line of a consumer's table: for which adapters it holds, and what comes of them."""

    when: Test
    reads: Reads
    why: str | Callable[[Case], str]
    remedy: Remedy | None = None
    error: Callable[[Case], float | None] | None = None


@dataclass(frozen=True)
class Consumer:
    """A program that reads adapter files."""

    name: str
    title: str
    """As it calls itself, with the version that was looked at where that matters."""
    keys: Keys
    """Dialects whose keys it knows, the one to write for it first → architecture → what of them."""
    rows: tuple[Row, ...]
    """The first that holds counts; where none does, it reads as trained."""
    kinds: tuple[Kind, ...] = ("linear", "conv", "norm")
    """Kinds of layers that it has adapters for."""
    transposes: bool = False
    """Whether it knows the linear layers of GPT-2, which keep their weight as (I, O)."""

    replaces: bool = False
    """Whether it knows weights that stand in place of a layer's own."""

    unmatched: int | None = None
    """More keys than these that it passes over, and it rejects the file; None: any number."""
    whole: Callable[[Bundle], str] | None = None
    """Why it does not take adapters together that it takes one by one; "" where it does."""

    def known(self, dialect: str, architecture: str | None) -> Known | None:
        """What it knows of the keys that a dialect has for an architecture; None: nothing."""
        there = self.keys.get(dialect, {})
        return there.get(architecture or ALL, there.get(ALL))

    def verdict(
        self,
        entry: Entry,
        base: Affine | None = None,
        *,
        beside: tuple[Entry, ...] = (),
        dialect: str | None = None,
        architecture: str | None = None,
        key: str = "",
        stored: Mapping[str, tuple[int, ...]] = MappingProxyType({}),
    ) -> Verdict:
        """What the program makes of an adapter. `base`, where it is at hand, settles what depends on it.

        `beside` is what the file has for the layer besides, `dialect` how it writes them (None: as is usual for the
        program), `key` what it calls the layer, `stored` the shapes of its tensors there by name.
        """
        g = entry.geometry
        if g.kind not in self.kinds:
            return Verdict("not at all", f"{self.title} has no adapters for a layer of kind {g.kind}")
        if g.transposed and not self.transposes:
            return Verdict("not at all", f"{self.title} knows no layers that keep their weight as (inputs, outputs)")
        if not self.replaces and any(isinstance(each.algorithm, Replace) for each in (entry, *beside)):
            return Verdict("not at all", f"{self.title} is not known to put whole weights in place of a layer's own")
        case = Case(entry, base, beside, dialect or next(iter(self.keys)), architecture, key, stored)
        for row in self.rows:
            if row.when(case):
                error = None if row.error is None else row.error(case)
                why = row.why if isinstance(row.why, str) else row.why(case)
                return Verdict(row.reads, f"{self.title} {why}", error, row.remedy)
        return Verdict("as trained", f"{self.title} computes what was trained")
