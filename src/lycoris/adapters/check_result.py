"""What a check of adapters on a model came to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lycoris.adapters.watching import list_some_paths

APART = 0.05
"""Share of the gradient from which on difference quotients say that it is wrong."""


@dataclass(frozen=True, kw_only=True)
class CheckedLayer:
    """One layer's adapters on one batch. Changes of the output are max|a - b| / max|a|.

    They are relative: 0.01 is a change by 1% of the largest value.
    """

    path: str
    calls: int
    """How often the layer was called; of a parameter, whether it was read."""
    gradient: float | None
    """Norm of the gradient of the adapters; None where none arrived."""
    trains: bool
    """Whether any of their parameters asks for a gradient."""
    effect: float
    """Change of the output between strength 0 and 1."""
    fresh: bool
    """Whether the adapters did nothing yet, and were nudged for `effect` and `difference`."""
    difference: float | None
    """Change of the output by merging the adapters; None where they cannot be merged."""
    remark: str = ""
    """Why they cannot."""

    def problem(self, tolerance: float) -> str:
        """Say what is wrong, with what to do; "" for nothing.

        The first of these that holds: not called, no gradient, no effect, merged unlike attached.

        Args:
            tolerance: Relative change of the output up to which merged and attached count as equal.
        """
        apart = self.difference is not None and self.difference > tolerance
        if not self.calls:
            return "its weight is read and it is not called: idle until merged" if apart else "not called in this batch"
        if self.trains and self.gradient is None:
            return "called, and no gradient arrives: something behind it has no derivative, or its output is not used"
        if self.effect == 0:
            return "called, and the output does not depend on it"
        return "merged, the model does something else: its weight is used elsewhere too" if apart else ""


@dataclass(frozen=True)
class Verification:
    """What `verify` found, layer by layer; prints as a table.

    A problem is not an error: nothing is raised for it. Look at `ok`, or at `problems` for what to do.
    """

    layers: tuple[CheckedLayer, ...]
    tolerance: float
    """Change of the output from which on merged and attached count as different."""
    noise: float
    """Change of the output between two equal passes."""
    gradient_error: float | None
    """Of the whole gradient against difference quotients in random directions, relative; None where that cannot be
    reported: after an error, and in half precision."""
    stopped: str
    """The error that ended the backward pass, or ""."""
    cuts: tuple[str, ...]
    """Modules whose output has no gradient for an input with one. Rotary embeddings are such by right."""

    @property
    def problems(self) -> Mapping[str, str]:
        """What is wrong, by layer path; under "" what concerns no single one. {} for nothing.

        Under "" is the error that ended the backward pass, or else a gradient that is more than `APART` off.
        """
        found = {layer.path: layer.problem(self.tolerance) for layer in self.layers}
        return {path: problem for path, problem in {**found, "": self._whole()}.items() if problem}

    @property
    def ok(self) -> bool:
        """Whether every adapter is called, gets a gradient that is right, acts, and merges to what it does.

        Not asked of an adapter: a gradient where none of its parameters trains, and a merge that its layer does not
        allow.
        """
        return not self.problems

    def _whole(self) -> str:
        if self.stopped:
            return self.stopped
        if self.gradient_error is not None and self.gradient_error > APART:
            share = f"gradients are {self.gradient_error:.0%} off what small steps show"
            where = f", perhaps in {list_some_paths(self.cuts)}" if self.cuts else ""
            return f"{share}: something between adapters and loss has no derivative{where}"
        return ""

    def __str__(self) -> str:
        head = ("layer", "calls", "gradient", "effect", "merged - attached", "")
        lines = [head, *(self._line(layer) for layer in self.layers)]
        widths = [max(len(line[at]) for line in lines) for at in range(len(head))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        notes = [f"problem: {problem}" for path, problem in self.problems.items() if not path]
        if any(layer.fresh for layer in self.layers):
            notes.append("*: does nothing yet; nudged for this check")
        if self.noise > 0:
            notes.append(f"two equal passes differ by {self.noise:.1e}")
        return "\n".join(line.rstrip() for line in [*table, *notes])

    def _line(self, layer: CheckedLayer) -> tuple[str, ...]:
        gradient = "none" if layer.gradient is None else f"{layer.gradient:.1e}"
        difference = "cannot" if layer.difference is None else f"{layer.difference:.1e}"
        effect = f"{layer.effect:.1e}{'*' if layer.fresh else ''}"
        problem = layer.problem(self.tolerance) or ("ok" if layer.difference is not None else "ok, attached")
        return layer.path, str(layer.calls), gradient if layer.trains else "frozen", effect, difference, problem


def relative(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Return max|a - b| / max|a| in float64, the largest over pairs of tensors.

    Infinite where numbers or shapes of the tensors differ, and where `a` is zero and `b` is not; 0 for no tensors.
    """
    if [x.shape for x in a] != [x.shape for x in b]:
        return float("inf")
    return max((_relative(x.double(), y.double()) for x, y in zip(a, b, strict=True) if x.numel()), default=0.0)


def _relative(a: Tensor, b: Tensor) -> float:
    difference, size = float((a - b).abs().max()), float(a.abs().max())
    return difference / size if size > 0 else float("inf") if difference > 0 else 0.0


def tensors_in(output: Any) -> list[Tensor]:
    """Return the floating-point tensors in what a module was given or returned, in order.

    Mappings, tuples, lists and dataclasses are looked into, at any depth; anything else holds none.
    """
    return list(_tensors(output))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)
    elif hasattr(output, "__dataclass_fields__"):
        for name in output.__dataclass_fields__:
            yield from _tensors(getattr(output, name))
