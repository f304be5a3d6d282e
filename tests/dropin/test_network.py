"""`LycorisNetwork` and the two functions that make it, as documented and as trainers call them."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import perturb, relative
from lycoris import (
    ConfigError,
    FileError,
    LycorisNetwork,
    PlanError,
    RankSchedule,
    create_lycoris,
    create_lycoris_from_weights,
)
from lycoris.files import load_tensors, write
from tiny import sdxl_unet

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon", "use_tucker": True},
    "lora-scalar": {"algo": "lora", "use_scalar": True},
    "lora-rs": {"algo": "lora", "rs_lora": True},
    "lora-dora": {"algo": "lora", "dora_wd": True},
    "lora-dora-in": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha-scalar": {"algo": "loha", "use_scalar": True},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr-whole": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "full_matrix": True},
    "lokr-both": {"algo": "lokr", "linear_dim": 1, "decompose_both": True},
    "lokr-scalar": {"algo": "lokr", "use_scalar": True},
    "tlora": {"algo": "tlora"},
    "tlora-last": {"algo": "tlora", "sig_type": "last"},
    "full": {"algo": "full"},
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out(self.to_q(x).tanh())


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MyModel(nn.Module):
    """A convolution, a 1x1 convolution, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.skip = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.blocks = nn.ModuleList([Attention(), FeedForward()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(self.conv_in(x).sigmoid()).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.fixture
def model() -> MyModel:
    return MyModel().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64)


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"linear_dim": 2, "linear_alpha": 3.0} | CONFIGS[request.param]


def trained(model: nn.Module, multiplier: float = 1.0, **config: Any) -> LycorisNetwork:
    """An applied network with random tensors, in the model's precision."""
    network = create_lycoris(model, multiplier, **config).to(next(model.parameters()).dtype)
    perturb(network.adapters, 0.2)
    network.apply_to()
    return network


def names(network: LycorisNetwork) -> set[str]:
    return {key.split(".")[0] for key in network.state_dict()}


# -- life of a network -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_network_changes_nothing_and_multiplier_zero_is_the_base(config: Any, dtype: torch.dtype) -> None:
    model, x = MyModel().to(dtype), torch.randn(2, 3, 4, 4, dtype=dtype)
    base = model(x)
    network = create_lycoris(model, 1.0, **config)
    network.apply_to()
    assert torch.equal(model(x), base)
    perturb(network.adapters)
    assert relative(model(x), base) > 1e-3
    network.set_multiplier(0.0)
    assert torch.equal(model(x), base)
    network.set_multiplier(1.0)
    assert not torch.equal(model(x), base)


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@pytest.mark.parametrize("multiplier", [1.0, 0.6, -0.5])
def test_live_merged_and_reloaded_are_one(
    config: Any, multiplier: float, model: MyModel, x: Tensor, tmp_path: Path
) -> None:
    base, weight = model(x), model.head.weight
    network = trained(model, multiplier, **config)
    live = model(x)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.merge_to()
    assert relative(model(x), live) < 1e-10
    network.restore()
    assert torch.equal(model(x), base)
    assert model.head.weight is weight
    assert type(model.head) is nn.Linear

    again, tensors = create_lycoris_from_weights(multiplier, tmp_path / "a.safetensors", model)
    assert set(tensors) == set(network.state_dict())
    again.double().apply_to()
    # Gates fold and alpha is a float32 in the file.
    assert relative(model(x), live) < 1e-6
    again.restore()
    create_lycoris_from_weights(multiplier, None, model, weights_sd=tensors)[0].double().merge_to()
    assert relative(model(x), live) < 1e-6


def test_merge_weight_multiplies_the_multiplier(model: MyModel, x: Tensor) -> None:
    network = trained(model, 0.5, linear_dim=2)
    network.set_multiplier(0.2)
    live = model(x)
    network.set_multiplier(0.5)
    network.merge_to(0.4)
    assert relative(model(x), live) < 1e-10
    assert relative(model(x), MyModel().double()(x)) > 1e-3


def test_applying_twice_and_restoring_twice_are_harmless(config: Any, model: MyModel, x: Tensor) -> None:
    base = model(x)
    network = trained(model, **config)
    once = model(x)
    network.apply_to()
    assert torch.equal(model(x), once)
    network.restore()
    network.restore()
    assert torch.equal(model(x), base)
    network.apply_to()
    assert torch.equal(model(x), once)


