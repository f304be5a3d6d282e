"""What module classes take: keywords and positions, assignments by old names, tensors of files."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from lycoris import ConfigError, FileError
from lycoris.modules import (
    MODULE_LIST,
    DiagOFTModule,
    DyLoraModule,
    FullModule,
    LoConModule,
    LohaModule,
    LokrModule,
    LycorisBaseModule,
    NormModule,
    TLoraModule,
    get_module,
    make_module,
)


def test_keywords(caplog: pytest.LogCaptureFixture) -> None:
    layer = nn.Linear(12, 8)
    known = {"factor": 4, "train_on_input": True, "bypass_mode": "False", "conv_dim": 2, "use_cp": False}
    with caplog.at_level(logging.INFO, logger="LyCORIS"):
        net = LoConModule("a", layer, 1.0, 4, 2.0, **known)
    assert net.bypass_mode is False
    for told in ("lora has no factor", "lora has no train_on_input", "conv_dim has no effect on a single module"):
        assert told in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="LyCORIS"):
        for cls in MODULE_LIST:
            cls("a", nn.LayerNorm(8) if cls is NormModule else layer)
    assert not caplog.text, "nothing was asked for"
    with caplog.at_level(logging.INFO, logger="LyCORIS"):
        NormModule("a", nn.LayerNorm(8), 1.0, 0.5, factor=4, lora_dim=8)
        FullModule("a", layer, 1.0, 8)
    for told in ("norm has no rank_dropout", "norm has no factor", "linear_dim has no effect on full"):
        assert told in caplog.text
    for cls in MODULE_LIST:
        with pytest.raises(ConfigError, match="unknown option 'rank_drop'; did you mean 'rank_dropout'"):
            cls("a", nn.LayerNorm(8) if cls is NormModule else layer, rank_drop=0.1)
    with pytest.raises(ConfigError, match="use the class for that"):
        LoConModule("a", layer, algo="loha")
    with pytest.raises(ConfigError, match="positional values"):
        LoConModule("a", layer, 1.0, 4, 2.0, 0.0, 0.0, 0.0, *(False,) * 8)


def test_positions() -> None:
    layer, head = nn.Linear(12, 8), (1.0, 4, 2.0, 0.0, 0.0, 0.0)
    assert DyLoraModule("a", layer, *head, False, 2).algorithm.block_size == 2
    assert LokrModule("a", layer, *head, False, False, False, 2).algorithm.factor == 2
    assert DiagOFTModule("a", layer, *head, False, False, False, 0.5).algorithm.constraint == 0.5
    assert TLoraModule("a", layer, *head, False, None, "last").algorithm.vectors == "last"
    assert LokrModule.parametrize(layer, "weight", *head, False, False, False, 2).algorithm.factor == 2


@pytest.mark.parametrize("cls", [LoConModule, LohaModule, LokrModule, TLoraModule])
def test_assignments_reach_the_tensors_or_raise(cls: type[LycorisBaseModule]) -> None:
    layer, x = nn.Linear(12, 8), torch.randn(3, 12)
    net: Any = cls("a", layer, 1.0, 4, 2.0)
    for name, parameter in dict(net.named_parameters()).items():
        owner, _, leaf = name.partition(".")
        target, attribute = (getattr(net, owner), leaf) if leaf else (net, owner)
        before = net(x)
        for value in (torch.randn_like(parameter), nn.Parameter(torch.randn_like(parameter))):
            setattr(target, attribute, value)
            assert torch.equal(net.state_dict()[name], value)
        assert dict(net.named_parameters())[name] is parameter
        getattr(target, attribute).data = torch.full_like(parameter, 0.25)
        assert torch.equal(net.state_dict()[name], torch.full_like(parameter, 0.25))
        assert net(x).shape == before.shape
        with pytest.raises(ConfigError, match="has shape"):
            setattr(target, attribute, torch.randn(1))
    for name, value in {"alpha": torch.tensor(3.0), "dropout": 0.5, "scalar": torch.tensor(2.0)}.items():
        with pytest.raises(ConfigError, match="build a new module"):
            setattr(net, name, value)
    with pytest.raises(ConfigError, match="org_weight has shape"):
        net.org_weight = torch.zeros(1)
    net.note = torch.zeros(3)
    assert torch.equal(net.note, torch.zeros(3)), "other names are the script's own"


def test_a_layer_in_place_of_a_factor() -> None:
    net: Any = LoConModule("a", nn.Linear(12, 8), 1.0, 4, 2.0)
    up = nn.Linear(4, 8, bias=False)
    net.lora_up = up
    assert torch.equal(net.state_dict()["lora_up.weight"], up.weight)
    with pytest.raises(ConfigError, match=r"lora_up stands for the tensor lora_up\.weight"):
        net.lora_up = 3
    with pytest.raises(AttributeError):
        net.lora_up.bias = torch.zeros(8)
    with pytest.raises(ConfigError, match="has no tensor lora_mid"):
        net.lora_mid = up


def test_no_tensor_of_a_file_is_dropped() -> None:
    layer = nn.Linear(12, 8)
    net = LoConModule("a", layer, 1.0, 4, 2.0)
    sd = {f"a.{key}": tensor for key, tensor in net.state_dict().items()}
    assert get_module(sd, "a")[0] is LoConModule
    assert get_module(sd, "b") == (None, None)
    with pytest.raises(FileError, match=r"a: LoConModule has no tensors named diff_b; .* create_lycoris_from_weights"):
        get_module(sd | {"a.diff_b": torch.zeros(8)}, "a")
    with pytest.raises(FileError, match="a: no module class has tensors named lokr_w2"):
        get_module({"a.lokr_w2": torch.zeros(2, 3)}, "a")
    with pytest.raises(FileError, match=r"LoConModule takes 5 tensors.*2 were given"):
        make_module(LoConModule, (sd["a.lora_up.weight"], sd["a.lora_down.weight"]), "a", layer)
    with pytest.raises(FileError, match="DyLoraModule takes 0 tensors"):
        make_module(DyLoraModule, (sd["a.lora_up.weight"],), "a", layer)
