"""What the rows of the tables ask of an adapter."""

from __future__ import annotations

import re

from lycoris.algorithms.tensors import ALPHA
from lycoris.files.dialects import DIALECTS
from lycoris.files.programs.program import Case, Condition


def all_of(*tests: Condition) -> Condition:
    return lambda case: all(test(case) for test in tests)


def any_of(*tests: Condition) -> Condition:
    return lambda case: any(test(case) for test in tests)


def not_(test: Condition) -> Condition:
    return lambda case: not test(case)


def is_for(*architectures: str) -> Condition:
    return lambda case: case.architecture in architectures


def is_written_as(*dialects: str) -> Condition:
    return lambda case: case.dialect in dialects


def is_not_written_as(*dialects: str) -> Condition:
    return lambda case: case.dialect not in dialects


def has_own_names(case: Case) -> bool:
    """Behind what ComfyUI's own names of layers stand behind."""
    if case.key:
        return case.key.startswith("diffusion_model.")
    return case.dialect in ("comfyui", "onetrainer-comfy", "musubi-other")


def is_modeled_as(*models: str) -> Condition:
    """Of a component that is taken to be such a model."""
    return lambda case: case.model in models


def has_single_dot(case: Case) -> bool:
    """With a tensor whose name in the file has one dot."""
    return any(f"{case.key}.{name}".count(".") < 2 for name in case.spelled or case.stored or (ALPHA,))


def has_no_key(case: Case) -> bool:
    """A layer of which it is not known what its keys call it."""
    return not case.key


def is_not_behind(*prefixes: str) -> Condition:
    """A layer whose keys begin otherwise."""
    return lambda case: bool(case.key) and not case.key.startswith(prefixes)


def is_named(pattern: str) -> Condition:
    """A layer whose keys are called so."""
    return lambda case: re.fullmatch(pattern, case.key) is not None


def is_dotted(case: Case) -> bool:
    """In a dialect whose paths have dots."""
    return DIALECTS[case.dialect].style == "dotted"


def lacks_base(case: Case) -> bool:
    """With a base weight that is not at hand."""
    return case.base is None


def is_in_rows(case: Case) -> bool:
    """A layer that the program's model holds as rows of a larger one, or with its halves exchanged."""
    return case.place in ("rows", "swapped")


def is_renamed(case: Case) -> bool:
    """A layer that the program's model calls otherwise."""
    return bool(case.place)


def is_exchanged(case: Case) -> bool:
    """A layer whose halves the program exchanges."""
    return case.place == "swapped"
