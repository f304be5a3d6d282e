"""The tables against the programs' rules: forms of adapters that this library reads and never writes, and exports of
what is beside an algorithm."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from test_programs import BESIDE, READERS, SAME, change, check_told, error, made, read_as
from torch import Tensor

from lycoris.algorithms.base import Entry
from lycoris.algorithms.conversion import adapt_affine
from lycoris.algorithms.tensors import read_tensors, write_tensors
from lycoris.errors import FileError
from lycoris.files.dialects import forms
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.portable import make_stack_portable
from lycoris.layers.geometry import Affine

Tensors = dict[str, Tensor]


def first_layout(p: Tensors) -> Tensors:
    swapped = {"a1": "a2", "a2": "a1", "b1": "b2", "b2": "b1"}
    turned = {f"{one}.weight": p[f"{other}.weight"] for one, other in swapped.items()}
    return {name: tensor for name, tensor in p.items() if name not in turned} | turned


def unscaled(p: Tensors) -> Tensors:
    return first_layout(p) | {"alpha": torch.tensor(float(p["a1.weight"].shape[1]))}


def called(p: Tensors) -> Tensors:
    """As ComfyUI calls the changes of a norm."""
    return {{"w_norm": "diff", "b_norm": "diff_b"}[name]: tensor for name, tensor in p.items()}


def without(name: str, made: Callable[[Tensors], Tensors] = dict) -> Callable[[Tensors], Tensors]:
    return lambda p: {key: tensor for key, tensor in made(p).items() if key != name}


def rotations(p: Tensors) -> Tensors:
    """As early LyCORIS stored them: R = (I + Q)(I - Q)⁻¹."""
    q, eye = p["oft_blocks"] - p["oft_blocks"].mT, torch.eye(p["oft_blocks"].shape[-1])
    return {"oft_diag": torch.linalg.solve(eye - q, eye + q, left=False)}


FORMS = {
    "rotations themselves": ("oft", "linear", rotations),
    "first layout of glora": ("glora", "linear", first_layout),
    "the same without a scale": ("glora", "linear", unscaled),
    "scale of a norm": ("norm", "layer-norm", without("b_norm")),
    "shift of a norm": ("norm", "layer-norm", without("w_norm")),
    "differences of a norm": ("norm", "layer-norm", called),
    "difference of its scale": ("norm", "layer-norm", without("diff_b", called)),
    "difference of its shift": ("norm", "layer-norm", without("diff", called)),
}


UNKNOWN = {"rotations themselves": {"webui"}}
"""Of which it is not known here what a program does."""


@pytest.mark.parametrize("name", FORMS)
def test_the_tables_say_what_becomes_of_other_forms(name: str) -> None:
    algorithm, layer, other = FORMS[name]
    case = made(algorithm, layer)
    entry = case.entry
    tensors = other(write_tensors(entry.algorithm, entry.tensors, entry.geometry))
    (group,) = forms.normalize_tensors(tensors, entry.geometry, "layer")
    read, p = read_tensors(group, entry.geometry, "layer")
    entry = Entry(read, entry.geometry, p)
    wanted = adapt_affine(entry, case.base)
    for consumer in READERS.keys() - UNKNOWN.get(name, set()):
        stored = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
        verdict = PROGRAMS[consumer].judge(entry, case.base, stored=stored)
        found = read_as(consumer, tensors, case.base, entry.geometry.kind)
        check_told(verdict, found, wanted, case.base, consumer)


@pytest.mark.parametrize("name", BESIDE)
def test_exports_of_an_algorithm_with_a_change_of_the_bias_beside_it(name: str) -> None:
    case = made(name, "linear")
    stack = (case.entry, made("full-bias", "linear").entry)
    assert case.base.bias is not None
    wanted = adapt_affine(case.entry, case.base)._replace(bias=case.base.bias + stack[1].tensors["diff_b"])
    for consumer, reader in READERS.items():
        if consumer == "musubi":
            with pytest.raises(FileError, match=r"no adapters that change a bias|ignores the change of the bias"):
                make_stack_portable(stack, consumer, case.base)
            continue
        exported, what = make_stack_portable(stack, consumer, case.base)
        assert (what == "nothing") == (exported == stack)
        tensors: Tensors = {}
        for entry in exported:
            tensors |= write_tensors(entry.algorithm, entry.tensors, entry.geometry)
        found = reader.read(tensors, case.base.weight, case.base.bias, "linear")
        assert found is not None, consumer
        assert error(change(Affine(*found), case.base), change(wanted, case.base)) <= SAME, consumer
