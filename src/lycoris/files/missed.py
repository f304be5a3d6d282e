"""Tensors that a program passes over for their names, though the layer is one that it knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lycoris.algorithms import ALPHA, MAGNITUDE
from lycoris.files.consumers import Consumer, Place, Verdict
from lycoris.report import some


def without_missed(
    verdict: Verdict, program: Consumer, key: str, names: Sequence[str], renamed: Mapping[str, str], place: Place
) -> Verdict:
    """The verdict on a layer when tensors are left out whose names in the file the program does not know.

    `key` is what the file calls the layer, `names` are those of its tensors as they are read, `renamed` those that the
    file has in another form, `place` is how the program's model holds the layer.
    """
    if program.takes is None or verdict.reads == "not at all":
        return verdict
    taken, missed = set(), []
    for name in (renamed.get(each, each) for each in names):
        own = name.removeprefix(f"{key}.")
        if own != name and program.takes(own, key, place):
            taken.add(own)
        else:
            missed.append(name)
    if not missed:
        return verdict
    if taken <= {ALPHA, MAGNITUDE}:
        return Verdict("not at all", f"{program.title} knows nothing called {some(missed)}", None, "anew")
    if verdict.reads == "differently":
        return verdict
    return Verdict("differently", f"{program.title} leaves out {some(missed)}: it knows no such name", None, "anew")
