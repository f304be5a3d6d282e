"""What the user should know, as values that interfaces show as they like."""

from __future__ import annotations

from typing import Literal

from typing_extensions import Self

RemarkKind = Literal["note", "unknown", "unmatched", "tied"]


class Remark(str):
    """Something that the user should know, as text with a kind.

    A `str`: it compares as its text, and what string methods make of it has no kind. Kinds are "unknown" for options,
    "unmatched" for targets that no layer matches, "tied" for layers that share a weight, and "note" for the rest.
    """

    kind: RemarkKind

    def __new__(cls, text: str, kind: RemarkKind = "note") -> Self:
        made = super().__new__(cls, text)
        made.kind = kind
        return made