def test_networks_stack_and_come_off_in_any_order(model: MyModel, x: Tensor) -> None:
    base = model(x)
    first = trained(model, linear_dim=2)
    alone = model(x)
    second = trained(model, linear_dim=2, algo="lokr")
    assert relative(model(x), alone) > 1e-3
    second.restore()
    assert torch.equal(model(x), alone)
    second.apply_to()
    first.restore()
    second.restore()
    assert torch.equal(model(x), base)


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
def test_load_weights_is_empty_on_a_clean_round_trip(config: Any, model: MyModel, x: Tensor, tmp_path: Path) -> None:
    network = trained(model, **config)
    live, path = model(x), tmp_path / "pytorch_lora_weights.safetensors"
    network.save_weights(path, torch.float64, {"lycoris_config": json.dumps(config)})
    perturb(network.adapters)
    assert relative(model(x), live) > 1e-3
    assert network.load_weights(path) == {}
    assert relative(model(x), live) < 1e-10


def test_load_weights_names_what_is_missing_and_unexpected(model: MyModel, tmp_path: Path) -> None:
    small = trained(model, linear_dim=2, apply_preset={"target_name": ["head"], "target_module": []})
    small.save_weights(tmp_path / "small.safetensors", None, {})
    small.restore()
    whole = trained(model, linear_dim=2)
    whole.save_weights(tmp_path / "whole.safetensors", None, {})
    assert set(whole.load_weights(tmp_path / "small.safetensors")) == {"missing keys"}
    found = small.load_weights(tmp_path / "whole.safetensors")
    assert set(found) == {"unexpected keys"}
    assert "lycoris_conv_in.alpha" in found["unexpected keys"]


def test_load_weights_refuses_another_rank_and_changes_nothing(model: MyModel, x: Tensor, tmp_path: Path) -> None:
    network = trained(model, linear_dim=2)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.restore()
    other = trained(model, linear_dim=3)
    live = model(x)
    with pytest.raises(FileError, match=r"rank=2.*rank=3"):
        other.load_weights(tmp_path / "a.safetensors")
    assert torch.equal(model(x), live)


@pytest.mark.parametrize(("alpha", "fits"), [(3.0, True), (2.99, True), (2.5, False), (6.0, False)])
def test_load_weights_refuses_another_alpha_but_not_a_rounded_one(
    alpha: float, fits: bool, model: MyModel, tmp_path: Path
) -> None:
    trained(model, linear_dim=2, linear_alpha=3.0).save_weights(tmp_path / "a.safetensors", None, {})
    other = create_lycoris(MyModel(), 1.0, linear_dim=2, linear_alpha=alpha)
    if fits:
        assert other.load_weights(tmp_path / "a.safetensors") == {}
    else:
        with pytest.raises(FileError, match=rf"a\.safetensors.*alpha=3\.0.*alpha={alpha}"):
            other.load_weights(tmp_path / "a.safetensors")


def test_state_dict_copies_and_loads(config: Any, model: MyModel, x: Tensor) -> None:
    network = trained(model, **config)
    live, state = model(x), copy.deepcopy(network.state_dict())
    assert not any(tensor.requires_grad for tensor in state.values())
    perturb(network.adapters)
    missing, unexpected = network.load_state_dict(state)
    assert (missing, unexpected) == ([], [])
    assert relative(model(x), live) < 1e-6
    with pytest.raises(FileError, match=r"lycoris_head"):
        network.load_state_dict({key: value for key, value in state.items() if "head" not in key})


def test_parameters_are_the_same_objects_in_the_same_order(config: Any, model: MyModel) -> None:
    network = create_lycoris(model, 1.0, **config)
    before = list(network.parameters())
    assert before
    network.apply_to()
    network.set_multiplier(0.5)
    network.to(torch.float32)
    after = list(network.parameters())
    assert all(a is b for a, b in zip(before, after, strict=True))
    groups = network.prepare_optimizer_params(lr=1e-4)
    assert groups[0]["lr"] == 1e-4
    assert all(a is b for a, b in zip(before, groups[0]["params"], strict=True))
    assert not any(p is base for p in before for base in model.head.parameters(recurse=False))


