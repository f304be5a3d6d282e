"""The tables of what other programs make of adapters, against those programs' rules: they may not disagree."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cases import ALGORITHMS, LAYERS, PAIRS, One, adapt
from consumers import Refused, comfyui, forge, invokeai, musubi, simpletuner, tuners, webui
from lycoris.algorithm import Affine
from lycoris.algorithms import read_tensors, write_tensors
from lycoris.bundle import Entry
from lycoris.errors import FileError, PlanError
from lycoris.files.consumers import CONSUMERS
from lycoris.files.portable import portable
from lycoris.geometry import Geometry, sites
from lycoris.recast import adapted, needs_base

SAME = 1e-5
READERS = {
    "comfyui": comfyui,
    "webui": webui,
    "forge": forge,
    "invokeai": invokeai,
    "simpletuner": simpletuner,
    "musubi": musubi,
}
THROUGH_PEFT = [pair for pair in PAIRS if pair[1] != "conv2d-unbatched"]
"""PEFT's DoRA takes batches only."""


class Made(NamedTuple):
    entry: Entry
    base: Affine
    layer: nn.Module
    """Without the adapter."""
    x: Tensor
    plain: Tensor
    adapted: Tensor
    """Outputs without and with the adapter."""


def made(name: str, layer: str) -> Made:
    case = LAYERS[layer]
    model = One(case.layer()).eval()
    ((_, _, attribute, geometry),) = sites(model)
    bare, x = copy.deepcopy(model.layer), case.input()
    weight = getattr(bare, attribute or "weight").detach()
    bias = None if attribute else getattr(bare, "bias", None)
    base = Affine(geometry.turned(weight), None if bias is None else bias.detach())
    with torch.no_grad():
        plain = model(x)
        ((entry,),) = adapt(model, ALGORITHMS[name]).bundle().entries.values()
        return Made(entry, base, bare, x, plain, model(x))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def change(after: Affine, before: Affine) -> Tensor:
    """Of weight and bias together."""
    weight = (after.weight - before.weight).flatten()
    if after.bias is None:
        return weight
    return torch.cat([weight, (after.bias if before.bias is None else after.bias - before.bias).flatten()])


def read_by(consumer: str, entry: Entry, base: Affine, strength: float = 1.0) -> Affine | None:
    """What a program makes of a layer; None when it refuses or passes over."""
    tensors = write_tensors(entry.algorithm, entry.tensors, entry.geometry)
    if entry.geometry.transposed:
        return None
    try:
        found = READERS[consumer].read(tensors, base.weight, base.bias, entry.geometry.kind, strength)
    except Refused:
        return None
    return None if found is None else Affine(*found)


@pytest.mark.parametrize("pair", PAIRS, ids="-on-".join)
def test_the_tables_say_what_the_programs_do(pair: tuple[str, str]) -> None:
    case = made(*pair)
    for consumer in READERS:
        verdict, found = CONSUMERS[consumer].verdict(case.entry, case.base), read_by(consumer, case.entry, case.base)
        if found is None:
            assert verdict.reads == "not at all", consumer
            continue
        off = error(change(found, case.base), change(adapted(case.entry, case.base), case.base))
        assert verdict.reads == ("as trained" if off <= SAME else "differently"), (consumer, off)
        assert verdict.error is None or verdict.error == pytest.approx(off, rel=0.1), consumer


@pytest.mark.parametrize("pair", PAIRS, ids="-on-".join)
def test_without_the_base_weight_they_say_no_more_than_they_know(pair: tuple[str, str]) -> None:
    case = made(*pair)
    for consumer in CONSUMERS.values():
        told, alone = consumer.verdict(case.entry, case.base), consumer.verdict(case.entry)
        assert alone.why.startswith(consumer.title)
        assert alone.remedy is None or alone.reads != "as trained"
        if alone != told:
            assert (alone.reads, told.reads) == ("differently", "as trained")
            assert "depends on the base weight" in alone.why


