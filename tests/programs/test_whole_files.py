"""What is said of whole files, against what the programs made of them: recorded for some, run here for others.

The records are of InvokeAI's own loader and patcher and of Musubi Tuner's own merging, over the files of `whole`: for
each family and format, in the order of `picks`, null (there is no such file), "x" (the file is rejected), "=" (read as
trained), "~" (differently), "-" (not at all), or where layers differ, the number of an item in "layers", which says
which are which; the rest is as trained.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor

from lycoris.algorithms.conversion import adapt_affine
from lycoris.errors import FileError
from lycoris.files.opening import Opened, parse_opened
from lycoris.files.programs.check import ProgramCheck, check_opened
from lycoris.files.reading import resolve
from lycoris.files.writing import compose
from lycoris.layers.geometry import Affine
from programs.pipelines import PIPELINES
from whole import MODELS, bundle_of, model_of, picks

HERE = Path(__file__).parent
CODES: Mapping[str, str] = {"=": "as trained", "~": "differently", "-": "not at all"}
QUICK = ("flux1", "wan")


def records(program: str) -> Mapping[str, Any]:
    return json.loads((HERE / f"{program}_runs.json").read_text())


CASES = [
    pytest.param(program, family, dialect, id=f"{program}-{family}-{dialect}", marks=() if quick else pytest.mark.slow)
    for program in ("invokeai", "musubi")
    for family, dialects in records(program)["files"].items()
    for dialect in dialects
    for quick in [family in QUICK and dialect in ("diffusers", "kohya", "musubi", "musubi-other", "comfyui")]
]


def written(family: str, dialect: str, chosen: Any) -> tuple[Opened, dict[str, Tensor], dict[str, str]]:
    model, layout = model_of(family)
    made = compose(bundle_of(family, chosen), dialect, model=layout)
    tensors = dict(sorted(made.tensors.items()))
    return parse_opened(tensors, made.header, model), tensors, made.header


def said(found: ProgramCheck) -> dict[str, str]:
    return {layer: each.reads for layer, each in found.layers.items()}


def recorded(outcome: str | Mapping[str, list[str]], layers: list[str]) -> dict[str, str]:
    if isinstance(outcome, str):
        return dict.fromkeys(layers, CODES.get(outcome, "not at all"))
    kinds = {layer: CODES[code] for code, those in outcome.items() for layer in those}
    return {layer: kinds.get(layer, "as trained") for layer in layers}


@pytest.mark.sample(5)
@pytest.mark.parametrize(("program", "family", "dialect"), CASES)
def test_what_is_said_is_what_came_of_it(program: str, family: str, dialect: str) -> None:
    record = records(program)
    seen = 0
    for outcome, (label, chosen) in zip(record["files"][family][dialect], picks(family), strict=True):
        if outcome is None:
            continue
        found, _, _ = written(family, dialect, chosen)
        check = check_opened(found, program)
        told = record["layers"][outcome] if isinstance(outcome, int) else outcome
        assert said(check) == recorded(told, list(check.layers)), label
        assert outcome != "x" or check.keys, label
        seen += 1
    assert seen


REFUSES = (ValueError, KeyError, IndexError, RuntimeError, AssertionError)


def run_by_diffusers(family: str, path: Path) -> dict[str, Affine]:
    """Layer of diffusers → its weight and bias as a pipeline makes them of a file."""
    kind, model = getattr(diffusers, PIPELINES[family]), copy.deepcopy(model_of(family)[0])
    needed = (name for name, each in inspect.signature(kind).parameters.items() if each.default is each.empty)
    kind(**dict.fromkeys(needed) | {"transformer": model}).load_lora_weights(str(path), adapter_name="a")
    found: dict[str, Affine] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            base = layer.get_base_layer()
            found[name] = Affine(base.weight.detach(), None if base.bias is None else base.bias.detach())
    return found


@pytest.mark.sample(1)
@pytest.mark.filterwarnings("ignore:::diffusers", "ignore:::peft")
@pytest.mark.parametrize("dialect", ["diffusers", "onetrainer-diffusers"])
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in MODELS
        if "unet" not in name and hasattr(getattr(diffusers, PIPELINES[name]), "load_lora_weights")
    ],
)
def test_what_is_said_of_diffusers(family: str, dialect: str, tmp_path: Path) -> None:
    model, _ = model_of(family)
    for label, chosen in picks(family):
        try:
            found, tensors, header = written(family, dialect, chosen)
        except FileError:
            continue
        path = tmp_path / "a.safetensors"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata=header or None)
        try:
            after = run_by_diffusers(family, path)
        except REFUSES:
            after = {}
        check = check_opened(found, "diffusers")
        assert said(check) == {layer: outcome(model, found, layer, after) for layer in check.layers}, label


def outcome(model: Any, found: Opened, layer: str, after: Mapping[str, Affine]) -> str:
    own = model.get_submodule(layer)
    base = Affine(own.weight.detach(), None if getattr(own, "bias", None) is None else own.bias.detach())
    if layer not in after:
        return "not at all"
    wanted = [torch.zeros_like(base.weight), None if base.bias is None else torch.zeros_like(base.bias)]
    for entry in found.bundles[""].entries[layer]:
        made = adapt_affine(entry, base)
        wanted[0] = wanted[0] + made.weight - base.weight
        if base.bias is not None:
            wanted[1] = wanted[1] + made.bias - base.bias
    got = [after[layer].weight - base.weight, None if base.bias is None else after[layer].bias - base.bias]
    change, expected = (torch.cat([each.flatten() for each in pair if each is not None]) for pair in (got, wanted))
    if not change.any():
        return "not at all"
    return "as trained" if float((change - expected).norm() / expected.norm()) < 1e-4 else "differently"


def test_what_is_said_of_xlabs_processors(tmp_path: Path) -> None:
    """diffusers' pipeline takes any file with a processor in a name for XLabs'."""
    model, _ = model_of("flux1")
    torch.manual_seed(0)
    sizes = {
        "single_blocks.0.processor.qkv_lora": (96, 32),
        "single_blocks.0.processor.proj_lora": (32, 160),
        "double_blocks.0.processor.qkv_lora1": (96, 32),
        "double_blocks.0.processor.proj_lora2": (32, 32),
    }
    tensors = {}
    for name, (rows, columns) in sizes.items():
        tensors |= {f"{name}.up.weight": torch.randn(rows, 2), f"{name}.down.weight": torch.randn(2, columns)}
    save_file(tensors, tmp_path / "a.safetensors")
    after = run_by_diffusers("flux1", tmp_path / "a.safetensors")
    entries = resolve(tensors, model).entries
    assert after.keys() == entries.keys()
    for layer, (entry,) in entries.items():
        weight = model.get_submodule(layer).weight.detach()
        change = after[layer].weight - weight
        assert torch.allclose(change, adapt_affine(entry, Affine(weight, None)).weight - weight, atol=1e-4)
    assert set(said(check_opened(parse_opened(tensors, {}, model), "diffusers")).values()) == {"as trained"}
