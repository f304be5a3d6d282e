"""What to say of a file that was not read: what it has, what the model has, and what it may be instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from lycoris.adapters.load_report import SHOWN, Report, some
from lycoris.errors import FileError, nearest
from lycoris.files import foreign
from lycoris.files.detect import judge
from lycoris.files.layout import Layout

if TYPE_CHECKING:
    from lycoris.files.reading import Match


def nothing(match: Match, tensors: Mapping[str, Tensor]) -> str:
    others = sorted(name or "the denoiser" for name in match.elsewhere)
    if not others:
        known = foreign.kind_of(_shapes(tensors), readable=True)
        return known or f"its {len(tensors)} keys are not of the format {match.dialect.name}: {some(tensors)}"
    return (
        f"it has nothing for this component, only tensors for {', '.join(others)}; pass the model that they are "
        "for, and its name as component="
    )


def _looks(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """What a file's keys are like, when they are of a known family."""
    try:
        found = judge(_shapes(tensors), header)
    except FileError:
        return ""
    parts = [f"the {name or 'denoiser'} ({found.models[name]})" for name in found.components if name in found.models]
    if not parts:
        return ""
    return f"These look like {found.dialect} keys for {' and '.join(parts)}. "


def problem(
    report: Report, match: Match, layout: Layout, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> str:
    """What was left over, grouped."""
    lines = []
    if not match.used_names() and (known := foreign.kind_of(_shapes(tensors), readable=True)):
        return known
    if report.mismatched:
        listed = [f"  {why}" for why in list(report.mismatched.values())[:SHOWN]]
        more = [f"  and {len(report.mismatched) - SHOWN} more"] if len(report.mismatched) > SHOWN else []
        head = f"{len(report.mismatched)} of {len(match.groups)} layers do not fit {layout.owner}:"
        lines.append("\n".join([head, *listed, *more]))
    lost = sorted(layer for layer in match.groups if layer not in match.names)
    if lost:
        close = ((one, nearest(one, match.names, 1)) for one in lost[:SHOWN])
        hint = next((f"; {one} is like {near[0]}" for one, near in close if near), "")
        none = len(lost) == len(match.groups)
        what = "none of its" if none else f"{len(lost)} of its"
        lines.append(
            f"{what} {len(match.groups)} layers {'is' if none else 'are not'} a layer of {layout.owner}: "
            f"{some(lost)}{hint}. {layout.owner} has {len(match.names)} such layers: {some(sorted(match.names))}. "
            f"{_looks(tensors, header)}Is this the model the file was made for?"
        )
    if match.strange:
        count = sum(map(len, match.groups.values())) + len(match.strange) + sum(match.elsewhere.values())
        lines.append(
            f"{len(match.strange)} of its {count} keys are not of the format {match.dialect.name}: "
            f"{some(match.strange)}"
        )
    return "\n".join(lines)


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
