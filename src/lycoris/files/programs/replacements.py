"""Conditions of program tables on weights and biases that replace a layer's own."""

from __future__ import annotations

from lycoris.algorithms import Replace
from lycoris.files.programs.program import Case


def replaces_weight(case: Case) -> bool:
    """Return whether a weight replaces the layer's own, alone or with other changes."""
    return any(isinstance(each.algorithm, Replace) and "w" in each.tensors for each in (case.entry, *case.extra))


def replaces_bias(case: Case) -> bool:
    """Return whether a bias replaces the layer's own, alone or with other changes."""
    return any(isinstance(each.algorithm, Replace) and "b" in each.tensors for each in (case.entry, *case.extra))


def changes_replaced(case: Case) -> bool:
    """Return whether a weight or bias is changed on top of one that replaces it.

    Entries of a layer are looked at in their order: a change before the replacement does not count.
    """
    replaced: set[str] = set()
    for each in (case.entry, *case.extra):
        if isinstance(each.algorithm, Replace):
            replaced |= each.tensors.keys()
        elif any(("b" if name == "diff_b" else "w") in replaced for name in each.tensors):
            return True
    return False


def replaces_only_bias(case: Case) -> bool:
    """Return whether the file replaces the layer's bias and changes nothing else.

    Ask it only of layers with a replacement.
    """
    return not replaces_weight(case) and not case.extra


def has_only_biases(case: Case) -> bool:
    """Return whether the file has nothing but biases for the layer, replaced or changed."""
    return all(each.tensors.keys() <= {"b", "diff_b"} for each in (case.entry, *case.extra))


def replaces(case: Case) -> bool:
    """Return whether a weight or bias replaces the layer's own, alone or with another algorithm."""
    return any(isinstance(each.algorithm, Replace) for each in (case.entry, *case.extra))


def only_replaces(case: Case) -> bool:
    """Return whether there are only replacements of weight and bias, and changes of the bias."""
    return replaces(case) and not changes_weight(case)


def changes_weight(case: Case) -> bool:
    """Return whether the weight is changed, be it the layer's own or one that replaces it."""
    return any(
        not isinstance(each.algorithm, Replace) and not each.tensors.keys() <= {"diff_b"}
        for each in (case.entry, *case.extra)
    )
