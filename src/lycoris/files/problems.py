"""Explain why a file was not read: what it contains, what the model has, and what the file may be for instead."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lycoris.adapters.load_report import SHOWN, Report, some
from lycoris.errors import FileError, nearest
from lycoris.files import foreign
from lycoris.files.container.storage import get_shapes
from lycoris.files.detect import judge
from lycoris.files.layout import NamedLayout
from lycoris.files.matching import Match


def explain_no_match(match: Match, tensors: Mapping[str, Tensor]) -> str:
    """Return the message for a file that has nothing for the requested component.

    Names the other components it has, or says what kind of file it is.
    """
    others = sorted(name or "the denoiser" for name in match.elsewhere)
    if not others:
        known = foreign.explain_kind(get_shapes(tensors), readable=True)
        return known or f"its {len(tensors)} keys are not of the format {match.dialect.name}: {some(tensors)}"
    return (
        f"it has nothing for this component, only tensors for {', '.join(others)}; pass the model that they are "
        "for, and its name as component="
    )


def _describe_looks(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """What a file's keys are like, when they are of a known family."""
    try:
        found = judge(get_shapes(tensors), header)
    except FileError:
        return ""
    parts = [f"the {name or 'denoiser'} ({found.models[name]})" for name in found.components if name in found.models]
    if not parts:
        return ""
    return f"These look like {found.dialect} keys for {' and '.join(parts)}. "


def explain_mismatch(
    report: Report, match: Match, layout: NamedLayout, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> str:
    """Return the message for tensors that match no layer or do not fit, grouped by reason.

    Each group shows a few examples, and the nearest names of the model for layers it does not have.
    """
    lines = []
    if not match.used_names() and (known := foreign.explain_kind(get_shapes(tensors), readable=True)):
        return known
    if report.mismatched:
        listed = [f"  {why}" for why in list(report.mismatched.values())[:SHOWN]]
        more = [f"  and {len(report.mismatched) - SHOWN} more"] if len(report.mismatched) > SHOWN else []
        head = f"{len(report.mismatched)} of {len(match.groups)} layers do not fit {layout.model_name}:"
        lines.append("\n".join([head, *listed, *more]))
    lost = sorted(layer for layer in match.groups if layer not in match.names)
    if lost:
        close = ((one, nearest(one, match.names, 1)) for one in lost[:SHOWN])
        hint = next((f"; {one} is like {near[0]}" for one, near in close if near), "")
        none = len(lost) == len(match.groups)
        what = "none of its" if none else f"{len(lost)} of its"
        lines.append(
            f"{what} {len(match.groups)} layers {'is' if none else 'are not'} a layer of {layout.model_name}: "
            f"{some(lost)}{hint}. {layout.model_name} has {len(match.names)} such layers: {some(sorted(match.names))}. "
            f"{_describe_looks(tensors, header)}Is this the model the file was made for?"
        )
    if match.strange:
        count = sum(map(len, match.groups.values())) + len(match.strange) + sum(match.elsewhere.values())
        lines.append(
            f"{len(match.strange)} of its {count} keys are not of the format {match.dialect.name}: "
            f"{some(match.strange)}"
        )
    return "\n".join(lines)
