"""PEFT's folders as this library writes them: PEFT loads them and runs what they hold."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft_net import at, built, net, outputs, trained, worst
from torch import nn

from cases import ALGORITHMS, LAYERS, One, adapt, relative, serves
from lycoris import IA3, AdapterSet, DoRA, DyLoRA, Full, LoHa, LoKr, LoRA, Rule, plan
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Entry
from lycoris.errors import FileError
from lycoris.files.peft import encode_lora_metadata, encode_peft, read_peft, write_peft

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers", "ignore::UserWarning")

PADDED, BARE = {"conv2d-circular", "conv2d-reflect"}, {"parameter", "experts"}
DILATED, GROUPED = {"conv2d-same", "conv2d-stride"}, {"conv2d-groups", "conv2d-depthwise"}
LIKE_LYCORIS = PADDED | BARE | {"conv1d-transformers", "conv3d", "embedding"}
WITHOUT: dict[str, set[str]] = {
    "lora": PADDED | BARE | DILATED,
    "dylora": PADDED | BARE | DILATED,
    "dora": PADDED | BARE | DILATED | GROUPED,
    "loha": LIKE_LYCORIS,
    "lokr": LIKE_LYCORIS,
    "ia3": set(LAYERS) - {"linear-no-bias", "conv2d-rectangle"},
    "ia3-in": BARE | {"conv1d", "embedding"},
    "lokr-whole": LIKE_LYCORIS | {"conv1d"},
    "lokr-tucker": LIKE_LYCORIS | {"conv1d", "conv2d-groups"},
    "lokr-factor": LIKE_LYCORIS | {"conv1d", "conv2d-groups"},
    "lokr-full-matrix": LIKE_LYCORIS | {"conv1d", "conv2d-rectangle", "conv2d-same", "conv2d-unbatched"},
    "lokr-unbalanced": LIKE_LYCORIS
    | {"linear", "linear-one-vector", "conv2d-rectangle", "conv2d-1x1", "conv2d-same", "conv2d-unbatched"},
    "dora-lora-in": set(LAYERS),
}
"""Layers for which PEFT has no counterpart, by algorithm or, where it has no line of its own, by what its name begins
with. The sizes of some have no one `decompose_factor`."""
EXPORTS = [
    (name, layer)
    for name, algorithm in ALGORITHMS.items()
    if name.startswith(("lora", "loha", "lokr", "dylora", "dora-lora", "dora-dylora", "ia3"))
    for layer, case in LAYERS.items()
    if serves(One(case.layer()), algorithm)
]


def written(name: str) -> set[str]:
    return set(LAYERS) - WITHOUT.get(name, WITHOUT[name.partition("-")[0]] if name not in WITHOUT else set())


@pytest.mark.parametrize(("name", "layer"), EXPORTS)
def test_peft_loads_what_is_written(name: str, layer: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case, folder = LAYERS[layer], tmp_path / "adapter"
    model = One(case.layer()).eval()
    plain, x = copy.deepcopy(model), case.input()
    adapters = adapt(model, ALGORITHMS[name])
    if layer not in written(name):
        with pytest.raises(FileError, match="PEFT"):
            write_peft(adapters.bundle(), folder)
        assert not folder.exists()
        return
    if layer == "conv2d-unbatched":
        x = x[None]  # PEFT's DoRA fails on a single picture without a batch.
    write_peft(adapters.bundle(), folder)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder).double().eval()
    # LoHa's scale is rounded to float32 by PEFT; for DoRA see above.
    assert relative(loaded(x), model(x)) < (1e-6 if name.startswith(("dora", "loha")) else 1e-10)
    assert relative(plain(x), model(x)) > 1e-3
    AdapterSet.load(plain, read_peft(folder, plain)).attach()
    assert relative(plain(x), model(x)) < 1e-10


WHOLE: dict[str, list[Rule]] = {
    "lora": [
        Rule(LoRA(rank=5, alpha=1.0, rs_lora=True), path="inner.linear"),
        Rule(LoRA(rank=2, alpha=3.0, tucker=True), path="inner.conv2d"),
        Rule(DyLoRA(rank=4, block_size=2), path="inner.embedding", kind="*"),
        Rule(LoRA(rank=3), kind="*", path="inner.[bcptgw]*"),
    ],
    "bias": [
        Rule((LoRA(rank=2, alpha=3.0), Full(weight=False)), path="inner.linear"),
        Rule(LoRA(rank=3), path="inner.conv2d"),
    ],
    "dora": [Rule(DoRA(inner=LoRA(rank=3, alpha=1.0)), path="inner.[lbpc]*")],
    "loha": [
        Rule(LoHa(rank=2, alpha=1.0, tucker=True), path="inner.conv2d"),
        Rule(LoHa(rank=4), path="inner.[lb]*"),
    ],
    "lokr": [
        Rule(LoKr(rank=1, alpha=0.5, decompose_both=True), path="inner.linear"),
        Rule(LoKr(full_matrix=True), path="inner.conv2d"),
        Rule(LoKr(rank=2, alpha=3.0, tucker=True), path="inner.wide1d"),
        Rule(LoKr(rank=1, decompose_both=True), path="inner.pointwise"),
    ],
    "ia3": [
        Rule(IA3(on_input=True), path="inner.linear"),
        Rule(IA3(), path="inner.bare"),
        Rule(IA3(on_input=True), path="inner.[gt]*"),
    ],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", WHOLE)
def test_peft_loads_a_model_with_many_kinds(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adapters = built(WHOLE[name]).attach()
    model: Any = adapters.model
    write_peft(adapters.bundle(), tmp_path / "a", dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "a").double().eval()
    loose = dtype == torch.float32 or name == "dora"
    assert worst(outputs(loaded), outputs(model)) < (1e-6 if loose else 1e-10)
    again = net()
    AdapterSet.load(again, read_peft(tmp_path / "a", again)).attach()
    assert worst(outputs(again), outputs(model)) < (1e-6 if dtype == torch.float32 else 1e-10)


def nested(path: str) -> nn.Module:
    """A layer at a path, and another at one that ends with it."""
    torch.manual_seed(0)
    model = nn.ModuleDict()
    for each in (path, f"other.{path}"):
        at_: Any = model
        *steps, last = each.split(".")
        for step in steps:
            at_ = _child(at_, step)
        at_[last] = nn.Linear(4, 4)
    return model


def _child(model: nn.ModuleDict, step: str) -> nn.ModuleDict:
    if step not in model:
        model[step] = nn.ModuleDict()
    child = model[step]
    assert isinstance(child, nn.ModuleDict)
    return child


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("path", ["proj", "block.proj"])
def test_a_path_is_not_taken_for_the_end_of_others(path: str, known: bool, tmp_path: Path) -> None:
    model = nested(path)
    adapters = AdapterSet.build(model, plan(model, Rule(LoRA(rank=2), path=path)))
    write_peft(adapters.bundle(), tmp_path, model=model if known else None)
    loaded = peft.PeftModel.from_pretrained(nested(path), tmp_path)
    assert {key.split(".lora_")[0] for key in loaded.state_dict() if "lora_" in key} == {f"base_model.model.{path}"}


def test_paths_that_are_no_ends_are_listed() -> None:
    adapters = built([Rule(LoRA(rank=2), path="inner.[lb]*")])
    assert encode_peft(adapters.bundle())[1]["target_modules"] == ["inner.bare", "inner.linear"]


def test_ia3_tells_paths_apart_by_whole_steps(tmp_path: Path) -> None:
    def both() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "ba": nn.Linear(4, 4, bias=False)}).double()

    model: Any = both()
    adapters = built([Rule(IA3(on_input=True), path="a"), Rule(IA3(), path="ba")], model).attach()
    write_peft(adapters.bundle(), tmp_path)
    loaded, x = peft.PeftModel.from_pretrained(both(), tmp_path).double(), torch.randn(2, 4).double()
    for name in ("a", "ba"):
        assert relative(loaded.base_model.model[name](x), model[name](x)) < 1e-10
    again: Any = both()
    AdapterSet.load(again, read_peft(tmp_path, again)).attach()
    assert relative(again["ba"](x), model["ba"](x)) < 1e-10


def test_a_rotation_is_not_written(tmp_path: Path) -> None:
    adapters = built([Rule(ALGORITHMS["oft"], path="inner.[lb]*")])
    with pytest.raises(FileError, match=r"diag-oft: inner\.bare, inner\.linear\n.*lycoris\.files\.write"):
        write_peft(adapters.bundle(), tmp_path / "a")


def test_layers_of_two_kinds_are_not_written_together(tmp_path: Path) -> None:
    adapters = built([Rule(LoRA(), path="inner.linear"), Rule(LoHa(), path="inner.bare")])
    with pytest.raises(FileError, match=r"LORA: inner\.linear; LOHA: inner\.bare"):
        write_peft(adapters.bundle(), tmp_path / "a")


def test_lokr_names_the_layers_that_need_another_factor() -> None:
    rules = [Rule(LoKr(rank=1, factor=2), path="inner.[lb]*"), Rule(LoKr(rank=1), path="inner.wide1d")]
    with pytest.raises(FileError, match=r"2 of 3 fit, and not inner\.wide1d.*LoRA"):
        encode_peft(built(rules).bundle())


def test_a_folder_that_is_there_keeps_both_files_or_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (built([Rule(LoRA(rank=rank), path="inner.linear")]) for rank in (2, 3))
    write_peft(first.bundle(), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    replace = Path.replace

    def failing(self: Path, target: Path) -> Path:
        if Path(target).name == "adapter_config.json" and self.name == "adapter_config.json":
            raise OSError("full")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    with pytest.raises(OSError, match="full"):
        write_peft(second.bundle(), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    write_peft(second.bundle(), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3
    assert (tmp_path / "README.md").read_text() == "mine"
    assert not [path for path in tmp_path.parent.iterdir() if path.suffix == ".part"]


def test_ia3_of_pefts_goes_back_to_it(tmp_path: Path) -> None:
    """With the model: its biases tell that theirs are scaled too."""
    wrapped = trained(peft.IA3Config(target_modules=at("linear", "conv2d", "bare"), feedforward_modules=at("bare")))
    wrapped.save_pretrained(tmp_path / "a")
    bundle = read_peft(tmp_path / "a", net())
    with pytest.raises(FileError, match=r"a stack of ia3 and full: inner\.conv2d, inner\.linear"):
        write_peft(bundle, tmp_path / "b")
    write_peft(bundle, tmp_path / "b", model=net())
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "b").double().eval()
    assert worst(outputs(loaded), outputs(wrapped)) < 1e-10
    bundle.entries["inner.linear"][1].tensors["diff_b"] += 1
    with pytest.raises(FileError, match=r"a stack of ia3 and full: inner\.linear"):
        write_peft(bundle, tmp_path / "b", model=net())


def test_metadata_of_diffusers_is_for_lora_alone() -> None:
    lora, loha = (built([Rule(algorithm, path="inner.linear")]).bundle() for algorithm in (LoRA(rank=3), LoHa()))
    told = json.loads(encode_lora_metadata({"unet": lora, "text_encoder": lora}))
    assert told["unet.r"] == told["text_encoder.lora_alpha"] == 3
    with pytest.raises(FileError, match="unet: diffusers' pipelines read LoRA alone"):
        encode_lora_metadata({"unet": loha})
    with pytest.raises(FileError, match="no adapters to write"):
        encode_lora_metadata({"unet": Bundle({})})


def test_many_groups_are_refused_before_their_tensor_is_made() -> None:
    """A rank for each of 11,200 groups of a depthwise convolution is a tensor of gigabytes in PEFT's form."""
    model = One(nn.Conv2d(11200, 11200, 3, padding=1, groups=11200, device="meta"))
    entry = plan(model, Rule(LoRA(rank=2))).placements[0]
    tensors = {name: torch.zeros(slot.shape) for name, slot in entry.algorithms[0].slots(entry.geometry).items()}
    bundle = Bundle({"layer": (Entry(entry.algorithms[0], entry.geometry, tensors),)})
    with pytest.raises(FileError, match=r"11200 groups takes [\d,]+ bytes in PEFT's form"):
        encode_peft(bundle)
