"""What is said of whole files for ComfyUI, against what its own reader made of them.

The record (`comfyui_runs.json`) is of its loader over the files of `whole.picks_everywhere`, with the names that its
own classes have: for each known model and format, "x" (the load fails), "=" (read as trained), "~" (differently), "-"
(not at all), or these of the layers in the order of their names, each with how many follow each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lycoris.files.opening import parse_opened
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.check import check_opened
from lycoris.files.writing import compose
from lycoris.models.families import ARCHITECTURES
from whole import bundle_of, model_of, picks_everywhere

RUNS: Mapping[str, Any] = json.loads((Path(__file__).parent / "comfyui_runs.json").read_text())["runs"]
READS: Mapping[str, str] = {"=": "as trained", "~": "differently", "-": "not at all", "x": "not at all"}
QUICK = {"flux.1-dev": ("diffusers", "kohya"), "krea-2": ("comfyui", "lycoris"), "wan2.1-i2v-14b": ("comfyui",)}
CASES = [
    pytest.param(
        model, dialect, id=f"{model}-{dialect}", marks=() if dialect in QUICK.get(model, ()) else pytest.mark.slow
    )
    for model, dialects in RUNS.items()
    for dialect in dialects
]


def recorded(outcome: str, layers: list[str]) -> dict[str, str]:
    found = [(code, int(count or len(layers))) for code, count in re.findall(r"([=~x-])(\d*)", outcome)]
    reads = [READS[code] for code, count in found for _ in range(count)]
    return dict(zip(sorted(layers), reads, strict=True))


@pytest.mark.sample(3)
@pytest.mark.parametrize(("name", "dialect"), CASES)
def test_what_is_said_is_what_came_of_it(name: str, dialect: str) -> None:
    model, layout = model_of(name)
    files = dict(picks_everywhere(name))
    outcomes = {label: outcome for outcome, labels in RUNS[name][dialect].items() for label in labels}
    assert outcomes
    for label, outcome in outcomes.items():
        made = compose(bundle_of(name, files[label]), dialect, model=layout)
        check = check_opened(parse_opened(dict(sorted(made.tensors.items())), made.header, model), "comfyui")
        said = {layer: "not at all" if check.unknown else each.reads for layer, each in check.layers.items()}
        assert said == recorded(outcome, [*check.layers]), label
        if outcome == "x":
            assert check.keys, label


def test_every_known_denoiser_was_run_or_is_not_in_comfyui() -> None:
    program = PROGRAMS["comfyui"]
    denoisers = {
        name
        for name, each in ARCHITECTURES.items()
        if each.outlines and name not in ("language-model", "clip", "clip-with-projection", "t5")
    }
    run = {layout.architecture.name for layout in (model_of(name)[1] for name in RUNS) if layout.architecture}
    # A small UNet of SD 2 is like one of SD 1.5, whose layers have the same names.
    assert run | program.missing_architectures | {"sd2-unet"} == denoisers
    assert not run & program.missing_architectures


@pytest.mark.parametrize("name", ["flux.3", "sana-1600m", "qwen-image-2.1", "framepack-i2v"])
def test_of_a_model_that_it_does_not_have_it_reads_nothing(name: str) -> None:
    model, layout = model_of(name)
    files = dict(picks_everywhere(name))
    made = compose(bundle_of(name, files["lora"]), "kohya-diffusers", model=layout)
    check = check_opened(parse_opened(made.tensors, made.header, model), "comfyui")
    assert {each.reads for each in check.layers.values()} == {"not at all"}
    assert "has no such model" in check.keys
    assert not check.remedies
