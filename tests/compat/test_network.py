"""The life of a `LycorisNetwork`: applied, merged, stacked, saved and loaded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cases import perturb, relative
from lycoris import (
    ConfigError,
    FileError,
    RankSchedule,
    create_lycoris,
    create_lycoris_from_weights,
)
from lycoris.files import load_tensors
from networks import MyModel, trained


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


def test_settings_in_the_header_of_sd_scripts_give_the_schedule(model: MyModel, tmp_path: Path) -> None:
    network = create_lycoris(model, 1.0, linear_dim=2, algo="tlora", tlora_alpha=2.0)
    arguments = json.dumps({"algo": "tlora", "tlora_alpha": "2.0"})
    header = {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_args": arguments}
    network.save_weights(tmp_path / "a.safetensors", None, header)
    read, _ = create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", model)
    assert read.adapters.schedule == network.adapters.schedule == RankSchedule(max_rank=2, alpha=2.0)


def test_a_header_that_is_no_json_is_reported(model: MyModel, tmp_path: Path, caplog: Any) -> None:
    path = header(model, tmp_path / "a.safetensors", "{'algo': 'tlora'}")
    caplog.clear()
    network, _ = create_lycoris_from_weights(1.0, path, model)
    assert network.adapters.schedule is None
    assert [text for text in caplog.messages if "no JSON" in text and "{'algo'" in text]


def test_a_bias_beside_an_adapter(tmp_path: Path) -> None:
    """As ComfyUI and OneTrainer write it: both are applied, trained and saved again."""
    model, x = nn.Sequential(nn.Linear(4, 6)), torch.randn(3, 4)
    tensors = {
        "lycoris_0.lora_up.weight": torch.randn(6, 2),
        "lycoris_0.lora_down.weight": torch.randn(2, 4),
        "lycoris_0.alpha": torch.tensor(1.0),
        "lycoris_0.diff_b": torch.randn(6),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    network, _ = create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", model)
    plain = model(x)
    network.apply_to()
    added = 0.5 * x @ tensors["lycoris_0.lora_down.weight"].T @ tensors["lycoris_0.lora_up.weight"].T
    assert torch.allclose(model(x), plain + added + tensors["lycoris_0.diff_b"], atol=1e-5)
    assert sum(parameter.numel() for parameter in network.parameters()) == 6 * 2 + 2 * 4 + 6
    network.save_weights(tmp_path / "b.safetensors", None, {})
    again = load_tensors(tmp_path / "b.safetensors")[0]
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert network.load_weights(tmp_path / "b.safetensors") == {}


def test_numbers_may_be_strings(model: MyModel) -> None:
    network = create_lycoris(model, "0.5", "2", "3")
    again, _ = create_lycoris_from_weights("0.25", None, model, weights_sd=network.state_dict())
    again.set_multiplier("0.75")
    assert (network.multiplier, again.multiplier) == (0.5, 0.75)
    assert network.prepare_optimizer_params("1e-4")[0]["lr"] == 1e-4
    with pytest.raises(ConfigError, match="multiplier must be a number, not 'all'"):
        create_lycoris_from_weights("all", None, model, weights_sd=network.state_dict())