@pytest.mark.parametrize("pair", THROUGH_PEFT, ids="-on-".join)
def test_the_table_says_what_peft_does(pair: tuple[str, str]) -> None:
    case = made(*pair)
    verdict = CONSUMERS["peft"].verdict(case.entry, case.base)
    diffusers = CONSUMERS["diffusers"].verdict(case.entry, case.base)
    try:
        found = peft_output(case.entry, case)
    except Refused:
        assert verdict.reads == diffusers.reads == "not at all"
        return
    off = error(found - case.plain, case.adapted - case.plain)
    assert verdict.reads == ("as trained" if off <= SAME else "differently"), off
    assert diffusers.reads in (verdict.reads, "not at all"), "it runs what it reads through PEFT"


def peft_output(entry: Entry, case: Made) -> Tensor:
    if entry.geometry.kind not in ("linear", "conv"):
        raise Refused(f"no {entry.geometry.kind}")
    tensors = write_tensors(entry.algorithm, entry.tensors, entry.geometry)
    return tuners.output(tensors, copy.deepcopy(case.layer), case.x)


@pytest.mark.parametrize("pair", PAIRS, ids="-on-".join)
def test_an_export_is_read_as_trained(pair: tuple[str, str]) -> None:
    case = made(*pair)
    expected = change(adapted(case.entry, case.base), case.base)
    for consumer in READERS:
        if CONSUMERS[consumer].verdict(case.entry, case.base).remedy is None:
            continue
        exported, what = portable(case.entry, consumer, case.base)
        assert what != "nothing"
        found = read_by(consumer, exported, case.base)
        assert found is not None, consumer
        got = change(found, case.base)
        assert error(got[: len(expected)], expected) <= SAME, consumer
        assert not got[len(expected) :].any(), "what was added for the program's sake says nothing"
        is_read_again(exported, case.entry.geometry)


@pytest.mark.parametrize("pair", THROUGH_PEFT, ids="-on-".join)
def test_an_export_is_run_by_peft_as_trained(pair: tuple[str, str]) -> None:
    case = made(*pair)
    for consumer in ("peft", "diffusers"):
        if CONSUMERS[consumer].verdict(case.entry, case.base).remedy is None:
            continue
        exported, _ = portable(case.entry, consumer, case.base)
        assert error(peft_output(exported, case) - case.plain, case.adapted - case.plain) <= SAME, consumer
        is_read_again(exported, case.entry.geometry)


@pytest.mark.parametrize("pair", PAIRS, ids="-on-".join)
def test_only_what_depends_on_the_weight_needs_it(pair: tuple[str, str]) -> None:
    case = made(*pair)
    for consumer in CONSUMERS:
        if CONSUMERS[consumer].verdict(case.entry).remedy is None:
            continue
        try:
            portable(case.entry, consumer)
        except PlanError:
            assert needs_base(case.entry)


def is_read_again(entry: Entry, geometry: Geometry) -> None:
    """By the library, for the layer as it is."""
    read_tensors(write_tensors(entry.algorithm, entry.tensors, entry.geometry), geometry, "layer")


def test_what_is_read_as_trained_stays_as_it_is() -> None:
    entry = made("lora", "linear").entry
    assert portable(entry, "comfyui") == (entry, "nothing")


def test_an_unknown_program() -> None:
    with pytest.raises(FileError, match=r"unknown consumer 'comfy'; did you mean 'comfyui'\?"):
        portable(made("lora", "linear").entry, "comfy")


def test_what_no_export_makes_right() -> None:
    with pytest.raises(FileError, match=r"musubi-tuner has no adapters for a layer of kind norm; no export of norm"):
        portable(made("norm", "layer-norm").entry, "musubi")


@pytest.mark.parametrize("pair", PAIRS, ids="-on-".join)
def test_they_say_what_strength_does_elsewhere(pair: tuple[str, str]) -> None:
    case = made(*pair)
    half = 0.5 * change(adapted(case.entry, case.base), case.base)
    for consumer in READERS:
        verdict = CONSUMERS[consumer].verdict(case.entry, case.base)
        if verdict.reads == "as trained":
            found = read_by(consumer, case.entry, case.base, 0.5)
            assert found is not None
            told = "at another strength than 1" in verdict.why
            assert told == (error(change(found, case.base), half) > SAME), consumer
