"""`lycoris.modules`: a module for one layer, by itself and as a member of a network."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cases import relative
from lycoris import ConfigError, create_lycoris
from lycoris.modules import (
    ButterflyOFTModule,
    DiagOFTModule,
    DyLoraModule,
    FullModule,
    GLoRAModule,
    IA3Module,
    LoConModule,
    LohaModule,
    LokrModule,
    LycorisBaseModule,
    NormModule,
    TLoraModule,
    get_module,
    make_module,
)
from networks import MyModel

CLASSES = [
    *(LoConModule, LohaModule, LokrModule, FullModule, DiagOFTModule, ButterflyOFTModule),
    *(GLoRAModule, DyLoraModule, IA3Module, TLoraModule),
]
LAYERS = {
    "linear": (lambda: nn.Linear(16, 16), (2, 16)),
    "conv1d": (lambda: nn.Conv1d(16, 16, 3, 1, 1), (1, 16, 8)),
    "conv2d": (lambda: nn.Conv2d(16, 16, (3, 3), 1, 1), (1, 16, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(16, 16, (3, 3, 3), 1, 1), (1, 16, 3, 3, 3)),
}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"weight_decompose": True},
    {"use_tucker": True, "use_scalar": True},
    {"use_scalar": True, "bypass_mode": True, "rank_dropout": 0.0},
]
EVERY = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
ON = pytest.mark.parametrize("layer", LAYERS)


@torch.no_grad()
def stir(module: nn.Module, size: float = 0.1) -> None:
    for parameter in module.parameters():
        parameter.add_(size * torch.randn_like(parameter))


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@EVERY
@ON
@pytest.mark.parametrize("options", OPTIONS)
def test_a_module_by_itself(cls: type[LycorisBaseModule], layer: str, options: dict[str, Any]) -> None:
    """lycoris-lora's own test suite, with its arguments, and what it does not look at."""
    base, x = LAYERS[layer][0]().double().requires_grad_(False), torch.randn(LAYERS[layer][1], dtype=torch.float64)
    before, weight = base(x), base.weight.clone()
    net = cls("test", base, multiplier=1, lora_dim=4, alpha=1, **options).double()
    net.apply_to()
    assert relative(base(x), before) < 1e-10
    stir(net)
    live = base(x)
    assert relative(live, before) > 1e-4
    live.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    state = copy.deepcopy(net.state_dict())
    stir(net)
    assert relative(base(x), live) > 1e-6
    net.load_state_dict(state)
    assert relative(base(x), live) < 1e-6
    assert torch.equal(net(x), base(x))
    net.multiplier = 0.5
    half = base(x)
    net.restore()
    assert torch.equal(base(x), before)
    assert type(base) is type(LAYERS[layer][0]())
    net.merge_to()
    assert relative(base(x), half) < 1e-8
    net.restore()
    assert torch.equal(base.weight, weight)
    net.onfly_merge(2.0)
    net.onfly_restore()
    assert torch.equal(net.org_weight, weight)


@EVERY
@ON
def test_what_it_says_of_itself(cls: type[LycorisBaseModule], layer: str) -> None:
    base, x = LAYERS[layer][0]().double(), torch.randn(LAYERS[layer][1], dtype=torch.float64)
    net = cls("blocks_0_to_q", base, 1.0, 4, 2.0).double()
    stir(net)
    assert (net.lora_name, net.dim, net.shape, net.multiplier) == ("blocks_0_to_q", 16, tuple(base.weight.shape), 1.0)
    assert net.org_module[0] is base
    assert net.org_weight is base.weight
    assert net.full_matrix is (cls is LokrModule)
    weight, bias = net.get_merged_weight()
    plain = copy.deepcopy(base)
    plain.weight, plain.bias = nn.Parameter(weight), nn.Parameter(bias)
    assert relative(net(x), plain(x)) < 1e-8
    delta, moved = net.get_diff_weight(0.5)
    assert relative(delta, (weight - base.weight) * 0.5) < 1e-8
    assert (moved is not None) == (cls is FullModule)
    assert relative(net.bypass_forward_diff(x, 0.5), net.bypass_forward(x, 0.5) - base(x)) < 1e-8
    names = dict(net.named_parameters())
    stored = set(net.state_dict())
    assert set(names) <= stored
    assert all(getattr(net, name.split(".")[0]) is not None for name in names)


@EVERY
def test_modules_from_a_file(cls: type[LycorisBaseModule]) -> None:
    base, x = nn.Linear(16, 16).double(), torch.randn(2, 16, dtype=torch.float64)
    net = cls("lycoris_a", base, 1.0, 4, 2.0).double()
    stir(net)
    sd = {f"lycoris_a.{key}": tensor for key, tensor in net.state_dict().items()}
    found, params = get_module(sd, "lycoris_a")
    assert found is (LoConModule if cls is DyLoraModule else cls)
    again = make_module(found, params, "lycoris_a", base).double()
    assert relative(again(x), net(x)) < 1e-6