def test_only_the_adapters_are_trained_by_their_parameters(config: Any, model: MyModel, x: Tensor) -> None:
    model.requires_grad_(False)
    network = trained(model, **config)
    model(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_metadata_reaches_the_header_and_dtype_the_tensors(model: MyModel, tmp_path: Path) -> None:
    network = trained(model, linear_dim=2, linear_alpha=0.3)
    network.save_weights(tmp_path / "a.safetensors", torch.float16, {"lycoris_config": "{}", "global_step": "10"})
    tensors, metadata = load_tensors(tmp_path / "a.safetensors")
    assert metadata["lycoris_config"] == "{}"
    assert metadata["global_step"] == "10"
    assert tensors["lycoris_head.lora_up.weight"].dtype == torch.float16
    assert float(tensors["lycoris_head.alpha"]) == pytest.approx(0.3, abs=1e-7)
    with pytest.raises(FileError, match=r"safetensors"):
        network.save_weights(tmp_path / "a.pt", None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def header(model: nn.Module, path: Path, config: str) -> Path:
    create_lycoris(model, 1.0, linear_dim=2, algo="tlora").save_weights(path, None, {"lycoris_config": config})
    return path


def test_a_header_gives_the_schedule_and_outranks_options(model: MyModel, tmp_path: Path) -> None:
    config = {"algo": "tlora", "linear_dim": 2, "tlora_alpha": 2.0, "dropout": 0.1, "no_such": 1, "apply_preset": {}}
    path = header(model, tmp_path / "a.safetensors", json.dumps(config))
    options = {"algo": "tlora", "linear_dim": 2, "tlora_alpha": 3.0}
    network, tensors = create_lycoris_from_weights(1.0, path, model, None, **options)
    assert network.adapters.schedule == RankSchedule(max_rank=2, alpha=2.0)
    network, _ = create_lycoris_from_weights(1.0, None, model, weights_sd=tensors, **options)
    assert network.adapters.schedule == RankSchedule(max_rank=2, alpha=3.0)


def test_a_header_that_is_no_json_is_reported(model: MyModel, tmp_path: Path, caplog: Any) -> None:
    path = header(model, tmp_path / "a.safetensors", "{'algo': 'tlora'}")
    caplog.clear()
    network, _ = create_lycoris_from_weights(1.0, path, model)
    assert network.adapters.schedule is None
    assert [text for text in caplog.messages if "not JSON" in text and "{'algo'" in text]


# -- making it -------------------------------------------------------------------------------------------------------


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
    with pytest.raises(ConfigError, match=r"a\.b_c and a_b\.c are both called a_b_c.*exclude_name"):
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
    create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", MyModel(), **whole)
    assert not caplog.records
    create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", MyModel(), None, linear_dims=2)
    assert "unknown option 'linear_dims'; did you mean 'linear_dim'" in caplog.text


def test_a_component_of_a_file_for_a_whole_pipeline(model: MyModel, x: Tensor, tmp_path: Path) -> None:
    network = trained(model, linear_dim=2)
    live, bundle = model(x), network.adapters.bundle()
    network.restore()
    write(bundle, tmp_path / "te.safetensors", "kohya", component="text_encoder")
    with pytest.raises(FileError, match=r"text_encoder; pass it as component="):
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


# -- presets ---------------------------------------------------------------------------------------------------------


def test_a_preset_counts_for_later_networks_and_is_frozen_into_each(model: MyModel) -> None:
    before = create_lycoris(model, 1.0, linear_dim=2)
    assert LycorisNetwork.apply_preset({"target_module": ["Attention"]}) is LycorisNetwork
    during = create_lycoris(model, 1.0, linear_dim=2)
    LycorisNetwork.apply_preset({"target_module": ["FeedForward"], "lora_prefix": "mine"})
    after = create_lycoris(model, 1.0, linear_dim=2)
    assert len(names(before)) == 7
    assert names(during) == {"lycoris_blocks_0_to_q", "lycoris_blocks_0_to_out"}
    assert names(after) == {"mine_blocks_1_net_0", "mine_blocks_1_net_2"}


def test_the_class_outranks_an_apply_preset_that_is_handed_over(model: MyModel, caplog: Any) -> None:
    """Trainers change the preset before they apply it, and still hand the config over as it was."""
    LycorisNetwork.apply_preset({"target_module": ["Attention"]})
    network = create_lycoris(model, 1.0, apply_preset={"target_module": ["FeedForward"]})
    assert names(network) == {"lycoris_blocks_0_to_q", "lycoris_blocks_0_to_out"}
    assert [text for text in caplog.messages if "the class's is used" in text]


def test_a_prefix_of_ones_own_goes_through_files(model: MyModel, x: Tensor, tmp_path: Path) -> None:
    LycorisNetwork.apply_preset({"lora_prefix": "mine"})
    network = trained(model, linear_dim=2)
    live = model(x)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    assert network.load_weights(tmp_path / "a.safetensors") == {}
    network.restore()
    again, _ = create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", model)
    again.double().apply_to()
    assert relative(model(x), live) < 1e-6


def test_a_file_with_the_usual_prefix_loads_whatever_the_preset(model: MyModel, tmp_path: Path) -> None:
    trained(model, linear_dim=2).save_weights(tmp_path / "a.safetensors", None, {})
    LycorisNetwork.apply_preset({"lora_prefix": "mine", "target_module": ["Attention"]})
    again, _ = create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", MyModel())
    assert len(again.loras) == 7


def test_keys_that_are_given_are_replaced_and_the_others_stay() -> None:
    LycorisNetwork.apply_preset({"target_module": ["Attention"], "exclude_name": ["blocks.0.to_q"]})
    LycorisNetwork.apply_preset({"exclude_name": []})
    assert names(create_lycoris(MyModel(), 1.0)) == {"lycoris_blocks_0_to_q", "lycoris_blocks_0_to_out"}


def test_unknown_preset_key_is_a_key_error_naming_the_nearest() -> None:
    with pytest.raises(KeyError, match=r"'target_modules'.*did you mean 'target_module'") as caught:
        LycorisNetwork.apply_preset({"target_modules": ["Attention"]})
    assert isinstance(caught.value, ConfigError)
    assert LycorisNetwork._preset is None
    with pytest.raises(ConfigError, match=r"target_module.*list"):
        LycorisNetwork.apply_preset({"target_module": "Attention"})


def test_the_root_class_as_target(model: MyModel, x: Tensor) -> None:
    network = trained(model, linear_dim=2, apply_preset={"target_module": ["MyModel"]})
    assert len(names(network)) == 7
    assert not [name for name in names(network) if "__" in name]
    assert "lycoris_blocks_0_to_q" in names(network)


def test_a_bare_layer_as_the_model(tmp_path: Path) -> None:
    layer, x = nn.Linear(6, 4).double(), torch.randn(2, 6, dtype=torch.float64)
    network = trained(layer, linear_dim=2)
    live = layer(x)
    network.save_weights(tmp_path / "a.safetensors", None, {})
    network.restore()
    create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", layer)[0].double().apply_to()
    assert relative(layer(x), live) < 1e-6


def test_names_inside_a_targeted_block_count(model: MyModel) -> None:
    preset = {"target_module": ["Attention"], "name_algo_map": {"blocks.0.to_q": {"algo": "lokr", "factor": 2}}}
    network = create_lycoris(model, 1.0, linear_dim=2, apply_preset=preset)
    assert [adapter.algorithm.name for adapter in network.loras] == ["lokr", "lora"]


def test_exclude_name_wins(model: MyModel) -> None:
    preset = {"target_module": ["Attention"], "target_name": ["head"], "exclude_name": ["blocks.0.to_q", "he"]}
    assert names(create_lycoris(model, 1.0, apply_preset=preset)) == {"lycoris_blocks_0_to_out"}


@pytest.mark.parametrize(
    ("pattern", "globs", "hit"),
    [
        ("blocks.0", False, 2),
        ("to_q", False, 0),
        (r".*\.to_q$", False, 1),
        ("blocks.*.to_?", True, 1),
        ("blocks.0", True, 0),
        ("blocks.*", True, 4),
    ],
)
def test_regular_expressions_and_globs(pattern: str, globs: bool, hit: int, model: MyModel) -> None:
    preset = {"target_module": [], "target_name": [pattern], "use_fnmatch": globs}
    if hit:
        assert len(create_lycoris(model, 1.0, apply_preset=preset).loras) == hit
    else:
        with pytest.raises(PlanError, match=pattern):
            create_lycoris(model, 1.0, apply_preset=preset)


def test_enable_conv_false_is_honoured(model: MyModel) -> None:
    LycorisNetwork.apply_preset({"enable_conv": False})
    found = names(create_lycoris(model, 1.0))
    assert "lycoris_conv_in" not in found
    assert {"lycoris_skip", "lycoris_head"} <= found


def test_convolutions_have_sizes_of_their_own(model: MyModel) -> None:
    network = create_lycoris(model, 1.0, linear_dim=4, linear_alpha=2, conv_dim=3, conv_alpha=1.5)
    sizes = {
        path: (stack[0].algorithm.rank, stack[0].algorithm.alpha) for path, stack in network.adapters.stacks.items()
    }
    assert sizes["conv_in"] == (3, 1.5)
    assert sizes["skip"] == sizes["head"] == (4, 2.0)


def test_nothing_warns(model: MyModel, config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(model, **config)


def test_networks_made_before_any_is_applied_stack_and_come_back_in_any_order() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    before = model(x)
    one, two = (create_lycoris(model, algorithm="lora", rank=2) for _ in range(2))
    for network in (one, two):
        perturb(network.adapters)
        network.apply_to()
    both = model(x)
    one.restore()
    alone = model(x)
    one.apply_to()
    assert relative(model(x), both) < 1e-5
    one.restore()
    assert torch.equal(model(x), alone)
    two.restore()
    assert torch.equal(model(x), before)
