"""A network's tensors, made a network again and given back, are the same: every one, alpha included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lycoris import AdapterSet, FileError, create_lycoris, create_lycoris_from_weights, read
from lycoris.kohya import create_network, create_network_from_weights
from networks import CONFIGS, MyModel

MORE: dict[str, dict[str, Any]] = {
    "lokr of two whole factors": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 2},
    "lokr full_matrix": {"algo": "lokr", "full_matrix": True},
    "lokr full_matrix rs_lora": {"algo": "lokr", "full_matrix": True, "rs_lora": True},
    "lokr full_matrix dora": {"algo": "lokr", "full_matrix": True, "dora_wd": True},
    "lokr full_matrix gate": {"algo": "lokr", "full_matrix": True, "use_scalar": True},
    "lora rs_lora": {"algo": "lora", "rs_lora": True},
    "oft constraint": {"algo": "diag-oft", "constraint": 0.25, "rescaled": True},
    "ia3 norms": {"algo": "ia3", "train_norm": True},
}


def drawn(network: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return network.state_dict()


def assert_same(tensors: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    assert list(tensors) == list(again)
    assert not [key for key, tensor in tensors.items() if not torch.equal(tensor, again[key])]


@pytest.mark.parametrize("name", [*CONFIGS, *MORE])
def test_networks(name: str) -> None:
    config = {"linear_dim": 2, "linear_alpha": 3.0} | (CONFIGS | MORE)[name]
    tensors = drawn(create_lycoris(MyModel(), 1.0, **config))
    network, _ = create_lycoris_from_weights(1.0, None, MyModel(), tensors)
    assert_same(tensors, network.state_dict())
    network.load_state_dict(tensors)
    assert_same(tensors, network.state_dict())

    sizes = config.pop("linear_dim"), config.pop("linear_alpha")
    wanted = {"unet_target_module": ["MyModel"], **config.pop("apply_preset", {})}
    tensors = drawn(create_network(1.0, *sizes, None, None, MyModel(), apply_preset=wanted, **config))
    kohya, _ = create_network_from_weights(1.0, None, None, None, MyModel(), weights_sd=tensors)
    assert_same(tensors, kohya.state_dict())


@pytest.mark.parametrize("alpha", [float("inf"), float("nan"), 1e10])
def test_an_alpha_without_effect_is_read_whatever_it_is(alpha: float) -> None:
    """4.1.3 writes infinity for a rank of 100000 in half precision."""
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    w1, w2 = torch.randn(2, 2), torch.randn(4, 4)
    tensors = {"lycoris_0.lokr_w1": w1, "lycoris_0.lokr_w2": w2, "lycoris_0.alpha": torch.tensor(alpha)}
    base = model(x)
    network, _ = create_lycoris_from_weights(1.0, None, model, tensors)
    network.apply_to()
    torch.testing.assert_close(model(x), base + x @ torch.kron(w1, w2).T)
    assert torch.isfinite(network.state_dict()["lycoris_0.alpha"])


def test_an_alpha_with_an_effect_has_to_be_finite() -> None:
    tensors = {
        "lycoris_0.lora_down.weight": torch.randn(2, 8),
        "lycoris_0.lora_up.weight": torch.randn(8, 2),
        "lycoris_0.alpha": torch.tensor(float("inf")),
    }
    with pytest.raises(FileError, match="alpha must be one finite number"):
        create_lycoris_from_weights(1.0, None, nn.Sequential(nn.Linear(8, 8)), tensors)


def test_a_file_keeps_it(tmp_path: Any) -> None:
    network = create_lycoris(MyModel(), 1.0, linear_dim=10000, linear_alpha=1, algo="lokr", factor=2)
    network.save_weights(tmp_path / "a.safetensors", torch.float16)
    model = MyModel()
    adapters = AdapterSet.load(model, read(tmp_path / "a.safetensors", model))
    again, _ = create_lycoris_from_weights(1.0, tmp_path / "a.safetensors", MyModel())
    alphas = {key: float(tensor) for key, tensor in again.state_dict().items() if key.endswith("alpha")}
    assert set(alphas.values()) == {10000.0}
    assert {stack[0].algorithm.scale(stack[0].geometry) for stack in adapters.stacks.values()} == {1.0}