@pytest.mark.filterwarnings("ignore:merging adapters that were trained:UserWarning")
@EVERY
@ON
@pytest.mark.parametrize("options", OPTIONS[:3])
def test_parametrize(cls: type[LycorisBaseModule], layer: str, options: dict[str, Any]) -> None:
    base, x = LAYERS[layer][0]().double(), torch.randn(LAYERS[layer][1], dtype=torch.float64)
    before, weight = base(x), base.weight
    if cls is FullModule:
        with pytest.raises(RuntimeError, match="train the parameter itself"):
            cls.parametrize(base, "weight", 1, 4, 1)
        return
    net = cls.parametrize(base, "weight", 1, 4, 1, **options)
    assert relative(base(x), before) < 1e-10
    stir(net)
    live = base(x)
    assert relative(live, before) > 1e-4
    live.sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net.org_weight is weight
    state = copy.deepcopy(net.state_dict())
    whole = copy.deepcopy(base.state_dict())
    assert {f"parametrizations.weight.0.{key}" for key in state} < set(whole)
    stir(net)
    net.load_state_dict(state)
    assert relative(base(x), live) < 1e-6
    stir(net)
    base.load_state_dict(whole)
    assert relative(base(x), live) < 1e-6
    net.restore()
    assert not parametrize.is_parametrized(base)
    assert torch.equal(base(x), before)
    net = cls.parametrize(base, "weight", 1, 4, 1, **options)
    net.load_state_dict(state)
    net.merge_to(0.5)
    assert relative(base(x), 0.5 * (before + live)) < 1e-6


def test_parametrize_a_matrix_that_is_no_layer() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(6, 10))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.table.T

    odd = Odd()
    net = LoConModule.parametrize(odd, "table", 0.5, 2, 1.0)
    stir(net)
    assert (net.shape, net.multiplier) == ((6, 10), 0.5)
    odd(torch.randn(2, 10)).sum().backward()
    with pytest.raises(ConfigError, match="not a tensor of shape"):
        LoConModule.parametrize(nn.Linear(2, 2), "bias")


def test_norms() -> None:
    base, x = nn.LayerNorm(8), torch.randn(2, 8)
    before = base(x)
    net = NormModule("norm", base, 1.0, 0.0, 0.0)
    net.apply_to()
    assert torch.equal(base(x), before)
    stir(net)
    assert set(net.state_dict()) == {"w_norm", "b_norm"}
    assert relative(base(x), before) > 1e-3
    net.restore()
    assert torch.equal(base(x), before)
    with pytest.raises(ConfigError, match="norms take Norm"):
        LoConModule("norm", base)
    with pytest.raises(ConfigError, match="is not a layer that LoConModule can adapt"):
        LoConModule("gelu", nn.GELU())


@pytest.mark.parametrize("cls", [LoConModule, LohaModule, LokrModule, DyLoraModule, DiagOFTModule])
def test_max_norm(cls: type[LycorisBaseModule]) -> None:
    net = cls("a", nn.Linear(16, 16), 1.0, 4, 2.0)
    stir(net, 1.0)
    _, norm = net.apply_max_norm(1e9)
    assert net.apply_max_norm(norm / 2) == (True, pytest.approx(norm / 2))
    assert net.apply_max_norm(norm) == (False, pytest.approx(norm / 2))


def test_members_of_a_network_under_their_old_names() -> None:
    model = MyModel()
    network = create_lycoris(model, 0.5, 2, 1.0, algo="lokr", full_matrix=True, factor=2)
    lora = network.loras[-1]
    assert isinstance(lora, LokrModule)
    assert (lora.lora_name, lora.multiplier, lora.bypass_mode) == ("lycoris_head", 0.5, False)
    assert (lora.use_w1, lora.use_w2, lora.full_matrix) == (True, True, True)
    assert lora.org_module[0] is model.head
    kept = lora.lokr_w1
    lora.lokr_w1 = nn.Parameter(torch.full_like(kept, 3.0))
    assert lora.lokr_w1 is kept
    assert torch.equal(network.state_dict()["lycoris_head.lokr_w1"], torch.full_like(kept, 3.0))
    network.apply_to()
    with pytest.raises(ConfigError, match="by its network"):
        lora.restore()
    with pytest.raises(ConfigError, match="by its network"):
        lora.merge_to()
    assert [name for name, _ in network.named_parameters()][-2:] == ["lycoris_head.lokr_w1", "lycoris_head.lokr_w2"]
    other = create_lycoris(model, algo="lora").loras[0]
    assert other.lora_up.weight.shape == (8, 4, 1, 1)
    with pytest.raises(AttributeError, match="hada_w1_a"):
        _ = other.hada_w1_a


def test_a_member_that_was_applied_alone_is_not_applied_twice() -> None:
    layer, x = nn.Linear(4, 4), torch.randn(2, 4)
    network = create_lycoris(layer, 1.0, 2)
    stir(network)
    network.loras[0].apply_to()
    live = layer(x)
    network.apply_to()
    assert torch.equal(layer(x), live)
    network.restore()
    assert type(layer) is nn.Linear


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("base", "LycorisBaseModule"),
        ("locon", "LoConModule"),
        ("loha", "LohaModule"),
        ("lokr", "LokrModule"),
        ("full", "FullModule"),
        ("norms", "NormModule"),
        ("diag_oft", "DiagOFTModule"),
        ("boft", "ButterflyOFTModule"),
        ("glora", "GLoRAModule"),
        ("dylora", "DyLoraModule"),
        ("ia3", "IA3Module"),
        ("tlora", "TLoraModule"),
    ],
)
def test_each_has_a_module_of_its_own(module: str, name: str) -> None:
    found = getattr(importlib.import_module(f"lycoris.modules.{module}"), name)
    assert found.__name__ == name
    assert issubclass(found, LycorisBaseModule)
