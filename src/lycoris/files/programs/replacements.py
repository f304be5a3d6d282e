"""What the rows of the tables ask of weights and biases that replace a layer's own."""

from __future__ import annotations

from lycoris.algorithms import Replace
from lycoris.files.programs.program import Case


def replaces_weight(case: Case) -> bool:
    """A weight in place of the layer's own, alone or beside others."""
    return any(isinstance(each.algorithm, Replace) and "w" in each.tensors for each in (case.entry, *case.extra))


def replaces_bias(case: Case) -> bool:
    """A bias in place of the layer's own, alone or beside others."""
    return any(isinstance(each.algorithm, Replace) and "b" in each.tensors for each in (case.entry, *case.extra))


def changes_replaced(case: Case) -> bool:
    """A change of a weight or a bias on top of one that replaces it."""
    replaced: set[str] = set()
    for each in (case.entry, *case.extra):
        if isinstance(each.algorithm, Replace):
            replaced |= each.tensors.keys()
        elif any(("b" if name == "diff_b" else "w") in replaced for name in each.tensors):
            return True
    return False


def replaces_only_bias(case: Case) -> bool:
    """Nothing but whole biases."""
    return not replaces_weight(case) and not case.extra


def has_only_biases(case: Case) -> bool:
    """Nothing but biases, whole or changes of them."""
    return all(each.tensors.keys() <= {"b", "diff_b"} for each in (case.entry, *case.extra))


def replaces(case: Case) -> bool:
    """A weight or bias in place of the layer's own, alone or beside another algorithm."""
    return any(isinstance(each.algorithm, Replace) for each in (case.entry, *case.extra))


def only_replaces(case: Case) -> bool:
    """Nothing but weights and biases in place of the layer's own, and changes of its bias."""
    return replaces(case) and not changes_weight(case)


def changes_weight(case: Case) -> bool:
    """A change of the weight that the layer has, or that stands in its place."""
    return any(
        not isinstance(each.algorithm, Replace) and not each.tensors.keys() <= {"diff_b"}
        for each in (case.entry, *case.extra)
    )
