"""`create_lycoris` and `create_lycoris_from_weights`, as documented and as trainers call them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from cases import relative
from lycoris import (
    ConfigError,
    FileError,
    LycorisNetwork,
    PlanError,
    create_lycoris,
    create_lycoris_from_weights,
)
from lycoris.files import write
from networks import MyModel, names, trained
from tiny import sdxl_unet


def test_documented_calls(model: MyModel) -> None:
    trainers = create_lycoris(model, 1.0, linear_dim=16, linear_alpha=2.0, algo="lokr")
    assert {a.algorithm.name for a in trainers.loras} == {"lokr"}
    assert {(a.algorithm.rank, a.algorithm.alpha) for a in trainers.loras} == {(16, 2.0)}
    friendly = create_lycoris(model, algorithm="loha", rank=16, alpha=32)
    assert {(a.algorithm.name, a.algorithm.rank, a.algorithm.alpha) for a in friendly.loras} == {("loha", 16, 32.0)}
    positional = create_lycoris(model, 0.5, 8, 4)
    assert (positional.multiplier, positional.loras[0].algorithm.rank) == (0.5, 8)
    with pytest.raises(ConfigError, match=r"contradict"):
        create_lycoris(model, algo="lora", algorithm="loha")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 3, "linear_dim": 16}, r"rank=3 and linear_dim=16 contradict"),
        ({"rank": 3, "linear_dim": 4}, r"rank=3 and linear_dim=4 contradict"),
        ({"alpha": 2, "linear_alpha": 1}, r"alpha=2 and linear_alpha=1 contradict"),
        ({"rank": 0}, r"rank must be at least 1"),
        ({"linear_dim": 0}, r"rank must be at least 1"),
    ],
)
def test_sizes_that_contradict_each_other_or_are_none(options: dict[str, Any], words: str, model: MyModel) -> None:
    with pytest.raises(ConfigError, match=words):
        create_lycoris(model, **options)


def test_sizes_given_twice_alike_and_by_default(model: MyModel) -> None:
    both = create_lycoris(model, rank=3, linear_dim=3, alpha=2, linear_alpha=2.0).loras[0].algorithm
    assert (both.rank, both.alpha) == (3, 2.0)
    plain = create_lycoris(model).loras[0].algorithm
    assert (plain.rank, plain.alpha) == (4, 1.0)


def test_layers_of_one_name_are_refused() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"b_c": nn.Linear(2, 2)}), "a_b": nn.ModuleDict({"c": nn.Linear(2, 2)})})
    with pytest.raises(ConfigError, match=r"a\.b_c and a_b\.c have the same name a_b_c.*exclude_name"):
        create_lycoris(model)


def test_unmatched_targets_are_warned_about_unless_told_otherwise(model: MyModel, caplog: Any) -> None:
    preset = {"target_module": ["Attention", "GELU"]}
    create_lycoris(model, apply_preset=preset, warn_on_unmatched=False)
    assert not caplog.records
    create_lycoris(model, apply_preset=preset)
    assert caplog.messages == ["'GELU' matches no layer of MyModel that adapters can serve"]


def test_options_for_a_file_are_known_or_warned_about(model: MyModel, tmp_path: Path, caplog: Any) -> None:
    trained(model, linear_dim=2).save_weights(tmp_path / "a.safetensors", None, {})
    whole = {"algo": "lora", "linear_dim": 2, "dropout": 0.1, "apply_preset": {"target_module": ["x"]}}
    create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", model, **whole)
    assert not caplog.records
    create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", model, None, linear_dims=2)
    assert "unknown option 'linear_dims'; did you mean 'linear_dim'" in caplog.text


def test_a_component_of_a_file_for_a_whole_pipeline(model: MyModel, x: Tensor, tmp_path: Path) -> None:
    network = trained(model, linear_dim=2)
    live, bundle = model(x), network.adapters.bundle()
    network.restore()
    write(bundle, tmp_path / "te.safetensors", "kohya", component="text_encoder")
    with pytest.raises(FileError, match=r"only tensors for text_encoder; pass the model .*component="):
        create_lycoris_from_weights(1.0, tmp_path / "te.safetensors", model)
    again, _ = create_lycoris_from_weights(1.0, tmp_path / "te.safetensors", model, component="text_encoder")
    again.double().apply_to()
    assert relative(model(x), live) < 1e-6
    again.save_weights(tmp_path / "own.safetensors", None, {})
    assert again.load_weights(tmp_path / "own.safetensors") == {}


DOCUMENTED: dict[str, dict[str, Any]] = {
    "lokr": {
        "algo": "lokr",
        "multiplier": 1.0,
        "linear_dim": 10000,
        "linear_alpha": 1,
        "factor": 10,
        "apply_preset": {
            "target_module": ["Attention", "FeedForward"],
            "module_algo_map": {"Attention": {"factor": 8}, "FeedForward": {"factor": 4}},
        },
    },
    "lokr-full-matrix": {
        "bypass_mode": True,
        "algo": "lokr",
        "multiplier": 1.0,
        "full_matrix": True,
        "linear_dim": 10000,
        "linear_alpha": 1,
        "factor": 4,
        "apply_preset": {"target_module": ["Attention"], "module_algo_map": {"Attention": {"factor": 2}}},
    },
    "tlora": {
        "algo": "tlora",
        "multiplier": 1.0,
        "linear_dim": 64,
        "linear_alpha": 32,
        "tlora_min_rank": 2,
        "apply_preset": {"target_module": ["Attention", "FeedForward"]},
    },
    "loha-with-factors": {
        "algo": "loha",
        "multiplier": 1.0,
        "linear_dim": 32,
        "linear_alpha": 16,
        "apply_preset": {
            "target_module": ["Attention", "FeedForward"],
            "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
        },
    },
}


@pytest.mark.parametrize("how", ["on the class", "as a keyword", "both"])
@pytest.mark.parametrize("name", DOCUMENTED)
def test_whole_json_objects_on_a_unet(name: str, how: str, caplog: Any) -> None:
    given = copy.deepcopy(DOCUMENTED[name])
    if how != "as a keyword":
        LycorisNetwork.apply_preset(given["apply_preset"])
    if how == "on the class":
        del given["apply_preset"]
    settings = [given.pop("multiplier"), given.pop("linear_dim"), given.pop("linear_alpha")]
    unet = sdxl_unet()
    network = create_lycoris(unet, *settings, **given)
    targets = DOCUMENTED[name]["apply_preset"]["target_module"]
    assert len(names(network)) == expected_layers(unet, targets)
    if name == "lokr":
        factors = {("ff" in path, stack[0].algorithm.factor) for path, stack in network.adapters.stacks.items()}
        assert factors == {(False, 8), (True, 4)}
    assert not caplog.records


def expected_layers(model: nn.Module, classes: list[str]) -> int:
    blocks = [m for m in model.modules() if type(m).__name__ in classes]
    return len({id(layer) for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear | nn.Conv2d)})


def test_a_preset_in_a_file_and_names_that_were_replaced(model: MyModel, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "mine.toml").write_text('enable_conv = false\ntarget_module = ["FeedForward"]\n')
    network = create_lycoris(model, preset=str(tmp_path / "mine.toml"), algo="locon", use_cp=False)
    assert names(network) == {"lycoris_blocks_1_net_0", "lycoris_blocks_1_net_2"}
    assert caplog.messages == ["use_cp is deprecated; use use_tucker"]
    with pytest.raises(ConfigError, match="neither a built-in preset nor a file"):
        create_lycoris(model, preset="nowhere.toml")
    for name, text in (("a.toml", "target_module = ["), ("b.toml", "a=" + "[" * 10**5), ("c.json", "[" * 10**5)):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=f"{name} is not a preset"):
            create_lycoris(model, preset=str(tmp_path / name))


def test_known_but_unused_options_are_reported_once(model: MyModel, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "LyCORIS")
    create_lycoris(model, 1.0, algo="lora", linear_dim=2, factor=8, constraint=False, block_size=4)
    assert sum("no factor" in text for text in caplog.messages) == 1
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_unknown_options_are_warned_about_with_the_nearest(model: MyModel, caplog: Any) -> None:
    network = create_lycoris(model, 1.0, algo="lokr", linear_dim=2, fulll_matrix=True)
    assert len(network.loras) == 7
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == 1
    assert "fulll_matrix" in warned[0]
    assert "did you mean 'full_matrix'" in warned[0]


def test_unknown_algorithms_and_classes_raise_with_the_nearest(model: MyModel) -> None:
    with pytest.raises(ConfigError, match=r"'lorka'.*did you mean '\w+'"):
        create_lycoris(model, 1.0, algo="lorka")
    with pytest.raises(PlanError, match=r"FeedForward"):
        create_lycoris(model, 1.0, apply_preset={"target_module": ["FeedForwards"]})
    with pytest.raises(ConfigError, match=r"dropout"):
        create_lycoris(model, 1.0, dropout=1.5)
