"""The tables of what other programs make of adapters, against those programs' rules: they may not disagree."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from torch import Tensor, nn

from cases import ALGORITHMS, LAYERS, PAIRS, LayerCase, One, adapt
from lycoris import OFT, GLoRA
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Entry
from lycoris.algorithms.conversion import adapt_affine, needs_base
from lycoris.algorithms.tensors import read_tensors, write_tensors
from lycoris.errors import FileError, PlanError
from lycoris.files.peft import write_peft
from lycoris.files.programs import PROGRAMS, Verdict
from lycoris.files.programs.portable import make_portable
from lycoris.layers.geometry import Affine, Geometry
from lycoris.layers.sites import ModelSites
from programs import Refused, comfyui, forge, invokeai, musubi, simpletuner, tuners, webui
from programs.answers import ANSWERS

SAME = 1e-5
READERS = {
    "comfyui": comfyui,
    "webui": webui,
    "forge": forge,
    "invokeai": invokeai,
    "simpletuner": simpletuner,
    "musubi": musubi,
}
SQUARE = [
    ("glora-square", "linear-one-vector"),
    ("glora-square", "conv2d-1x1-square"),
    ("glora-square", "conv2d-square"),
]
"""GLoRA of as many ranks as inputs and outputs, which some take for its first layout."""
MORE = {"glora-square": GLoRA(rank=8, alpha=4.0)}
MORE_LAYERS = {
    "conv2d-1x1-square": LayerCase(nn.Conv2d, (8, 8, 1), {}, (2, 8, 4, 4)),
    "conv2d-square": LayerCase(nn.Conv2d, (8, 8, 3), {"padding": 1}, (2, 8, 4, 4)),
}
ALL_PAIRS = [*PAIRS, *SQUARE]


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
    case = (LAYERS | MORE_LAYERS)[layer]
    model = One(case.layer()).eval()
    ((_, _, attribute, geometry),) = ModelSites(model).values()
    bare, x = copy.deepcopy(model.layer), case.input()
    weight = getattr(bare, attribute or "weight").detach()
    bias = None if attribute else getattr(bare, "bias", None)
    base = Affine(geometry.transpose_stored(weight), None if bias is None else bias.detach())
    with torch.no_grad():
        plain = model(x)
        ((entry,),) = adapt(model, (ALGORITHMS | MORE)[name]).bundle().entries.values()
        return Made(entry, base, bare, x, plain, model(x))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def change(after: Affine, before: Affine) -> Tensor:
    """Of weight and bias together."""
    weight = (after.weight - before.weight).flatten()
    if after.bias is None:
        return weight
    return torch.cat([weight, (after.bias if before.bias is None else after.bias - before.bias).flatten()])


OWN_NAMES = "comfyui"
"""The format by whose names Forge knows bare parameters, which the one that is usual for it has not."""


def formats(consumer: str, entry: Entry) -> list[str | None]:
    """Those that an adapter is judged in: the program's usual one, and another where it depends on the format."""
    return [None, OWN_NAMES] if consumer == "forge" and entry.geometry.kind == "parameter" else [None]


def out_of_reach(consumer: str, entry: Entry, dialect: str | None) -> str:
    """Why no export helps a program that knows other ways to read such a layer; "" where one does."""
    nameless = consumer == "forge" and entry.geometry.kind == "parameter" and dialect != OWN_NAMES
    return "knows bare parameters by their own names behind diffusion_model. only" if nameless else ""


def read_by(
    consumer: str, entry: Entry, base: Affine, strength: float = 1.0, dialect: str | None = None
) -> Affine | None:
    """What a program makes of a layer; None when it refuses or passes over."""
    if entry.geometry.transposed and entry.geometry.kind != "embedding":
        return None
    tensors = write_tensors(entry.algorithm, entry.tensors, entry.geometry)
    return read_as(consumer, tensors, base, entry.geometry.kind, strength, dialect)


def read_as(
    consumer: str,
    tensors: dict[str, Tensor],
    base: Affine,
    kind: str,
    strength: float = 1.0,
    dialect: str | None = None,
) -> Affine | None:
    """The same of tensors, whoever wrote them."""
    names = {"own_names": dialect == OWN_NAMES} if consumer == "forge" else {}
    try:
        found = READERS[consumer].read(tensors, base.weight, base.bias, kind, strength, **names)
    except Refused:
        return None
    return None if found is None else Affine(*found)


def check_told(verdict: Verdict, found: Affine | None, wanted: Affine, base: Affine, where: str) -> None:
    """That a verdict is what came of it."""
    if found is None:
        assert verdict.reads == "not at all", where
        return
    off = error(change(found, base), change(wanted, base))
    assert verdict.reads == ("as trained" if off <= SAME else "differently"), (where, off)
    assert verdict.error is None or verdict.error == pytest.approx(off, rel=0.1), where


