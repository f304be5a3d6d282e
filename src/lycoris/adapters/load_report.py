"""What reading a file came to: nothing that it held goes unsaid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SHOWN = 5
WIDEST = 120
"""Characters of a name that are shown: a file may have names of any length."""


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a file. `str` tells it in lines.

    Problems do not raise here: whoever reads the file decides by `clean`.
    """

    dialect: str = ""
    applied: Mapping[str, str] = field(default_factory=dict)
    """Layer → algorithm, with what had to be done to it."""
    unused: Mapping[str, str] = field(default_factory=dict)
    """Tensor → why it has no place."""
    mismatched: Mapping[str, str] = field(default_factory=dict)
    """Layer → why its tensors do not fit it, or which are missing."""
    elsewhere: Mapping[str, int] = field(default_factory=dict)
    """Component of a pipeline that was not asked for → how many tensors are for it."""
    changed: Mapping[str, str] = field(default_factory=dict)
    """Layer → what its algorithm had to become."""
    cast: Mapping[str, int] = field(default_factory=dict)
    """Precision in the file → tensors stored in it."""
    remarks: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """Whether everything for this component was used: nothing is `unused` or `mismatched`.

        Tensors for other components, changed algorithms and remarks do not count against it; see `notes`.
        """
        return not self.unused and not self.mismatched

    def notes(self) -> list[str]:
        """Return what is no error and yet worth knowing, a sentence each.

        First the tensors for other components, then what changed on layers, grouped by the change, then remarks.
        """
        lines = []
        if self.elsewhere:
            count = sum(self.elsewhere.values())
            names = ", ".join(name or "the denoiser" for name in sorted(self.elsewhere))
            lines.append(f"{count} tensors are for {names} and were left out")
        for what, count in Counter(self.changed.values()).items():
            first = next(layer for layer, change in self.changed.items() if change == what)
            lines.append(f"{first}{f' and {count - 1} more' if count > 1 else ''}: {what}")
        return [*lines, *self.remarks]

    def __str__(self) -> str:
        kinds = Counter(self.applied.values())
        lines = [f"{len(self.applied)} layers applied" + (f": {counts}" if (counts := _count_kinds(kinds)) else "")]
        if self.dialect:
            lines[0] += f" (format {self.dialect})"
        lines += [f"unused: {key}: {why}" for key, why in self.unused.items()]
        lines += [f"does not fit: {layer}: {why}" for layer, why in self.mismatched.items()]
        return "\n".join(lines + self.notes())


def _count_kinds(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def some(names: Iterable[str]) -> str:
    """Return the first few of many names as one text, with how many there are in all if that is more.

    At most `SHOWN` names, each cut to `WIDEST` characters.
    """
    names = list(names)
    shown = (name if len(name) <= WIDEST else f"{name[:WIDEST]}..." for name in names[:SHOWN])
    return ", ".join(shown) + (f", ... ({len(names)})" if len(names) > SHOWN else "")
