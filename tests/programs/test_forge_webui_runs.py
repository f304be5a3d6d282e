"""What is said of whole files, against what Forge's and the WebUI's own readers made of them.

Recorded over the files of `known_files`, at a 32nd of the models' widths: family → format → outcome → kinds of files.
An outcome is one letter for each layer, in order: "=" read as trained, "~" differently, "-" not at all; one letter for
all where they are alike.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from known_files import cases, file_of, layouts_of
from lycoris.files.opening import parse_opened
from lycoris.files.programs.check import ProgramCheck, check_opened

HERE = Path(__file__).parent
CODES: Mapping[str, str] = {"as trained": "=", "differently": "~", "not at all": "-"}
PROGRAMS = ("forge", "webui")
QUICK = (
    *(("forge", "flux1", "lycoris"), ("forge", "flux1", "comfyui"), ("forge", "chroma", "kohya")),
    *(("webui", "sd2", "kohya"), ("webui", "sd3", "diffusers"), ("webui", "sdxl", "kohya")),
)


@lru_cache(maxsize=4)
def records(program: str) -> Mapping[str, Any]:
    return json.loads((HERE / f"{program}_runs.json").read_text())


CASES = [
    pytest.param(*case, id="-".join(case), marks=() if case in QUICK else pytest.mark.slow)
    for program in PROGRAMS
    for family, dialects in records(program).items()
    for case in [(program, family, dialect) for dialect in dialects]
]


def said(found: ProgramCheck) -> str:
    rejected = any("rejects" in line for line in found.keys.splitlines())
    layers = sorted(found.layers, key=lambda name: _find_place(name, found))
    codes = "".join("-" if rejected or found.unknown else CODES.get(found.layers[name].reads, "?") for name in layers)
    return codes[0] if len(set(codes)) == 1 else codes


def _find_place(name: str, found: ProgramCheck) -> tuple[str, str]:
    """Component and layer."""
    own = next((each for each in found.detection.components if each and name.startswith(f"{each}.")), "")
    return own, name.removeprefix(f"{own}.") if own else name


@pytest.mark.sample(3)
@pytest.mark.parametrize(("program", "family", "dialect"), CASES)
def test_what_is_said_is_what_came_of_it(program: str, family: str, dialect: str) -> None:
    recorded = {label: code for code, labels in records(program)[family][dialect].items() for label in labels}
    layouts = layouts_of(family)
    looked_at = 0
    for label, chosen, change in cases(family):
        if label not in recorded:
            continue
        made = file_of(family, dialect, chosen, layouts)
        found = check_opened(parse_opened(change(dict(made.tensors)), made.header), program)
        assert said(found) == recorded[label], label
        looked_at += 1
    assert looked_at == len(recorded)


def test_the_records_have_every_kind_of_outcome() -> None:
    for program in PROGRAMS:
        outcomes = {
            each
            for family in records(program).values()
            for dialect in family.values()
            for code in dialect
            for each in code
        }
        assert outcomes == set(CODES.values())