def answers(pair: tuple[str, str]) -> set[tuple[str, ...]]:
    """Which rows of the tables hold for it, with the weight below it and without: programs and words, no figures."""
    case = made(*pair)
    found = set()
    for name, program in PROGRAMS.items():
        for verdict in (program.judge(case.entry, case.base), program.judge(case.entry)):
            found.add((name, verdict.reads, re.sub(r"[\d.e+-]*\d[\d.e+-]*", "#", verdict.why), str(verdict.remedy)))
    return found


@pytest.mark.slow
def test_the_named_pairs_get_every_answer() -> None:
    every = {pair: answers(pair) for pair in ALL_PAIRS}
    named = set().union(*(every[pair] for pair in ANSWERS))
    assert not {pair: found - named for pair, found in every.items() if found - named}


@pytest.mark.covers(ANSWERS)
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-on-".join)
def test_the_tables_say_what_the_programs_do(pair: tuple[str, str]) -> None:
    case = made(*pair)
    for consumer, dialect in ways(case):
        verdict = PROGRAMS[consumer].judge(case.entry, case.base, dialect=dialect)
        if verdict.reads == "not known":
            assert consumer == "forge"
            assert isinstance(case.entry.algorithm, OFT)
            assert case.entry.geometry.kind == "parameter"
            continue
        found = read_by(consumer, case.entry, case.base, dialect=dialect)
        check_told(verdict, found, adapt_affine(case.entry, case.base), case.base, consumer)


def ways(case: Made) -> list[tuple[str, str | None]]:
    return [(consumer, dialect) for consumer in READERS for dialect in formats(consumer, case.entry)]


@pytest.mark.each_value
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-on-".join)
def test_without_the_base_weight_they_say_no_more_than_they_know(pair: tuple[str, str]) -> None:
    case = made(*pair)
    for consumer in PROGRAMS.values():
        told, alone = consumer.judge(case.entry, case.base), consumer.judge(case.entry)
        assert alone.why.startswith(consumer.title)
        assert alone.remedy is None or alone.reads != "as trained"
        if alone != told:
            assert alone.reads in ("differently", "not known")
            assert told.reads == "as trained" or alone.reads == "not known"
            assert "depends on the base weight" in alone.why


@pytest.mark.each_value
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-on-".join)
def test_the_table_says_what_peft_does(pair: tuple[str, str], tmp_path: Path) -> None:
    """PEFT reads as trained exactly what is written for it."""
    case = made(*pair)
    verdict = PROGRAMS["peft"].judge(case.entry, case.base)
    try:
        found = written_for_peft(case.entry, case, tmp_path)
    except FileError:
        assert verdict.reads == "not at all"
        return
    assert verdict.reads == "as trained"
    assert error(found - case.plain, case.adapted - case.plain) <= SAME


@pytest.mark.each_value
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-on-".join)
def test_the_table_says_what_diffusers_does(pair: tuple[str, str]) -> None:
    case = made(*pair)
    verdict = PROGRAMS["diffusers"].judge(case.entry, case.base)
    try:
        found = diffusers_output(case.entry, case)
    except Refused:
        assert verdict.reads == "not at all"
        return
    off = error(found - case.plain, case.adapted - case.plain)
    assert verdict.reads == ("as trained" if off <= SAME else "differently"), off


def diffusers_output(entry: Entry, case: Made) -> Tensor:
    """What it makes of its own format, which holds LoRA."""
    tensors = write_tensors(entry.algorithm, entry.tensors, entry.geometry)
    if entry.geometry.kind not in ("linear", "conv") or entry.geometry.transposed:
        raise Refused(f"no {entry.geometry.kind}")
    if tensors.keys() - {"alpha", "dora_scale"} != tuners.LORA.keys():
        raise Refused(f"no {entry.algorithm.name}")
    return batched(case, lambda x: tuners.output(tensors, copy.deepcopy(case.layer), x))


