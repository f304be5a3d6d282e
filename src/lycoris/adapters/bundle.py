"""Adapters without a model: which layer has which algorithm with which tensors, and what the file said besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from lycoris.adapters.load_report import Report
from lycoris.algorithms.base import Entry
from lycoris.layers.geometry import Geometry

__all__ = ["Base", "Bundle", "Entry"]


class Base(NamedTuple):
    """The model that adapters are for, as far as a file can tell of it: no weights.

    An `AdapterSet` reads it when it is made: later the model may be sharded, or merged into.
    """

    model: str
    """Name of its class."""
    layers: Mapping[str, Geometry]
    """Of all its layers, by dotted path."""
    signs: str = ""
    """Of its weights; see `lycoris.models.fingerprint`."""


@dataclass(frozen=True)
class Bundle:
    """What an adapter file holds, in the library's own terms.

    `lycoris.read` and `AdapterSet.bundle` return one, `lycoris.write` takes one. The tensors of `AdapterSet.bundle`
    share memory with the adapters unless the model is sharded: training goes on in them.
    """

    entries: dict[str, tuple[Entry, ...]]
    """Dotted module path → stack of algorithms, lowest first."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    base: Base | None = field(default=None, compare=False, repr=False)
    """The model, where it is known: names of fused layers depend on what else it has."""
    report: Report = field(default_factory=Report, compare=False)
    """What became of every tensor of the file that it was read from."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What reading the file brought up that is no error, such as keys for a component that was not given."""
        return tuple(self.report.notes())

    def with_remark(self, remark: str) -> Bundle:
        """Return a bundle with one more remark, which comes last among those of its report.

        This one stays as it is; both have the same tensors.
        """
        return replace(self, report=replace(self.report, remarks=(*self.report.remarks, remark)))

    def __str__(self) -> str:
        names = sorted({entry.algorithm.name for stack in self.entries.values() for entry in stack})
        return f"{len(self.entries)} layers of {', '.join(names)}"
