"""Conditions of program tables: combinations, and where and how a file stores the layer."""

from __future__ import annotations

import re

from lycoris.algorithms.tensors import ALPHA
from lycoris.files.dialects import DIALECTS
from lycoris.files.programs.program import Case, Condition


def all_of(*tests: Condition) -> Condition:
    """Make a condition that holds where all of these do.

    They are evaluated in order, up to the first that fails.
    """
    return lambda case: all(test(case) for test in tests)


def any_of(*tests: Condition) -> Condition:
    """Make a condition that holds where at least one of these does.

    They are evaluated in order, up to the first that holds.
    """
    return lambda case: any(test(case) for test in tests)


def not_(test: Condition) -> Condition:
    return lambda case: not test(case)


def is_for(*architectures: str) -> Condition:
    """Make a condition for layers of these architectures.

    It is false where the architecture is unknown.

    Args:
        architectures: names as in `lycoris.models.families`.
    """
    return lambda case: case.architecture in architectures


def is_written_as(*dialects: str) -> Condition:
    """Make a condition for files in these dialects."""
    return lambda case: case.dialect in dialects


def is_not_written_as(*dialects: str) -> Condition:
    """Make a condition for files in any other dialect."""
    return lambda case: case.dialect not in dialects


def has_own_names(case: Case) -> bool:
    """Return whether the layer's key is one of ComfyUI's own names.

    By its prefix; where the key is not known, by the dialect.
    """
    if case.key:
        return case.key.startswith("diffusion_model.")
    return case.dialect in ("comfyui", "onetrainer-comfy", "musubi-other")


def is_modeled_as(*models: str) -> Condition:
    """Make a condition for components that are taken to be one of these known models.

    It is false where no model is known.
    """
    return lambda case: case.model in models


def has_single_dot(case: Case) -> bool:
    """Return whether some tensor's name in the file has fewer than two dots.

    WebUI takes the last two steps of SD 3's names for the tensor's.
    """
    return any(f"{case.key}.{name}".count(".") < 2 for name in case.spelled or case.stored or (ALPHA,))


def has_no_key(case: Case) -> bool:
    """Return whether it is not known what the file calls the layer."""
    return not case.key


def is_not_behind(*prefixes: str) -> Condition:
    """Make a condition for layers whose keys have none of these prefixes.

    Does not hold where the key is not known.
    """
    return lambda case: bool(case.key) and not case.key.startswith(prefixes)


def is_named(pattern: str) -> Condition:
    """Make a condition for layers whose entire key matches a regular expression."""
    return lambda case: re.fullmatch(pattern, case.key) is not None


def is_dotted(case: Case) -> bool:
    """Return whether the dialect's paths have dots."""
    return DIALECTS[case.dialect].style == "dotted"


def lacks_base(case: Case) -> bool:
    """Return whether the verdict would depend on a base weight that was not given."""
    return case.base is None


def is_in_rows(case: Case) -> bool:
    """Return whether the program's model stores the layer as rows of a larger one, or with its halves swapped.

    False where nothing is known about the program's model.
    """
    return case.place in ("rows", "swapped")


def is_renamed(case: Case) -> bool:
    """Return whether the program's model has the layer under another name, in rows of another, or swapped.

    False where nothing is known about the program's model.
    """
    return bool(case.place)


def is_exchanged(case: Case) -> bool:
    """Return whether the program's model stores the layer with its two halves swapped."""
    return case.place == "swapped"