def written_for_peft(entry: Entry, case: Made, folder: Path) -> Tensor:
    write_peft(Bundle({"layer": (entry,)}), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(One(copy.deepcopy(case.layer)), folder).double().eval()
    with torch.no_grad():
        return batched(case, model)


def batched(case: Made, run: Callable[[Tensor], Tensor]) -> Tensor:
    """PEFT's DoRA takes no single picture without a batch."""
    single = isinstance(case.layer, nn.Conv2d) and case.x.dim() == 3
    return run(case.x[None])[0] if single else run(case.x)


@pytest.mark.covers(ANSWERS)
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-on-".join)
def test_an_export_is_read_as_trained_or_refused_with_the_reason(pair: tuple[str, str]) -> None:
    case = made(*pair)
    expected = change(adapt_affine(case.entry, case.base), case.base)
    for consumer, dialect in ways(case):
        verdict = PROGRAMS[consumer].judge(case.entry, case.base, dialect=dialect)
        if verdict.reads == "as trained":
            continue
        if verdict.remedy is None or out_of_reach(consumer, case.entry, dialect):
            with pytest.raises(FileError, match=r"no export of .* is known that it reads as trained") as refusal:
                make_portable(case.entry, consumer, case.base, dialect=dialect)
            reason = verdict.why if verdict.remedy is None else out_of_reach(consumer, case.entry, dialect)
            assert reason in str(refusal.value)
            continue
        exported, what = make_portable(case.entry, consumer, case.base, dialect=dialect)
        assert what != "nothing"
        found = read_by(consumer, exported, case.base, dialect=dialect)
        assert found is not None, consumer
        got = change(found, case.base)
        assert error(got[: len(expected)], expected) <= SAME, consumer
        assert not got[len(expected) :].any(), "what was added for the program's sake says nothing"
        is_read_again(exported, case.entry.geometry)


@pytest.mark.each_value
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-on-".join)
def test_an_export_is_run_as_trained(pair: tuple[str, str], tmp_path: Path) -> None:
    case = made(*pair)
    runs = {
        "peft": lambda entry: written_for_peft(entry, case, tmp_path),
        "diffusers": lambda e: diffusers_output(e, case),
    }
    for consumer, run in runs.items():
        if PROGRAMS[consumer].judge(case.entry, case.base).remedy is None:
            continue
        exported, _ = make_portable(case.entry, consumer, case.base)
        assert error(run(exported) - case.plain, case.adapted - case.plain) <= SAME, consumer
        is_read_again(exported, case.entry.geometry)


@pytest.mark.each_value
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-on-".join)
def test_what_depends_on_the_weight_needs_it_and_nothing_else(pair: tuple[str, str]) -> None:
    case = made(*pair)
    for consumer in PROGRAMS:
        # As it is out of reach otherwise.
        dialect = formats(consumer, case.entry)[-1]
        verdict = PROGRAMS[consumer].judge(case.entry, dialect=dialect)
        if verdict.remedy is None:
            continue
        try:
            exported, _ = make_portable(case.entry, consumer, dialect=dialect)
        except PlanError:
            assert needs_base(case.entry)
        else:
            # Without the weight nothing is made of it but what another weight would make too.
            assert change_by(exported, case.base) == pytest.approx(change_by(case.entry, case.base), rel=1e-6)
            other = Affine(2 * case.base.weight.flip(0), case.base.bias)
            assert change_by(exported, other) == pytest.approx(change_by(case.entry, other), rel=1e-6)


def change_by(entry: Entry, base: Affine) -> list[float]:
    return (adapt_affine(entry, base).weight - base.weight).flatten().tolist()


BESIDE = [name for name in ALGORITHMS if (name, "linear") in PAIRS and not name.startswith(("full", "replace"))]


@pytest.mark.parametrize("name", BESIDE)
def test_a_change_of_the_bias_beside_another_algorithm(name: str) -> None:
    case = made(name, "linear")
    bias = made("full-bias", "linear").entry
    own, other = (write_tensors(e.algorithm, e.tensors, e.geometry) for e in (case.entry, bias))
    assert case.base.bias is not None
    wanted = adapt_affine(case.entry, case.base)
    wanted = Affine(wanted.weight, case.base.bias + bias.tensors["diff_b"])
    for consumer in READERS:
        verdict = PROGRAMS[consumer].judge(case.entry, case.base, beside=(bias,))
        found = read_as(consumer, own | other, case.base, "linear")
        # An algorithm that is passed over is told as such, though the bias beside it may be read.
        alone = found is not None and verdict.reads == "not at all"
        if not alone or error(change(found, case.base), change(wanted, case.base)) <= SAME:
            check_told(verdict, found, wanted, case.base, consumer)


def is_read_again(entry: Entry, geometry: Geometry) -> None:
    """By the library, for the layer as it is."""
    read_tensors(write_tensors(entry.algorithm, entry.tensors, entry.geometry), geometry, "layer")


def test_what_is_read_as_trained_stays_as_it_is() -> None:
    entry = made("lora", "linear").entry
    assert make_portable(entry, "comfyui") == (entry, "nothing")


def test_an_unknown_program() -> None:
    with pytest.raises(FileError, match=r"unknown program 'comfy'; did you mean 'comfyui'\?"):
        make_portable(made("lora", "linear").entry, "comfy")


def test_what_no_export_makes_right() -> None:
    with pytest.raises(FileError, match=r"musubi-tuner has no adapters for norms; no export of norm"):
        make_portable(made("norm", "layer-norm").entry, "musubi")


@pytest.mark.each_value
@pytest.mark.parametrize("pair", ALL_PAIRS, ids="-on-".join)
def test_they_say_what_strength_does_elsewhere(pair: tuple[str, str]) -> None:
    case = made(*pair)
    half = 0.5 * change(adapt_affine(case.entry, case.base), case.base)
    for consumer, dialect in ways(case):
        verdict = PROGRAMS[consumer].judge(case.entry, case.base, dialect=dialect)
        if verdict.reads == "as trained":
            found = read_by(consumer, case.entry, case.base, 0.5, dialect)
            assert found is not None
            told = "at strengths other than 1" in verdict.why
            assert told == (error(change(found, case.base), half) > SAME), consumer
